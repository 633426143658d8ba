"""The report of a run's forks: one past, many futures, in ``RUN.forks/forks.html``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastbyol import config_io
from fastbyol.config import IN_COLLAPSE
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.runs.durable import write_text, writing
from fastbyol.runs.folder import CONFIG
from fastbyol.runs.fork import Fork
from fastbyol.runs.metrics import METRICS_FILE
from fastbyol.show import figures, run_report
from fastbyol.show.figures import BLUE, GREEN, INK, ORANGE, PURPLE, RED, SKY
from fastbyol.show.run_report import RunCurves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "forks.html"
SUFFIX = ".forks"
PAST = "#999999"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
# The mean of fp32 cosines is exact to about so much.
LEAST = 1e-8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Future:
    """A fork's curves and the step where it begins, or its parent's, whose ``step`` is None.

    ``seed`` is ``train.seed``.
    """

    label: str
    step: int | None
    changes: str
    seed: int
    curves: RunCurves

    @property
    def state(self) -> str:
        """The state at its last epoch's end."""
        return str(self.curves.epoch_events[-1]["state"]) if self.curves.epoch_events else ""

    def way_out(self) -> str:
        """Return after how many steps from the fork on it left a collapse, in words."""
        if self.step is None:
            return ""
        states = [event for event in self.curves.events if event["event"] == "state"]
        before = [event["after"] for event in states if event["step"] <= self.step]
        if not before or before[-1] not in IN_COLLAPSE:
            return "was not in one"
        left = (
            event["step"] - self.step
            for event in states
            if event["step"] > self.step and event["after"] not in IN_COLLAPSE
        )
        return str(next(left, "stays"))


class Bundle(NamedTuple):
    """The parent, None if it is gone, and its forks by step and name."""

    name: str
    parent: Future | None
    forks: tuple[Future, ...]

    @property
    def steps(self) -> list[int]:
        """The steps at which forks begin."""
        return sorted({future.step for future in self.forks if future.step is not None})


def is_of_forks(folder: Path) -> bool:
    """Return whether a folder is one that ``fork`` makes beside a run, for its forks."""
    return folder.name.endswith(SUFFIX) and not (folder / CONFIG).exists()


def read(folder: Path) -> Bundle:
    """Return the forks in ``RUN.forks`` that have recorded a step, and their parent.

    Raises UsageError where there is none.
    """
    paths = sorted(config.parent for config in folder.glob(f"[!.]*/{CONFIG}"))
    begun = [(path, fork) for path in paths if (fork := Fork.read(path)) and _has_steps(path)]
    forks = [future for path, fork in begun if (future := _future(path, fork)) is not None]
    if not forks:
        raise UsageError(f"{folder}: no sound forks here: `fastbyol fork RUN@STEP` makes them")
    parent = Path(begun[0][1].run)
    is_there = (parent / CONFIG).exists() and _has_steps(parent)
    return Bundle(
        folder.name.removesuffix(SUFFIX),
        _future(parent, None) if is_there else None,
        tuple(sorted(forks, key=lambda future: (future.step or 0, future.label))),
    )


def _has_steps(run: Path) -> bool:
    return (run / METRICS_FILE).exists() and (run / METRICS_FILE).stat().st_size > 0


def _future(run: Path, fork: Fork | None) -> Future | None:
    """Return what a run recorded; None, logged, where it is damaged."""
    try:
        return _read_future(run, fork)
    except FastbyolError as error:
        _log.warning("%s", error)
        return None


def _read_future(run: Path, fork: Fork | None) -> Future:
    changes = {} if fork is None else fork.changes
    words = ", ".join(
        f"{key} = {'none' if value is None else config_io.show(value)}"
        for key, value in changes.items()
    )
    config = config_io.read_run(run / CONFIG)
    return Future(
        label=run.name,
        step=None if fork is None else fork.step,
        changes=words or ("" if fork is None else "unchanged"),
        seed=config.train.seed,
        curves=run_report.read(run),
    )


def _neg_cos(curves: RunCurves) -> tuple[np.ndarray, np.ndarray]:
    return curves.epochs, np.maximum(1 - curves.metrics["neg_cos"], LEAST)


def _loss(curves: RunCurves) -> tuple[np.ndarray, np.ndarray]:
    return curves.epochs, np.maximum(curves.metrics["loss"], 1e-12)


def _std_z(curves: RunCurves) -> tuple[np.ndarray, np.ndarray]:
    return curves.epochs, curves.metrics.get("std_z", np.full(len(curves.epochs), np.nan))


def _stage_rate(stage: str) -> Callable[[RunCurves], tuple[np.ndarray, np.ndarray]]:
    """Return what reads the mean rate of the weights of one of the encoder's stages."""

    def rates(curves: RunCurves) -> tuple[np.ndarray, np.ndarray]:
        members = [
            index
            for index, name in enumerate(curves.layer_names)
            if name.startswith((f"encoder.{stage}.", f"encoder.net.{stage}."))
            and name.endswith("weight")
        ]
        if not members:
            return curves.layer_epochs, np.full(len(curves.layer_epochs), np.nan)
        rate = curves.rates[:, members].mean(axis=1)
        return curves.layer_epochs, np.where(rate > 0, rate, np.nan)

    return rates


