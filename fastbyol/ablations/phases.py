"""A run's phase in each epoch, and the epochs when it collapsed, left, separated or relapsed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fastbyol.ablations.evidence import Evidence
from fastbyol.config import IN_COLLAPSE
from fastbyol.errors import check_choice
from fastbyol.evaluation.collapse import CollapseMonitor

Phase = Literal["fresh", "collapsed", "between", "separated"]
Signal = Literal["cosines", "loss", "accuracy"]

SIGNALS = ("neg_cos", "pos_cos", "std_z", "rank_y", "dead_y", "grad_norm")
# From the figures that show loss and cosines. At a negative cosine above .99 the loss is below 2e-3
# (weight decay 1e-3 at epoch 90, weight standardization 1.1e-3 at 13, LARS on the MLPs 2e-3 at 87).
# Where the cosine falls to .5 the loss is above .1 (.14 with LARS on layer1 and layer2 at epoch 18,
# .24 with weight decay at 111).
LOSS_COLLAPSED, LOSS_SEPARATED = 2e-3, 0.1
# The post calls encodings useful from 40 % on. The first ten epochs say nothing: after ten, its
# table has 48 to 58 % for runs that learn and 28 % for the others.
ACCURACY_USEFUL, ACCURACY_SAYS_NOTHING_BEFORE = 40.0, 10


@dataclass(frozen=True)
class Phases:
    """The phase of a run at the end of each measured epoch; ``epoch`` counts from 0.

    fresh: neither collapsed nor separated so far. between: on the way from one to the other.
    """

    signal: Signal
    epoch: tuple[int, ...]
    phase: tuple[Phase, ...]
    steps_per_epoch: int
    finished: bool

    def first(self, phase: Phase, *, after: int = -1) -> int | None:
        """Return the first epoch after ``after`` that is in ``phase``, or None."""
        check_choice("phase", phase, get_args(Phase))
        return next((e for e, p in self._pairs() if p == phase and e > after), None)

    @property
    def collapse(self) -> int | None:
        """The epoch in which the run first collapsed."""
        return self.first("collapsed")

    @property
    def leaving(self) -> int | None:
        """The first epoch out of the collapsed state after the first collapse."""
        if (collapse := self.collapse) is None:
            return None
        return next((e for e, p in self._pairs() if e > collapse and p != "collapsed"), None)

    @property
    def separations(self) -> tuple[int, ...]:
        """Epochs in which the run separated, from whatever phase it was in."""
        changes = zip((None, *self.phase), self._pairs(), strict=False)
        return tuple(e for before, (e, p) in changes if p == "separated" != before)

    @property
    def relapses(self) -> tuple[int, ...]:
        """Epochs in which a separated run began to collapse again."""
        changes = zip((None, *self.phase), self._pairs(), strict=False)
        return tuple(e for before, (e, p) in changes if before == "separated" != p)

    @property
    def end(self) -> Phase:
        """The phase of the newest epoch."""
        return self.phase[-1]

    def onset(self, epoch: int) -> str:
        """Return ``epoch`` in words: ``epoch 3 (step 128)``.

        The epoch is counted as in the post, and the step is the number of steps done at its end.
        """
        return f"epoch {epoch} (step {(epoch + 1) * self.steps_per_epoch})"

    def _pairs(self) -> Iterator[tuple[int, Phase]]:
        return zip(self.epoch, self.phase, strict=True)


def phases_of(run: Evidence) -> Phases:
    """Read the phases of ``run`` from its cosines, else from its losses, else from its accuracies.

    Epochs without the measure are left out. Raises ValueError if the run has none of the three.
    """
    for signal, values, read in (
        ("cosines", run.neg_cos, _by_cosines),  # the states that the run itself reported
        ("loss", run.loss, _by_loss),
        ("accuracy", run.accuracy, _by_accuracy),
    ):
        measured = np.isfinite(values)
        if measured.any():
            epochs = tuple(int(epoch) for epoch in run.epoch[measured])
            phases = tuple(read(run, measured))
            return Phases(signal, epochs, phases, run.steps_per_epoch, run.finished)  # type: ignore[arg-type]
    raise ValueError(f"{run.arm}, seed {run.seed}: no epoch with a cosine, loss or accuracy")


def _by_cosines(run: Evidence, measured: np.ndarray) -> Iterator[Phase]:
    monitor = CollapseMonitor()
    for index in np.flatnonzero(measured):
        signals = {name: float(getattr(run, name)[index]) for name in SIGNALS}
        # A positive curve that a figure hides lies under the negative one. No spread was published.
        signals["pos_cos"] = (
            signals["pos_cos"] if np.isfinite(signals["pos_cos"]) else signals["neg_cos"]
        )
        signals["std_z"] = signals["std_z"] if np.isfinite(signals["std_z"]) else 1.0
        state = monitor.update(step=int(index), **signals)
        if state == "healthy":
            yield "separated" if monitor.separated else "fresh"
        else:
            yield "collapsed" if state in IN_COLLAPSE else "between"


def _by_loss(run: Evidence, measured: np.ndarray) -> Iterator[Phase]:
    collapsed_before = False
    for loss in run.loss[measured]:
        collapsed_before |= bool(loss < LOSS_COLLAPSED)
        if not collapsed_before:
            yield "fresh"
        else:
            yield (
                "collapsed"
                if loss < LOSS_COLLAPSED
                else "separated"
                if loss >= LOSS_SEPARATED
                else "between"
            )


def _by_accuracy(run: Evidence, measured: np.ndarray) -> Iterator[Phase]:
    for epoch, accuracy in zip(run.epoch[measured], run.accuracy[measured], strict=True):
        if epoch < ACCURACY_SAYS_NOTHING_BEFORE:
            yield "fresh"
        else:
            yield "separated" if accuracy >= ACCURACY_USEFUL else "collapsed"


@dataclass(frozen=True)
class Peak:
    """The highest epoch mean of a layer group's rate.

    It has an epoch, a value, and a multiple of the first rate. The first rate is that of a run's
    first step, and of a figure's first epoch; zeros are passed over. A warm-up alone is no rise.
    """

    epoch: int
    rate: float
    rise: float


def rate_peak(run: Evidence, group: str) -> Peak | None:
    """Return the peak of the rate of ``group``; None if no rate was recorded."""
    rates = run.rate_by_epoch(group)
    if not np.isfinite(rates).any():
        return None
    top = int(np.nanargmax(rates))
    return Peak(int(run.epoch[top]), float(rates[top]), float(run.rise_by_epoch(group)[top]))
