"""Asked to stop at any instant, a run is gone within five seconds and goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import processes
import pytest
import run_rig as rig
from own_time import OwnTime

STOPS = rig.many(8, 50)
OTHERS = rig.many(3, 30)
WITHIN_S = 5.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The uninterrupted run and how long it took in a warm child, seconds."""
    folder = tmp_path_factory.mktemp("whole")
    marks = rig.Marks(folder / "marks")
    for name in ("warm", "run"):
        began = time.monotonic()
        process = rig.command(folder / name, rig.make_config(folder), folder / "output", marks)
        process.join(rig.PATIENCE_S)
        assert process.exitcode == 0, (folder / "output").read_text()
    return folder / "run", time.monotonic() - began


def stop(process: BaseProcess, number: signal.Signals, *, twice: bool) -> float:
    """Send the signal, as a terminal does to the whole session, and return how long the process lived on, its own seconds."""
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


def stopped_runs(whole: tuple[Path, float], folder: Path, numbers: list[signal.Signals], seed: int) -> Counter[str]:
    """Runs that are sent all of ``numbers`` at random instants and resumed until they end; what they did when it came."""
    reference, seconds = rig.contents(whole[0]), whole[1]
    config, marks, output = rig.make_config(whole[0].parent), rig.Marks(folder / "marks"), folder / "output"
    draw, phases, runs = random.Random(seed), Counter[str](), 0
    while numbers or (folder / f"run{runs}").exists():
        run = folder / f"run{runs}"
        process = rig.command(run, config, output, marks)
        if numbers and draw.random() < 0.8:  # else while it starts
            marks.wait_for_step(process)
        process.join(draw.uniform(0.15, seconds / 2) if numbers else rig.PATIENCE_S)
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
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2] * (OTHERS // 3)
    phases = stopped_runs(whole, tmp_path, numbers, seed=2)
    print(f"{sum(phases.values())} SIGTERM, SIGUSR1, SIGUSR2: {dict(phases)}")