# Name, heading, label of the axis, whether it is logarithmic, and the curve.
PICTURES: tuple[
    tuple[str, str, str, bool, Callable[[RunCurves], tuple[np.ndarray, np.ndarray]]], ...
] = (
    ("neg_cos", "Negative pairs", "1 - cosine of z and z'", True, _neg_cos),
    ("loss", "Loss", "loss", True, _loss),
    ("std_z", "Spread of projections", "std of z", False, _std_z),
    ("layer1", "Rate of layer1", "rate", True, _stage_rate("layer1")),
    ("layer2", "Rate of layer2", "rate", True, _stage_rate("layer2")),
)


def pictures_of(bundle: Bundle) -> list[tuple[Any, ...]]:
    """Return those of ``PICTURES`` that show something: not every network has ResNet's stages."""
    return [
        picture
        for picture in PICTURES
        if any(np.isfinite(picture[-1](future.curves)[1]).any() for future in bundle.forks)
    ]


def draw(
    axes: Axes,
    bundle: Bundle,
    curve: Callable[[RunCurves], tuple[np.ndarray, np.ndarray]],
) -> None:
    """Draw the common past in grey, a line at each fork's step, and the futures in colours."""
    longest = bundle.parent or max(bundle.forks, key=lambda future: future.step or 0)
    begin = bundle.steps[0] if bundle.parent else bundle.steps[-1]
    colours = COLOURS if len(bundle.forks) <= len(COLOURS) else figures.viridis(len(bundle.forks))
    _draw_part(axes, curve(longest.curves), longest.curves, 0, begin, color=PAST)
    if bundle.parent:
        label = f"{bundle.name}, the parent"
        _draw_part(axes, curve(longest.curves), longest.curves, begin, color=INK, label=label)
    for step in bundle.steps:
        axes.axvline(step * _epochs_per_step(longest.curves), color=INK, lw=0.6, ls=":")
    for future, colour in zip(bundle.forks, colours, strict=False):
        label = f"{future.step}: {future.changes}"
        part = curve(future.curves), future.curves, future.step or 0
        _draw_part(axes, *part, color=colour, label=label)


def _draw_part(
    axes: Axes,
    curve: tuple[np.ndarray, np.ndarray],
    curves: RunCurves,
    begin: int,
    end: int | None = None,
    **style: Any,
) -> None:
    """Draw a curve from step ``begin`` to before ``end``, joined to the step before ``begin``."""
    epochs, values = curve
    steps = np.rint(epochs / _epochs_per_step(curves))
    part = (steps >= begin - 1) & (steps < (np.inf if end is None else end))
    axes.plot(epochs[part], values[part], lw=0.9, **style)


def _epochs_per_step(curves: RunCurves) -> float:
    return float(curves.epochs[1]) if len(curves.epochs) > 1 else 1.0


def figure(bundle: Bundle, picture: tuple[Any, ...]) -> Any:
    """Return one of ``PICTURES`` over epochs."""
    _, _, label, is_log, curve = picture
    made = figures.blank(8.6, 3.0)
    axes = made.add_subplot()
    draw(axes, bundle, curve)
    if is_log:
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.margins(x=0.01)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)
    return made


def rows(bundle: Bundle) -> list[tuple[str, ...]]:
    """Return the table's rows: fork, step, changes, seed, end state, way out, accuracy."""
    every = ([bundle.parent] if bundle.parent else []) + list(bundle.forks)
    return [
        (
            future.label,
            "" if future.step is None else str(future.step),
            future.changes or "the parent",
            str(future.seed),
            future.state,
            future.way_out(),
            ""
            if future.curves.accuracies.last is None
            else future.curves.accuracies.shown(future.curves.accuracies.last),
        )
        for future in every
    ]


def page(bundle: Bundle) -> str:
    """Return the report as HTML."""
    with figures.settings():
        pictures = [(each[1], figures.svg(figure(bundle, each))) for each in pictures_of(bundle)]
    return figures.page(
        "forks.html.j2",
        title=f"Forks of {bundle.name}",
        rows=rows(bundle),
        pictures=pictures,
    )


def write(folder: Path, *, png: Path | None = None) -> list[Path]:
    """Write ``RUN.forks/forks.html``, and each picture as a PNG into ``png``. Return the paths.

    Raises UsageError: matplotlib is missing, or there is no fork.
    """
    figures.demand()
    bundle = read(folder)
    target = folder / PAGE
    # Forks that end at the same time each write the page.
    own = folder / f".{PAGE}.{os.getpid()}"
    with writing(target):
        write_text(own, page(bundle))
        own.replace(target)
    if png is None:
        return [target]
    pictures = pictures_of(bundle)
    paths = [png / f"{bundle.name}-forks-{each[0]}.png" for each in pictures]
    with writing(png):
        png.mkdir(parents=True, exist_ok=True)
        for path, each in zip(paths, pictures, strict=True):
            figure(bundle, each).savefig(path, dpi=120)
    return [target, *paths]
