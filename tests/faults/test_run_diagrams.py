"""A phase diagram, killed at any instant with all its workers, is the one that nobody killed."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import processes
import pytest
import run_rig as rig

from fastbyol.cli import main
from made_sweep import small, written
from small import contents

KILLS = rig.many(2, 20)
AXES = '"views.scale" = [[0.2, 1.0], [0.9, 1.0]]\n"optim.lr" = [0.1, 0.5]'
FILES = ("sweep.csv", "phase.html", "markers.json")


def _command(grid: Path, out: Path) -> None:
    os.setsid()
    sink = os.open(out.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.argv = ["fastbyol", "ablate", "phase", str(grid), "--out", str(out), "--jobs", "2"]
    main.main()


def attempt(grid: Path, out: Path, after_s: float | None = None) -> int:
    """The exit code of the command, which dies with its workers ``after_s`` if that is set."""
    process = rig.PROCESSES.Process(target=_command, args=(grid, out))
    process.start()
    if after_s is not None:
        process.join(after_s)
        assert process.pid is not None
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
    process.join(processes.PATIENCE_S)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.timeout(3600)
def test_killed_at_random_instants_a_diagram_is_the_same(tmp_path: Path) -> None:
    grid = written(tmp_path, small(AXES, epochs=2))
    whole = tmp_path / "a/diagram"
    whole.parent.mkdir()
    assert attempt(grid, whole) == 0
    expected = {name: (whole / name).read_bytes() for name in FILES}
    draw, kills, trials = random.Random(5), 0, 0
    while kills < KILLS:
        trials += 1
        out = tmp_path / f"{trials}/diagram"
        out.parent.mkdir()
        # The whole command takes some 15 s of two quiet cores; a process some 4 s to begin.
        while attempt(grid, out, draw.uniform(2.0, 12.0)) == -signal.SIGKILL:
            kills += 1
            if kills >= KILLS:
                assert attempt(grid, out) == 0
                break
        assert {name: (out / name).read_bytes() for name in FILES} == expected
        assert contents(out / "runs") == contents(whole / "runs")
        assert not [path for path in out.rglob("*") if ".tmp" in path.name]
    print(f"{kills} kills in {trials} diagrams")
