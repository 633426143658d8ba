"""The runs in a folder, read from their files once.

Rows are kept in the cache folder, a file for each folder of runs, and used again as long as the
run's files are the same by size, times and inode. A file that is missing, damaged or cannot be
written only costs time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastbyol.errors import UsageError
from fastbyol.files import cache_folder, open_regular
from fastbyol.registry.row import Row
from fastbyol.runs.environment import package_version
from fastbyol.runs.lock import is_locked

# Raised with the meaning of what is kept.
_FORMAT = 1
# What a row and the warnings beside it are read from. Not by the names in ``runs``, whose modules
# take a tenth of a second to import: a test compares them.
FILES = (
    *("config.toml", "env.json", "metrics.jsonl"),
    *("layers.npy", "layers.npz", "layers.rows", "checkpoints"),
)
# A file that changes again so shortly after it was looked at may have the same times.
_RACY_NS = 100_000_000
_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """A run's row, None if it is damaged, with the warnings, of the files of that ``stamp``."""

    stamp: str
    row: dict[str, Any] | None
    warnings: list[str]


def list_runs(root: Path, *, depth: int = 1) -> list[Row]:
    """Return the runs in ``root`` by name. Runs with damaged configurations are logged instead.

    Those in folders within it have a name such as ``runs/lr=0.1/seed0``, of ``depth`` parts at
    most. Raises UsageError where ``root`` is no folder.
    """
    if not root.is_dir():
        raise UsageError(
            f"{root}: no such folder of runs: train makes runs/NAME where it is called, or name "
            "another folder"
        )
    # Read by absolute paths, so that what is kept serves whichever way the folder is named.
    folder = root.absolute()
    before = _load(folder)
    now = {name: _entry(folder / name, before.get(name)) for name in _names(root, depth)}
    if now != before:
        _save(folder, now)
    for name, entry in now.items():
        for warning in entry.warnings:
            _log.warning("%s", warning.replace(str(folder / name), str(root / name)))
    rows = {name: Row(**entry.row) for name, entry in now.items() if entry.row is not None}
    return [
        replace(row, name=name, path=str(root / name), status=status_now(row, root / name))
        for name, row in rows.items()
    ]


def _names(root: Path, depth: int) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(root) if not name.startswith("."))  # noqa: PTH208
    except OSError as error:
        raise UsageError(f"{root}: cannot list this folder: {error.strerror}") from None
    return [each for name in names for each in _runs_at(root, name, depth)]


def _runs_at(root: Path, name: str, depth: int) -> Iterator[str]:
    """Yield ``name`` if it is a run, which has none inside; else those of the folder ``name``."""
    if is_run(root / name):
        yield name
    elif depth > 1 and (root / name).is_dir() and not (root / name).is_symlink():
        with suppress(UsageError):  # another user's folder
            yield from (f"{name}/{each}" for each in _names(root / name, depth - 1))


def status_now(row: Row, path: Path) -> str:
    """Return a run's status: one that was stopped when it was read may be running."""
    return "running" if row.status == "stopped" and is_locked(path) else row.status


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's."""
    try:
        (path / FILES[0]).stat()
    except OSError:  # as where the folder is another user's
        return False
    return True


def _entry(path: Path, before: _Entry | None) -> _Entry:
    """Return a run's entry, the one from ``before`` where its files are still the same."""
    stamp = _stamp(path)
    if before is not None and stamp and before.stamp == stamp:
        return before
    from fastbyol.registry import reading

    row, warnings = reading.read(path)
    return _Entry(stamp, None if row is None else asdict(row), warnings)


def _stamp(run: Path) -> str:
    """Return a digest of what the system says of a run's files, empty if they change just now."""
    marks: list[tuple[int, ...] | None] = []
    newest = 0
    for name in FILES:
        try:
            file = (run / name).stat()
        except OSError:
            marks.append(None)
            continue
        marks.append((file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino))
        newest = max(newest, file.st_mtime_ns, file.st_ctime_ns)
    if abs(time.time_ns() - newest) < _RACY_NS:
        return ""
    return _digest(repr(marks).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _file(folder: Path) -> Path:
    return cache_folder() / "runs" / f"{_digest(os.fsencode(folder))}.json"


def _load(folder: Path) -> dict[str, _Entry]:
    """Return what was kept of ``folder``: a digest and, in the next line, JSON of that digest."""
    try:
        with open_regular(_file(folder)) as file:
            digest, _, content = file.read().partition(b"\n")
        if digest.decode() != _digest(content):
            return {}
        kept = json.loads(content)
        if kept["of"] != _key(folder):
            return {}
        return {name: _Entry(*entry) for name, entry in kept["runs"].items()}
    except (OSError, ValueError, LookupError, TypeError, UsageError):
        return {}


def _key(folder: Path) -> list[Any]:
    return [_FORMAT, package_version("fastbyol"), str(folder)]


def _save(folder: Path, entries: dict[str, _Entry]) -> None:
    """Keep what can be used again. Processes that do so at once each write a file of their own."""
    content = json.dumps({"of": _key(folder), "runs": entries}, separators=(",", ":")).encode()
    with suppress(OSError, UsageError):
        path = _file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            own.write_bytes(_digest(content).encode() + b"\n" + content)
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)
