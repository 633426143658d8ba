"""Asking for runs, and for failed ones again: the only writers of the ledger beside the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastbyol.errors import UsageError, quoted
from fastbyol.fleet import ledger
from fastbyol.fleet.claim import Owner, Watch, acquire, newest
from fastbyol.fleet.ledger import LEDGER, Entry, Ledger, Task, entry_of
from fastbyol.runs.consistency import changed
from fastbyol.runs.durable import writing
from fastbyol.runs.folder import CONFIG

# What a run's folder says: nothing there, begun, all epochs done.
FolderStatus = Literal["new", "stopped", "done"]


def ask(
    out: Path, tasks: Sequence[tuple[Task, FolderStatus]], *, retry_failed: bool = True
) -> tuple[Entry, ...]:
    """Write down that ``tasks`` are to be trained; return the entries of those that are left.

    Each comes with what its folder says, which counts: a run whose folder was removed is new. One
    that failed is tried again if ``retry_failed``. Runs that are there, and those that somebody
    trains at this moment, stay as they are. Raises UsageError if one of these has other settings,
    and FastbyolError where the folder cannot be written.
    """
    with writing(out / LEDGER):
        for folder in {out / LEDGER / task.group for task, _ in tasks}:
            folder.mkdir(parents=True, exist_ok=True)
    book, old = Ledger(out), ledger.read_old(out).get("runs", {})
    order = ledger.order_after(book.entries())
    entries = []
    for number, (task, status) in enumerate(tasks):
        fresh = entry_of(out, task, order + number)
        before = book.entry(task.key)
        if before is None:
            wanted = _asked_again(fresh.with_row(**_kept(old.get(task.key, {}))), status)
            entries.append(_write(None, wanted))
        elif retry_failed or before.status != "failed":
            wanted = _with_settings(_asked_again(before, status), fresh)
            entries.append(before if wanted.row == before.row else _write(before, wanted))
    return tuple(entry for entry in entries if entry.status != "done")


def retry(out: Path, words: Sequence[str]) -> tuple[Entry, ...]:
    """Let failed runs be tried again: those that ``words`` name, or all. Return them.

    Raises UsageError for a word that names no run, or none that failed.
    """
    entries = Ledger(out).entries()
    keys = ledger.keys(words, entries) if words else tuple(entry.key for entry in entries)
    failed = [entry for entry in entries if entry.key in keys and entry.status == "failed"]
    if words and not failed:
        raise UsageError(
            f"{', '.join(words)}: did not fail; see `fastbyol ablate status {quoted(out)}`"
        )
    return tuple(_write(entry, _asked_again(entry, _begun(entry))) for entry in failed)


def _begun(entry: Entry) -> FolderStatus:
    """Return whether the run has a folder to go on with."""
    return "stopped" if (entry.path / CONFIG).is_file() else "new"


def _write(before: Entry | None, wanted: Entry) -> Entry:
    """Write ``wanted`` in place of ``before``, under a claim of its own; return what is there now.

    If the run is claimed, or its entry has changed since, it is another's to write, and stays.
    Raises UsageError if that one trains it with other settings than are wanted.
    """
    seen = newest(wanted.stem)
    if seen is not None and not Watch().is_dead(seen):
        return _left_alone(before, wanted)
    last = max(wanted.claimed, 0 if seen is None else seen.number)
    with writing(wanted.stem):
        claim = acquire(wanted.stem, last, Owner())
    if claim is None:
        return _left_alone(before, wanted)
    try:
        now = Ledger(wanted.out).entry(wanted.key)
        if now is not None and (before is None or now.row != before.row):
            return _left_alone(now, wanted)
        wanted = wanted.with_row(claimed=claim.number)
        wanted.write()
    finally:
        claim.release()
    return wanted


def _left_alone(there: Entry | None, wanted: Entry) -> Entry:
    """Return the entry of a run that another has. Raises UsageError for other settings."""
    if there is None:
        return wanted
    settings = str(there.row["config"])
    if changed(there.path, wanted.config(), settings, str(there.stem)):
        raise UsageError(
            f"{there.path}: is trained with other settings at this moment: name another folder "
            "with --out"
        )
    return there


def _asked_again(entry: Entry, status: FolderStatus) -> Entry:
    """Return the entry of a run that is asked for again, by what its folder says."""
    if entry.status == "failed":
        failures = [*entry.row.get("failed_before", ()), entry.row.get("error", "no reason kept")]
        entry = entry.with_row(error=None, failed_before=failures)
    if status == "new" and entry.status != "new":  # whatever was made of it is gone
        entry = entry.with_row(attempts=None, state=None, accuracy=None, num_scored=None, step=None)
    return entry.with_row(status=status)


def _with_settings(entry: Entry, fresh: Entry) -> Entry:
    """Return the entry with the settings of ``fresh``; its paths may have moved."""
    return entry.with_row(**{key: fresh.row[key] for key in ("config", "device", "epochs")})


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what earlier code's ledger has on a run."""
    names = ("status", "seconds", "step", "state", "accuracy", "error", "failed_before")
    return {name: row[name] for name in names if name in row}
