"""W&B: a run of the id in RUN/loggers/wandb/state.json, its files in RUN/wandb.

Its own variables count: WANDB_MODE, WANDB_PROJECT, WANDB_DIR and so on. Without an account's key
it works offline. What it has is asked of the server, or read from the files of an offline run.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Nothing goes to a third party unasked; read when it is imported.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from fastbyol.errors import FastbyolError
from fastbyol.files import open_regular
from fastbyol.loggers.sink import Alert, Entry, LoggedRun, Newest
from fastbyol.runs.durable import writing

OFFLINE = ("offline", "dryrun", "disabled")
# The form of LevelDB's log: a head, then blocks of records in one piece or several.
_HEAD = b":W&B"
_HEAD_BYTES, _BLOCK_BYTES, _RECORD_HEAD_BYTES = 7, 1 << 15, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


class WandB:
    """A run of W&B, resumed if there is one of its id."""

    def __init__(self, run: LoggedRun) -> None:
        variables = os.environ
        parent = Path(variables.get("WANDB_DIR") or run.path)
        _refuse_unwritable(parent / "wandb")
        mode: Any = variables.get("WANDB_MODE") or (None if _has_key() else "offline")
        own_id = variables.get("WANDB_RUN_ID") or run.id[:12]
        # Read before it adds a file of its own.
        stored = parent.glob(f"wandb/*run-*-{own_id}/run-{own_id}.wandb")
        self.splits = mode in OFFLINE
        self.newest = Newest.of(rows(stored) if self.splits else ())
        self._live = wandb.init(
            id=own_id,
            resume="allow",
            mode=mode,
            dir=str(parent),
            project=variables.get("WANDB_PROJECT") or run.config.log.project,
            name=variables.get("WANDB_NAME") or run.name,
            config=run.config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                # The use of the machine that it shows is the trainer's.
                x_stats_pid=run.trainer or os.getpid(),
            ),
        )
        if not self.splits:
            self.newest = Newest(self._live.step - 1, self._live.step - 1)
        self.where = self._live.url or ""
        if mode == "offline":
            pattern = parent / "wandb" / f"offline-run-*-{own_id}"
            self.where = f"offline: `wandb sync {pattern}` sends it"

    def send(self, entries: Sequence[Entry]) -> None:
        """Write each entry at its step, in one call."""
        for entry in entries:
            values: dict[str, Any] = {"_timestamp": entry.unix_s, **entry.scalars}
            values |= {name: wandb.Histogram(each) for name, each in entry.histograms.items()}
            if entry.picture is not None:
                values["views"] = wandb.Image(str(entry.picture))
            self._live.log(values, step=entry.step, commit=True)

    def alert(self, alert: Alert) -> None:
        """Send an alert, and set the state in the summary."""
        self._live.alert(alert.state, alert.text, level=alert.level.upper(), wait_duration=0)
        self._live.summary["state"] = alert.state

    def close(self, *, is_finished: bool) -> None:
        """Wait until all is written or sent."""
        self._live.finish(exit_code=0 if is_finished else 1)


def open_sink(run: LoggedRun) -> WandB:
    """Open a run of W&B."""
    return WandB(run)


def rows(files: Iterable[Path]) -> Iterator[tuple[int, list[str]]]:
    """Yield the steps that ``.wandb`` files have, and the names at each."""
    for path in files:
        for content in records(path):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                names = [each.key or "/".join(each.nested_key) for each in record.history.item]
                yield record.history.step.num, names


def records(path: Path) -> Iterator[bytes]:
    """Yield a file's records, up to the first that is not whole."""
    with open_regular(path) as file:
        if file.read(_HEAD_BYTES)[: len(_HEAD)] != _HEAD:
            return
        record = b""
        while True:
            left = _BLOCK_BYTES - file.tell() % _BLOCK_BYTES
            if left < _RECORD_HEAD_BYTES:
                file.seek(left, os.SEEK_CUR)
            head = file.read(_RECORD_HEAD_BYTES)
            num_bytes, kind = int.from_bytes(head[4:6], "little"), head[6:]
            piece = file.read(num_bytes)
            if (
                len(head) < _RECORD_HEAD_BYTES
                or len(piece) < num_bytes
                or zlib.crc32(kind + piece) != int.from_bytes(head[:4], "little")
            ):
                return
            record = piece if kind[0] in (_WHOLE, _FIRST) else record + piece
            if kind[0] in (_WHOLE, _LAST):
                yield record


def _refuse_unwritable(folder: Path) -> None:
    """Raise FastbyolError where files cannot be made: W&B would write elsewhere, untold."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FastbyolError(f"{folder}: cannot write: Permission denied")


def _has_key() -> bool:
    """Return whether W&B would not have to ask for an account's key."""
    return bool(wandb.login(prompt=False, verify=False))
