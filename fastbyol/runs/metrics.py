"""metrics.jsonl: a strict JSON line per step and event, determined by the training alone.

``{"step": 0, "epoch": 0, "loss": ..., ...}`` is a step, counted from 0. An event has ``event``, its
kind, and ``step``, the number of steps done. A step that was skipped for its gradient is followed
by an event ``skipped``. ``engine.step.METRICS`` names the metrics of a step.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastbyol.errors import UsageError
from fastbyol.files import open_regular
from fastbyol.runs.durable import Written, append, new_digest, pieces, writing

METRICS_FILE = "metrics.jsonl"
# The kinds of events, and what they say.
EVENTS: Mapping[str, str] = {
    "untrained": "what the weights before the first step have: `accuracy` in percent of "
    "`num_scored` images, `rank_y`; with `train.init_from` also `weights`",
    "epoch": "the end of epoch number `epoch`: `state`, `accuracy` in percent and `rank_y`, the "
    "effective rank of the embeddings (both null without a probe), and the mean of each metric",
    "state": "a change of state from `before` to `after`, with the measures that caused it",
    "skipped": "the step before was skipped, and with it `in_a_row` steps",
    "versions": "a resumed run goes on with other versions of libraries: `changed`",
    "end": "the run ended before its last epoch because of its `state` (`train.end_in`)",
}
_log = logging.getLogger(__name__)


class MetricsFile:
    """The file open for appending, cut back to whole lines of the first ``resume_step`` steps.

    ``recorded`` is the file's record of that time, if any. ``skipped_in_row`` counts the newest
    consecutive steps that were skipped. Raises FastbyolError where the file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        steps_per_epoch: int,
        resume_step: int,
        recorded: Written | None = None,
    ) -> None:
        self._names, self._steps_per_epoch = tuple(names), steps_per_epoch
        self.skipped_in_row = 0
        self._epoch_rows: list[dict[str, Any]] = []
        self._path = folder / METRICS_FILE
        with writing(self._path):
            self._path.touch()
            self._num_bytes = self._keep(resume_step, recorded)
            os.truncate(self._path, self._num_bytes)
            self._digest = new_digest()
            for piece in pieces(self._path):
                self._digest.update(piece)
            self._file = self._path.open("ab", buffering=0)

    def append_steps(self, first_step: int, values: np.ndarray) -> list[dict[str, float]]:
        """Write float32 ``values`` (steps, metrics). Return them as dicts, NaN where not finite."""
        rows, lines = [], []
        for step, row in enumerate(values, first_step):
            # numpy's text of a float32 is as short as can be; float(value) has a float64's digits.
            numbers = (float(str(value)) if math.isfinite(value) else math.nan for value in row)
            rows.append(
                {
                    "step": step,
                    "epoch": step // self._steps_per_epoch,
                    **dict(zip(self._names, numbers, strict=True)),
                }
            )
            lines.append(_line(rows[-1]))
            self._count(rows[-1])
            if self.skipped_in_row:
                lines.append(
                    _line({"event": "skipped", "step": step + 1, "in_a_row": self.skipped_in_row})
                )
        self._write(lines)
        return rows

    def append_event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Write an event after ``step`` steps. ``fields`` must depend on the training alone."""
        self._write([_line({"event": kind, "step": step, **fields})])

    def epoch_means(self) -> dict[str, float]:
        """Return the mean of each metric over the newest epoch's steps, NaN where there are none.

        Means are of the written decimals, whichever process wrote them. Skipped steps count in
        ``skipped`` alone.
        """
        counted = [row for row in self._epoch_rows if not _was_skipped(row)]
        rows = {name: self._epoch_rows if name == "skipped" else counted for name in self._names}
        # The lines of a run that earlier code began may lack a metric.
        return {
            name: _mean([row.get(name, math.nan) for row in rows[name]]) for name in self._names
        }

    @property
    def written(self) -> Written:
        """The file's content now."""
        return Written(self._num_bytes, self._digest.hexdigest())

    def sync(self) -> None:
        """Force what was written to disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close; nothing is buffered."""
        self._file.close()

    def _keep(self, resume_step: int, recorded: Written | None) -> int:
        """Return the bytes of the first ``resume_step`` steps and of the events up to there."""
        offset = num_rows = 0
        limit = recorded.num_bytes if recorded is not None else math.inf
        with open_regular(self._path) as file:
            for size, row in _parse(file):
                is_event = "event" in row
                if (
                    row["step"] > (resume_step if is_event else resume_step - 1)
                    or offset + size > limit
                ):
                    break
                offset += size
                if not is_event:
                    num_rows += 1
                    self._count(
                        {name: math.nan if value is None else value for name, value in row.items()}
                    )
        if num_rows != resume_step:
            _log.warning(
                "%s: holds %d steps of the %d done: the others are lost",
                self._path,
                num_rows,
                resume_step,
            )
        return offset

    def _count(self, row: dict[str, Any]) -> None:
        if self._epoch_rows and self._epoch_rows[0]["epoch"] != row["epoch"]:
            self._epoch_rows = []
        self._epoch_rows.append(row)
        self.skipped_in_row = self.skipped_in_row + 1 if _was_skipped(row) else 0

    def _write(self, lines: Sequence[str]) -> None:
        content = "".join(lines).encode()
        with writing(self._path):
            append(self._file, content)
        self._digest.update(content)
        self._num_bytes += len(content)


