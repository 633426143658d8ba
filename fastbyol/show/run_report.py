"""A run as pictures: loss, cosines, accuracy and the rate of every layer, in one self-contained HTML file."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable
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
from fastbyol.show.figures import BLUE, GREEN, INK, RED, STATE_COLOURS, STYLE, demand, settings, svg, viridis
from fastbyol.show.figures import page as html_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Story:
    """What the pictures draw. Steps are converted to epochs; ``rates`` is (samples, segments)."""

    name: str
    epochs: np.ndarray
    metrics: dict[str, np.ndarray]
    epoch_events: list[dict[str, Any]]
    accuracies: Accuracies
    layer_epochs: np.ndarray
    layer_names: tuple[str, ...]
    rates: np.ndarray
    rate_ceiling: float | None


def read(run: Path) -> Story:
    """Collect a run's metrics and layer telemetry. A run without a finished step is a ``UsageError``."""
    with RunFolder.open(run, lock=False) as folder:
        config = folder.config
    for change in consistency.changes(run, config, folder.env.get("config")):
        _log.warning("%s", change)
    rows, events = read_metrics(folder.path)
    if not rows:
        raise UsageError(f"{run}: no step was recorded yet: nothing to draw")
    layers = read_layers(folder.path)
    lost = [name for name in ("loss", "pos_cos", "neg_cos") if name not in rows[0]]
    if lost or "rate" not in layers.metrics:
        raise UsageError(f"{run}: damaged: {lost[0] if lost else 'rate'} is not among what was measured")
    per_epoch = next((row["step"] for row in rows if row["epoch"] == 1), None) or max(len(rows), 1)
    names = [name for name in rows[0] if name not in ("step", "epoch")]
    steps = np.array([row["step"] for row in rows], dtype=np.float64)
    return Story(
        name=folder.path.name,
        epochs=steps / per_epoch,
        metrics={name: np.array([_number(row[name]) for row in rows]) for name in names},
        epoch_events=[event for event in events if event["event"] == "epoch"],
        accuracies=Accuracies.of(events),
        layer_epochs=layers.steps / per_epoch,
        layer_names=layers.names,
        rates=layers.values[:, :, layers.metrics.index("rate")],
        rate_ceiling=rate_ceiling(config.optim),
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def shade_states(axes: Axes, story: Story) -> None:
    """Colour the epochs that ended collapsing, collapsed, recovering or dead."""
    for event in story.epoch_events:
        colour = STATE_COLOURS.get(event["state"])
        if colour:
            axes.axvspan(event["epoch"], event["epoch"] + 1, color=colour, lw=0, zorder=0)


def draw_loss(axes: Axes, story: Story) -> None:
    """Loss (1 - cos(q, z')) + (1 - cos(q', z)) on a log axis, as the post plots it."""
    axes.semilogy(story.epochs, np.maximum(story.metrics["loss"], 1e-12), color=BLUE, lw=0.8)
    axes.set_ylabel("loss")


def draw_cosines(axes: Axes, story: Story) -> None:
    """Cosine of z and z' over positive and negative pairs: 1 on both means collapsed."""
    axes.plot(story.epochs, story.metrics["pos_cos"], color=GREEN, lw=0.8, label="positive pairs")
    axes.plot(story.epochs, story.metrics["neg_cos"], color=RED, lw=0.8, label="negative pairs")
    axes.set_ylim(min(-0.05, float(np.nanmin(story.metrics["neg_cos"]))), 1.02)
    axes.set_ylabel("cosine of z and z'")
    axes.legend(loc="lower left", frameon=False)


def draw_accuracy(axes: Axes, story: Story) -> None:
    """The probe's accuracy at the epochs where it was measured."""
    points = [(event["epoch"] + 1, event["accuracy"]) for event in story.epoch_events if event.get("accuracy") is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", ms=3)
    if story.accuracies.untrained is not None:
        axes.axhline(story.accuracies.untrained, color=INK, lw=0.8, ls="--", label=story.accuracies.weights)
        axes.legend(loc="lower right", frameon=False)
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, %")


def draw_rates(axes: Axes, story: Story) -> None:
    """Mean rate of the weights of each stage; with LARS, the ceiling lr * eta / wd that it cannot pass."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(story.layer_names):
        if name.endswith("weight"):
            groups.setdefault(".".join(name.split(".")[:2]), []).append(index)
    colours = viridis(len(groups))
    for (stage, members), colour in zip(groups.items(), colours, strict=True):
        rate = np.nanmean(story.rates[:, members], axis=1)
        axes.semilogy(story.layer_epochs, np.where(rate > 0, rate, np.nan), lw=0.9, label=stage, color=colour)
    if story.rate_ceiling is not None:
        axes.axhline(story.rate_ceiling, color=INK, lw=0.8, ls="--", label="lr eta / wd")
    axes.set_ylabel("rate")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)


PICTURES: tuple[tuple[str, str, Callable[[Any, Story], None]], ...] = (
    ("loss", "Loss", draw_loss),
    ("cosines", "Representation distance", draw_cosines),
    ("accuracy", "Linear accuracy", draw_accuracy),
    ("rates", "Rate per layer", draw_rates),
)


def figure(story: Story, draw: Callable[[Any, Story], None]) -> Any:
    """One picture as a matplotlib figure, states shaded behind it."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = made.add_subplot()
    shade_states(axes, story)
    draw(axes, story)
    axes.set_xlabel("epoch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    return made


def drawn(story: Story, draw: Callable[[Any, Story], None]) -> str:
    """One picture as an SVG element of a page."""
    with settings():
        return svg(figure(story, draw))


def page(story: Story, config_text: str, env: dict[str, Any]) -> str:
    """The HTML text: no script, no network."""
    last = story.epoch_events[-1] if story.epoch_events else None
    facts = [("epochs", f"{story.epochs[-1]:.1f}")]
    if last is not None:
        loss, neg_cos = (_number(last.get(name)) for name in ("loss", "neg_cos"))
        facts += [("state", last["state"]), ("loss", f"{loss:.4g}"), ("negative cosine", f"{neg_cos:.4f}")]
        facts += [("accuracy", words)] if (words := story.accuracies.in_words().removeprefix("accuracy ")) else []
        ranks = [event["rank_y"] for event in story.epoch_events if event.get("rank_y") is not None]
        facts += [("effective rank of the embeddings", f"{ranks[-1]:.1f}")] if ranks else []
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts)
    key = "".join(f'<span style="background:var(--{state})">{state}</span>' for state in STATE_COLOURS)
    pictures = "".join(f"<h2>{title}</h2>{drawn(story, draw)}" for _, title, draw in PICTURES)
    body = (
        f'<h1>{html.escape(story.name)}</h1><table>{table}</table><p class="key">shaded: {key}</p>{pictures}'
        f"<h2>Configuration</h2><pre>{html.escape(config_text)}</pre>"
        f"<h2>Environment</h2><pre>{html.escape(json.dumps(env, indent=2))}</pre>"
    )
    return html_page(story.name, STYLE, body)


def write(run: Path, *, png: Path | None = None) -> list[Path]:
    """Write ``RUN/report.html``, and with ``png`` each picture as a file there. Returns the paths."""
    demand()
    story = read(run)
    with RunFolder.open(run, lock=False) as folder:
        text = folder.config_text
        env = {name: value for name, value in folder.env.items() if name != "config"}
    target = folder.path / "report.html"
    with writing(target):
        write_text(target, page(story, text, env))
    return [target, *(_write_pngs(story, png) if png else [])]


def _write_pngs(story: Story, folder: Path) -> list[Path]:
    paths = [folder / f"{story.name}-{name}.png" for name, _, _ in PICTURES]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, (_, _, draw) in zip(paths, PICTURES, strict=True):
            figure(story, draw).savefig(path, dpi=120)
    return paths
