"""The pictures of the ablations' report: the post's figures with ours, maps of LARS's rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from fastbyol.ablations.claims import CLAIMS, Source
from fastbyol.ablations.curves import appendix, published
from fastbyol.ablations.evidence import PUBLISHED_STEPS_PER_EPOCH, Evidence
from fastbyol.ablations.suite import Record, Suite
from fastbyol.evaluation.collapse import COLLAPSED_ABOVE
from fastbyol.show.figures import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, blank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, RED, GREEN, PURPLE)
LABELS = {
    "loss": "loss",
    "neg_cos": "cosine of z and z'",
    "pos_cos": "cosine of z and z'",
    "accuracy": "accuracy, %",
}
DASHES = (0, (3, 1.5))
# A curve keeps about a point per pixel of a picture that is 400 wide. A mini run has fewer.
MAX_POINTS = 400
MAP_COLUMNS = 240
# At about 330 pt a phone shows the type at its size.
WIDTH = 4.6


@dataclass(frozen=True, eq=False)
class Panel:
    """A figure of the post: its name, its series in order, and the claims that it belongs to."""

    figure: str
    claim: str
    sources: tuple[Source, ...]

    @property
    def label(self) -> str:
        """The label of the vertical axis."""
        return LABELS.get(self.sources[0].measure, "rate")


def panels() -> tuple[Panel, ...]:
    """Return the fourteen figures with all their series, in the order of the published file."""
    by_figure: dict[str, list[tuple[str, Source]]] = {figure: [] for figure, _ in published()}
    for claim in CLAIMS:
        for source in claim.sources:
            by_figure[source.figure].append((claim.id, source))
    return tuple(
        Panel(
            figure,
            ", ".join(dict.fromkeys(claim for claim, _ in rows)),
            tuple(source for _, source in rows),
        )
        for figure, rows in by_figure.items()
    )


def band(runs: Sequence[Evidence], measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs (E,), and least, median and most (3, E) of the seeds measured there."""
    epochs = np.unique(np.concatenate([run.epoch for run in runs]))
    table = np.full((len(runs), len(epochs)), np.nan)
    for row, run in zip(table, runs, strict=True):
        group = measure.removeprefix("rate:")
        row[np.searchsorted(epochs, run.epoch)] = (
            getattr(run, measure) if group == measure else run.rate_by_epoch(group)
        )
    measured = np.isfinite(table).any(axis=0)
    # Without a measured epoch numpy leaves out the axis of the three.
    return epochs[measured], np.nanquantile(table[:, measured], (0.0, 0.5, 1.0), axis=0).reshape(
        3, -1
    )


def draw_panel(panel: Panel, suite: Suite) -> Figure:
    """Draw our seeds as a line with a band over the published curve, which is dashed.

    Where the lengths differ, each has an axis of its own, ours at the bottom and the post's on top,
    both stretched to the picture's width. Shapes and order can then be compared, epochs cannot.
    """
    made = blank(WIDTH, 3.0)
    ours = made.add_subplot()
    runs = _runs(panel, suite)
    # At full scale an epoch is the post's only if it has as many steps.
    same_length = suite.scale == "full" and all(
        run.steps_per_epoch == PUBLISHED_STEPS_PER_EPOCH for run in runs
    )
    theirs = ours if same_length or not runs else ours.twiny()
    _draw_curves(ours, theirs, panel, suite, alpha=0.75)
    theirs.set_xlim(0, max(published()[s.figure, s.series].epoch[-1] for s in panel.sources))
    if theirs is ours:
        ours.set_xlabel("epoch" if runs else "epoch, published (ours: not run)")
        return made
    ours.set_xlabel("epoch, ours")
    ours.set_xlim(0, max((run.epochs - 1 for run in runs), default=1) or 1)
    theirs.set_xlabel("epoch, published", fontsize=7.5)
    theirs.tick_params(labelsize=7.5)
    theirs.spines["top"].set(visible=True, linestyle=DASHES)
    return made


def _runs(panel: Panel, suite: Suite) -> list[Evidence]:
    return [run for source in panel.sources for run in suite.evidence(source.arm)]


def _draw_curves(
    ours: Axes, theirs: Axes, panel: Panel, suite: Suite, alpha: float | None = None
) -> None:
    """Draw the panel's curves with the vertical axis that the post has."""
    for source, colour in zip(panel.sources, COLOURS, strict=False):
        curve = published()[source.figure, source.series]
        theirs.plot(curve.epoch, curve.value, color=colour, lw=0.9, ls=DASHES, alpha=alpha)
        _draw_seeds(ours, suite.evidence(source.arm), source.measure, colour)
    ours.set_ylabel(panel.label)
    measure = panel.sources[0].measure
    if measure == "loss":
        ours.set_yscale("log")
    elif measure in ("neg_cos", "pos_cos"):
        ours.set_ylim(min(0.0, ours.dataLim.y0), 1.02)
    elif measure == "accuracy":
        ours.set_ylim(0, 100)
    else:
        ours.set_ylim(bottom=0)


