"""The pictures of the ablations' report: counterparts of the post's figures, one card per arm, and maps of LARS's rates.

Ours and the post's curves are drawn over each other. Where the lengths differ each keeps an axis of its own, ours at the bottom
and the post's on top, both stretched to the picture's width: shapes and order can be compared then, epochs cannot.
"""

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
from fastbyol.show.figures import BLUE, GREEN, ORANGE, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, RED, GREEN, PURPLE)
LABELS = {"loss": "loss", "neg_cos": "cosine of z and z'", "pos_cos": "cosine of z and z'", "accuracy": "accuracy, %"}
# Points a curve keeps: one to a pixel of a picture that is some 400 wide. A run at mini scale has fewer.
MOST_POINTS = 400
MAP_COLUMNS = 240
# About 330 pt, so that a phone shows the type at its size.
SIZE = (4.6, 3.0)


@dataclass(frozen=True, eq=False)
class Panel:
    """A figure of the post with our counterpart: its name, its series in order, and the claim it belongs to."""

    figure: str
    claim: str
    sources: tuple[Source, ...]

    @property
    def label(self) -> str:
        """What the vertical axis shows."""
        return LABELS.get(self.sources[0].measure, "rate")


def panels() -> tuple[Panel, ...]:
    """The fourteen figures, in the order of the published file, with all their series."""
    by_figure: dict[str, list[tuple[str, Source]]] = {figure: [] for figure, _ in published()}
    for claim in CLAIMS:
        for source in claim.sources:
            by_figure[source.figure].append((claim.id, source))
    return tuple(
        Panel(figure, ", ".join(dict.fromkeys(claim for claim, _ in rows)), tuple(source for _, source in rows))
        for figure, rows in by_figure.items()
    )


def values(run: Evidence, measure: str) -> np.ndarray:
    """What ``Source.measure`` names, float64 (E,)."""
    if measure.startswith("rate:"):
        return run.rate_by_epoch(measure.removeprefix("rate:"))
    return np.asarray(getattr(run, measure))