def last_step(folder: Path) -> int:
    """Return the number of the newest step in the run's file, -1 where there is none."""
    if not (folder / METRICS_FILE).exists():
        return -1
    with _reading(folder / METRICS_FILE) as file:
        return max((row["step"] for _, row in _parse(file) if "event" not in row), default=-1)


def is_whole(folder: Path, recorded: Written) -> bool:
    """Return whether the run's file still begins with what was ``recorded``."""
    return recorded.matches(pieces(folder / METRICS_FILE))


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (steps, events) of a run in order; None stands for what was not finite."""
    with _reading(folder / METRICS_FILE) as file:
        lines = [row for _, row in _parse(file)]
    return [row for row in lines if "event" not in row], [row for row in lines if "event" in row]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events alone, without parsing the steps, of which a long run has many."""
    with _reading(folder / METRICS_FILE) as file:
        return [row for _, row in _parse(line for line in file if line.startswith(b'{"event"'))]


def is_finished(events: Iterable[Mapping[str, Any]], epochs: int) -> bool:
    """Return whether ``events`` are those of a run that has all ``epochs``, or ended before."""
    return any(
        event["event"] == "end" or (event["event"] == "epoch" and event["epoch"] + 1 >= epochs)
        for event in events
    )


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror}") from None


class Parser:
    """A check of lines one by one: each must be whole, and in order behind those before it."""

    def __init__(self) -> None:
        self._done = 0
        self._names: Any = None

    def row(self, line: bytes) -> dict[str, Any] | None:
        """Return the next line's content, None where it is damaged or out of order."""
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict) or not _is_count(row.get("step")) or row["step"] < self._done:
            return None
        if "event" in row:
            if not _is_event(row):
                return None
        else:
            self._names = self._names or row.keys()
            if (
                row.keys() != self._names
                or not _is_count(row.get("epoch"))
                or not all(map(_is_measure, row.values()))
            ):
                return None
        self._done = row["step"] + ("event" not in row)
        return row


def _parse(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (bytes, content) of each line up to the first that is damaged or out of order."""
    parser = Parser()
    for line in lines:
        if (row := parser.row(line)) is None:
            return
        yield len(line), row


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_measure(value: object) -> bool:
    return value is None or isinstance(value, float) or _is_count(value)


def _is_event(row: Mapping[str, Any]) -> bool:
    """Return whether an event has the fields that readers need."""
    if row["event"] != "epoch":
        return isinstance(row["event"], str)
    state, accuracy, neg_cos = (row.get(name) for name in ("state", "accuracy", "neg_cos"))
    return (
        _is_count(row.get("epoch"))
        and isinstance(state, str)
        and _is_measure(accuracy)
        and _is_measure(neg_cos)
    )


def _was_skipped(row: Mapping[str, Any]) -> bool:
    """Return whether the step was skipped; without that metric its gradient's norm tells."""
    skipped = row.get("skipped")
    return bool(skipped) if skipped is not None else not math.isfinite(row.get("grad_norm", 0.0))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _line(fields: Mapping[str, Any]) -> str:
    """Return a line of JSON, null for a float that is not finite."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
