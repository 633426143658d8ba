"""A run's row, read from its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.errors import FastbyolError
from fastbyol.evaluation.intervals import accuracy_interval
from fastbyol.evaluation.progress import Accuracies
from fastbyol.registry.row import Row, is_number
from fastbyol.runs import consistency
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.fork import Fork
from fastbyol.runs.metrics import METRICS_FILE, is_finished, read_events

# Of an ``epoch`` event: what is no measure, or has a field of its own.
_OTHER = ("event", "step", "epoch", "state", "accuracy", "accuracy_low", "accuracy_high")
# Points of a small curve: more cannot be told apart in it.
_POINTS = 60


def read(path: Path) -> tuple[Row | None, list[str]]:
    """Return a run's row, and warnings about its files; no row where they are damaged.

    Whether some process works on the run is not asked: ``status`` is done or stopped.
    """
    warnings: list[str] = []
    try:
        return _row(path, warnings), warnings
    except FastbyolError as error:
        return None, [*warnings, str(error)]


def _row(path: Path, warnings: list[str]) -> Row:
    with RunFolder.open(path, lock=False) as folder:
        config, env = folder.config, folder.env
    warnings += consistency.changes(path, config, env.get("config"))
    events = read_events(path) if (path / METRICS_FILE).exists() else []
    epochs = [event for event in events if event["event"] == "epoch"]
    last: Mapping[str, Any] = epochs[-1] if epochs else {}
    accuracies, started, fork = Accuracies.of(events), env.get("started"), Fork.read(path)
    scored = accuracies.num_scored if type(accuracies.num_scored) is int else None
    low, high = _interval(accuracies.last, scored)
    return Row(
        # The working folder, and the one above it, are named otherwise than by their path.
        name=path.name if path.name not in ("", "..") else path.resolve().name,
        path=str(path),
        status="done" if is_finished(events, config.train.epochs) else "stopped",
        state=last.get("state"),
        epochs_done=int(last.get("epoch", -1)) + 1,
        epochs=config.train.epochs,
        accuracy=accuracies.last,
        accuracy_low=low,
        accuracy_high=high,
        best_accuracy=accuracies.best,
        best_epoch=accuracies.best_epoch,
        untrained_accuracy=accuracies.untrained if is_number(accuracies.untrained) else None,
        num_scored=scored,
        started=started if isinstance(started, str) else None,
        forked_from=None if fork is None else f"{fork.run}@{fork.step}",
        measures={
            key: value
            for key, value in last.items()
            if key not in _OTHER and (value is None or is_number(value))
        },
        # As the index has them: lists, not tuples.
        settings=json.loads(json.dumps(config_io.flatten(config))),
        curves={key: _curve(epochs, key) for key in ("neg_cos", "accuracy")},
    )


def _interval(
    accuracy: float | None, num_scored: int | None
) -> tuple[float, float] | tuple[None, None]:
    """Return the interval of what a file says, which may be no share of anything."""
    if accuracy is None or not num_scored or num_scored < 1 or not 0 <= accuracy <= 100:
        return None, None
    return accuracy_interval(accuracy, num_scored)


def _curve(epochs: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """Return at most ``_POINTS`` points (epochs done, value), the last among them."""
    points = [
        [event["epoch"] + 1, float(f"{event[key]:.4g}")]
        for event in epochs
        if event.get(key) is not None and math.isfinite(event[key])
    ]
    every = -(-len(points) // _POINTS)
    return points[::-1][::every][::-1] if points else []
