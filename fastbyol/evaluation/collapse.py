"""Is the representation collapsing? A state machine over the average cosines of z and z'.

    healthy -> collapsing -> collapsed -> recovering -> healthy
               collapsing -> healthy                     turned round in time
                             recovering -> collapsed     relapsed

One observation is an epoch's mean: over 410 steps (the post) or 16 (the demo) it needs no further smoothing, and the published
curves that the thresholds below are read from have one point per epoch. What keeps the state from flickering is hysteresis:
every border is crossed at one value on the way up and at another on the way down.

The thresholds, against the appendix's figures of GN encoders without MLP norm (read to +-.005):

COLLAPSED_ABOVE .99    plateaus of the collapsed runs read .997 to 1.000; the deepest dip that stayed on one reads .993 (LARS on
                       the MLPs, epoch 65). No run stayed above .96 without being on one.
RECOVERING_BELOW .97   four readings' accuracy below. Weight decay leaves its plateau for good at epoch 101 (.963), weight
                       standardization at 19; LARS on the MLPs dips to .957 at epoch 91 and relapses: "disturbs the collapse,
                       which then returns".
SEPARATED_BELOW .5     where the post's text sees representations separate: epochs 111 (weight decay) and 19, 58, 77, 138
                       (weight standardization). Positives must be nearer than negatives by MARGIN, too: unrelated noise has
                       both cosines near 0.
COLLAPSING_ABOVE .7    weight decay ends at a negative cosine of .56, after .625, with a useful 56 % accuracy: that is health.
                       Weight standardization's three relapses pass .7 at epochs 54, 70 and 112 (.5 at 53, 69, 110), and its
                       harmless swing at epoch 93 reaches .44.
FRESH_ABOVE .95        a network before its first separation: random ones start at .91 to .94 (epoch 0 of all four figures),
                       which is no sign of anything yet; the collapsing ones are above .97 one epoch later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from fastbyol.errors import FastbyolError

State = Literal["healthy", "collapsing", "collapsed", "recovering"]

COLLAPSED_ABOVE = 0.99
RECOVERING_BELOW = 0.97
SEPARATED_BELOW = 0.5
COLLAPSING_ABOVE = 0.7
FRESH_ABOVE = 0.95
MARGIN = 0.1
# Rows that are all exactly equal, or zero, where a cosine says nothing: float32 has nothing between this and a true spread.
NO_SPREAD = 1e-12

TRANSITIONS: Mapping[State, tuple[State, ...]] = {
    "healthy": ("collapsing",),
    "collapsing": ("collapsed", "healthy"),
    "collapsed": ("recovering",),
    "recovering": ("healthy", "collapsed"),
}


@dataclass(frozen=True)
class Event:
    """A change of state, with the step and the negative cosine that brought it."""

    step: int
    before: State
    after: State
    neg_cos: float


@dataclass
class CollapseMonitor:
    """The state, whether the network has ever separated, and the changes so far. A new one is healthy.

    The state after a sequence of observations is a function of that sequence alone.
    """

    state: State = "healthy"
    separated: bool = False
    events: list[Event] = field(default_factory=list)

    def update(self, *, step: int, neg_cos: float, pos_cos: float, std: float) -> State:
        """Take in one observation and return the new state.

        ``neg_cos`` and ``pos_cos``: mean cosines of z and z' over pairs of other images and of the same; ``std``: the standard
        deviation of z over the batch, in any positive unit. An observation may pass through several states: each change is
        an event. Raises FastbyolError where one of the three is not finite.
        """
        if not all(math.isfinite(value) for value in (neg_cos, pos_cos, std)):
            raise FastbyolError(
                f"step {step}: negative cosine {neg_cos}, positive cosine {pos_cos}, std {std}: the run has diverged; "
                "go back to an earlier checkpoint or lower the learning rate (--lr)"
            )
        spread_cos = 1.0 if std < NO_SPREAD else neg_cos
        while (after := self._next(spread_cos, pos_cos)) != self.state:
            self.events.append(Event(step, self.state, after, neg_cos))
            self.state = after
        self.separated |= _separated(spread_cos, pos_cos)
        return self.state

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CollapseMonitor:
        """The monitor that ``to_dict`` described. Raises ValueError for a state or a change that cannot be."""
        monitor = cls(values["state"], bool(values["separated"]), [Event(**event) for event in values["events"]])
        if monitor.state not in get_args(State) or any(e.after not in TRANSITIONS.get(e.before, ()) for e in monitor.events):
            raise ValueError(f"not a state of the collapse monitor: {values}")
        return monitor

    def _next(self, neg_cos: float, pos_cos: float) -> State:
        """The next state on the way to where this observation belongs; the same where it is there."""
        if self.state == "healthy":
            return "collapsing" if neg_cos > (COLLAPSING_ABOVE if self.separated else FRESH_ABOVE) else "healthy"
        if self.state == "collapsed":
            return "recovering" if neg_cos < RECOVERING_BELOW else "collapsed"
        if neg_cos > COLLAPSED_ABOVE:
            return "collapsed"
        return "healthy" if _separated(neg_cos, pos_cos) else self.state


def _separated(neg_cos: float, pos_cos: float) -> bool:
    return neg_cos <= SEPARATED_BELOW and pos_cos - neg_cos >= MARGIN
