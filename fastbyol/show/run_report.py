"""The report of a run: pictures of loss, cosines, accuracy and rates in one HTML file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbyol.errors import UsageError
from fastbyol.evaluation.progress import Accuracies
from fastbyol.optim.lars import rate_ceiling
from fastbyol.runs import consistency
from fastbyol.runs.durable import write_text, writing
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.layers import read_layers
from fastbyol.runs.metrics import read_metrics
from fastbyol.show import figures
from fastbyol.show.figures import BLUE, GREEN, INK, RED, STATE_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As many as the legend has room for.
MOST_STAGES = 14
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCurves:
    """The curves of a run over epochs. ``rates`` is (samples, segments)."""

    name: str
    epochs: np.ndarray
    metrics: dict[str, np.ndarray]
    events: list[dict[str, Any]]
    accuracies: Accuracies
    layer_epochs: np.ndarray
    layer_names: tuple[str, ...]
    rates: np.ndarray
    rate_ceiling: float | None

    @property
    def epoch_events(self) -> list[dict[str, Any]]:
        """The events that end epochs."""
        return [event for event in self.events if event["event"] == "epoch"]


def read(run: Path, *, log_changes: bool = True) -> RunCurves:
    """Read a run's metrics and layer telemetry, and log which files have changed.

    Raises UsageError: no step was recorded, or a metric that the pictures need is missing.
    """
    with RunFolder.open(run, lock=False) as folder:
        config = folder.config
    if log_changes:
        for change in consistency.changes(run, config, folder.env.get("config")):
            _log.warning("%s", change)
    rows, events = read_metrics(folder.path)
    if not rows:
        raise UsageError(f"{run}: no step was recorded yet: nothing to draw")
    layers = read_layers(folder.path)
    missing = [name for name in ("loss", "pos_cos", "neg_cos") if name not in rows[0]]
    if missing or "rate" not in layers.metrics:
        raise UsageError(
            f"{run}: damaged: {missing[0] if missing else 'rate'} is not among what was measured"
        )
    per_epoch = next((row["step"] for row in rows if row["epoch"] == 1), None) or max(len(rows), 1)
    names = [name for name in rows[0] if name not in ("step", "epoch")]
    steps = np.array([row["step"] for row in rows], dtype=np.float64)
    return RunCurves(
        name=folder.path.name,
        epochs=steps / per_epoch,
        metrics={name: np.array([_number(row[name]) for row in rows]) for name in names},
        events=events,
        accuracies=Accuracies.of(events),
        layer_epochs=layers.steps / per_epoch,
        layer_names=layers.names,
        rates=layers.values[:, :, layers.metrics.index("rate")],
        rate_ceiling=rate_ceiling(config.optim),
    )


def _number(value: Any) -> float:
    """Return a number of metrics.jsonl, which writes NaN as null."""
    return float("nan") if value is None else float(value)


def shade_states(axes: Axes, curves: RunCurves) -> None:
    """Shade the epochs that ended collapsing, collapsed, recovering or dead."""
    for event in curves.epoch_events:
        colour = STATE_COLOURS.get(event["state"])
        if colour:
            axes.axvspan(event["epoch"], event["epoch"] + 1, color=colour, lw=0, zorder=0)


def draw_loss(axes: Axes, curves: RunCurves) -> None:
    """Draw the loss (1 - cos(q, z')) + (1 - cos(q', z)) on a log axis, as the post does."""
    axes.semilogy(curves.epochs, np.maximum(curves.metrics["loss"], 1e-12), color=BLUE, lw=0.8)
    axes.set_ylabel("loss")


def draw_cosines(axes: Axes, curves: RunCurves) -> None:
    """Draw the cosine of z and z' over positive and negative pairs. 1 on both means collapse."""
    axes.plot(curves.epochs, curves.metrics["pos_cos"], color=GREEN, lw=0.8, label="positive pairs")
    axes.plot(curves.epochs, curves.metrics["neg_cos"], color=RED, lw=0.8, label="negative pairs")
    axes.set_ylim(min(-0.05, float(np.nanmin(curves.metrics["neg_cos"]))), 1.02)
    axes.set_ylabel("cosine of z and z'")
    axes.legend(loc="lower left", frameon=False)


def accuracy_points(curves: RunCurves) -> list[tuple[int, float]]:
    """Return (epochs done, accuracy in percent) where it was measured."""
    return [
        (event["epoch"] + 1, event["accuracy"])
        for event in curves.epoch_events
        if event.get("accuracy") is not None
    ]


