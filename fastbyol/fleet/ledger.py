"""What was asked of a folder of runs, and what became of each: a file a call and a file a run.

``calls/*.json`` are the commands, each written by its own process. ``ledger/NAME.json`` is a run:
its configuration, its status and every attempt at it. Only the owner of the run's claim writes it,
so nothing is ever lost between two writers. ``ledger.json`` is one file of both, as earlier code
wrote it, and is still read.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastbyol import config_io
from fastbyol.config import Resolved
from fastbyol.errors import UsageError, quoted
from fastbyol.files import open_regular
from fastbyol.fleet import fields
from fastbyol.fleet.fields import LIST, NUMBER, TEXT, WHOLE
from fastbyol.runs.durable import write_text, writing
from fastbyol.runs.environment import environment

OLD, CALLS, LEDGER, RUNS = "ledger.json", "calls", "ledger", "runs"
STOP = "stop"
# What is kept of a run; whether somebody works on it now, its claim tells.
Status = Literal["new", "stopped", "done", "failed"]
STATUSES: tuple[Status, ...] = ("new", "stopped", "done", "failed")
_NEEDED: fields.Types = {
    "arm": TEXT, "seed": WHOLE, "status": TEXT, "order": WHOLE, "epochs": WHOLE, "claimed": WHOLE,
    "config": TEXT, "device": TEXT,
}  # fmt: skip
_MORE: fields.Types = {
    "after": TEXT, "attempts": LIST, "step": WHOLE, "state": TEXT, "error": TEXT,
    "failed_before": LIST, "accuracy": NUMBER, "num_scored": WHOLE, "seconds": NUMBER,
}  # fmt: skip
_NEEDED_OF_ATTEMPT: fields.Types = {"claim": WHOLE, "device": TEXT, "from_step": WHOLE}
_MORE_OF_ATTEMPT: fields.Types = {
    "worker": TEXT, "job": TEXT, "began": TEXT, "ended": TEXT, "how": TEXT, "step": WHOLE,
    "seconds": NUMBER,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A run as asked for: ``NAME/seedK`` in the folder, its configuration with origins.

    ``after`` is the key of the run that has to be done first. ``about`` are further fields of its
    row, such as the claims that it is for.
    """

    group: str
    seed: int
    config: Resolved
    origin: Mapping[str, str]
    after: str | None = None
    about: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """``GROUP/seedK``, the folder of the run below ``runs``."""
        return f"{self.group}/seed{self.seed}"

    @property
    def name(self) -> str:
        """``GROUP seed K``, as tables show it."""
        return f"{self.group} seed {self.seed}"


@dataclass(frozen=True)
class Entry:
    """A run's ledger file, read. ``out`` is the folder of all runs."""

    out: Path
    key: str
    row: Mapping[str, Any]

    @property
    def name(self) -> str:
        """``GROUP seed K``, as tables show it."""
        return f"{self.row['arm']} seed {self.row['seed']}"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.out / RUNS / self.key

    @property
    def stem(self) -> Path:
        """The ledger file without ``.json``, which names the run's claims."""
        return self.out / LEDGER / self.key

    @property
    def status(self) -> Status:
        """What became of the run."""
        status: Status = self.row["status"]
        return status

    @property
    def claimed(self) -> int:
        """The number of the last claim that is written down."""
        return int(self.row["claimed"])

    @property
    def after(self) -> str | None:
        """The key of the run that has to be done first."""
        return self.row.get("after")

    @property
    def epochs(self) -> int:
        """How many epochs the run is to have."""
        return int(self.row["epochs"])

    @property
    def attempts(self) -> tuple[Mapping[str, Any], ...]:
        """Every attempt, oldest first. One without ``how`` goes on, or its process was killed."""
        return tuple(self.row.get("attempts", ()))

    @property
    def is_open(self) -> bool:
        """Whether the last attempt has no end."""
        return bool(self.attempts) and "how" not in self.attempts[-1]

    def tells_end_of(self, number: int) -> bool:
        """Return whether the ledger has the end of the claim ``number``, which may still lie there.

        Its owner writes down the end, and then removes the claim.
        """
        return number <= self.claimed and not self.is_open

    def config(self) -> Resolved:
        """Return the configuration that was asked for."""
        return config_io.parse(self.row["config"], where=str(self.stem))

    def with_row(self, **fields: Any) -> Entry:
        """Return the entry with ``fields`` in its row; those that are None leave it."""
        row = {**self.row, **fields}
        return replace(self, row={key: value for key, value in row.items() if value is not None})

    def write(self) -> None:
        """Write the ledger file. Only for the owner of the run's claim.

        Raises FastbyolError where it cannot be written.
        """
        path = self.stem.with_name(f"{self.stem.name}.json")
        with writing(path):
            write_text(path, json.dumps(self.row, indent=1) + "\n")


