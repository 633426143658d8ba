"""Asked to stop at any instant, a run is gone within five seconds and goes on as if nothing had
been.
"""

from __future__ import annotations

import contextlib
import os
import pty
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import processes
import pytest
import run_rig as rig
from own_time import OwnTime

STOPS = rig.many(8, 50)
OTHERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2)
WITHIN_S = 5.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The uninterrupted run and how long it took in a warm child, seconds."""
    folder = tmp_path_factory.mktemp("whole")
    marks = rig.Marks(folder / "marks")
    for name in ("warm", "run"):
        began = time.monotonic()
        process = rig.command(folder / name, rig.make_config(folder), folder / "output", marks)
        process.join(processes.PATIENCE_S)
        assert process.exitcode == 0, (folder / "output").read_text()
    return folder / "run", time.monotonic() - began


def stop(process: BaseProcess, number: signal.Signals, *, twice: bool) -> float:
    """Send the signal, as a terminal does to the whole session, and return how long the process
    lived on, its own seconds.
    """
    assert process.pid is not None
    clock = OwnTime(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    if twice:
        process.join(0.03)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    if not clock.waits(lambda wait_s: process.join(wait_s) or not process.is_alive(), 4 * WITHIN_S):
        os.kill(process.pid, signal.SIGABRT)
        process.join()
    return clock.seconds()


def stopped_runs(
    whole: tuple[Path, float], folder: Path, numbers: list[signal.Signals], seed: int
) -> Counter[str]:
    """Runs that are sent all of ``numbers`` at random instants and resumed until they end; what
    they did when it came.
    """
    reference, seconds = rig.contents(whole[0]), whole[1]
    config, marks, output = (
        rig.make_config(whole[0].parent),
        rig.Marks(folder / "marks"),
        folder / "output",
    )
    draw, phases, runs = random.Random(seed), Counter[str](), 0
    while numbers or (folder / f"run{runs}").exists():
        run = folder / f"run{runs}"
        process = rig.command(run, config, output, marks)
        if numbers and draw.random() < 0.8:  # else while it starts
            marks.wait_for_step(process)
        process.join(draw.uniform(0.15, seconds / 2) if numbers else processes.PATIENCE_S)
        if process.is_alive():
            number = numbers.pop()
            phases[marks.phase] += 1
            took = stop(process, number, twice=number == signal.SIGINT and draw.random() < 0.3)
            said = output.read_text()
            assert took < WITHIN_S, (number, took, marks.phase, said)
            assert "Traceback" not in said, said
            # Before the run has taken the signals over they do what they always do.
            assert process.exitcode in (0, 130, -number), (process.exitcode, said)
        else:
            assert process.exitcode == 0, output.read_text()
        assert process.pid is not None
        # A child that was started as the signal came has a while to end, too.
        assert processes.left(process.pid, 60.0) == []
        if process.exitcode == 0 and not says_stopped(output):
            assert rig.contents(run) == reference
            assert rig.leftovers(run) == []
            runs += 1
    return phases


def says_stopped(output: Path) -> bool:
    return "go on with: fastbyol resume" in output.read_text()


def test_ctrl_c_at_random_instants(whole: tuple[Path, float], tmp_path: Path) -> None:
    phases = stopped_runs(whole, tmp_path, [signal.SIGINT] * STOPS, seed=1)
    print(f"{sum(phases.values())} Ctrl-C: {dict(phases)}")


def test_the_other_signals_at_random_instants(whole: tuple[Path, float], tmp_path: Path) -> None:
    phases = stopped_runs(whole, tmp_path, [*OTHERS] * rig.many(1, 6), seed=2)
    print(f"{sum(phases.values())} {', '.join(number.name for number in OTHERS)}: {dict(phases)}")


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A file that takes nothing, from the start."""
    yield Path("/dev/full"), lambda: None


@contextlib.contextmanager
def reader_that_leaves(folder: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A pipe, and what closes its other end."""
    os.mkfifo(folder / "pipe")
    with os.fdopen(os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        yield folder / "pipe", reader.close


@contextlib.contextmanager
def terminal_that_closes(folder: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A terminal, and what closes its window: the session gets SIGHUP, and nothing can be written
    any more.
    """
    master, slave = pty.openpty()
    window = os.fdopen(master, "rb", buffering=0)
    try:
        with window:
            yield Path(os.ttyname(slave)), lambda: (os.close(slave), window.close())
    finally:
        window.close()


@pytest.mark.parametrize("output", [full_disk, reader_that_leaves, terminal_that_closes])
def test_a_run_whose_output_is_gone_loses_no_step(
    output: Any, whole: tuple[Path, float], tmp_path: Path
) -> None:
    config, marks = rig.make_config(whole[0].parent), rig.Marks(tmp_path / "marks")
    with output(tmp_path) as (path, leave):
        process = rig.command(tmp_path / "run", config, path, marks)
        marks.wait_for_step(process)
        leave()
        process.join(processes.PATIENCE_S)
    # 0: stopped and saved with nothing left to say.
    assert process.exitcode in ((0, 1) if output is terminal_that_closes else (1,))
    if output is terminal_that_closes:
        assert rig.checkpoints(tmp_path / "run")
        again = rig.command(tmp_path / "run", config, tmp_path / "output", marks)
        again.join(processes.PATIENCE_S)
        assert again.exitcode == 0
    assert rig.contents(tmp_path / "run") == rig.contents(whole[0])
    assert rig.leftovers(tmp_path / "run") == []
