"""The heat map of a measure over two axes of a sweep, with a panel for each value of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.errors import UsageError, check_choice
from fastbyol.runs.durable import writing
from fastbyol.show import figures
from fastbyol.show.figures import INK, blank
from fastbyol.sweeps.names import labels, text
from fastbyol.sweeps.results import SHARES, PointResult, Sweep
from fastbyol.sweeps.table import number, seeds, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches. A picture is at most so wide, however many cells it has; narrow ones bear no numbers.
CELL_W, CELL_H, MOST_INCHES, LEAST_FOR_TEXT = 0.72, 0.42, 40.0, 0.36
ROW_INCHES = 14.0
# Cells this bright take dark numbers: viridis is at .5 where both are read equally well.
BRIGHT = 0.55
GREY = "#8a8a8a"
MOST_LETTERS, MOST_IN_TITLE, MOST_UPRIGHT = 24, 40, 9
_SHARES_IN_WORDS = {
    "collapsed": "seeds that end collapsed",
    "recovered": "seeds that collapsed and do not end so",
    "collapses": "seeds that collapse",
    "leaves": "the collapsed that leave",
}


@dataclass(frozen=True)
class Layout:
    """Which axes lie where: ``x`` and ``y`` by dotted key, ``y`` is None where there is one axis.

    ``panels`` are the values of the other axes, a panel each.
    """

    x: str
    y: str | None
    panels: tuple[Mapping[str, object], ...]


def layout(
    axes: Mapping[str, Sequence[object]], x: str | None = None, y: str | None = None
) -> Layout:
    """Return the layout with the axes ``x`` and ``y``, by their keys or short names.

    Without them those with the most values are taken, the first of equals first. Raises UsageError
    for a name of no axis, and for one axis twice.
    """
    chosen_x, chosen_y = _key("--x", x, axes), _key("--y", y, axes)
    if chosen_x is not None and chosen_x == chosen_y:
        raise UsageError(f"--x and --y: are both {chosen_x}: name two axes")
    others = sorted(
        (key for key in axes if key not in (chosen_x, chosen_y)),
        key=lambda key: -len(axes[key]),
    )
    if chosen_x is None and others:
        chosen_x = others.pop(0)
    if chosen_y is None and others:
        chosen_y = others.pop(0)
    if chosen_x is None:  # the only axis was named as y
        chosen_x, chosen_y = chosen_y, None
    assert chosen_x is not None
    rest = [key for key in axes if key not in (chosen_x, chosen_y)]
    combined = product(*(axes[key] for key in rest))
    panels = tuple(dict(zip(rest, values, strict=True)) for values in combined)
    return Layout(chosen_x, chosen_y, panels)


def _key(option: str, name: str | None, axes: Mapping[str, object]) -> str | None:
    if name is None or name in axes:
        return name
    by_label = {label: key for key, label in labels(axes).items()}
    check_choice(option, name, (*axes, *by_label))
    return by_label[name]


def write(
    sweep: Sweep,
    measure: str,
    where: Layout,
    folder: Path,
    under: Mapping[object, str] | None = None,
) -> Path:
    """Draw as ``draw`` does into a PNG in ``folder``; return its path.

    Raises UsageError without matplotlib, FastbyolError where it cannot be written.
    """
    figures.demand()
    path = folder / f"{sweep.out.name}-{measure}.png"
    with writing(folder), figures.settings():
        folder.mkdir(parents=True, exist_ok=True)
        picture = draw(sweep, measure, where, under)
        picture.savefig(path, dpi=140, facecolor="white")
    return path


def draw(
    sweep: Sweep, measure: str, where: Layout, under: Mapping[object, str] | None = None
) -> Figure:
    """Draw the means of ``measure``: a cell a point, with its number in it.

    A point that no finished run has it of is hatched; one of which runs are left says how many are
    done. ``under`` has what stands below a value of the horizontal axis.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    means = [each.mean for point in sweep.points if (each := point.summary(measure))]
    low, high = (0.0, 1.0) if measure in SHARES else (min(means), max(means))
    colours = ScalarMappable(Normalize(low, high), colormaps["viridis"])
    xs, ys = sweep.axes[where.x], sweep.axes[where.y] if where.y else (None,)
    shown = _Cells(xs, ys, where, colours, measure, under or {})
    columns = _columns(where, sweep.axes, int(ROW_INCHES // (shown.width + 0.8)))
    lines = -(-len(where.panels) // columns)
    figure = blank(
        min(MOST_INCHES, columns * (shown.width + 0.9) + 1.0),
        min(MOST_INCHES, lines * (shown.height + (0.9 if len(where.panels) > 1 else 0.7))),
    )
    grid = figure.subplots(lines, columns, squeeze=False)
    every = [axes for line in grid for axes in line]
    for axes in every[len(where.panels) :]:
        axes.remove()
    points = {_place(point, sweep.axes): point for point in sweep.points}
    for index, (axes, panel) in enumerate(zip(every, where.panels, strict=False)):
        shown.draw(axes, panel, points, sweep.axes)
        if index % columns:
            axes.set_ylabel("")
            axes.set_yticks([])
        if index + columns < len(where.panels):
            axes.set_xlabel("")
            axes.set_xticks([])
    drawn = every[: len(where.panels)]
    bar = figure.colorbar(colours, ax=drawn, fraction=0.05, aspect=18, pad=0.02)
    bar.set_label(_measure_label(measure))
    bar.outline.set_visible(False)
    return figure


def _columns(where: Layout, axes: Mapping[str, Sequence[object]], most: int) -> int:
    """Return how many panels lie side by side: where it fits, the values of the last other axis."""
    last = next((len(axes[key]) for key in reversed([*where.panels[0]]) if len(axes[key]) > 1), 1)
    return last if last <= most else max(1, min(len(where.panels), most))


def _place(point: PointResult, keys: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(point.values[key] for key in keys)


def _measure_label(measure: str) -> str:
    if measure in SHARES:
        return f"share of {_SHARES_IN_WORDS[measure]}"
    return "accuracy, %" if measure == "accuracy" else measure


@dataclass(frozen=True)
class _Cells:
    """The cells of every panel."""

    xs: Sequence[object]
    ys: Sequence[object]
    where: Layout
    colours: Any
    measure: str
    under: Mapping[object, str]

    @property
    def width(self) -> float:
        """Of a panel, in inches."""
        return min(MOST_INCHES - 2.0, max(1.4, CELL_W * len(self.xs)))

    @property
    def height(self) -> float:
        """Of a panel, in inches: the name of the axis needs some."""
        return min(MOST_INCHES - 2.0, max(1.0 if self.where.y else CELL_H, CELL_H * len(self.ys)))

    def draw(
        self,
        axes: Axes,
        panel: Mapping[str, object],
        points: Mapping[tuple[object, ...], PointResult],
        keys: Mapping[str, object],
    ) -> None:
        """Draw the panel of the other axes' values ``panel``."""
        for row, y in enumerate(self.ys):
            for column, x in enumerate(self.xs):
                values = {**panel, self.where.x: x, **({self.where.y: y} if self.where.y else {})}
                self._cell(axes, column, row, points.get(tuple(values[key] for key in keys)))
        axes.set_xlim(-0.5, len(self.xs) - 0.5)
        axes.set_ylim(-0.5, len(self.ys) - 0.5)
        names = [_short(x) for x in self.xs]
        ticks = [
            f"{name}\n{self.under.get(x, '')}".strip()
            for name, x in zip(names, self.xs, strict=True)
        ]
        axes.set_xticks(range(len(self.xs)), ticks)
        axes.set_xlabel(labels(keys)[self.where.x])
        if max(map(len, names)) > MOST_UPRIGHT or len(self.xs) * CELL_W > self.width:
            axes.tick_params(axis="x", labelrotation=90 if self.width < len(self.xs) * 0.3 else 40)
        axes.set_yticks(range(len(self.ys)), list(map(_short, self.ys)) if self.where.y else [""])
        axes.set_ylabel(labels(keys)[self.where.y] if self.where.y else "")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        title = (f"{labels(keys)[key]} = {_short(panel[key], MOST_IN_TITLE)}" for key in panel)
        axes.set_title(", ".join(title), fontsize=8.5)

    def _cell(self, axes: Axes, column: int, row: int, point: PointResult | None) -> None:
        from matplotlib.patches import Rectangle

        summary = point.summary(self.measure) if point else None
        corner = (column - 0.5, row - 0.5)
        if summary is None:
            style: dict[str, Any] = {"facecolor": "none", "edgecolor": GREY, "hatch": "////"}
            axes.add_patch(Rectangle(corner, 1, 1, lw=0.0, **style))
            if point and point.left.get("failed"):
                self._write(axes, column, row, "failed", INK, 7.0)
            return
        assert point is not None
        colour = self.colours.to_rgba(summary.mean)
        cell = Rectangle(corner, 1, 1, facecolor=colour, edgecolor="none", lw=0.0)
        cell.set_gid(f"cell:{point.name}")
        axes.add_patch(cell)
        # Luminance as screens mix it (ITU-R BT.709).
        bright = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] > BRIGHT
        ink, words = "#000000" if bright else "#ffffff", number(summary.mean, self.measure)
        notes = [span(summary, self.measure)] if self.measure in SHARES else []
        notes += [] if len(point.done) == len(point.runs) else [seeds(point)]
        self._write(axes, column, row + 0.14 * len(notes), words, ink, 8.0)
        for line, note in enumerate(reversed(notes)):
            self._write(axes, column, row - 0.34 + 0.2 * line, note, ink, 5.0)

    def _write(self, axes: Axes, x: float, y: float, words: str, ink: str, points: float) -> None:
        if self.width / len(self.xs) >= LEAST_FOR_TEXT:
            axes.text(x, y, words, ha="center", va="center", color=ink, fontsize=points)


def _short(value: object, most: int = MOST_LETTERS) -> str:
    """Return a value in at most ``most`` letters; of a path the end counts."""
    words = f"{value:g}" if type(value) in (int, float) else text(value)
    if isinstance(value, tuple) and [*map(type, value)] == [float, float]:
        words = f"{value[0]:g} to {value[1]:g}"
    if len(words) <= most:
        return words
    return f"...{words[3 - most :]}" if "/" in words else f"{words[: most - 3]}..."
