"""One run in a list of many: what its files say, in values that JSON has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

from fastbyol.config_io import toml_value
from fastbyol.evaluation.intervals import accuracy_text
from fastbyol.text import printable


@dataclass(frozen=True)
class Row:
    """A run by its last epoch; ``status`` is running, done or stopped.

    Accuracies are in percent, ``accuracy`` the newest with its 95 % interval. ``best_epoch`` counts
    from 0, as ``epoch`` in metrics.jsonl does. ``measures`` are the last epoch's means, and
    ``settings`` every value of config.toml by dotted key. ``curves`` are at most 60 points
    (epochs done, value) of ``neg_cos`` and of ``accuracy``.
    """

    name: str
    path: str
    status: str
    state: str | None
    epochs_done: int
    epochs: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    best_accuracy: float | None
    best_epoch: int | None
    untrained_accuracy: float | None
    num_scored: int | None
    started: str | None
    forked_from: str | None
    measures: dict[str, float | None] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def value(self, key: str) -> Any:
        """Return a field, a measure or a setting; None where the run does not have it."""
        if key in FIELDS:
            return getattr(self, key)
        return self.measures[key] if key in self.measures else self.settings.get(key)

    def as_json(self) -> dict[str, Any]:
        """Return fields and measures in one object, with ``settings`` as one more."""
        own = {name: getattr(self, name) for name in FIELDS}
        return {**dict.fromkeys(MEASURES), **self.measures, **own, "settings": self.settings}


FIELDS = tuple(
    each.name for each in fields(Row) if each.name not in ("measures", "settings", "curves")
)
# What today's runs measure, in this order; those of other versions may have more or fewer.
MEASURES = (
    *("loss", "pos_cos", "neg_cos", "std_z", "std_y", "dead_y"),
    *("grad_norm", "lr", "tau", "skipped", "rank_y"),
)
# Of these more is better, or newer; of the others less.
DESCENDING = frozenset(
    (
        *("accuracy", "accuracy_low", "accuracy_high", "best_accuracy", "untrained_accuracy"),
        *("pos_cos", "std_z", "std_y", "rank_y", "epochs_done", "started"),
    )
)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def differing(rows: Sequence[Row]) -> list[str]:
    """Return the settings, but for ``preset``, that differ among runs, in config.py's order."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    first = rows[0].settings if rows else {}
    return [
        key
        for key in keys
        if key != "preset" and any(row.settings.get(key) != first.get(key) for row in rows)
    ]


def in_words(row: Row, key: str) -> str:
    """Return what a table shows of ``key``: empty for no value, bare words, four digits."""
    value = row.value(key)
    if value is None:
        return "none" if key in row.settings else ""
    if "accuracy" in key:
        of_share = key not in ("accuracy_low", "accuracy_high") and 0 <= value <= 100
        return accuracy_text(value, row.num_scored if of_share else None)
    if isinstance(value, float) and key not in row.settings:
        return f"{value:.4g}"
    return setting_text(value)


def setting_text(value: object) -> str:
    """Return a setting in one line: TOML, but a text without its quotes."""
    return printable(
        value if isinstance(value, str) else "none" if value is None else toml_value(value)
    )