def _draw_seeds(axes: Axes, runs: Sequence[Evidence], measure: str, colour: str) -> None:
    if not runs:
        return
    epochs, (low, median, high) = band(runs, measure)
    every = max(1, -(-len(epochs) // MAX_POINTS))
    epochs, low, median, high = (part[::every] for part in (epochs, low, median, high))
    if len(runs) > 1:
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
    axes.plot(epochs, median, color=colour, lw=1.4, marker=_marker(epochs), ms=3)


def _marker(points: np.ndarray) -> str:
    """Return a marker for curves that are too short for a line."""
    return "o" if len(points) < 3 else ""


def ceilings(panel: Panel, suite: Suite) -> tuple[float, ...]:
    """Return the upper bounds lr eta / wd of the rates that a figure shows, ascending."""
    if not panel.sources[0].measure.startswith("rate:"):
        return ()
    return tuple(
        sorted({run.rate_ceiling for run in _runs(panel, suite) if run.rate_ceiling is not None})
    )


def draw_arm(arm: str, suite: Suite) -> Figure:
    """Draw loss, cosines, the early layers' gradient and accuracy of one arm, a line per seed."""
    made = blank(WIDTH, 3.4)
    (loss, cosines), (gradient, accuracy) = made.subplots(2, 2, sharex=True)
    for run in suite.evidence(arm):
        loss.semilogy(run.epoch, run.loss, color=BLUE, lw=0.9)
        cosines.plot(run.epoch, run.pos_cos, color=GREEN, lw=0.9)
        cosines.plot(run.epoch, run.neg_cos, color=RED, lw=0.9)
        gradient.semilogy(run.epoch, _positive(run.early_gradient_by_epoch()), color=PURPLE, lw=0.9)
        measured = np.isfinite(run.accuracy)
        accuracy.plot(run.epoch[measured], run.accuracy[measured], color=ORANGE, lw=0.9)
    cosines.set_ylim(min(0.0, cosines.dataLim.y0), 1.02)
    accuracy.set_ylim(0, 100)
    titles = ("loss", "cosine of z and z'", "gradient of conv1, layer1", "accuracy, %")
    for axes, title in zip((loss, cosines, gradient, accuracy), titles, strict=True):
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in (gradient, accuracy):
        axes.set_xlabel("epoch", fontsize=7.5)
    return made


def draw_rates(run: Record) -> Figure:
    """Draw the rate of every weight matrix and kernel over the steps on a logarithmic colour scale.

    The layers nearest to the input are on top.
    """
    from matplotlib.colors import LogNorm

    names, edges, rates = rate_map(run)
    ceiling = run.evidence.rate_ceiling
    made = blank(7.2, 0.9 + 0.13 * len(names))
    axes = made.add_subplot()
    positive = rates[np.isfinite(rates) & (rates > 0)]
    top = max(float(positive.max()), ceiling or 0.0) if len(positive) else 1.0
    low = max(float(np.quantile(positive, 0.01)), top * 1e-6) if len(positive) else 0.1
    image = axes.imshow(
        _positive(rates), aspect="auto", interpolation="nearest", norm=LogNorm(min(low, top / 2),
        top), cmap="viridis",
        extent=(float(edges[0]), float(edges[-1]), len(names) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("step")
    bar = made.colorbar(image, ax=axes, pad=0.01, label="rate")
    if ceiling is not None:
        bar.ax.axhline(ceiling, color=RED, lw=2)
    return made


def rate_map(run: Record) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return names of weight matrices and kernels (R,), first and end step (2,), and rates.

    Rates are float64 (R, columns), means over at most ``MAP_COLUMNS`` spans of steps.
    """
    matrices, steps = run.evidence.matrix_rates, run.evidence.rate_step
    rates = np.array(list(matrices.values()), dtype=np.float64)
    spans = np.array_split(np.arange(rates.shape[1]), min(MAP_COLUMNS, rates.shape[1]))
    table = np.stack([rates[:, span].mean(axis=1) for span in spans], axis=1)
    return (
        [name.removesuffix(".weight") for name in matrices],
        np.array([steps[0], steps[-1] + 1]),
        table,
    )


def _positive(table: np.ndarray) -> np.ndarray:
    """Replace zeros, which have no logarithm, by NaN, which leaves a gap."""
    return np.where(table > 0, table, np.nan)


def draw_readme_timing(suite: Suite) -> Figure:
    """Draw claim C12: layer1's rate and the loss at both learning rates, over the post's."""
    chosen = [panel for panel in panels() if panel.figure.startswith("lars_timing")]
    made = blank(9.0, 3.4, facecolor="white")
    for axes, panel in zip(made.subplots(1, 2), chosen, strict=True):
        theirs = axes.twiny()
        _draw_curves(axes, theirs, panel, suite)
        for source, colour in zip(panel.sources, COLOURS, strict=False):
            axes.plot([], [], color=colour, label=f"{source.arm} ({_count(suite, source.arm)})")
        axes.set_xlabel("epoch, ours (solid, band over seeds)")
        theirs.set_xlabel("epoch, published (dashed)")
        axes.legend(frameon=False, fontsize=8)
    made.axes[0].set_ylabel("rate of layer1")
    return made


def draw_readme_cosines(suite: Suite, arms: Iterable[str]) -> Figure:
    """Draw 1 - the negative cosine of ``arms``, seeds as bands, on a log axis."""
    made = blank(9.0, 3.4, facecolor="white")
    axes = made.add_subplot()
    present = [arm for arm in arms if suite.evidence(arm)]
    for arm, colour in zip(present, (BLUE, SKY, RED, PURPLE, ORANGE, GREEN), strict=False):
        epochs, (low, median, high) = band(suite.evidence(arm), "neg_cos")
        axes.fill_between(epochs, _distance(low), _distance(high), color=colour, alpha=0.2, lw=0)
        axes.semilogy(
            epochs, _distance(median), color=colour, lw=1.4, label=f"{arm} ({_count(suite, arm)})"
        )
    axes.axhline(1 - COLLAPSED_ABOVE, color="black", lw=0.7, ls=":")
    axes.annotate("collapsed below", (0.01, 1 - COLLAPSED_ABOVE), (0, -10),
    xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=7.5)  # fmt: skip
    axes.set_ylabel("1 - cosine of z and z', negative pairs")
    axes.set_xlabel("epoch")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return made


def draw_recoveries(suite: Suite) -> Figure:
    """Draw 1 - the negative cosine over steps, a line per seed, over the published curve.

    Each arm has a panel, which also shows the settings that the post leaves open.
    """
    arms = [arm for arm in suite.runs if "@" not in arm]
    rows = -(-len(arms) // 3)
    made = blank(9.0, 0.4 + 2.6 * rows, facecolor="white")
    for index, arm in enumerate(arms):
        axes = made.add_subplot(rows, min(len(arms), 3), index + 1)
        _draw_recovery(axes, arm, suite)
        if index % 3 == 0:
            axes.set_ylabel("1 - cosine, negative pairs")
    return made


def _draw_recovery(axes: Axes, arm: str, suite: Suite) -> None:
    from matplotlib.ticker import NullFormatter

    theirs = {
        source.arm: source
        for claim in CLAIMS
        for source in claim.sources
        if source.measure == "neg_cos"
    }
    if source := theirs.get(arm):
        curve = published()[source.figure, source.series]
        # The figures are read to this accuracy: a cosine of 1 may be that much less.
        read_to = appendix()["accuracy_of_reading"]["cosine"]
        distance, steps = (
            np.maximum(1 - curve.value, read_to),
            (curve.epoch + 1) * PUBLISHED_STEPS_PER_EPOCH,
        )
        axes.plot(
            steps, distance, color="black", lw=0.9, ls=DASHES, label=f"published, read to {read_to}"
        )
    open_settings = [name for name in suite.runs if name.startswith(f"{arm}@")]
    for name, colour in zip((arm, *open_settings), cycle(COLOURS), strict=False):
        label: str | None = f"{name.partition('@')[2] or 'ours'} ({_count(suite, name)})"
        for run in suite.evidence(name):
            steps = (run.epoch + 1) * run.steps_per_epoch
            axes.plot(
                steps,
                _distance(run.neg_cos),
                color=colour,
                lw=1.1,
                marker=_marker(steps),
                label=label,
            )
            label = None
    axes.set(xscale="log", yscale="log", xlabel="step")
    # Within one decade matplotlib labels the minor ticks too, and they overlap.
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(arm, fontsize=9)
    axes.axhline(1 - COLLAPSED_ABOVE, color="black", lw=0.7, ls=":")
    axes.legend(frameon=False, fontsize=7)


def _distance(cosine: np.ndarray) -> np.ndarray:
    """Return 1 - cosine, kept above the rounding of a mean of fp32 cosines."""
    return np.asarray(np.maximum(1 - cosine, 1e-8))


def _count(suite: Suite, arm: str) -> str:
    count = len(suite.evidence(arm))
    return f"{count} seed{'s' * (count != 1)}" if count else "not run"
