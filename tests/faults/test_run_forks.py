"""Killed at any instant, also while its folder is made, a fork ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import run_rig as rig

from fastbyol import api
from fastbyol.runs.fork import Fork

AT, CHANGE = 8, "optim.lr=0.7"
KILLS = rig.many(4, 20)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    api.train(rig.make_config(folder, "run.keep_checkpoints=100"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def whole(parent: Path) -> dict[str, bytes]:
    """What a fork ends with that nobody killed."""
    return rig.contents(Path(api.fork(parent, AT, [CHANGE], parent.with_name("whole")).run))


def _fork(parent: Path, out: Path, dies_at: int | None) -> None:
    """Make the fork or go on with it; die before the ``dies_at``-th time that it forces or renames.

    Between two of these nothing is promised to be on the disk, and nothing has its last name.
    """
    calls = 0

    def dying(work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **kwargs)

        return called

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace")):
        setattr(owner, name, dying(getattr(owner, name)))
    api.fork(parent, AT, [CHANGE], out)


def attempt(parent: Path, out: Path, dies_at: int | None, after_s: float | None = None) -> int:
    """Return the exit code of a child that is killed at a call, after a time, or not at all."""
    process = rig.PROCESSES.Process(target=_fork, args=(parent, out, dies_at))
    process.start()
    if after_s is not None:
        process.join(after_s)
        process.kill()
    process.join(processes.PATIENCE_S)
    assert process.exitcode is not None
    return process.exitcode


def test_killed_while_its_folder_is_made_there_is_none_or_one_that_goes_on(
    parent: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """At every call in turn, or at some of them, each over what the attempt before left."""
    out, call, kills = tmp_path / "fork", 1, 0
    while not out.exists():
        assert attempt(parent, out, call) == -signal.SIGKILL
        assert out.exists() or not [path for path in tmp_path.iterdir() if path.name[0] != "."]
        kills, call = kills + 1, call + (1 if rig.FULL else 3)
        assert kills < 100
    assert kills > 4
    # Its name came last: it is complete, however little came after.
    origin = Fork.read(out)
    assert origin is not None
    assert (origin.step, origin.changes) == (AT, {"optim.lr": 0.7})
    assert attempt(parent, out, None) == 0
    assert rig.contents(out) == whole
    assert rig.leftovers(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["fork"]


def test_killed_at_random_instants_a_fork_ends_as_one_that_was_not(
    parent: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    draw, kills, runs = random.Random(4), 0, 0
    while kills < KILLS or (tmp_path / f"fork{runs}").exists():
        out = tmp_path / f"fork{runs}"
        after_s = draw.uniform(0.2, 2.5) if kills < KILLS else None
        code = attempt(parent, out, None, after_s)
        if code == -signal.SIGKILL:
            kills += 1
            continue
        assert code == 0
        assert rig.contents(out) == whole
        assert rig.leftovers(out) == []
        runs += 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".building")]
