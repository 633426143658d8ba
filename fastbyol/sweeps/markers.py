"""The marker of each column of a phase diagram, measured once and kept beside the runs.

``evaluation.marker`` has its definition. It depends on images, views and network alone.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.config import Resolved
from fastbyol.errors import FastbyolError
from fastbyol.files import open_regular
from fastbyol.runs.durable import write_text, writing
from fastbyol.runs.folder import CONFIG
from fastbyol.sweeps.results import Sweep

FILE = "markers.json"
IMAGES, SEEDS = 1024, range(5)
_log = logging.getLogger(__name__)

# The r of every seed, by value of the horizontal axis and then by network, views and images.
Columns = Mapping[object, Mapping[str, tuple[float, ...]]]


def of(sweep: Sweep) -> Columns:
    """Return the markers of the columns of ``sweep``, and measure those that are not kept yet.

    The horizontal axis is the first. Images that cannot be read any more are logged and left out.
    """
    kept = _kept(sweep.out / FILE)
    columns: dict[object, dict[str, tuple[float, ...]]] = {}
    for key, (config, values) in _distinct(sweep).items():
        if key not in kept:
            try:
                kept[key] = _measure(config)
            except FastbyolError as error:
                _log.warning("no marker: %s", error)
                continue
        for value in values:
            columns.setdefault(value, {})[key] = tuple(kept[key])
    with writing(sweep.out / FILE):
        write_text(sweep.out / FILE, json.dumps(kept, indent=1) + "\n")
    return columns


def under(columns: Columns) -> dict[object, str]:
    """Return what stands below each column: mean and deviation of r over seeds.

    A column whose points differ in more than the optimizer has the least and the highest mean.
    """
    return {value: _in_words(tuple(rows.values())) for value, rows in columns.items()}


def as_rows(columns: Columns) -> list[dict[str, Any]]:
    """Return the markers as JSON values, a row a column and network."""
    return [
        {"value": value, "r": rs, "mean": statistics.fmean(rs), "spread": statistics.stdev(rs)}
        for value, rows in columns.items()
        for rs in rows.values()
    ]


def _in_words(rows: Sequence[Sequence[float]]) -> str:
    if len(rows) == 1:
        return f"r {statistics.fmean(rows[0]):.3f}\n± {statistics.stdev(rows[0]):.3f}"
    means = sorted(map(statistics.fmean, rows))
    return f"r {means[0]:.3f}\nto {means[-1]:.3f}"


def _distinct(sweep: Sweep) -> dict[str, tuple[Resolved, set[object]]]:
    """Return each configuration that differs in what the marker depends on, with its columns."""
    axis = next(iter(sweep.axes))
    made: dict[str, tuple[Resolved, set[object]]] = {}
    for point in sweep.points:
        for run in point.done[:1]:
            config = config_io.read_run(run.path / CONFIG)
            key = json.dumps({name: _plain(config, name) for name in ("data", "views", "model")})
            made.setdefault(key, (config, set()))[1].add(point.values[axis])
    return made


def _plain(config: Resolved, section: str) -> Any:
    return getattr(config, section).model_dump(mode="json")


def _measure(config: Resolved) -> list[float]:
    from fastbyol.evaluation import marker

    read, ids, _ = marker.images_of(config, IMAGES)
    return list(marker.measure(read.images, config, SEEDS, ids=ids).y.r)


def _kept(file: Path) -> dict[str, list[float]]:
    """Return what an earlier call measured; nothing from a file that is damaged or missing."""
    try:
        with open_regular(file) as opened:
            content = json.load(opened)
    except (OSError, ValueError, RecursionError):
        return {}
    pairs: Iterable[tuple[str, Any]] = content.items() if isinstance(content, dict) else ()
    return {key: rs for key, rs in pairs if _is_measured(rs)}


def _is_measured(rs: object) -> bool:
    return isinstance(rs, list) and len(rs) == len(SEEDS) and all(type(r) is float for r in rs)