def draw_accuracy(axes: Axes, curves: RunCurves) -> None:
    """Draw the probe's accuracy in percent at the epochs where it was measured."""
    if points := accuracy_points(curves):
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", ms=3)
    if curves.accuracies.untrained is not None:
        axes.axhline(
            curves.accuracies.untrained, color=INK, lw=0.8, ls="--", label=curves.accuracies.weights
        )
        axes.legend(loc="lower right", frameon=False)
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, %")


def stages(names: Sequence[str]) -> dict[str, list[int]]:
    """Group the indices of the weights among ``names`` by the stage that they are in.

    Networks of other libraries number their stages within a module, or have too many to show.
    """
    groups: dict[str, list[int]] = {}
    for is_deep in (True, False):
        groups.clear()
        for index, name in enumerate(names):
            if name.endswith("weight"):
                groups.setdefault(_stage(name, is_deep=is_deep), []).append(index)
        if len(groups) <= MOST_STAGES:
            break
    return groups


def _stage(name: str, *, is_deep: bool) -> str:
    own = name.replace("encoder.net.", "encoder.", 1).split(".")
    is_numbered = name.startswith("encoder.net.") and "".join(own[2:3]).isdigit()
    return ".".join(own[: 3 if is_deep and is_numbered else 2])


def draw_rates(axes: Axes, curves: RunCurves) -> None:
    """Draw the mean rate of each stage's weights, and LARS's upper bound lr * eta / wd."""
    groups = stages(curves.layer_names)
    colours = figures.viridis(len(groups))
    for (stage, members), colour in zip(groups.items(), colours, strict=True):
        rate = np.nanmean(curves.rates[:, members], axis=1)
        axes.semilogy(
            curves.layer_epochs, np.where(rate > 0, rate, np.nan), lw=0.9, label=stage, color=colour
        )
    if curves.rate_ceiling is not None:
        axes.axhline(curves.rate_ceiling, color=INK, lw=0.8, ls="--", label="lr eta / wd")
    axes.set_ylabel("rate")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)


PICTURES: tuple[tuple[str, str, Callable[[Any, RunCurves], None]], ...] = (
    ("loss", "Loss", draw_loss),
    ("cosines", "Representation distance", draw_cosines),
    ("accuracy", "Linear accuracy", draw_accuracy),
    ("rates", "Rate per layer", draw_rates),
)


def figure(curves: RunCurves, draw: Callable[[Any, RunCurves], None]) -> Figure:
    """Return one picture over epochs, with states shaded behind it."""
    made = figures.blank(7.2, 3.0)
    axes = made.add_subplot()
    shade_states(axes, curves)
    draw(axes, curves)
    axes.set_xlabel("epoch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    return made


def page(curves: RunCurves, config_text: str, env: dict[str, Any]) -> str:
    """Return the report as HTML."""
    with figures.settings():
        return figures.page(
            "run.html.j2", title=curves.name, facts=_facts(curves), states=tuple(STATE_COLOURS),
            pictures=[(heading, figures.svg(figure(curves, draw))) for _, heading,
            draw in PICTURES],
            config=config_text, env=json.dumps(env, indent=2),
        )  # fmt: skip


def _facts(curves: RunCurves) -> list[tuple[str, str]]:
    """Return names and values of what the last epoch measured."""
    facts = [("epochs", f"{curves.epochs[-1]:.1f}")]
    if curves.epoch_events:
        last = curves.epoch_events[-1]
        loss, neg_cos = (_number(last.get(name)) for name in ("loss", "neg_cos"))
        facts += [
            ("state", last["state"]),
            ("loss", f"{loss:.4g}"),
            ("negative cosine", f"{neg_cos:.4f}"),
        ]
        if words := curves.accuracies.in_words().removeprefix("accuracy "):
            facts.append(("accuracy", words))
        ranks = [
            event["rank_y"] for event in curves.epoch_events if event.get("rank_y") is not None
        ]
        if ranks:
            facts.append(("effective rank of the embeddings", f"{ranks[-1]:.1f}"))
    return facts


def write(run: Path, *, png: Path | None = None) -> list[Path]:
    """Write ``RUN/report.html``, and each picture as a PNG into ``png``. Return the paths.

    Raises UsageError: matplotlib is missing, or ``read`` raises it.
    """
    figures.demand()
    curves = read(run)
    with RunFolder.open(run, lock=False) as folder:
        text = folder.config_text
        env = {name: value for name, value in folder.env.items() if name != "config"}
    target = folder.path / "report.html"
    with writing(target):
        write_text(target, page(curves, text, env))
    return [target, *(_write_pngs(curves, png) if png else [])]


def _write_pngs(curves: RunCurves, folder: Path) -> list[Path]:
    paths = [folder / f"{curves.name}-{name}.png" for name, _, _ in PICTURES]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, (_, _, draw) in zip(paths, PICTURES, strict=True):
            figure(curves, draw).savefig(path, dpi=120)
    return paths
