"""A picture of embeddings in the plane, coloured by class."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.errors import UsageError
from fastbyol.evaluation.plane import Plane
from fastbyol.show import figures
from fastbyol.show.figures import BLUE, GREEN, INK, ORANGE, PAPER, PURPLE, RED, SKY
from fastbyol.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".html")
# Colours go round before shapes do, so that neighbours differ in what is seen first.
_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
_SHAPES = "osD^vPX*"
# As many classes can be told apart.
MOST_CLASSES = len(_COLOURS) * len(_SHAPES)
_GREY = "#999999"
# More names in the picture itself would cover the points.
_MOST_NAMES = 12
# Lines of a legend beside the picture.
_LEGEND_LINES = 20
_LONGEST = 24
# Width and height that a name in the picture takes, of the axes' longer side.
_NAME_ROOM = np.array([0.12, 0.035])


def check_name(path: Path) -> None:
    """Raise UsageError for a name that says no format, and where matplotlib is missing."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: name a picture that ends in {' or '.join(SUFFIXES)}")
    figures.demand("--picture")


def figure(
    plane: Plane,
    labels: NDArray[np.int64] | None,
    class_names: Sequence[str],
    facts: Sequence[str] = (),
) -> Figure:
    """Return the picture: a point for each row of ``plane``, in the colour and shape of its label.

    Images without a label, and those of classes beyond ``MOST_CLASSES``, are grey. ``facts`` are
    lines above it.
    """
    made = figures.blank(7.6, 5.4)
    axes = made.add_subplot()
    entries = draw(axes, plane, labels, class_names)
    if labels is not None:
        add_legend(axes, entries)
    _plain(axes.set_title("\n".join(map(printable, facts)), loc="left", fontsize=8.5))
    return made


def draw(
    axes: Axes,
    plane: Plane,
    labels: NDArray[np.int64] | None,
    class_names: Sequence[str],
    *,
    named: bool = True,
) -> list[tuple[Any, str]]:
    """Draw what ``figure`` returns into ``axes``, and return the entries of its legend.

    Up to ``_MOST_NAMES`` classes are named in the picture, too, if it is to be ``named``.
    """
    owners = np.full(len(plane.points), -1) if labels is None else np.asarray(labels)
    shown = [int(k) for k in np.unique(owners) if 0 <= k < MOST_CLASSES]
    others = ~np.isin(owners, shown)
    entries: list[tuple[Any, str]] = []
    if others.any():
        x, y = plane.points[others].T
        marks = axes.scatter(x, y, s=7, color=_GREY, alpha=0.5, linewidths=0)
        entries.append((marks, "other images"))
    for label in shown:
        x, y = plane.points[owners == label].T
        marks = axes.scatter(
            x, y, s=9, alpha=0.65, linewidths=0, color=_COLOURS[label % len(_COLOURS)],
            marker=_SHAPES[label // len(_COLOURS)],
        )  # fmt: skip
        entries.append((marks, _short(label, class_names)))
    # Before names are written, which keep their distance on the axes' scale.
    axes.set_aspect("equal", adjustable="datalim")
    if named and 0 < len(shown) <= _MOST_NAMES:
        middles = [np.median(plane.points[owners == label], axis=0) for label in shown]
        _add_names(axes, np.array(middles), [_short(label, class_names) for label in shown])
    for axis, name, share in zip("xy", plane.axes, plane.shares or (None, None), strict=True):
        suffix = "" if share is None else f", {100 * share:.1f} % of the variance"
        axes.set(**{f"{axis}label": f"{name}{suffix}"})
    if plane.shares is None:  # UMAP's units mean nothing
        axes.set(xticks=[], yticks=[])
    return entries


def add_legend(axes: Axes, entries: Sequence[tuple[Any, str]]) -> None:
    """Add a legend to the right of ``axes``."""
    legend = axes.legend(
        [marks for marks, _ in entries], ["-"] * len(entries), loc="upper left",
        bbox_to_anchor=(1.01, 1.0), frameon=False, markerscale=2.0, fontsize=8, handletextpad=0.1,
        ncols=-(-len(entries) // _LEGEND_LINES),
    )  # fmt: skip
    for text, (_, name) in zip(legend.get_texts(), entries, strict=True):
        _plain(text).set_text(name)
    handles: Any = legend.legend_handles
    for handle in handles:
        handle.set_alpha(1.0)


def _add_names(axes: Axes, middles: NDArray[np.float64], names: Sequence[str]) -> None:
    """Write each class's name at the middle of its points, or above others' names there."""
    box = {"boxstyle": "round,pad=0.15", "facecolor": PAPER, "alpha": 0.75, "linewidth": 0}
    x_limits, y_limits = axes.get_xlim(), axes.get_ylim()
    room = _NAME_ROOM * max(np.diff(x_limits)[0], np.diff(y_limits)[0])
    written: list[NDArray[np.float64]] = []
    for index in np.argsort(middles[:, 1], kind="stable"):
        at = middles[index].copy()
        while any((np.abs(at - other) < room).all() for other in written):
            at[1] += room[1] / 4
        written.append(at)
        name = axes.text(
            at[0], at[1], names[index], ha="center", va="center", fontsize=7.5, color=INK, bbox=box
        )
        _plain(name)


def _plain(text: Any) -> Any:
    """Have matplotlib show ``text`` as it is: a name may have dollars, which begin formulas."""
    text.set_parse_math(False)
    return text


def _short(label: int, class_names: Sequence[str]) -> str:
    name = printable(class_names[label]) if label < len(class_names) else str(label)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def content(
    suffix: str,
    plane: Plane,
    labels: NDArray[np.int64] | None,
    class_names: Sequence[str],
    facts: Sequence[str],
    title: str,
) -> bytes:
    """Return the file of ``figure``, of one of ``SUFFIXES``, with ``title`` and ``facts`` above."""
    with figures.settings(), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        if suffix == ".html":
            svg = figures.svg(figure(plane, labels, class_names))
            text = figures.page("embedding.html.j2", title=title, facts=facts, picture=svg)
            return text.encode()
        out = io.BytesIO()
        made = figure(plane, labels, class_names, (title, *facts))
        made.savefig(out, format="png", dpi=130, facecolor="white", metadata={"Software": None})
        return out.getvalue()