def band(runs: Sequence[Evidence], measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs (E,), and least, median and most over the seeds (3, E), each over the seeds that have been measured there."""
    epochs = np.unique(np.concatenate([run.epoch for run in runs]))
    table = np.full((len(runs), len(epochs)), np.nan)
    for row, run in zip(table, runs, strict=True):
        row[np.searchsorted(epochs, run.epoch)] = values(run, measure)
    known = np.isfinite(table).any(axis=0)
    return epochs[known], np.nanquantile(table[:, known], (0.0, 0.5, 1.0), axis=0)


def draw_panel(panel: Panel, suite: Suite) -> Figure:
    """Our seeds as a line with a band over the published curve, dashed."""
    from matplotlib.figure import Figure

    made = Figure(figsize=SIZE, layout="constrained")
    ours = made.add_subplot()
    theirs = ours if _same_length(panel, suite) else ours.twiny()
    for source, colour in zip(panel.sources, COLOURS, strict=False):
        curve = published()[source.figure, source.series]
        theirs.plot(curve.epoch, curve.value, color=colour, lw=0.9, ls=(0, (3, 1.5)), alpha=0.75)
        _draw_seeds(ours, suite.evidence(source.arm), source.measure, colour)
    _finish(ours, panel)
    theirs.set_xlim(0, max(published()[s.figure, s.series].epoch[-1] for s in panel.sources))
    if theirs is ours:
        ours.set_xlabel("epoch" if _shown(panel, suite) else "epoch, published (ours: not run)")
        return made
    ours.set_xlabel("epoch, ours")
    ours.set_xlim(0, max((run.epochs - 1 for run in _shown(panel, suite)), default=1) or 1)
    theirs.set_xlabel("epoch, published", fontsize=7.5)
    theirs.tick_params(labelsize=7.5)
    theirs.spines["top"].set(visible=True, linestyle=(0, (3, 1.5)))
    return made


def _shown(panel: Panel, suite: Suite) -> list[Evidence]:
    return [run for source in panel.sources for run in suite.evidence(source.arm)]


def _same_length(panel: Panel, suite: Suite) -> bool:
    """Whether one axis serves both: nothing of ours is there, or at full scale, with epochs of as many steps."""
    shown = _shown(panel, suite)
    return not shown or (suite.scale == "full" and all(run.steps_per_epoch == PUBLISHED_STEPS_PER_EPOCH for run in shown))


def _draw_seeds(axes: Axes, runs: Sequence[Evidence], measure: str, colour: str) -> None:
    if not runs:
        return
    epochs, (low, middle, high) = band(runs, measure)
    every = max(1, -(-len(epochs) // MOST_POINTS))
    epochs, low, middle, high = (part[::every] for part in (epochs, low, middle, high))
    if len(runs) > 1:
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
    marker = "o" if len(epochs) < 3 else ""
    axes.plot(epochs, middle, color=colour, lw=1.4, marker=marker, ms=3)


def _finish(axes: Axes, panel: Panel) -> None:
    """The axis that the post has: logarithmic losses, cosines to 1, percent, rates from 0."""
    measure = panel.sources[0].measure
    axes.set_ylabel(panel.label)
    if measure == "loss":
        axes.set_yscale("log")
    elif measure in ("neg_cos", "pos_cos"):
        low = min(0.0, axes.dataLim.y0)
        axes.set_ylim(low, 1.02)
    elif measure == "accuracy":
        axes.set_ylim(0, 100)
    else:
        axes.set_ylim(bottom=0)


def ceilings(panel: Panel, suite: Suite) -> tuple[float, ...]:
    """The ceilings lr eta / wd of the arms whose rates a figure shows, ascending."""
    if not panel.sources[0].measure.startswith("rate:"):
        return ()
    return tuple(sorted({run.rate_ceiling for run in _shown(panel, suite) if run.rate_ceiling is not None}))


def draw_arm(arm: str, suite: Suite) -> Figure:
    """Loss, cosines, the early layers' gradient and rates (or accuracy, where none adapts) of one arm, a line per seed."""
    from matplotlib.figure import Figure

    runs = suite.evidence(arm)
    made = Figure(figsize=(4.6, 3.4), layout="constrained")
    (loss, cosines), (gradient, last) = made.subplots(2, 2, sharex=True)
    for run in runs:
        loss.semilogy(run.epoch, run.loss, color=BLUE, lw=0.9)
        cosines.plot(run.epoch, run.pos_cos, color=GREEN, lw=0.9)
        cosines.plot(run.epoch, run.neg_cos, color=RED, lw=0.9)
        gradient.semilogy(run.epoch, _positive(run.early_gradient_by_epoch()), color=PURPLE, lw=0.9)
        last.plot(run.epoch[np.isfinite(run.accuracy)], run.accuracy[np.isfinite(run.accuracy)], color=ORANGE, lw=0.9)
    cosines.set_ylim(min(0.0, cosines.dataLim.y0), 1.02)
    last.set_ylim(0, 100)
    for axes, title in zip(
        (loss, cosines, gradient, last),
        ("loss", "cosine of z and z'", "gradient of conv1, layer1", "accuracy, %"),
        strict=True,
    ):
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in (gradient, last):
        axes.set_xlabel("epoch", fontsize=7.5)
    return made


def draw_rates(run: Record) -> Figure:
    """The rate of every weight matrix and kernel over the steps, on a logarithmic colour scale, the network's input on top."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names, edges, rates = rate_map(run)
    made = Figure(figsize=(7.2, 0.9 + 0.13 * len(names)), layout="constrained")
    axes = made.add_subplot()
    known = rates[np.isfinite(rates) & (rates > 0)]
    top = max(float(known.max()), run.evidence.rate_ceiling or 0.0) if len(known) else 1.0
    low = max(float(np.quantile(known, 0.01)), top * 1e-6) if len(known) else 0.1
    image = axes.imshow(
        _positive(rates), aspect="auto", interpolation="nearest", norm=LogNorm(min(low, top / 2), top), cmap="viridis",
        extent=(float(edges[0]), float(edges[-1]), len(names) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("step")
    bar = made.colorbar(image, ax=axes, pad=0.01, label="rate")
    if run.evidence.rate_ceiling is not None:
        bar.ax.axhline(run.evidence.rate_ceiling, color=RED, lw=2)
    return made


def rate_map(run: Record) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the weight matrices and kernels (R,), first and end step (2,), and their rates, means over at most
    ``MAP_COLUMNS`` spans of steps, float64 (R, columns)."""
    matrices, steps = run.evidence.matrix_rates, run.evidence.rate_step
    rates = np.array(list(matrices.values()), dtype=np.float64)
    spans = np.array_split(np.arange(rates.shape[1]), min(MAP_COLUMNS, rates.shape[1]))
    table = np.stack([rates[:, span].mean(axis=1) for span in spans], axis=1)
    return [name.removesuffix(".weight") for name in matrices], np.array([steps[0], steps[-1] + 1]), table


def _positive(table: np.ndarray) -> np.ndarray:
    """Zeros have no logarithm: they are left blank."""
    return np.where(table > 0, table, np.nan)


def draw_readme_timing(suite: Suite) -> Figure:
    """Claim C12 for the README: layer1's rate and the loss at both learning rates, over the published curves."""
    from matplotlib.figure import Figure

    chosen = [panel for panel in panels() if panel.figure.startswith("lars_timing")]
    made = Figure(figsize=(9.0, 3.4), layout="constrained", facecolor="white")
    for axes, panel in zip(made.subplots(1, 2), chosen, strict=True):
        theirs = axes.twiny()
        for source, colour in zip(panel.sources, COLOURS, strict=False):
            curve = published()[source.figure, source.series]
            theirs.plot(curve.epoch, curve.value, color=colour, lw=0.9, ls=(0, (3, 1.5)))
            _draw_seeds(axes, suite.evidence(source.arm), source.measure, colour)
            axes.plot([], [], color=colour, label=f"{source.arm} ({_count(suite, source.arm)})")
        _finish(axes, panel)
        axes.set_xlabel("epoch, ours (solid, band over seeds)")
        theirs.set_xlabel("epoch, published (dashed)")
        axes.legend(frameon=False, fontsize=8)
    made.axes[0].set_ylabel("rate of layer1")
    return made


def draw_readme_cosines(suite: Suite, arms: Iterable[str]) -> Figure:
    """1 - the negative cosine of some arms for the README, seeds as bands: logarithmic, to tell collapses apart."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9.0, 3.4), layout="constrained", facecolor="white")
    axes = made.add_subplot()
    present = [arm for arm in arms if suite.evidence(arm)]
    for arm, colour in zip(present, (BLUE, SKY, RED, PURPLE, ORANGE, GREEN), strict=False):
        epochs, (low, middle, high) = band(suite.evidence(arm), "neg_cos")
        axes.fill_between(epochs, _distance(low), _distance(high), color=colour, alpha=0.2, lw=0)
        axes.semilogy(epochs, _distance(middle), color=colour, lw=1.4, label=f"{arm} ({_count(suite, arm)})")
    # Where the state machine of evaluation.collapse sees a collapse.
    axes.axhline(1 - COLLAPSED_ABOVE, color="black", lw=0.7, ls=":")
    axes.annotate("collapsed below", (0.01, 1 - COLLAPSED_ABOVE), (0, -10), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=7.5)  # fmt: skip
    axes.set_ylabel("1 - cosine of z and z', negative pairs")
    axes.set_xlabel("epoch")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return made


def draw_recoveries(suite: Suite) -> Figure:
    """Draw 1 - the negative cosine over steps, a line per seed, over the published curve, dashed.

    A panel per arm, with its settings left open.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    read_to = appendix()["accuracy_of_reading"]["cosine"]
    arms = [arm for arm in suite.runs if "@" not in arm]
    theirs = {source.arm: source for claim in CLAIMS for source in claim.sources if source.measure == "neg_cos"}
    rows = -(-len(arms) // 3)
    made = Figure(figsize=(9.0, 0.4 + 2.6 * rows), layout="constrained", facecolor="white")
    for place, arm in enumerate(arms):
        axes = made.add_subplot(rows, min(len(arms), 3), place + 1)
        if source := theirs.get(arm):
            curve = published()[source.figure, source.series]
            # A cosine read off a figure as 1 is 1 to within the reading.
            distance, steps = np.maximum(1 - curve.value, read_to), (curve.epoch + 1) * PUBLISHED_STEPS_PER_EPOCH
            axes.plot(steps, distance, color="black", lw=0.9, ls=(0, (3, 1.5)), label=f"published, read to {read_to}")
        open_settings = [name for name in suite.runs if name.startswith(f"{arm}@")]
        for name, colour in zip((arm, *open_settings), cycle(COLOURS), strict=False):
            for number, run in enumerate(suite.evidence(name)):
                label = f"{name.partition('@')[2] or 'ours'} ({_count(suite, name)})" if number == 0 else None
                steps = (run.epoch + 1) * run.steps_per_epoch
                axes.plot(
                    steps, _distance(run.neg_cos), color=colour, lw=1.1, marker="o" if len(steps) < 3 else "", label=label
                )
        axes.set(xscale="log", yscale="log", xlabel="step")
        axes.xaxis.set_minor_formatter(NullFormatter())  # within a decade matplotlib labels them, over each other
        axes.set_title(arm, fontsize=9)
        axes.axhline(1 - COLLAPSED_ABOVE, color="black", lw=0.7, ls=":")
        axes.legend(frameon=False, fontsize=7)
        if place % 3 == 0:
            axes.set_ylabel("1 - cosine, negative pairs")
    return made


def _distance(cosine: np.ndarray) -> np.ndarray:
    """1 - cosine, kept above the rounding of a mean of fp32 cosines."""
    return np.asarray(np.maximum(1 - cosine, 1e-8))


def _count(suite: Suite, arm: str) -> str:
    count = len(suite.evidence(arm))
    return f"{count} seed{'s' * (count != 1)}" if count else "not run"
