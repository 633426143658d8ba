"""Run folders written by hand, step by step, and what loggers sent of them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol import config_io
from fastbyol.config import LoggerName, resolve
from fastbyol.loggers.child import ALL_SENT, Child
from fastbyol.loggers.follow import Trainer, follow
from fastbyol.runs.layers import LayersFile
from fastbyol.runs.metrics import METRICS_FILE
from tiny import TINY

STEPS, EPOCHS = 8, 4  # of an epoch, of a run
LAYERS, MEASURES = ("encoder.conv1", "encoder.bn1", "predictor.0"), ("rate", "grad_norm")
STATES = {1: ("healthy", "collapsing"), 2: ("collapsing", "collapsed"), 3: ("collapsed", "dead")}

LOG = ("log.pictures=0", "log.layers_every_steps=4")

Curves = dict[str, list[tuple[int, float]]]


class WrittenRun:
    """A run of ``EPOCHS`` epochs whose values depend on the step alone, written up to a step."""

    def __init__(self, path: Path, *sets: str) -> None:
        self.path = path
        (path / "checkpoints").mkdir(parents=True)
        loaded = config_io.load(
            preset="blog",
            sets=[*TINY, f"train.epochs={EPOCHS}", *LOG, *sets],
        )
        (path / "config.toml").write_text(config_io.dump(resolve(loaded.config), loaded.origin))
        self.num_lives = 0

    def write(self, start: int, stop: int, *, torn: bool = False) -> None:
        """Cut the files back to ``start`` steps done, and go on to ``stop``, as trainers do."""
        lines = [line for step in range(stop + 1) for line in _lines(step, stop)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.path / METRICS_FILE).write_text(text + ('{"step": 99, "ep' if torn else ""))
        layers = LayersFile(self.path, LAYERS, MEASURES, every=1, resume_step=start)
        if stop > start:
            values = [_layers(step) for step in range(start, stop)]
            layers.append(np.arange(start, stop), np.stack(values))
        layers.close()
        self.num_lives += 1
        with (self.path / "timing.jsonl").open("a") as timing:
            for written in [*range(start + 4, stop, 4), stop]:
                row = {"event": "drain", "step": written, "unix_s": self.num_lives * 1e4 + written}
                timing.write(json.dumps(row | {"written": written}) + "\n")

    def send(self, name: LoggerName) -> list[str]:
        """Send in this process what the files have; return what was reported."""
        reading, writing = os.pipe()
        os.close(writing)
        lines: list[str] = []
        try:
            trainer = Trainer(reading, os.getppid(), 0.0)
            assert follow(self.path, name, trainer, os.getppid(), lines.append), lines
        finally:
            os.close(reading)
        return lines

    def send_apart(self, name: LoggerName) -> list[str]:
        """Send in a process of its own what the files have; return what it said."""
        child = Child(self.path, name, limit_s=0.0)
        child.finish()
        code = child.process.wait()
        lines = child.lines()
        child.close()
        assert code == ALL_SENT, (lines, child.log.read_text())
        return lines

    def expected(self, *, has_end: bool = True) -> Curves:
        """Return every curve that metrics.jsonl has, read without our code.

        Without ``has_end`` the end of an epoch is left out where no step is behind it.
        """
        curves: Curves = {}
        text = (self.path / METRICS_FILE).read_text()
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        last = max((row["step"] for row in rows if "event" not in row), default=-1)
        for row in rows:
            if row["step"] > last and not has_end:
                continue
            prefix = ""
            if "event" in row:
                if row["event"] not in ("epoch", "untrained"):
                    continue
                prefix = f"{row['event']}/"
            for name, value in row.items():
                if name in ("event", "step", "state") or (prefix and name == "epoch"):
                    continue
                if value is None and name in ("accuracy", "rank_y"):
                    continue
                number = math.nan if value is None else float(value)
                curves.setdefault(prefix + name, []).append((row["step"], number))
        return curves

    def layers_at(self, step: int, measure: str) -> np.ndarray:
        """Return a measure of all layers (segments,) at a step."""
        return _layers(step)[:, MEASURES.index(measure)]


def same(ours: Curves, theirs: Curves) -> bool:
    """Return whether curves are equal, NaN to NaN."""
    return _as_text(ours) == _as_text(theirs)


def _as_text(curves: Curves) -> dict[str, list[tuple[int, str]]]:
    return {name: [(step, repr(float(v))) for step, v in rows] for name, rows in curves.items()}


def as_float32(curves: Curves) -> Curves:
    """Return curves with values rounded as float32 has them."""
    return {
        name: [(step, float(np.float32(value))) for step, value in rows]
        for name, rows in curves.items()
    }


def _lines(step: int, stop: int) -> list[dict[str, Any]]:
    """Return the lines between the ones of the steps before and behind, ``stop`` steps done."""
    lines: list[dict[str, Any]] = []
    if step == 0:
        lines.append({"event": "untrained", "step": 0, "accuracy": 9.5, "rank_y": 3.5})
    elif step % STEPS == 0:
        epoch = step // STEPS - 1
        if epoch in STATES:
            before, after = STATES[epoch]
            state = {"step": step, "before": before, "after": after, "neg_cos": 0.25 * epoch}
            lines.append({"event": "state", **state, "pos_cos": None})
        accuracy = None if epoch == 1 else 10.0 + epoch / 3
        means = {"accuracy": accuracy, "rank_y": accuracy, "loss": 1 / (epoch + 3), "neg_cos": 0.5}
        name = STATES.get(epoch, ("", "healthy"))[1]
        lines.append({"event": "epoch", "step": step, "epoch": epoch, "state": name, **means})
    if step < stop:
        loss = float(str(np.random.default_rng(step).standard_normal(dtype=np.float32)))
        row = {"step": step, "epoch": step // STEPS, "loss": loss, "lr": 0.1}
        lines.append(row | {"grad_norm": None if step == 5 else loss * loss, "skipped": step == 5})
        lines[-1]["skipped"] = float(step == 5)
        if step == 5:
            lines.append({"event": "skipped", "step": 6, "in_a_row": 1})
    return lines


def _layers(step: int) -> np.ndarray:
    return np.random.default_rng(1000 + step).random((len(LAYERS), len(MEASURES)), np.float32)
