"""Asking for runs again and again: what is written down is what the folder and the workers say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbyol.ablations import plan
from fastbyol.ablations.arms import arm
from fastbyol.errors import UsageError
from fastbyol.fleet import asking
from fastbyol.fleet.asking import FolderStatus
from fastbyol.fleet.claim import Claim, Owner, acquire, newest
from fastbyol.fleet.ledger import Entry, Ledger, Task
from folders import claims_in, rows
from small import SETS

KEY = "gn-lars-0.1/seed0"
ATTEMPT = {"claim": 1, "worker": "far:1", "device": "cuda", "began": "x", "from_step": 0}


def tasks(out: Path, *sets: str, seeds: int = 1) -> tuple[Task, ...]:
    runs = plan.make([arm("gn-lars-0.1")], "mini", out, seeds=seeds, sets=(*SETS, *sets))
    return tuple(run.task for run in runs)


def ask(out: Path, status: FolderStatus = "new", *sets: str, seeds: int = 1) -> tuple[str, ...]:
    """The names of the runs that are not done."""
    asked = [(task, status) for task in tasks(out, *sets, seeds=seeds)]
    return tuple(entry.name for entry in asking.ask(out, asked))


def change(out: Path, **fields: Any) -> None:
    """As a worker would have written it."""
    entry = Ledger(out).entry(KEY)
    assert entry is not None
    entry.with_row(**fields).write()


@contextmanager
def somebody(out: Path, **owner: Any) -> Iterator[Claim]:
    """A worker that lives, here or elsewhere, and has begun the run."""
    entry = Ledger(out).entry(KEY)
    assert entry is not None
    claim = acquire(entry.stem, entry.claimed, Owner(**owner))
    assert claim is not None
    change(out, status="stopped", claimed=claim.number, attempts=[ATTEMPT])
    yield claim
    claim.release()


def test_asking_twice_changes_nothing(tmp_path: Path) -> None:
    assert ask(tmp_path, seeds=3) == tuple(f"gn-lars-0.1 seed {seed}" for seed in range(3))
    paths = sorted((tmp_path / "ledger").rglob("*.json"))
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert len(ask(tmp_path, seeds=3)) == 3
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before
    assert claims_in(tmp_path) == []


def test_other_settings_are_free_while_nobody_works_on_the_run(tmp_path: Path) -> None:
    """A folder with a run of other settings is refused before, by ``existing``."""
    ask(tmp_path)
    ask(tmp_path, "new", "optim.momentum=0.5", "train.epochs=7")
    entry = Ledger(tmp_path).entry(KEY)
    assert entry is not None
    assert (entry.config().optim.momentum, entry.epochs) == (0.5, 7)


@pytest.mark.parametrize("boot", ["here", "another"])
def test_a_live_workers_run_is_left_alone(tmp_path: Path, boot: str) -> None:
    """Asked for alike it stays as it is; with settings that train otherwise it is refused."""
    ask(tmp_path)
    with somebody(tmp_path, **({} if boot == "here" else {"boot": boot})) as claim:
        before = rows(tmp_path)
        for status in ("new", "stopped", "done"):
            assert ask(tmp_path, status, "data.workers=3") == ("gn-lars-0.1 seed 0",)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="is trained with other settings at this moment"):
                ask(tmp_path, status, "optim.momentum=0.5")  # type: ignore[arg-type]
        assert rows(tmp_path) == before
        claim.check()
    assert claims_in(tmp_path) == []


def test_a_worker_that_is_gone_keeps_nobody_from_asking(tmp_path: Path) -> None:
    """It was killed: its claim lies there, its attempt has no end, and its folder was removed."""
    ask(tmp_path)
    with somebody(tmp_path) as claim:
        claim.close()
        ask(tmp_path, "new", "optim.momentum=0.5")
        entry = Ledger(tmp_path).entry(KEY)
        assert entry is not None
        assert (entry.status, entry.attempts, entry.claimed) == ("new", (), claim.number + 1)
        assert entry.config().optim.momentum == 0.5
    assert newest(entry.stem) is None


def test_a_run_whose_folder_was_removed_is_new_again(tmp_path: Path) -> None:
    """Also for another kind of device than the one that it was begun on."""
    ended = [{**ATTEMPT, "how": "SIGTERM", "step": 9}]
    for status in ("done", "stopped", "failed"):
        ask(tmp_path)
        change(tmp_path, status=status, attempts=ended, step=9, accuracy=50.0, state="healthy")
        assert ask(tmp_path) == ("gn-lars-0.1 seed 0",)
        row = rows(tmp_path)[KEY]
        assert row["status"] == "new"
        assert not {"attempts", "step", "accuracy", "state", "error"} & row.keys()


def test_what_failed_is_tried_again_and_said(tmp_path: Path) -> None:
    ask(tmp_path)
    for times in (1, 2):
        change(tmp_path, status="failed", error=f"reason {times}", seconds=10.0 * times)
        assert ask(tmp_path, "stopped") == ("gn-lars-0.1 seed 0",)
        row = rows(tmp_path)[KEY]
        assert (row["status"], row["seconds"]) == ("stopped", 10.0 * times)
        assert "error" not in row
        assert row["failed_before"] == [f"reason {number + 1}" for number in range(times)]


def test_a_finished_folder_is_done_whatever_the_ledger_says(tmp_path: Path) -> None:
    """``fastbyol resume`` may have finished it, or it was copied here."""
    for status in ("new", "stopped", "failed", "done"):
        ask(tmp_path)
        change(tmp_path, status=status)
        assert ask(tmp_path, "done") == ()
        assert rows(tmp_path)[KEY]["status"] == "done"


def test_what_an_old_ledger_has_on_a_run_goes_on(tmp_path: Path) -> None:
    old = {
        "gn-lars-0.1/seed0": {"status": "done", "seconds": 12.5, "accuracy": 40.0},
        "gn-lars-0.1/seed1": {"status": "failed", "seconds": 3.0, "error": "why"},
        "gn-lars-0.1/seed2": {"status": "stopped", "seconds": 4.0},
    }
    for key, row in old.items():
        row |= {"arm": "gn-lars-0.1", "seed": int(key[-1]), "claims": ["C7"]}
    old["gn-lars-0.1/seed1"]["failed_before"] = ["x"]
    text = json.dumps({"scale": "mini", "calls": [], "runs": old})
    (tmp_path / "ledger.json").write_text(text)
    statuses: list[FolderStatus] = ["done", "stopped", "stopped", "new"]
    asked = list(zip(tasks(tmp_path, seeds=4), statuses, strict=True))
    left = asking.ask(tmp_path, asked)
    assert [entry.row["seed"] for entry in left] == [1, 2, 3]
    made = rows(tmp_path)
    assert [made[f"gn-lars-0.1/seed{seed}"]["status"] for seed in range(4)] == statuses
    assert made["gn-lars-0.1/seed0"]["accuracy"] == 40.0
    assert made["gn-lars-0.1/seed1"]["failed_before"] == ["x", "why"]
    assert [row.get("seconds") for row in made.values()] == [12.5, 3.0, 4.0, None]
    assert (tmp_path / "ledger.json").read_text() == text
    # From now on the new file counts: what the old one says is not added once more.
    change(tmp_path, status="failed", error="new")
    asking.ask(tmp_path, asked[:2])
    assert rows(tmp_path)["gn-lars-0.1/seed1"]["failed_before"] == ["x", "why"]
    assert rows(tmp_path)["gn-lars-0.1/seed1"]["seconds"] == 3.0


def test_retry_is_for_runs_that_failed(tmp_path: Path) -> None:
    ask(tmp_path, seeds=3)
    assert asking.retry(tmp_path, ()) == ()
    change(tmp_path, status="failed", error="why")
    with pytest.raises(UsageError, match="no such run"):
        asking.retry(tmp_path, ("gn-lars-0.1/seed3",))
    with pytest.raises(UsageError, match="did not fail"):
        asking.retry(tmp_path, ("gn-lars-0.1/seed1",))
    (again,) = asking.retry(tmp_path, ("gn-lars-0.1",))
    assert (again.key, again.status) == (KEY, "new")
    assert rows(tmp_path)[KEY]["failed_before"] == ["why"]
    # One that has begun goes on.
    change(tmp_path, status="failed", error="other", step=5)
    (again.path).mkdir(parents=True)
    (again.path / "config.toml").touch()
    (again,) = asking.retry(tmp_path, ())
    assert (again.status, again.row["step"]) == ("stopped", 5)
    assert [row["status"] for row in rows(tmp_path).values()] == ["stopped", "new", "new"]
    assert claims_in(tmp_path) == []


STATUSES = st.sampled_from(["new", "stopped", "done", "failed"])


@settings(max_examples=40)
@given(before=STATUSES, status=st.sampled_from(["new", "stopped", "done"]), tries=st.integers(0, 3))
def test_the_folder_counts_and_asking_again_is_the_same(
    before: str, status: FolderStatus, tries: int
) -> None:
    """From every status, with every folder: at once and again."""
    row = {"arm": "gn-lars-0.1", "seed": 0, "status": before, "failed_before": ["x"] * tries}
    entry = Entry(Path(), KEY, row)
    if before == "failed":
        entry = entry.with_row(error="why")
    asked = asking._asked_again(entry, status)
    assert asked.status == status
    assert "error" not in asked.row
    assert len(asked.row["failed_before"]) == tries + (before == "failed")
    assert asking._asked_again(asked, status) == asked