def entry_of(out: Path, task: Task, order: int) -> Entry:
    """Return the entry of a run that nobody has begun."""
    row = {
        "arm": task.group, "seed": task.seed, **(task.about or {}), "status": "new",
        "order": order, "epochs": task.config.train.epochs, "claimed": 0,
        "device": task.config.train.device,
        "config": config_io.dump(task.config, task.origin),
    }  # fmt: skip
    return Entry(out, task.key, row).with_row(after=task.after)


class Ledger:
    """The entries of a folder. Files that did not change since the last look are not read again."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._read: dict[Path, tuple[tuple[int, int, int], Entry]] = {}
        # Files that are no entries, with why.
        self.damaged: dict[str, str] = {}

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries in the order in which they are to be trained."""
        paths = sorted((self.out / LEDGER).glob("*/seed*.json"))
        self.damaged = {}
        entries = [entry for path in paths if (entry := self._entry(path)) is not None]
        return tuple(sorted(entries, key=lambda entry: (entry.row["order"], entry.key)))

    def entry(self, key: str) -> Entry | None:
        """Return the entry of one run as it is now, None where there is none."""
        return self._entry(self.out / LEDGER / f"{key}.json")

    def _entry(self, path: Path) -> Entry | None:
        try:
            status = path.stat()
        except OSError:
            return None
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if path in self._read and self._read[path][0] == version:
            return self._read[path][1]
        key = f"{path.parent.name}/{path.stem}"
        try:
            with open_regular(path) as file:
                row = json.load(file)
            entry = Entry(self.out, key, row)
            sound = (
                fields.fit(row, _NEEDED, _MORE)
                and f"{row['arm']}/seed{row['seed']}" == key
                and row["status"] in STATUSES
                and all(
                    fields.fit(each, _NEEDED_OF_ATTEMPT, _MORE_OF_ATTEMPT)
                    for each in entry.attempts
                )
            )
        except (OSError, ValueError, RecursionError):
            sound = False
        if not sound:
            self.damaged[key] = f"{path}: damaged: ask for the run again, which writes a new one"
            return None
        self._read[path] = (version, entry)
        return entry


class Call:
    """One command that asked for runs: a file of its own in ``calls``.

    Raises FastbyolError where it cannot be written.
    """

    def __init__(self, out: Path, scale: str, asked: Mapping[str, Any]) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        self._path = out / CALLS / f"{stamp}-{secrets.token_hex(3)}.json"
        self._row = {
            "scale": scale, **asked, "command": sys.argv, "environment": environment(),
            "began": now(), "ended": None,
        }  # fmt: skip
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def end(self, **fields: Any) -> None:
        """Write down the end of the call."""
        self._row |= {"ended": now(), **fields}
        self._write()

    def _write(self) -> None:
        with writing(self._path):
            write_text(self._path, json.dumps(self._row, indent=1) + "\n")


