"""What a page that watches a run shows: read from the run's files as they grow, and only there.

A link in a file's stead is not followed, since it may lead out of the run's folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.config import Resolved
from fastbyol.errors import FastbyolError
from fastbyol.evaluation.intervals import accuracy_interval
from fastbyol.files import open_regular
from fastbyol.runs import differences
from fastbyol.runs.environment import ENV
from fastbyol.runs.folder import CONFIG
from fastbyol.runs.inputs import META
from fastbyol.runs.lock import is_locked
from fastbyol.runs.metrics import METRICS_FILE, is_finished
from fastbyol.runs.tail import Tail
from fastbyol.show.screen import duration
from fastbyol.text import printable

# Files are looked at again after this time, however many clients ask.
EVERY_S = 0.5
# How long one look reads: the rows of a long run come in several.
_LOOK_S = 0.25
# Bins of a curve, more than a page has pixels to draw them.
MOST = 1024
CURVES = ("loss", "pos_cos", "neg_cos")
# From bad to good: where one colour stands for several epochs, the worst of them.
_STATES = ("dead", "collapsed", "collapsing", "recovering", "healthy")
# What is read of config.toml and env.json at most, and of the end of timing.jsonl.
_MOST_BYTES, _TIMING_BYTES = 1 << 20, 1 << 16
# The pace is a mean over this time. What was longest in the demo, an epoch's probe, is in it.
_PACE_S = 120.0


class Thinned:
    """The measures ``names`` over rising steps, in at most ``MOST`` bins, however many there are.

    A bin is of ``width`` steps, a power of two that doubles when there are too many. It keeps the
    least and the greatest value, so that no spike is lost, and the mean.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.width = tuple(names), 1
        # Of each bin: its index, and for each name [least, greatest, sum, count].
        self._bins: list[tuple[int, list[list[float]]]] = []

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """Add the values that ``row`` has; None, or what is not finite, counts as missing."""
        index = step // self.width
        if not self._bins or self._bins[-1][0] != index:
            self._bins.append((index, [[math.inf, -math.inf, 0.0, 0] for _ in self.names]))
        for entry, name in zip(self._bins[-1][1], self.names, strict=True):
            if (value := finite(row.get(name))) is not None:
                _merge(entry, (value, value, value, 1))
        while len(self._bins) > MOST:
            self._halve()

    def _halve(self) -> None:
        """Double the width: neighbours become one."""
        self.width *= 2
        merged: list[tuple[int, list[list[float]]]] = []
        for index, entries in self._bins:
            if merged and merged[-1][0] == index // 2:
                for entry, other in zip(merged[-1][1], entries, strict=True):
                    _merge(entry, other)
            else:
                merged.append((index // 2, entries))
        self._bins = merged

    def table(self) -> dict[str, Any]:
        """Return ``width``, ``steps`` (where each bin begins), and by name low, high and mean.

        All but the width are lists, with None where no value was finite.
        """
        columns: dict[str, Any] = {
            "width": self.width,
            "steps": [index * self.width for index, _ in self._bins],
        }
        for k, name in enumerate(self.names):
            entries = [entry[k] for _, entry in self._bins]
            columns[name] = {
                "low": [low if count else None for low, _, _, count in entries],
                "high": [high if count else None for _, high, _, count in entries],
                "mean": [total / count if count else None for _, _, total, count in entries],
            }
        return columns


def _merge(entry: list[float], other: Sequence[float]) -> None:
    low, high, total, count = other
    entry[:] = min(entry[0], low), max(entry[1], high), entry[2] + total, entry[3] + count


def finite(value: object) -> float | None:
    """Return a number of a file as a float, None for what is none or overflows when it is used."""
    if type(value) not in (int, float) or not -1e30 < value < 1e30:  # type: ignore[operator]
        return None
    return float(value)  # type: ignore[arg-type]


def merged_states(spans: list[list[Any]]) -> list[list[Any]]:
    """Return half as many spans [first step, end, state]; of two neighbours the worse state."""
    merged = []
    for k in range(0, len(spans), 2):
        pair = spans[k : k + 2]
        merged.append([pair[0][0], pair[-1][1], min((span[2] for span in pair), key=_severity)])
    return merged


def _severity(state: str) -> int:
    return _STATES.index(state) if state in _STATES else len(_STATES)


def _short(text: str) -> str:
    """Return text of a file as it can be shown, in a bounded length."""
    return printable(text if len(text) <= 200 else f"{text[:200]}...")


class _Rows:
    """What was read of metrics.jsonl, in bounded memory."""

    def __init__(self) -> None:
        self.curves, self.accuracy = Thinned(CURVES), Thinned(("accuracy",))
        self.spans: list[list[Any]] = []
        self.newest: dict[str, Any] = {}
        self.ends: dict[str, dict[str, Any]] = {}
        self.state: str | None = None
        self.per_epoch: int | None = None
        self.num_skipped = 0

    def add(self, row: dict[str, Any]) -> None:
        """Add a step or an event."""
        kind = row.get("event")
        if kind is None:
            self.newest = row
            self.curves.add(row["step"], row)
            if row["epoch"] == 1 and self.per_epoch is None:
                self.per_epoch = row["step"] or None
        elif kind == "epoch":
            self._end_epoch(row)
        elif kind in ("untrained", "end"):
            self.ends[kind] = row
        elif kind == "skipped":
            self.num_skipped += 1
        elif kind == "state" and isinstance(row.get("after"), str):
            self.state = _short(row["after"])

    def _end_epoch(self, row: dict[str, Any]) -> None:
        self.ends["epoch"], self.state = row, _short(row["state"])
        if row["epoch"] == 0:
            self.per_epoch = row["step"] or None
        self.accuracy.add(row["step"], row)
        start = self.spans[-1][1] if self.spans else 0
        if self.spans and self.spans[-1][2] == self.state:
            self.spans[-1][1] = row["step"]
        else:
            self.spans.append([start, row["step"], self.state])
        if len(self.spans) > MOST:
            self.spans = merged_states(self.spans)

    @property
    def num_steps(self) -> int:
        """The number of steps done, as far as was read."""
        return int(self.newest["step"]) + 1 if self.newest else 0

    def interval(self, accuracy: float | None) -> tuple[float, float] | None:
        """Return the 95 % interval of an accuracy in percent, None where there can be none."""
        total = finite(self.ends.get("untrained", {}).get("num_scored"))
        if accuracy is None or not 0 <= accuracy <= 100 or total is None or total < 1:
            return None
        return accuracy_interval(accuracy, int(total))


class Watched:
    """A run that is watched. Any number of threads may ask: its files are read once for all."""

    def __init__(self, run: Path) -> None:
        self._path = Path(os.path.realpath(run))
        self._name = printable(self._path.name)
        self._lock, self._due_s = threading.Lock(), 0.0
        self._tail, self._rows = Tail(self._path, follow_links=False), _Rows()
        self._config: Resolved | None = None
        self._differences: list[list[str]] = []
        self._env: dict[str, Any] = {}
        # config.toml as it was last read; and, of the rows that are shown, whose they are.
        self._text: bytes | None = None
        self._identity: object = None
        self._answer = self._looked()

    def answer(self) -> tuple[bytes, str]:
        """Return what the page shows as JSON, and its digest: that of ``EVERY_S`` ago or later.

        Nobody waits for a look that another thread takes: until it ends, the last one counts.
        """
        if time.monotonic() >= self._due_s and self._lock.acquire(blocking=False):
            try:
                if time.monotonic() >= self._due_s:  # still
                    self._answer = self._looked()
            finally:
                self._lock.release()
        return self._answer

    def _looked(self) -> tuple[bytes, str]:
        seen = self._look()
        body = json.dumps(seen, allow_nan=False, separators=(",", ":")).encode()
        self._due_s = time.monotonic() + (0 if seen["is_behind"] else EVERY_S)
        return body, hashlib.sha256(body).hexdigest()

    def _look(self) -> dict[str, Any]:
        notes: list[str] = []
        # No part of the path, which had no link, has become one.
        is_same = os.path.realpath(self._path) == str(self._path)
        is_folder, is_behind = is_same and self._path.is_dir(), False
        if is_folder:
            self._read_settings(notes)
            is_behind = self._read_rows(notes)
        elif not is_same:
            notes.append("the way to the run's folder has a link now, which is not followed")
        has_run = is_folder and any(
            os.path.lexists(self._path / name) for name in (CONFIG, METRICS_FILE)
        )
        status = self._status(has_run)
        return {
            "name": self._name, "path": printable(str(self._path)), "status": status,
            "notes": notes, "is_behind": is_behind, **self._progress(status), **self._drawn(),
        }  # fmt: skip

    def _status(self, has_run: bool) -> str:
        if not has_run:
            return "gone"
        ends = [row for kind, row in self._rows.ends.items() if kind != "untrained"]
        if is_finished(ends, self._config.train.epochs if self._config else 1 << 63):
            return "done"
        return "running" if is_locked(self._path) else "stopped"

    def _bytes(self, name: str, notes: list[str]) -> bytes | None:
        """Return a small file's content, None with a note where it cannot be read."""
        try:
            with open_regular(self._path / name, follow_links=False) as file:
                content = file.read(_MOST_BYTES + 1)
        except OSError as error:
            notes.append(f"{name}: cannot read: {error.strerror}")
            return None
        if len(content) <= _MOST_BYTES:
            return content
        notes.append(f"{name}: of more than {_MOST_BYTES} bytes: not read")
        return None

    def _read_settings(self, notes: list[str]) -> None:
        env, text = self._bytes(ENV, []), self._bytes(CONFIG, notes)
        try:
            read = json.loads(env or b"{}")
        except (ValueError, RecursionError):
            read = {}
        self._env = read if isinstance(read, dict) else {}
        if text is None:
            return
        try:
            if text != self._text or self._config is None:
                self._config = config_io.parse(text.decode("utf-8-sig"), CONFIG)
                self._differences = [
                    [row.key, _short(differences.text(row.b)), _short(differences.text(row.a))]
                    for row in differences.against_preset(self._config)
                ]
            self._text = text
        except (FastbyolError, UnicodeDecodeError, RecursionError) as error:
            notes.append(f"{CONFIG}: damaged: {_short(str(error))}")

    def _read_rows(self, notes: list[str]) -> bool:
        """Read on for ``_LOOK_S``. Return whether there is more to read at once."""
        identity = self._text, self._env.get("started")
        until = time.monotonic() + _LOOK_S
        try:
            while time.monotonic() < until:
                news = self._tail.read(1 << 18)
                if news.is_fresh:
                    self._rows, self._identity = _Rows(), identity
                for row in news.rows:
                    self._rows.add(row)
                if news.is_damaged:
                    step = self._rows.num_steps
                    notes.append(
                        f"{METRICS_FILE}: damaged behind step {step}: the rest is not read"
                    )
                if news.is_damaged or not news.rows:
                    return False
        except FileNotFoundError:
            if not (self._path / CONFIG).exists():
                notes.append(f"no run is here any more: what is drawn is the last of {self._name}")
            elif identity != self._identity:  # another run, which has not begun
                self._rows, self._identity = _Rows(), identity
            return False
        except OSError as error:
            notes.append(f"{METRICS_FILE}: cannot read: {error.strerror}")
            return False
        return True

    def _progress(self, status: str) -> dict[str, Any]:
        """Return how far the run is, its pace and the time left, None for what is not known."""
        config, rows = self._config, self._rows
        per_epoch = rows.per_epoch or self._steps_per_epoch()
        epochs = config.train.epochs if config else None
        total = per_epoch * epochs if per_epoch and epochs else None
        pace, newest_s = self._pace() if status != "gone" else (None, None)
        is_running = status == "running"
        left = (total - rows.num_steps) / pace if total and pace and is_running else None
        return {
            "step": rows.num_steps, "steps": total, "per_epoch": per_epoch, "epochs": epochs,
            "epoch": min(rows.num_steps // per_epoch, epochs or 0) if per_epoch else None,
            "images_per_s": round(pace * config.train.batch_size, 1) if pace and config else None,
            "left": duration(left) if left is not None else None, "written_s": newest_s,
        }  # fmt: skip

    def _steps_per_epoch(self) -> int | None:
        """Return what the pinned data has, for a run in its first epoch."""
        inputs = self._env.get(META)
        train = inputs.get("train") if isinstance(inputs, dict) else None
        samples = finite(train.get("samples")) if isinstance(train, dict) else None
        if samples is None or self._config is None:
            return None
        limit = self._config.data.limit or samples
        return int(min(samples, limit)) // self._config.train.batch_size or None

    def _pace(self) -> tuple[float | None, float | None]:
        """Return steps a second and the Unix time in s of the newest writing, from timing.jsonl."""
        try:
            with open_regular(self._path / "timing.jsonl", follow_links=False) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TIMING_BYTES))
                lines = file.read(_TIMING_BYTES).splitlines()
        except OSError:
            return None, None
        drains: list[tuple[float, float]] = []
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(row, dict):
                continue
            at, written = finite(row.get("unix_s")), finite(row.get("written"))
            if row.get("event") == "open":
                drains = []
            elif at is not None and written is not None:
                drains.append((at, written))
        if not drains:
            return None, None
        newest_s, newest = drains[-1]
        # Neither its clock nor its steps went back.
        recent = [row for row in drains if newest_s - _PACE_S <= row[0] < newest_s]
        steps = newest - recent[0][1] if recent else 0
        return (steps / (newest_s - recent[0][0]) if steps > 0 else None), newest_s

    def _drawn(self) -> dict[str, Any]:
        """Return curves, newest numbers and settings."""
        rows, preset = self._rows, self._config.preset if self._config else None
        accuracy = rows.accuracy.table()
        bounds = [
            (rows.interval(low), rows.interval(high))
            for low, high in zip(*(accuracy["accuracy"][key] for key in ("low", "high")),
            strict=True)
        ]  # fmt: skip
        accuracy["interval"] = [[low[0], high[1]] if low and high else None for low, high in bounds]
        newest = [
            [_short(name), "not finite" if (number := finite(value)) is None else f"{number:.5g}"]
            for name, value in list(rows.newest.items())[:40]
            if name not in ("step", "epoch")
        ]
        untrained = finite(rows.ends.get("untrained", {}).get("accuracy"))
        return {
            "state": rows.state, "skipped": rows.num_skipped, "newest": newest,
            "curves": rows.curves.table(), "accuracy": accuracy, "spans": rows.spans,
            "untrained": untrained, "preset": preset, "differences": self._differences,
        }  # fmt: skip
