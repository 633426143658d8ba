"""What happens in a run: the phase of every epoch, and the events that verdicts are about, with their onsets.

A run's phases are read from the best measure that it has:

cosines   ``evaluation.collapse`` over the epochs' means: the same states that the run itself told.
loss      where a figure shows nothing else. Against figures that show both: at a negative cosine above .99 the loss is below
          2e-3 (weight decay 1e-3 at epoch 90, weight standardization 1.1e-3 at 13, LARS on the MLPs 2e-3 at 87), and where the
          cosine falls to .5 it is above .1 (.14 with LARS on layer1 and layer2 at epoch 18, .24 with weight decay at 111).
accuracy  where a figure shows nothing else: separated at 40 % or more, where the post sees useful encodings, else collapsed.
          The first ten epochs say nothing: after ten, the post's table has 48 to 58 % for runs that learn, 28 for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fastbyol.ablations.evidence import Evidence
from fastbyol.errors import check_choice
from fastbyol.evaluation.collapse import CollapseMonitor

Phase = Literal["fresh", "collapsed", "between", "separated"]
Signal = Literal["cosines", "loss", "accuracy"]

SIGNALS = ("neg_cos", "pos_cos", "std_z", "rank_y", "dead_y", "grad_norm")
LOSS_COLLAPSED, LOSS_SEPARATED = 2e-3, 0.1
ACCURACY_USEFUL, ACCURACY_SAYS_NOTHING_BEFORE = 40.0, 10


@dataclass(frozen=True)
class Course:
    """The phases of a run, one per measured epoch: ``epoch`` counts from 0, ``phase`` is what it was at that epoch's end.

    fresh: neither collapsed nor separated so far. between: on the way from one to the other.
    """

    signal: Signal
    epoch: tuple[int, ...]
    phase: tuple[Phase, ...]
    steps_per_epoch: int
    finished: bool

    def first(self, phase: Phase, *, after: int = -1) -> int | None:
        """The first epoch in ``phase`` that comes after epoch ``after``; None where there is none."""
        check_choice("phase", phase, get_args(Phase))
        return next((e for e, p in self._pairs() if p == phase and e > after), None)

    @property
    def collapse(self) -> int | None:
        """The epoch in which it first collapsed."""
        return self.first("collapsed")

    @property
    def leaving(self) -> int | None:
        """The first epoch out of the collapsed state after the first collapse."""
        if self.collapse is None:
            return None
        return next((e for e, p in self._pairs() if e > (self.collapse or 0) and p != "collapsed"), None)

    @property
    def separations(self) -> tuple[int, ...]:
        """Epochs in which it separated, from whatever it was before."""
        return tuple(
            e for before, (e, p) in zip((None, *self.phase), self._pairs(), strict=False) if p == "separated" != before
        )

    @property
    def relapses(self) -> tuple[int, ...]:
        """Epochs in which a separated one began to collapse again."""
        return tuple(
            e for before, (e, p) in zip((None, *self.phase), self._pairs(), strict=False) if before == "separated" != p
        )

    @property
    def end(self) -> Phase:
        """The phase of the newest epoch."""
        return self.phase[-1]

    def onset(self, epoch: int) -> str:
        """``epoch 3 (step 128)``: epochs as the post counts them, and the steps done at that epoch's end."""
        return f"epoch {epoch} (step {(epoch + 1) * self.steps_per_epoch})"

    def _pairs(self) -> Iterator[tuple[int, Phase]]:
        return zip(self.epoch, self.phase, strict=True)


def course(run: Evidence) -> Course:
    """The course of ``run``, by cosines where it has them, else by loss, else by accuracy. Epochs without the measure are left
    out. Raises ValueError where it has none of the three."""
    by_signal = {"cosines": run.neg_cos, "loss": run.loss, "accuracy": run.accuracy}
    readers = {"cosines": _by_cosines, "loss": _by_loss, "accuracy": _by_accuracy}
    for signal, values in by_signal.items():
        known = np.isfinite(values)
        if known.any():
            epochs = tuple(int(epoch) for epoch in run.epoch[known])
            phases = tuple(readers[signal](run, known))
            return Course(signal, epochs, phases, run.steps_per_epoch, run.finished)  # type: ignore[arg-type]
    raise ValueError(f"{run.arm}, seed {run.seed}: no epoch with a cosine, loss or accuracy")


def _by_cosines(run: Evidence, known: np.ndarray) -> Iterator[Phase]:
    monitor = CollapseMonitor()
    for index in np.flatnonzero(known):
        seen = {name: float(getattr(run, name)[index]) for name in SIGNALS}
        # Where a figure's positive curve cannot be seen it lies under the negative one. Nobody published a spread.
        seen["pos_cos"] = seen["pos_cos"] if np.isfinite(seen["pos_cos"]) else seen["neg_cos"]
        seen["std_z"] = seen["std_z"] if np.isfinite(seen["std_z"]) else 1.0
        state = monitor.update(step=int(index), **seen)
        if state == "healthy":
            yield "separated" if monitor.separated else "fresh"
        else:
            yield "collapsed" if state in ("collapsed", "dead") else "between"


def _by_loss(run: Evidence, known: np.ndarray) -> Iterator[Phase]:
    collapsed_before = False
    for loss in run.loss[known]:
        collapsed_before |= bool(loss < LOSS_COLLAPSED)
        if not collapsed_before:
            yield "fresh"
        else:
            yield "collapsed" if loss < LOSS_COLLAPSED else "separated" if loss >= LOSS_SEPARATED else "between"


def _by_accuracy(run: Evidence, known: np.ndarray) -> Iterator[Phase]:
    for epoch, accuracy in zip(run.epoch[known], run.accuracy[known], strict=True):
        if epoch < ACCURACY_SAYS_NOTHING_BEFORE:
            yield "fresh"
        else:
            yield "separated" if accuracy >= ACCURACY_USEFUL else "collapsed"


@dataclass(frozen=True)
class Peak:
    """The highest epoch mean of a layer group's rate, when it was, and how many times the first rate recorded it is.

    The first is that of the run's first step, and of a figure's first epoch; zeros are passed over. A warm-up alone is no rise.
    """

    epoch: int
    rate: float
    rise: float


def rate_peak(run: Evidence, group: str) -> Peak | None:
    """Where the rate of ``group`` was highest; None where it was not recorded."""
    rates = run.rate_by_epoch(group)
    known = np.flatnonzero(np.isfinite(rates))
    if not len(known):
        return None
    top = int(known[np.argmax(rates[known])])
    return Peak(int(run.epoch[top]), float(rates[top]), float(run.rise_by_epoch(group)[top]))
