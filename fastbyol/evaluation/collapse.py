"""Is the representation collapsing? A state machine over what a run measures of its embeddings and projections.

    healthy -> collapsing -> collapsed -> recovering -> healthy
               collapsing -> healthy                     turned round in time
                             recovering -> collapsed     relapsed
                             collapsed -> dead -> collapsed

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

The cosines are of online and target projections. Two networks that each map everything to one point of its own may have a low
one; and batch norm in the heads scales up whatever differences are left. So two more signs are a collapse whatever the cosines
are: no spread of the online projections, and embeddings along one direction (``evaluation.rank``). Measured with GN encoders of
width 8 on textures:

STD_COLLAPSED .01      1.5e-6 at cosines of .906 (no MLP norm, SGD at lr .2, one epoch). The spread is a mean over features:
                       even where one of 128 holds all of it, .01 means a mean cosine of .987 within the batch.
STD_RECOVERING .02     the other way.
RANK_COLLAPSED 1.01    1.0001 where embeddings differed by rounding alone (BN in the MLPs, SGD at lr .1: std_y 5e-8); 2.7 in a
                       run that was getting alike (mean cosine of embeddings .993); 12 to 42 in healthy ones.
RANK_RECOVERING 1.05   the other way.

dead is a collapse that no gradient leads out of: the whole gradient is exactly 0, or every embedding unit is 0 for every image,
and with a unit's derivative at 0 being 0 the encoder gets none (Lu et al., "Dying ReLU and Initialization", arXiv:1903.06733).
A small gradient is not death: LARS divides by its norm, and has left collapses where it was a millionth of the weights'. fp32
norms read 0 below some 1e-22, where their squares are. The state is left when both signals are back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from fastbyol.errors import FastbyolError

State = Literal["healthy", "collapsing", "collapsed", "recovering", "dead"]

COLLAPSED_ABOVE = 0.99
RECOVERING_BELOW = 0.97
SEPARATED_BELOW = 0.5
COLLAPSING_ABOVE = 0.7
FRESH_ABOVE = 0.95
MARGIN = 0.1
STD_COLLAPSED = 0.01
STD_RECOVERING = 0.02
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
    """A change of state, with the step and the signals that brought it; None stands for what was not measured."""

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
    """The state, whether the network has ever separated, the newest effective rank, and the changes so far.

    A new one is healthy. The state after a sequence of observations is a function of that sequence alone.
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
        """Take in one observation and return the new state.

        ``neg_cos`` and ``pos_cos``: mean cosines of z and z' over pairs of other images and of the same; ``std_z``: the spread
        of z over the batch, 0 to 1 (``model.objective.spread``); ``rank_y``: the embeddings' effective rank, which stands until
        it is measured again; ``dead_y``: share of embedding units that are 0 over the batch; ``grad_norm``: of the gradient.
        An observation may pass through several states: each change is an event. Raises FastbyolError where one of the first
        three is not finite; the others then count as not measured.
        """
        if not all(math.isfinite(value) for value in (neg_cos, pos_cos, std_z)):
            raise FastbyolError(
                f"step {step}: negative cosine {neg_cos}, positive cosine {pos_cos}, std {std_z}: the run has diverged; "
                "go back to an earlier checkpoint or lower the learning rate (--lr)"
            )
        self.rank_y = self.rank_y if _measured(rank_y) is None else rank_y
        signals = _Signals(neg_cos, pos_cos, std_z, self.rank_y, _measured(dead_y), _measured(grad_norm))
        while (after := self._next(signals)) != self.state:
            self.events.append(Event(step, self.state, after, **asdict(signals)))
            self.state = after
        self.separated |= signals.separated
        return self.state

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CollapseMonitor:
        """The monitor that ``to_dict`` described, today's or one that knew cosines only.

        Raises ValueError for a state or a change that cannot be, or for signals of another name.
        """
        try:
            events = [Event(**event) for event in values["events"]]
            monitor = cls(values["state"], bool(values["separated"]), events, values.get("rank_y"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of the collapse monitor: {error}: {values}") from None
        if monitor.state not in get_args(State) or any(e.after not in TRANSITIONS.get(e.before, ()) for e in monitor.events):
            raise ValueError(f"not a state of the collapse monitor: {values}")
        return monitor

    def _next(self, signals: _Signals) -> State:
        """The next state on the way to where this observation belongs; the same where it is there."""
        match self.state:
            case "healthy":
                border = COLLAPSING_ABOVE if self.separated else FRESH_ABOVE
                return "collapsing" if signals.neg_cos > border or signals.collapsed else "healthy"
            case "collapsed":
                return "dead" if signals.dead else "recovering" if signals.apart else "collapsed"
            case "dead":
                return "dead" if signals.dead else "collapsed"
            case "collapsing" | "recovering":
                return "collapsed" if signals.collapsed else "healthy" if signals.separated else self.state


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
        return self.grad_norm == 0.0 or (self.dead_y is not None and self.dead_y >= 1.0)

    @property
    def collapsed(self) -> bool:
        one_direction = self.rank_y is not None and self.rank_y < RANK_COLLAPSED
        return self.neg_cos > COLLAPSED_ABOVE or self.std_z < STD_COLLAPSED or one_direction or self.dead

    @property
    def apart(self) -> bool:
        """Out of the collapse: every sign of it is gone."""
        one_direction = self.rank_y is not None and self.rank_y < RANK_RECOVERING
        return self.neg_cos < RECOVERING_BELOW and self.std_z >= STD_RECOVERING and not one_direction and not self.dead

    @property
    def separated(self) -> bool:
        return self.neg_cos <= SEPARATED_BELOW and self.pos_cos - self.neg_cos >= MARGIN and not self.collapsed


def _measured(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
