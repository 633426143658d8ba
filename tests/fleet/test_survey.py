"""What a folder of runs looks like: each run in one status, clocks that jump, the time left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.errors import UsageError
from fastbyol.fleet import ledger, survey
from fastbyol.fleet.claim import SIGN, Claim, Owner, acquire
from fastbyol.fleet.ledger import Ledger
from fastbyol.fleet.survey import STATUSES, Row, Surveyor, epochs_done
from folders import ask, rows

KEY = "gn-lars-0.1/seed0"
NAME = "gn-lars-0.1 seed 0"
ATTEMPT = {"claim": 1, "worker": "far:7", "device": "cpu", "began": "x", "from_step": 0}


def change(out: Path, key: str = KEY, **fields: Any) -> None:
    entry = Ledger(out).entry(key)
    assert entry is not None
    entry.with_row(**fields).write()


def begin(out: Path, key: str = KEY, sign: dict[str, Any] | None = None, **owner: Any) -> Claim:
    """As a worker begins a run, on another machine if ``owner`` has its boot."""
    entry = Ledger(out).entry(key)
    assert entry is not None
    claim = acquire(entry.stem, entry.claimed, Owner(**owner))
    assert claim is not None
    change(out, key, status="stopped", claimed=claim.number, attempts=[ATTEMPT])
    claim.say(**(sign or {}))
    return claim


def far(out: Path, key: str = KEY, **sign: Any) -> Claim:
    return begin(out, key, sign, host="far", boot="another", pid=7)


def touched(claim: Claim, ago_s: float) -> None:
    then = time.time() - ago_s
    os.utime(claim.path / SIGN, (then, then))


def row(out: Path, name: str = NAME) -> Row:
    look = Surveyor(out).look()
    (match,) = [each for each in look.rows if each.run == name]
    assert look.counts[match.status] >= 1
    assert sum(look.counts.values()) == len(look.rows)
    return match


def epochs(out: Path, number: int, key: str = KEY) -> None:
    """Metrics of a run that has finished so many epochs."""
    path = out / "runs" / key / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    same = {"event": "epoch", "state": "healthy", "neg_cos": 0.5}
    events = ({**same, "epoch": epoch, "step": 8 * epoch + 8} for epoch in range(number))
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no runs were asked for here"):
        Surveyor(tmp_path)


def test_new_done_failed_and_waiting(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.2-replayed", "gn-lars-0.1")
    look = Surveyor(tmp_path).look()
    assert look.counts == dict.fromkeys(STATUSES, 0) | {"new": 3, "waiting": 1}
    waiting = row(tmp_path, "gn-lars-0.2-replayed seed 0")
    assert (waiting.status, waiting.note) == ("waiting", "for gn-lars-0.2/seed1")
    change(tmp_path, "gn-lars-0.2/seed1", status="done", accuracy=45.5, state="healthy")
    assert row(tmp_path, "gn-lars-0.2-replayed seed 0").status == "new"
    done = row(tmp_path, "gn-lars-0.2 seed 1")
    assert (done.status, done.accuracy, done.state) == ("done", 45.5, "healthy")
    assert done.epochs_done == done.epochs
    change(tmp_path, status="failed", error="it broke", failed_before=["x", "y"])
    failed = row(tmp_path)
    assert (failed.status, failed.note) == ("failed", "it broke (failed 3 times)")


def test_running_has_what_the_sign_says(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1")
    said = {"step": 12, "epoch": 3, "state": "healthy", "neg_cos": 0.25, "accuracy": 33.0}
    said |= {"img_s": 99.0, "left_s": 60.0, "on": "cuda"}
    claim = begin(tmp_path, KEY, said, job="4_1")
    seen = row(tmp_path)
    assert (seen.status, seen.worker, seen.job) == ("running", claim.owner.name, "4_1")
    assert (seen.step, seen.neg_cos, seen.img_s, seen.left_s) == (12, 0.25, 99.0, 60.0)
    assert (seen.epochs_done, seen.device, seen.accuracy) == (3, "cuda", 33.0)
    assert seen.silent_s == pytest.approx(0.0, abs=30.0)
    assert seen.note == ""


@pytest.mark.parametrize("sign", [None, "{", '{"pid": -5, "host": 3, "epoch": "zz"}'])
def test_a_claim_without_a_readable_sign_is_told(tmp_path: Path, sign: str | None) -> None:
    ask(tmp_path, "gn-lars-0.1")
    claim = tmp_path / "ledger/gn-lars-0.1/seed0.claim.7"
    claim.mkdir()
    if sign is not None:
        (claim / "sign.json").write_text(sign)
    (seen,) = Surveyor(tmp_path).look().rows
    assert (seen.status, seen.worker) == ("running", "an unknown worker")
    assert seen.note.startswith("its sign cannot be read: if that stays so for 5:00")


def test_lost_is_a_worker_whose_process_is_gone_from_here(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1")
    claim = begin(tmp_path, KEY, {"img_s": 99.0, "left_s": 60.0})
    claim.close()
    seen = row(tmp_path)
    assert seen.status == "lost"
    assert f"{claim.owner.name} is gone" in seen.note
    assert (seen.img_s, seen.left_s) == (None, None)
    claim.release()
    seen = row(tmp_path)
    assert (seen.status, seen.note) == ("lost", "its claim was removed; the next worker goes on")


def test_silent_is_a_worker_elsewhere_without_signs(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1")
    claim = far(tmp_path, img_s=99.0, left_s=60.0)
    assert row(tmp_path).status == "running"
    touched(claim, 290.0)
    assert row(tmp_path).status == "running"
    touched(claim, 310.0)
    seen = row(tmp_path)
    assert (seen.status, seen.worker) == ("silent", "far:7")
    assert seen.note.startswith("no sign for 5:1")
    assert "takes it over" in seen.note
    assert (seen.img_s, seen.left_s) == (None, None)


@pytest.mark.parametrize("boot", ["here", "another"])
def test_a_clock_that_jumps_is_told_and_makes_nobody_dead_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot: str
) -> None:
    """The status looks at clocks, and says so; workers do not (test_claim)."""
    ask(tmp_path, "gn-lars-0.1")
    begin(tmp_path) if boot == "here" else far(tmp_path)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600.0)
    ahead = row(tmp_path)
    monkeypatch.setattr(time, "time", lambda: clock() - 3600.0)
    behind = row(tmp_path)
    monkeypatch.setattr(time, "time", lambda: clock() - 30.0)
    skewed = row(tmp_path)
    assert (skewed.status, skewed.note) == ("running", "")
    assert behind.status == "running"
    assert behind.note.startswith(("its last sign lies 1:00:00 ahead", "its last sign lies 59:5"))
    assert "clocks differ, or one jumped; nothing depends on them" in behind.note
    assert ahead.status == ("running" if boot == "here" else "silent")
    assert ahead.note.startswith("no sign for 1:00:0")
    if boot == "here":
        assert "its process lives: it is paused or stuck, or the clock jumped" in ahead.note
    else:
        assert "by the clocks" in ahead.note


def test_stopped_says_how(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1")
    epochs(tmp_path, 4)
    attempts = [{**ATTEMPT, "how": "lost"}, {**ATTEMPT, "how": "SIGTERM"}]
    change(tmp_path, status="stopped", attempts=attempts, step=32)
    seen = row(tmp_path)
    assert (seen.status, seen.step, seen.epochs_done, seen.attempts) == ("stopped", 32, 4, 2)
    assert seen.note == "SIGTERM; taken over from far:7, which gave no sign or died"
    change(tmp_path, attempts=[attempts[0], *attempts])
    assert "taken over 2 times, at last from far:7" in row(tmp_path).note


def test_stopped_is_also_whose_worker_could_only_say_so_in_its_sign(tmp_path: Path) -> None:
    """The disk was full: the ledger could not be written."""
    ask(tmp_path, "gn-lars-0.1")
    claim = far(tmp_path, ended="stopped; seed0.json: No space left on device")
    assert row(tmp_path).status == "stopped"
    (note,) = Surveyor(tmp_path).look().notes
    assert "the disk is full or was" in note
    claim.release()
    claim = begin(tmp_path, KEY, {"ended": "stopped; No space left on device"})
    assert row(tmp_path).status == "running"  # it says so before it ends
    claim.close()
    assert row(tmp_path).status == "stopped"


def test_a_claim_that_an_ended_attempt_left_is_nothing(tmp_path: Path) -> None:
    """Its owner was killed after its last word in the ledger."""
    ask(tmp_path, "gn-lars-0.1")
    claim = begin(tmp_path)
    change(tmp_path, attempts=[{**ATTEMPT, "how": "SIGTERM"}])
    assert (row(tmp_path).status, row(tmp_path).note) == ("stopped", "SIGTERM")
    claim.release()


def test_damaged_is_a_file_that_is_no_entry(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1", seeds=2)
    (tmp_path / "ledger/gn-lars-0.1/seed1.json").write_text("{")
    seen = row(tmp_path, "gn-lars-0.1 seed 1")
    assert seen.status == "damaged"
    assert "damaged: ask for the run again" in seen.note
    assert row(tmp_path).status == "new"


def test_a_request_to_stop_and_a_full_disk_are_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path, "gn-lars-0.1")
    assert Surveyor(tmp_path).look().notes == ()
    ledger.ask_to_stop(tmp_path)
    (note,) = Surveyor(tmp_path).look().notes
    assert "--undo" in note
    ledger.allow(tmp_path)
    monkeypatch.setattr(ledger, "free_bytes", lambda out: 1000)
    (note,) = Surveyor(tmp_path).look().notes
    assert "1000 bytes are free" in note or "1.0 kB are free" in note, note


def test_epochs_are_counted_again_when_metrics_grow(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1")
    surveyor = Surveyor(tmp_path)
    change(tmp_path, status="stopped")
    for number in (0, 1, 3):
        epochs(tmp_path, number)
        assert surveyor.look().rows[0].epochs_done == number
        assert epochs_done(tmp_path / "runs" / KEY) == number
    assert epochs_done(tmp_path / "nowhere") == 0


def test_the_time_left_is_what_a_hand_counts(tmp_path: Path) -> None:
    """Two work: one has 10 of 20 epochs left for 100 s, the other 5 for 100 s: .15 epochs a
    second. Of the others one is stopped with 12 left, one new with 20, and one failed: 47 epochs.
    """
    ask(tmp_path, "gn-lars-0.1", seeds=5, sets=("train.epochs=20",))
    for seed, done in ((0, 10), (1, 15)):
        begin(tmp_path, f"gn-lars-0.1/seed{seed}", {"epoch": done, "left_s": 100.0})
    change(tmp_path, "gn-lars-0.1/seed2", status="stopped")
    epochs(tmp_path, 8, "gn-lars-0.1/seed2")
    change(tmp_path, "gn-lars-0.1/seed3", status="failed", error="x")
    look = Surveyor(tmp_path).look()
    assert (look.epochs_done, look.epochs) == (33, 100)
    assert look.left_s == pytest.approx((10 + 5 + 12 + 20) / (0.1 + 0.05))
    assert json.loads(json.dumps(look.as_json()))["left_s"] == look.left_s


def test_without_workers_nobody_knows_the_time_left(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1", seeds=2)
    assert Surveyor(tmp_path).look().left_s is None
    begin(tmp_path)  # it has said no pace yet
    assert Surveyor(tmp_path).look().left_s is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(STATUSES), st.integers(0, 50), st.integers(0, 50),
            st.none() | st.floats(0.0, 1e6),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_the_time_left_is_never_less_than_the_first_needs_nor_negative(
    runs: list[tuple[Any, int, int, float | None]],
) -> None:
    made = [
        Row(f"a seed {number}", status, min(done, total), total, left_s=left)
        for number, (status, done, total, left) in enumerate(runs)
    ]
    left_s = survey._left_s(made)
    working = [each for each in made if each.status == "running" and each.left_s]
    working = [each for each in working if each.epochs > each.epochs_done]
    assert (left_s is None) == (not working)
    if left_s is not None:
        least = min(each.left_s for each in working if each.left_s)
        # Of runs that need 1e-305 s and less a sum of paces is infinite.
        assert left_s >= least * (1 - 1e-9) - 1e-300


def test_a_look_writes_nothing(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1", seeds=2)
    far(tmp_path)
    before, kept = rows(tmp_path), sorted(path for path in tmp_path.rglob("*"))
    Surveyor(tmp_path).look()
    assert (rows(tmp_path), sorted(tmp_path.rglob("*"))) == (before, kept)
