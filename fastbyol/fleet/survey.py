"""A folder of runs as it is now: what is done, who works on what, and what is wrong.

Nothing is written, and nobody is asked: the ledger, the claims and their signs say it all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fastbyol.errors import FastbyolError, quoted, size_text
from fastbyol.fleet import ledger
from fastbyol.fleet.claim import STALE_S, Seen, claims_below, look, newest
from fastbyol.fleet.ledger import LEDGER, Entry, Ledger
from fastbyol.runs.metrics import METRICS_FILE, is_finished, read_events
from fastbyol.show.screen import duration

Status = Literal[
    "done", "running", "silent", "lost", "stopped", "failed", "waiting", "new", "damaged"
]
STATUSES: tuple[Status, ...] = get_args(Status)
# Less than this is no room for a checkpoint of any network.
LITTLE_ROOM = 1_000_000
MOST_LOOKS = 5
# Clocks of machines that are kept in time differ by less.
SKEW_S = 60.0


@dataclass(frozen=True)
class Row:
    """One run now. ``note`` is a sentence on what is odd about it, or empty.

    ``status`` is done; running: claimed, and its worker gives signs; silent: claimed, without
    signs, on another machine; lost: its worker's process is gone; stopped: saved, or not begun
    well; failed; waiting: for the run whose rates it replays; new; damaged: its ledger file.
    ``img_s``, ``left_s``: its pace, and the seconds it needs at it. ``silent_s`` is since its
    worker's last sign, by the clocks that there are.
    """

    run: str
    status: Status
    epochs_done: int = 0
    epochs: int = 0
    step: int = 0
    state: str | None = None
    neg_cos: float | None = None
    accuracy: float | None = None
    num_scored: int | None = None
    img_s: float | None = None
    left_s: float | None = None
    worker: str | None = None
    device: str | None = None
    job: str | None = None
    silent_s: float | None = None
    attempts: int = 0
    note: str = ""


@dataclass(frozen=True)
class Survey:
    """All runs of ``out`` now, each in one row, and ``notes`` on the folder itself.

    ``left_s`` is how long all that is left takes at the present pace, None where nobody works.
    """

    out: Path
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    left_s: float | None

    @property
    def counts(self) -> dict[Status, int]:
        """How many runs are in each status, those without any included."""
        counts = Counter(row.status for row in self.rows)
        return {status: counts[status] for status in STATUSES}

    @property
    def epochs_done(self) -> int:
        """The epochs that all runs have finished."""
        return sum(row.epochs_done for row in self.rows)

    @property
    def epochs(self) -> int:
        """The epochs that all runs are to have."""
        return sum(row.epochs for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return it all as JSON values."""
        return {
            "out": str(self.out), "counts": self.counts, "epochs_done": self.epochs_done,
            "epochs": self.epochs, "left_s": self.left_s, "notes": list(self.notes),
            "runs": [asdict(row) for row in self.rows],
        }  # fmt: skip


