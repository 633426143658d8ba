"""Phase diagrams: two keys crossed, which runs collapse, which of these leave, and the marker.

A run collapses if it is ever collapsed, and leaves if it does not end so. Runs may end early, once
their state is decided (``train.end_in``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.errors import UsageError, check_choice
from fastbyol.runs.durable import write_text, writing
from fastbyol.show import figures
from fastbyol.sweeps import grid, heat_map, table
from fastbyol.sweeps.grid import Grid
from fastbyol.sweeps.heat_map import Layout
from fastbyol.sweeps.names import labels, text
from fastbyol.sweeps.report import CSV
from fastbyol.sweeps.results import PointResult, Sweep

HTML = "phase.html"
MEASURES = ("collapses", "leaves")
# What ends a run early unless the file says otherwise. All 51 of 90 runs on Fashion-MNIST that
# collapsed did so in their second or third epoch (bench/results/science/fashion-mnist).
END_IN = [["recovering", 3], ["healthy", 5], ["dead", 1]]


def names() -> tuple[str, ...]:
    """Return the names of the diagrams in ``configs/ablations/phases.toml``."""
    return tuple(_document()[0]["diagrams"])


def read(target: str, **stronger: Any) -> Grid:
    """Return the grid of a diagram's name, or of a file; ``stronger`` are ``grid.make``'s options.

    Raises UsageError as ``grid.make`` does, and where not exactly two keys are crossed.
    """
    if target in names():
        document, where = _document()
        file = _file()
        crossed = document.pop("diagrams")[target]
        for key in crossed:  # settings of the other diagrams
            section, _, name = key.partition(".")
            document.get(section, {}).pop(name, None)
        document["grid"] = crossed
        where = _renamed(where, "grid", f"diagrams.{target}")
    else:
        file = Path(target)
        if not file.exists() and file.suffix != ".toml":
            check_choice("diagram", target, names())
        document, where = config_io.read_document(config_io.read_text(file), target)
    _end_early(document)
    made = grid.make(document, where, file, **stronger)
    if len(made.axes) != 2:
        raise UsageError(
            f"{file}: crosses {len(made.axes)} keys, a phase diagram two: "
            "`fastbyol sweep` takes any number"
        )
    return made


def layout(sweep: Sweep) -> Layout:
    """Return the layout of two axes: the first lies horizontally, as in the file."""
    if len(sweep.axes) != 2:
        raise UsageError(
            f"{sweep.out}: a sweep over {len(sweep.axes)} keys, a phase diagram has two: "
            "see `fastbyol sweep`"
        )
    x, y = sweep.axes
    return heat_map.layout(sweep.axes, x, y)


def header(sweep: Sweep) -> list[str]:
    """Return the names of the columns."""
    more = ("seeds", "collapse", "95 %", "of these leave", "95 %", "after epochs", "")
    return [*labels(sweep.axes).values(), *more]


def rows(sweep: Sweep) -> list[list[str]]:
    """Return a row a point: who collapses and who leaves, with intervals, and after how long."""
    return [_row(point, sweep) for point in sweep.points]


def _row(point: PointResult, sweep: Sweep) -> list[str]:
    cells = [*(text(point.values[key]) for key in sweep.axes), table.seeds(point)]
    for measure in MEASURES:
        summary = point.summary(measure)
        if summary is None:
            cells += ["", ""]
        else:
            hits = round(summary.mean * summary.count)
            cells += [f"{hits} of {summary.count}", table.span(summary, measure)]
    left = [run.measures["epochs_collapsed"] for run in point.done if run.measures.get("leaves")]
    return [*cells, f"{statistics.median(left):g}" if left else "", table.counts(point.left)]


def write(sweep: Sweep, under: Mapping[object, str], png: Path | None = None) -> list[Path]:
    """Write all runs as CSV, and where matplotlib is the page and, into ``png``, its pictures.

    ``under`` is what stands below each column. Return the paths. Raises FastbyolError where one
    cannot be written.
    """
    paths = [sweep.out / CSV]
    with writing(paths[0]):
        write_text(paths[0], table.as_csv(sweep))
    if not figures.available():
        return paths
    where = layout(sweep)
    paths.append(sweep.out / HTML)
    with writing(paths[1]), figures.settings():
        pictures = {
            measure: figures.svg(heat_map.draw(sweep, measure, where, under))
            for measure in MEASURES
            if any(measure in run.measures for run in sweep.runs)
        }
        write_text(paths[1], _page(sweep, pictures))
    if png is not None:
        paths += [heat_map.write(sweep, measure, where, png, under) for measure in pictures]
    return paths


def _page(sweep: Sweep, pictures: Mapping[str, Any]) -> str:
    return figures.page(
        "phase.html.j2", "fastbyol.sweeps", title=f"Phase diagram {sweep.out.name}",
        axes=list(sweep.axes), pictures=pictures, num_points=len(sweep.points),
        num_runs=len(sweep.runs), num_done=sum(run.is_done for run in sweep.runs),
        header=header(sweep), rows=rows(sweep),
        # How a finished run came about says nothing of it: equal diagrams are equal pages.
        notes=[
            f"{run.point} seed {run.seed}: {run.note}"
            for run in sweep.runs
            if run.note and not run.is_done
        ],
    )  # fmt: skip


def _file() -> Path:
    return config_io.config_folder() / "ablations" / "phases.toml"


def _document() -> tuple[dict[str, Any], Callable[[str], str]]:
    return config_io.read_document(config_io.read_text(_file()), str(_file()))


def _renamed(where: Callable[[str], str], name: str, there: str) -> Callable[[str], str]:
    """Return ``where`` for a document in which the table ``there`` is called ``name``."""

    def renamed(key: str) -> str:
        return where(key.replace(name, there, 1) if key.startswith(name) else key)

    return renamed


def _end_early(document: dict[str, Any]) -> None:
    """Let runs end once their state is decided, unless ``document`` says when they end."""
    train = document.setdefault("train", {})
    if isinstance(train, dict) and "train.end_in" not in document:
        train.setdefault("end_in", END_IN)