def read(out: Path) -> dict[str, Any]:
    """Return ``scale``, ``calls`` and ``runs`` (rows by key) of the folder ``out``.

    Raises UsageError: none is there, a file is damaged, or calls are of several scales.
    """
    ledger = Ledger(out)
    calls = [_call(path) for path in sorted((out / CALLS).glob("*.json"))]
    scales = _scales(out, calls)
    if not scales:
        raise UsageError(
            f"{out}: no ablations here (no {CALLS}); make some with `fastbyol ablate run --out "
            f"{quoted(out)}`"
        )
    if len(scales) > 1:
        raise UsageError(
            f"{out}: holds calls of several scales, {' and '.join(scales)}: name another folder"
        )
    content = read_old(out) or {"calls": [], "runs": {}}
    rows = {entry.key: dict(entry.row) for entry in ledger.entries()}
    if ledger.damaged:
        raise UsageError(next(iter(ledger.damaged.values())))
    return {
        "scale": scales[0],
        "calls": [*content["calls"], *calls],
        "runs": {**content["runs"], **rows},
    }


def _call(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            call = json.load(file)
        if not isinstance(call["scale"], str):
            raise TypeError("scale")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path}: damaged: move it away") from None
    return dict(call)


def read_old(out: Path) -> dict[str, Any]:
    """Return the content of ``ledger.json``; empty where there is none."""
    path = out / OLD
    try:
        content = json.loads(path.read_text("utf-8"))
        runs, calls = dict(content["runs"]), list(content["calls"])
        sound = all({"arm", "seed"} <= set(row) for row in runs.values()) and all(
            isinstance(call, dict) for call in calls
        )
        if not isinstance(content["scale"], str) or not sound:
            raise KeyError("scale")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path}: damaged: move it away; `fastbyol ablate run` writes a new one"
        ) from None
    return dict(content)


def refuse_other_scale(out: Path, scale: str) -> None:
    """Raise UsageError if runs of another scale were asked for in ``out``."""
    for other in _scales(out, [_call(path) for path in (out / CALLS).glob("*.json")]):
        if other != scale:
            raise UsageError(
                f"{out}: holds runs at scale {other}, not {scale}: name another folder with --out"
            )


def _scales(out: Path, calls: Sequence[Mapping[str, Any]]) -> list[str]:
    old = read_old(out)
    return sorted({call["scale"] for call in (*calls, *([old] if old else ()))})


def demand(out: Path) -> None:
    """Raise UsageError if no runs were asked for in ``out``."""
    if (out / LEDGER).is_dir():
        return
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is no folder: name the one that --out named")
    what = f"no runs were asked for here (no {CALLS} and {LEDGER})"
    raise UsageError(
        f"{out}: {what if out.exists() else 'no such folder'}: `fastbyol ablate run --out "
        f"{quoted(out)}` asks for some, or `fastbyol sweep`"
    )


def is_asked_to_stop(out: Path) -> bool:
    """Return whether ``ablate stop`` was called on the folder."""
    return (out / STOP).exists()


def ask_to_stop(out: Path) -> None:
    """Ask all workers on the folder to save and end, also those that start later."""
    with writing(out / STOP):
        (out / STOP).touch()


def allow(out: Path) -> None:
    """Take ``ask_to_stop`` back."""
    with suppress(FileNotFoundError):
        (out / STOP).unlink()


def now() -> str:
    """Return the time of this machine's clock, for people: nothing depends on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def order_after(entries: Iterable[Entry]) -> int:
    """Return the order of the next run that is asked for."""
    return 1 + max((int(entry.row["order"]) for entry in entries), default=-1)


def keys(words: Sequence[str], entries: Sequence[Entry]) -> tuple[str, ...]:
    """Return the keys of the runs that ``words`` name: ``NAME``, ``NAME/seedK``, "NAME seed K".

    Raises UsageError for a word that names none.
    """
    matches: list[str] = []
    for word in words:
        names = [e.key for e in entries if word in (e.key, e.name, e.row["arm"])]
        if not names:
            see = f"fastbyol ablate status {quoted(entries[0].out)}" if entries else "--out"
            raise UsageError(f"{word}: no such run in this folder; see `{see}`")
        matches += names
    return tuple(dict.fromkeys(matches))


def free_bytes(out: Path) -> int | None:
    """Return how many bytes the folder's file system has left; None where it does not say."""
    with suppress(OSError):
        return shutil.disk_usage(out).free
    return None
