"""The entries of a run for its loggers, from its files as they grow."""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol.config import IN_COLLAPSE, Resolved
from fastbyol.errors import UsageError
from fastbyol.files import open_regular
from fastbyol.loggers.sink import ENDS, Alert, Entry, Level, Newest, as_floats
from fastbyol.runs.layers import read_layers
from fastbyol.runs.metrics import is_finished
from fastbyol.runs.tail import Tail

TIMING = "timing.jsonl"
# Drains of the trainer's buffer that a step waits for its time and layers, should they be lost.
_DRAINS = 4
_NOT_LOGGED = ("event", "step", "epoch", "state")


class Entries:
    """The run's entries that a store lacks, in order, each of them once.

    A step's entry has what happened before it: an epoch's end after n steps is in the entry of step
    n, which is complete once that step was made, or the run is over. So a store that has a step has
    all of it. Where the run stops at an epoch's end, its measures make an entry of their own.
    """

    def __init__(self, folder: Path, config: Resolved, newest: Newest) -> None:
        self._config, self._newest, self._newest_end = config, newest.step, newest.end
        self._tail, self._clock = Tail(folder), Clock(folder)
        self._layers = LayerRows(folder, config)
        self._begin()

    def _begin(self) -> None:
        self._waiting: list[Entry] = []
        self._open = Entry(0)
        self._alerts: list[Alert] = []
        self._ends: list[dict[str, Any]] = []

    @property
    def is_finished(self) -> bool:
        """Whether the run is over, as far as it was read."""
        return is_finished(self._ends, self._config.train.epochs)

    @property
    def alerts(self) -> list[Alert]:
        """Every change of state since the run began, as far as it was read."""
        return self._alerts

    def read(self) -> tuple[list[Entry], bool]:
        """Return further entries, and whether more may be there already. Raises OSError."""
        self._clock.read()
        news = self._tail.read()
        if news.is_fresh and news.rows:
            self._begin()
        for row in news.rows:
            self._add(row)
        ready = self._ready()
        if ready:
            self._newest = ready[-1].step
        return ready, bool(news.rows)

    def last(self, *, splits: bool) -> list[Entry]:
        """Return what is left once nothing more is written: the last epoch's end.

        That of a run that may go on is left out unless the store ``splits`` a step.
        """
        # Steps of a run that was killed while it wrote them come again, and whole.
        rest = self._waiting if self.is_finished else []
        if (
            self._open.scalars
            and len(rest) == len(self._waiting)
            and (splits or self.is_finished)
            and self._open.step > self._newest
        ):
            rest = [*rest, self._open]
        self._complete(rest)
        return rest

    def _add(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if step != self._open.step:
            self._open = Entry(step)
        if "event" not in row:
            self._open.scalars |= as_floats({n: v for n, v in row.items() if n != "step"})
            if step > self._newest:
                self._waiting.append(self._open)
            self._open = Entry(step + 1)
            return
        kind = row["event"]
        if f"{kind}/" in ENDS and step > self._newest_end:
            # Nothing was measured where these are null.
            rest = {
                name: value
                for name, value in row.items()
                if name not in _NOT_LOGGED
                and not (value is None and name in ("accuracy", "rank_y"))
            }
            self._open.scalars |= as_floats(rest, f"{kind}/")
        if kind in ("epoch", "end"):
            self._ends.append({"event": kind, "epoch": row.get("epoch", -1)})
        if kind == "state":
            self._alerts.append(_alert(row, self._clock.time_of(step - 1) or 0.0))

    def _ready(self) -> list[Entry]:
        """Return entries whose time and layers are there, or are not to be expected any more."""
        if not self._waiting:
            return []
        last = self._waiting[-1].step
        overdue = last - _DRAINS * self._config.run.drain_every_steps
        timed = self._clock.newest if self._clock.exists else last
        limit = max(overdue, min(timed, self._layers.read(last)))
        ready = [entry for entry in self._waiting if entry.step <= limit]
        self._waiting = self._waiting[len(ready) :]
        self._complete(ready)
        return ready

    def _complete(self, entries: list[Entry]) -> None:
        for entry in entries:
            entry.histograms = self._layers.take_out(entry.step)
            entry.unix_s = self._clock.time_of(entry.step) or self._clock.last_s


class Clock:
    """The times at which the trainer wrote steps, from timing.jsonl, which only grows.

    A step that was made again after a kill keeps its first time.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._num_bytes = folder / TIMING, 0
        self._written: list[int] = []
        self._unix_s: list[float] = []
        self.last_s = 0.0

    @property
    def newest(self) -> int:
        """The newest step whose time is known."""
        return self._written[-1] - 1 if self._written else -1

    @property
    def exists(self) -> bool:
        """Whether times are written down; the trainer makes the file before its first step."""
        return self._path.exists()

    def read(self) -> None:
        """Read the whole lines that are new; damaged ones say nothing, nor does a missing file."""
        try:
            with open_regular(self._path) as file:
                file.seek(self._num_bytes)
                content = file.read()
        except OSError:
            return
        content = content[: content.rfind(b"\n") + 1]
        self._num_bytes += len(content)
        for line in content.splitlines():
            try:
                row = json.loads(line)
                unix_s, written = float(row["unix_s"]), int(row.get("written", 0))
            except (ValueError, TypeError, LookupError, RecursionError):
                continue
            self.last_s = unix_s
            if written > self.newest + 1:
                self._written.append(written)
                self._unix_s.append(unix_s)

    def time_of(self, step: int) -> float | None:
        """Return when ``step`` was first written, in Unix seconds, None where nothing tells."""
        index = bisect_right(self._written, step)
        return self._unix_s[index] if index < len(self._unix_s) else None


class LayerRows:
    """The rows of layers.npy that are logged, read as the file grows."""

    def __init__(self, folder: Path, config: Resolved) -> None:
        self._folder, self._spacing = folder, config.run.layers_every_steps
        self._logged = config.log.layers_every_steps
        self._rows: dict[int, dict[str, np.ndarray]] = {}
        self._next = 0  # the first step that was not read yet

    def read(self, step: int) -> int:
        """Read up to ``step``; return the step up to which nothing is to be expected any more."""
        if not self._logged:
            return step
        if step >= self._next:
            try:
                layers = read_layers(self._folder, -(-self._next // self._spacing))
            except UsageError:  # missing or damaged: the trainer makes it before its first step
                return step
            for number, values in zip(layers.steps.tolist(), layers.values, strict=True):
                if number % self._logged == 0 and number >= self._next:
                    finite = (column[np.isfinite(column)] for column in values.T.astype(np.float64))
                    self._rows[number] = {
                        f"layers/{name}": column
                        for name, column in zip(layers.metrics, finite, strict=True)
                        if column.size
                    }
            if layers.steps.size:
                self._next = int(layers.steps[-1]) + self._spacing
        return self._next - 1

    def take_out(self, step: int) -> dict[str, np.ndarray]:
        """Return the layers of ``step``, and forget those up to it."""
        row = self._rows.get(step, {})
        self._rows = {number: values for number, values in self._rows.items() if number > step}
        return row


def _alert(row: dict[str, Any], unix_s: float) -> Alert:
    before, after = str(row.get("before")), str(row.get("after"))
    level: Level = "error" if after in IN_COLLAPSE else "warn" if after == "collapsing" else "info"
    signals = ", ".join(
        f"{name} {value:.4g}"
        for name, value in row.items()
        if name != "step" and isinstance(value, float)
    )
    return Alert(
        row["step"], after, f"{after} after {row['step']} steps, {before} before; {signals}",
        level, unix_s,
    )  # fmt: skip
