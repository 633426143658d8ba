"""A few runs side by side: the settings in which they differ, and what they measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbyol.errors import UsageError
from fastbyol.registry import reading
from fastbyol.registry.index import status_now
from fastbyol.registry.row import Row, differing, in_words

# More curves cannot be told apart in one picture: six colours, four kinds of lines.
MOST = 24
_SHOWN = ("status", "state", "epochs_done", "accuracy", "best_accuracy", "untrained_accuracy")
_MEASURES = ("loss", "pos_cos", "neg_cos", "rank_y")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Runs, and the ``keys`` of the settings that are not the same in all of them."""

    rows: tuple[Row, ...]
    keys: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The runs' names, or their paths where two have the same name."""
        names = [row.name for row in self.rows]
        return names if len(set(names)) == len(names) else [row.path for row in self.rows]

    def table(self) -> list[list[str]]:
        """Return lines of cells: the names, then each key that differs, then each measure."""
        keys = [*self.keys, *_SHOWN, *_MEASURES]
        lines = [[key, *(in_words(row, key) for row in self.rows)] for key in keys]
        return [["", *self.names], *(line for line in lines if any(line[1:]))]

    def as_json(self) -> dict[str, Any]:
        """Return the runs, and by key the values of each."""
        return {
            "runs": [row.as_json() for row in self.rows],
            "differences": {key: [row.settings.get(key) for row in self.rows] for key in self.keys},
        }


def of(runs: Sequence[Path]) -> Comparison:
    """Return the comparison of the runs in some folders.

    Raises UsageError for less than two, more than ``MOST``, or a folder that holds no sound run.
    """
    if not 2 <= len(runs) <= MOST:
        raise UsageError(f"runs compare: name 2 to {MOST} runs, not {len(runs)}")
    rows = []
    for path in runs:
        row, warnings = reading.read(path)
        if row is None:
            raise UsageError(warnings[-1])
        for warning in warnings:
            _log.warning("%s", warning)
        rows.append(replace(row, status=status_now(row, path)))
    return Comparison(tuple(rows), tuple(differing(rows)))
