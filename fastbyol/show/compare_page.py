"""Some runs in one page: their curves over each other, beside the settings in which they differ."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbyol.errors import UsageError
from fastbyol.registry.comparison import Comparison
from fastbyol.runs.durable import write_output
from fastbyol.show import figures, run_report
from fastbyol.show.figures import PALETTE
from fastbyol.show.run_report import RunCurves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "compare.html"
_COLOURS = ("blue", "orange", "green", "red", "purple", "sky")
# Kinds of lines, for a page and for matplotlib: as many times as many runs can be told apart.
_DASHES = ("", "6 2", "2 2", "8 2 2 2")
# More points than a picture has columns make it heavy, and noise hides the curves below.
_POINTS = 800
_log = logging.getLogger(__name__)


def style(index: int) -> tuple[str, str]:
    """Return the colour's name in ``PALETTE`` and the dashes, as SVG has them, of a run."""
    return _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]


def _metric(curves: RunCurves, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a step's metric over epochs, as means of as many neighbours as make it short."""
    values = curves.metrics.get(name, np.full(len(curves.epochs), np.nan))
    every = -(-len(values) // _POINTS)
    starts = np.arange(0, len(values), every)
    counts = np.diff(np.append(starts, len(values)))
    return tuple(np.add.reduceat(each, starts) / counts for each in (curves.epochs, values))  # type: ignore[return-value]


def _accuracy(curves: RunCurves, _: str) -> tuple[np.ndarray, np.ndarray]:
    points = run_report.accuracy_points(curves)
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


# Name, heading, ends of the axis or None for a logarithmic one, and the curve.
PICTURES = (
    ("loss", "Loss", None, _metric),
    ("neg_cos", "Cosine of z and z', negative pairs: 1 means collapse", (-0.05, 1.02), _metric),
    ("pos_cos", "Cosine of z and z', positive pairs", (-0.05, 1.02), _metric),
    ("accuracy", "Linear accuracy, %", (0.0, 100.0), _accuracy),
)


def figure(every: Sequence[RunCurves | None], picture: tuple[Any, ...]) -> Figure:
    """Return one of ``PICTURES``; None stands for a run without a step, which has no curve."""
    name, _, ends, curve = picture
    made = figures.blank(8.6, 3.0)
    axes = made.add_subplot()
    least = 0.0
    for index, curves in enumerate(every):
        if curves is None:
            continue
        colour, dashes = style(index)
        # Lines of a picture have no names: they would be read as formulas.
        lines = (0, tuple(map(float, dashes.split()))) if dashes else "-"
        marks: dict[str, Any] = {"marker": "o", "ms": 3} if curve is _accuracy else {}
        epochs, values = curve(curves, name)
        if ends is None:
            values = np.maximum(values, 1e-12)
        least = min(least, float(np.nanmin(values, initial=0.0)))
        axes.plot(epochs, values, color=PALETTE[colour][0], lw=1.1, ls=lines, **marks)
    if ends is None:
        axes.set_yscale("log")
    else:
        axes.set_ylim(min(ends[0], least), ends[1])
    axes.set_xlabel("epoch")
    axes.margins(x=0.01)
    return made


def page(compared: Comparison, every: Sequence[RunCurves | None]) -> str:
    """Return the comparison as HTML; ``every`` has a run's curves at the run's position."""
    head, *lines = compared.table()
    with figures.settings():
        pictures = [(each[1], figures.svg(figure(every, each))) for each in PICTURES]
    return figures.page(
        "compare.html.j2",
        title=f"{len(compared.rows)} runs",
        runs=[(name, *style(index)) for index, name in enumerate(head[1:])],
        settings=lines[: len(compared.keys)],
        measures=lines[len(compared.keys) :],
        pictures=pictures,
    )


def write(compared: Comparison, out: Path | None = None) -> Path:
    """Write the page to ``out``, or beside the first run's folder. Return where it is.

    Raises UsageError where matplotlib is missing, FastbyolError where it cannot be written.
    """
    figures.demand()
    first = Path(compared.rows[0].path)
    if first.name in ("", ".."):
        first = first.resolve()
    target = out or first.parent / PAGE
    every = [_curves(Path(row.path)) for row in compared.rows]
    write_output(target, page(compared, every).encode())
    return target


def _curves(run: Path) -> RunCurves | None:
    """Return what a run recorded; None, logged, where nothing can be drawn."""
    try:
        return run_report.read(run, log_changes=False)
    except UsageError as error:
        _log.warning("%s", error)
        return None
