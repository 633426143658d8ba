"""Is the representation collapsing? A state machine over a run's embeddings and projections.

    healthy -> collapsing -> collapsed -> recovering -> healthy
               collapsing -> healthy                     turned round in time
                             recovering -> collapsed     relapsed
                             collapsed -> dead -> collapsed

An observation is an epoch's mean. Hysteresis keeps the state from flickering: every border is
crossed at one value on the way up and at another on the way down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from fastbyol.config import State
from fastbyol.errors import FastbyolError

# Thresholds of the mean cosine of online and target projections of different images, read to +-.005
# from the appendix's figures of GN encoders without MLP norm. Their points, like ours, are epochs.
# Plateaus of collapsed runs read .997 to 1.000; the deepest dip that stayed on one reads .993 (LARS
# on the MLPs, epoch 65). No run stayed above .96 without being on one.
COLLAPSED_ABOVE = 0.99
# Four reading errors below. Weight decay leaves its plateau for good at epoch 101 (.963), weight
# standardization at 19; LARS on the MLPs dips to .957 at epoch 91 and relapses: "disturbs the
# collapse, which then returns".
RECOVERING_BELOW = 0.97
# Where the post's text sees representations separate: epochs 111 (weight decay) and 19, 58, 77, 138
# (weight standardization). Positives must also be nearer than negatives by MARGIN: unrelated noise
# has both cosines near 0.
SEPARATED_BELOW = 0.5
MARGIN = 0.1
# Weight decay ends at .56, after .625, with a useful 56 % accuracy: that is health. Weight
# standardization's three relapses pass .7 at epochs 54, 70 and 112 (.5 at 53, 69, 110), and its
# harmless swing at epoch 93 reaches .44.
COLLAPSING_ABOVE = 0.7
# The border of a network before its first separation: random ones start at .91 to .94 (epoch 0 of
# all four figures), the collapsing ones are above .97 one epoch later.
FRESH_ABOVE = 0.95

# Two networks that each map everything to one point may have a low cosine, and batch norm in the
# heads scales up whatever differences are left. So two more signs count as a collapse whatever the
# cosines are: no spread of the online projections, and embeddings along one direction
# (``evaluation.rank``). Measured with GN encoders of width 8 on textures: std 1.5e-6 at cosines of
# .906 (no MLP norm, SGD at lr .2, one epoch). The spread is a mean over features: even if one of
# 128 holds all of it, .01 means a mean cosine of .987 within the batch.
STD_COLLAPSED = 0.01
STD_RECOVERING = 0.02
# 1.0001 where embeddings differed by rounding alone (BN in the MLPs, SGD at lr .1: std_y 5e-8); 2.7
# in a run that was getting alike (mean cosine of embeddings .993); 12 to 42 in healthy ones.
RANK_COLLAPSED = 1.01
RANK_RECOVERING = 1.05

TRANSITIONS: Mapping[State, tuple[State, ...]] = {
    "healthy": ("collapsing",),
    "collapsing": ("collapsed", "healthy"),
    "collapsed": ("recovering", "dead"),
    "recovering": ("healthy", "collapsed"),
    "dead": ("collapsed",),
}


@dataclass(frozen=True)
class Event:
    """A change of state, with the step and the signals that caused it; None is not measured."""

    step: int
    before: State
    after: State
    neg_cos: float
    pos_cos: float | None = None
    std_z: float | None = None
    rank_y: float | None = None
    dead_y: float | None = None
    grad_norm: float | None = None


@dataclass
class CollapseMonitor:
    """A monitor: its state, whether the network ever separated, and the changes so far.

    It starts healthy. The state is a function of the sequence of observations alone.
    """

    state: State = "healthy"
    separated: bool = False
    events: list[Event] = field(default_factory=list)
    rank_y: float | None = None

    def update(
        self,
        *,
        step: int,
        neg_cos: float,
        pos_cos: float,
        std_z: float,
        rank_y: float | None = None,
        dead_y: float | None = None,
        grad_norm: float | None = None,
    ) -> State:
        """Add one observation and return the new state. It may pass several states, each an event.

        ``neg_cos`` and ``pos_cos``: mean cosines of z and z' over pairs of different images and of
        the same; ``std_z``: the spread of z, 0 to 1 (``model.objective.spread``); ``rank_y``: the
        embeddings' effective rank, kept until the next one; ``dead_y``: share of embedding units
        that are 0 over the batch. Raises FastbyolError if one of the first three is not finite; the
        others then count as not measured.
        """
        if not all(math.isfinite(value) for value in (neg_cos, pos_cos, std_z)):
            raise FastbyolError(
                f"step {step}: negative cosine {neg_cos}, positive cosine {pos_cos}, std {std_z}: "
                "the run has diverged; "
                "go back to an earlier checkpoint or lower the learning rate (--lr)"
            )
        self.rank_y = self.rank_y if _measured(rank_y) is None else rank_y
        signals = _Signals(
            neg_cos, pos_cos, std_z, self.rank_y, _measured(dead_y), _measured(grad_norm)
        )
        while (after := self._next(signals)) != self.state:
            self.events.append(Event(step, self.state, after, **asdict(signals)))
            self.state = after
        self.separated |= signals.separated
        return self.state

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CollapseMonitor:
        """Make the monitor that ``to_dict`` described, today's or an older one with cosines only.

        Raises ValueError for an impossible state or change, or for unknown signals.
        """
        try:
            events = [Event(**event) for event in values["events"]]
            monitor = cls(values["state"], bool(values["separated"]), events, values.get("rank_y"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of the collapse monitor: {error}: {values}") from None
        if monitor.state not in get_args(State) or any(
            e.after not in TRANSITIONS.get(e.before, ()) for e in monitor.events
        ):
            raise ValueError(f"not a state of the collapse monitor: {values}")
        return monitor

    def _next(self, signals: _Signals) -> State:
        """Return the next state on the way to where ``signals`` belong, or the same one."""
        match self.state:
            case "healthy":
                border = COLLAPSING_ABOVE if self.separated else FRESH_ABOVE
                return "collapsing" if signals.neg_cos > border or signals.collapsed else "healthy"
            case "collapsed":
                return (
                    "dead" if signals.dead else "recovering" if signals.recovering else "collapsed"
                )
            case "dead":
                return "dead" if signals.dead else "collapsed"
            case "collapsing" | "recovering":
                return (
                    "collapsed"
                    if signals.collapsed
                    else "healthy"
                    if signals.separated
                    else self.state
                )


@dataclass(frozen=True)
class _Signals:
    neg_cos: float
    pos_cos: float
    std_z: float
    rank_y: float | None
    dead_y: float | None
    grad_norm: float | None

    @property
    def dead(self) -> bool:
        """No gradient leads out of the collapse: it is exactly 0, or every embedding unit is 0.

        The derivative of a ReLU at 0 is 0 (Lu et al., "Dying ReLU and Initialization",
        arXiv:1903.06733). A small gradient is not death: LARS divides by its norm, and has left
        collapses where it was a millionth of the weights'. fp32 norms read 0 below some 1e-22.
        """
        return self.grad_norm == 0.0 or (self.dead_y is not None and self.dead_y >= 1.0)

    @property
    def collapsed(self) -> bool:
        one_direction = self.rank_y is not None and self.rank_y < RANK_COLLAPSED
        return (
            self.neg_cos > COLLAPSED_ABOVE
            or self.std_z < STD_COLLAPSED
            or one_direction
            or self.dead
        )

    @property
    def recovering(self) -> bool:
        """Every sign of the collapse is gone."""
        one_direction = self.rank_y is not None and self.rank_y < RANK_RECOVERING
        return (
            self.neg_cos < RECOVERING_BELOW
            and self.std_z >= STD_RECOVERING
            and not one_direction
            and not self.dead
        )

    @property
    def separated(self) -> bool:
        return (
            self.neg_cos <= SEPARATED_BELOW
            and self.pos_cos - self.neg_cos >= MARGIN
            and not self.collapsed
        )


def _measured(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
