"""A run's probe accuracies: before its first step, the best and the last, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastbyol.evaluation.intervals import accuracy_text


@dataclass(frozen=True)
class Accuracies:
    """Accuracies in percent or None: ``untrained``, ``best`` in ``best_epoch`` (from 0), ``last``.

    All are of the same ``num_scored`` images, None in runs of older versions, which did not record
    it. ``weights`` describes the weights before the first step.
    """

    untrained: float | None
    best: float | None
    best_epoch: int | None
    last: float | None
    num_scored: int | None
    weights: str = "random weights"

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Accuracies:
        """Collect the accuracies from the events of a run's ``metrics.jsonl``."""
        rows = [event for event in events if event.get("accuracy") is not None]
        before = next((row for row in rows if row["event"] == "untrained"), {})
        probed = [row for row in rows if row["event"] == "epoch"]
        best = max(
            probed,
            key=lambda row: float(row["accuracy"]),
            default={"accuracy": None, "epoch": None},
        )
        return cls(
            untrained=before.get("accuracy"),
            best=best["accuracy"],
            best_epoch=best["epoch"],
            last=probed[-1]["accuracy"] if probed else None,
            num_scored=before.get("num_scored"),
            weights="weights at the start" if before.get("weights") == "given" else cls.weights,
        )

    def shown(self, accuracy: float) -> str:
        """Format ``accuracy`` as ``62.0% (59.0 to 64.9)``; the interval needs ``num_scored``."""
        return accuracy_text(accuracy, self.num_scored)

    def in_words(self) -> str:
        """Return all accuracies in one line, empty if nothing was probed."""
        named = [("accuracy", self.last), (self.weights, self.untrained)]
        if self.best_epoch is not None:
            named.insert(1, (f"best in epoch {self.best_epoch + 1}", self.best))
        return ", ".join(
            f"{name} {self.shown(value)}" for name, value in named if value is not None
        )