class Surveyor:
    """One that looks at a folder again and again, and reads only what changed.

    Raises UsageError where no runs were asked for.
    """

    def __init__(self, out: Path) -> None:
        ledger.demand(out)
        self.out, self._ledger = out, Ledger(out)
        self._epochs: dict[str, tuple[int, int]] = {}

    def look(self) -> Survey:
        """Return the state of all runs, each in the one status that it has or just had."""
        claims = claims_below(self.out / LEDGER)
        entries = self._ledger.entries()
        status = {entry.key: entry.status for entry in entries}
        rows = [self._settled(entry, claims.get(entry.stem, 0), status) for entry in entries]
        rows += [
            Row(key.replace("/seed", " seed "), "damaged", note=why)
            for key, why in self._ledger.damaged.items()
        ]
        return Survey(self.out, tuple(rows), tuple(self._notes(rows)), _left_s(rows))

    def _notes(self, rows: list[Row]) -> list[str]:
        notes = []
        if ledger.is_asked_to_stop(self.out):
            notes.append(
                f"{self.out}: workers were asked to stop; `fastbyol ablate stop "
                f"{quoted(self.out)} --undo` takes it back"
            )
        free = ledger.free_bytes(self.out)
        is_full = free is not None and free < LITTLE_ROOM
        if is_full or any("No space left" in row.note or "are free" in row.note for row in rows):
            size = "an unknown number of bytes" if free is None else size_text(free)
            notes.append(
                f"{self.out}: the disk is full or was, {size} are free: make room; `fastbyol "
                f"ablate work {quoted(self.out)}` goes on"
            )
        return notes

    def _settled(self, entry: Entry, number: int, status: Mapping[str, str]) -> Row:
        """Return the run's row, looked at again if it seems odd: it may be changing hands."""
        row = self._row(entry, number, status)
        for _ in range(MOST_LOOKS):
            if row.status not in ("lost", "silent"):
                break
            seen, now = newest(entry.stem), self._ledger.entry(entry.key)
            last = 0 if seen is None else seen.number
            if now is None or (now.row, last) == (entry.row, number):
                break
            entry, number = now, last
            row = self._row(entry, number, status)
        return row

    def _row(self, entry: Entry, number: int, status: Mapping[str, str]) -> Row:
        row = entry.row
        base: dict[str, Any] = {
            "run": entry.name, "epochs": entry.epochs, "step": row.get("step", 0),
            "state": row.get("state"), "accuracy": row.get("accuracy"),
            "num_scored": row.get("num_scored"),
            "attempts": len(entry.attempts),
        }  # fmt: skip
        if entry.status == "done":
            return Row(status="done", **base | {"epochs_done": entry.epochs}, note=_history(entry))
        if entry.status == "failed":
            times = 1 + len(row.get("failed_before", ()))
            note = f"{row.get('error')}" + (f" (failed {times} times)" if times > 1 else "")
            return Row(status="failed", **base | {"epochs_done": self._finished(entry)}, note=note)
        if number and not entry.tells_end_of(number):
            return self._claimed(entry, look(entry.stem, number), base)
        base["epochs_done"] = self._finished(entry)
        if entry.is_open and number == 0:
            return Row(status="lost", **base, note="its claim was removed; the next worker goes on")
        if entry.status == "new":
            source = status.get(entry.after) if entry.after else "done"
            if source != "done":
                return Row(status="waiting", **base, note=f"for {entry.after}")
            return Row(status="new", **base)
        how = entry.attempts[-1]["how"] if entry.attempts else ""
        return Row(status="stopped", **base, note="; ".join(filter(None, (how, _history(entry)))))

    def _claimed(self, entry: Entry, seen: Seen, base: dict[str, Any]) -> Row:
        """Return the row of a run that somebody has, alive or not."""
        sign, lives = seen.sign, seen.process_lives()
        silent_s = time.time() - seen.touched_ns / 1e9
        base |= {
            "worker": seen.owner_name, "job": sign.get("job") or None, "device": sign.get("on"),
            "silent_s": round(silent_s, 1), "epochs_done": self._finished(entry, sign.get("epoch")),
        }  # fmt: skip
        base |= {
            name: sign[name]
            for name in (
                *("step", "state", "neg_cos", "accuracy", "num_scored", "img_s", "left_s"),
            )
            if name in sign
        }
        stale_s = sign.get("stale_s", STALE_S)
        status: Status = "running"
        note = _history(entry)
        if seen.has_ended and not lives:
            status, note = "stopped", sign["ended"]
        elif lives is False:
            status = "lost"
            note = f"{seen.owner_name} is gone: the next worker goes on from the last checkpoint"
        elif not sign and silent_s <= stale_s:
            note = (
                f"its sign cannot be read: if that stays so for {duration(stale_s)}, a worker "
                "takes the run over"
            )
        elif silent_s < -SKEW_S:
            note = (
                f"its last sign lies {duration(-silent_s)} ahead: clocks differ, or one jumped; "
                "nothing depends on them"
            )
        elif silent_s > stale_s and lives:
            note = (
                f"no sign for {duration(silent_s)}, but its process lives: it is paused or stuck, "
                "or the clock jumped; end it, and another goes on"
            )
        elif silent_s > stale_s:
            status = "silent"
            note = (
                f"no sign for {duration(silent_s)}, by the clocks: a worker that sees none for "
                f"{duration(stale_s)} takes it over"
            )
        if status != "running":
            base |= {"img_s": None, "left_s": None}
        return Row(status=status, **base, note=note)

    def _finished(self, entry: Entry, epoch: int | None = None) -> int:
        """Return how many epochs a run has finished: what its sign says, or its metrics."""
        if epoch is not None:
            return epoch
        metrics = entry.path / METRICS_FILE
        size = metrics.stat().st_size if metrics.is_file() else 0
        if self._epochs.get(entry.key, (-1, 0))[0] != size:
            self._epochs[entry.key] = (size, epochs_done(entry.path))
        return self._epochs[entry.key][1]


def epochs_done(path: Path) -> int:
    """Return how many epochs the run in ``path`` has finished."""
    try:
        events = read_events(path)
    except FastbyolError:
        return 0
    return max((event["epoch"] + 1 for event in events if event["event"] == "epoch"), default=0)


def is_done(path: Path, epochs: int) -> bool:
    """Return whether the run in ``path`` is finished, which is to have ``epochs``."""
    try:
        return is_finished(read_events(path), epochs)
    except FastbyolError:
        return False


def _history(entry: Entry) -> str:
    """Return from whom the run was taken over, and how often."""
    lost = [attempt for attempt in entry.attempts if attempt.get("how") == "lost"]
    if not lost:
        return ""
    times = "" if len(lost) == 1 else f" {len(lost)} times, at last"
    return (
        f"taken over{times} from {lost[-1].get('worker', 'a worker')}, which gave no sign or died"
    )


def _left_s(rows: list[Row]) -> float | None:
    """Return how long everything takes at the pace of those who work, as epochs are finished."""
    pace = sum(
        (row.epochs - row.epochs_done) / row.left_s
        for row in rows
        if row.status == "running" and row.left_s and row.epochs > row.epochs_done
    )
    left = sum(row.epochs - row.epochs_done for row in rows if row.status not in ("done", "failed"))
    return left / pace if pace else None
