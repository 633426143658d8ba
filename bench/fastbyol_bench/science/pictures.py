"""The pictures of docs/science.md beside the phase diagrams: futures, and the mechanism.

python -m fastbyol_bench.science.pictures    # from bench/results/science, into it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbyol.evaluation.collapse import COLLAPSED_ABOVE
from fastbyol.show import figures
from fastbyol.show.figures import BLUE, GREEN, INK, ORANGE, PURPLE, RED, SKY
from fastbyol_bench.science.forks import FUTURES, ROWS
from fastbyol_bench.science.mechanism import PARTS, SEEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {"deepest": "-", "first": "--"}
COLOURS = (INK, BLUE, ORANGE, GREEN, RED, PURPLE, SKY)


def draw_futures(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw 1 - the cosine of negative pairs from the fork on: a panel a future, a line a seed.

    Solid are the networks forked at their deepest collapse, dashed those at the first.
    """
    figure = figures.blank(9.0, 4.4)
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for name, axes, colour in zip(FUTURES, panels, COLOURS, strict=False):
        for row in (row for row in rows if row["future"] == name):
            epochs = np.arange(1, len(row["neg_cos"]) + 1)
            per_epoch = row["steps"] / len(epochs)
            since = epochs * per_epoch - row["step"]
            distance, style = 1 - np.array(row["neg_cos"]), STYLES[row["moment"]]
            axes.semilogy(since, distance, color=colour, lw=0.9, ls=style)
        axes.axvline(0, color=INK, lw=0.5, ls=":")
        axes.axhline(1 - COLLAPSED_ABOVE, color=INK, lw=0.5, ls=":")
        axes.set_title(name, fontsize=8.5)
    figure.supxlabel("steps since the fork", fontsize=8.5)
    figure.supylabel("1 - cosine of negative pairs", fontsize=8.5)
    return figure


def draw_mechanism(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the same four panels of the first run of each data set and rate, a column each."""
    runs = list({(run["data"], run["lr"]): run for run in reversed(runs)}.values())[::-1]
    figure = figures.blank(4.2 * len(runs), 8.6)
    grid = figure.subplots(4, len(runs), sharex="col", sharey="row", squeeze=False)
    for column, run in enumerate(runs):
        spreads, gradients, rates, growth = grid[:, column]
        looks = run["looks"]
        steps = [look["step"] for look in looks]
        _draw_spreads(spreads, steps, looks)
        _draw_gradients(gradients, steps, looks)
        at = [row["step"] for row in run["curves"]]
        rates.semilogy(at, [row["early_rate"] for row in run["curves"]], color=BLUE, label="rate")
        moves = [row["early_move"] for row in run["curves"]]
        rates.semilogy(at, moves, color=ORANGE, label="rate |g| / |w|")
        growth.plot(at, [row["growth"] for row in run["curves"]], color=BLUE)
        growth.axhline(0, color=INK, lw=0.5)
        growth.set_yscale("symlog", linthresh=1e-3)
        growth.set_xlabel("step")
        spreads.set_title(f"{run['data']}, LARS {run['lr']:g}, seed {run['seed']}", fontsize=8.5)
    labels = ("spread after each part", "gradient of layer1 and layer2", "layer1 and layer2")
    for axes, label in zip(grid[:, 0], (*labels, "growth of std_z per step"), strict=True):
        axes.set_ylabel(label)
    for axes in grid[:3, -1]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)
    return figure


def _draw_spreads(axes: Axes, steps: Sequence[int], looks: Sequence[Mapping[str, Any]]) -> None:
    colours = figures.viridis(len(PARTS))
    for part, colour in zip(PARTS, colours, strict=True):
        axes.semilogy(steps, [look["spread"][part] for look in looks], color=colour, label=part)


def _draw_gradients(axes: Axes, steps: Sequence[int], looks: Sequence[Mapping[str, Any]]) -> None:
    for name, colour in (("signal", BLUE), ("noise", ORANGE)):
        values = np.array([look["gradient"]["early"][name] for look in looks])
        axes.semilogy(steps, np.where(values > 0, values, np.nan), color=colour, label=name)


def main() -> None:
    """Draw what is kept."""
    drawn = ((ROWS, draw_futures), (SEEN, draw_mechanism))
    for file, draw in drawn:
        if file.exists():
            with figures.settings():
                picture = draw(json.loads(file.read_text("utf-8")))
                picture.savefig(file.with_suffix(".png"), dpi=140, facecolor="white")


if __name__ == "__main__":
    main()
