"""Killed at any instant, again and again, a run ends as if nothing had been."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import processes
import pytest
import run_rig as rig

KILLS = rig.many(10, 200)
WRITE_KILLS = rig.many(6, 200)
# Longer than a write of the tiny run, files of a few thousand bytes that are forced to disk.
WRITE_S = 0.02


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The uninterrupted run and how long it took in a warm child, seconds."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("warm", "run"):  # the first child pays for what the machine has not read yet
        began = time.monotonic()
        process = rig.start(folder / name, rig.make_config(folder), rig.Marks(folder / "marks"))
        process.join(processes.PATIENCE_S)
        assert process.exitcode == 0
    return folder / "run", time.monotonic() - began


def kill(
    whole: Path, folder: Path, most: int, until: Callable[[BaseProcess, rig.Marks], None]
) -> Counter[str]:
    """Kill runs in ``folder`` ``most`` times, each child after ``until``, and let them end.

    Each must leave what is in ``whole``. Return how often which phase was hit.
    """
    reference = rig.contents(whole)
    config, marks = rig.make_config(whole.parent), rig.Marks(folder / "marks")
    phases, runs = Counter[str](), 0
    while phases.total() < most or (folder / f"run{runs}").exists():
        run = folder / f"run{runs}"
        process = rig.start(run, config, marks)
        if phases.total() < most:
            until(process, marks)
            process.kill()
        process.join(processes.PATIENCE_S)
        if process.exitcode == -signal.SIGKILL:
            phases[marks.phase] += 1
            continue
        assert process.exitcode == 0
        assert rig.contents(run) == reference
        assert rig.leftovers(run) == []
        assert not list((run / "checkpoints").glob(".*"))
        runs += 1
    print(f"{phases.total()} kills over {runs} runs: {dict(phases)}")
    return phases


def test_killed_at_random_instants_a_run_ends_bit_for_bit_as_the_uninterrupted_one(
    whole: tuple[Path, float], tmp_path: Path
) -> None:
    """Each child is killed after a random part of half a run's time, so a run may be killed several
    times before its end.
    """
    draw = random.Random(6)

    def until(process: BaseProcess, marks: rig.Marks) -> None:
        if draw.random() < 0.8:  # else while it starts
            marks.wait_for_step(process)
        process.join(draw.uniform(0.0, whole[1] / 2))

    phases = kill(whole[0], tmp_path, KILLS, until)
    if rig.FULL:
        assert all(phases[phase] for phase in ("start", "step", "probe", "checkpoint")), phases


def test_killed_while_a_checkpoint_is_written_beside_the_steps(
    whole: tuple[Path, float], tmp_path: Path
) -> None:
    """Each child dies a little after it began to write: its first checkpoint or a later one."""
    draw = random.Random(7)

    def until(process: BaseProcess, marks: rig.Marks) -> None:
        marks.wait_for_write(process, draw.choice((1, 1, 2, 3)))
        time.sleep(draw.uniform(0.0, WRITE_S))

    assert kill(whole[0], tmp_path, WRITE_KILLS, until)["checkpoint"]
