"""The collapse monitor on the post's published curves, on made-up ones and on hypothesis's."""

from __future__ import annotations

import itertools
import json
import math
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.errors import FastbyolError
from fastbyol.evaluation.collapse import TRANSITIONS, CollapseMonitor

# Read off the post's figures, epoch: (negative cosine, positive cosine), where the curves bend;
# between them they are all but straight. Where a figure's positive curve lies hidden, a value a
# little above the negative's stands in.
WEIGHT_DECAY = {
    0: (0.939, 0.99), 1: (0.980, 0.997), 2: (0.997, 0.997), 93: (0.997, 0.997), 97: (0.992, 0.995),
    99: (0.983, 0.992),
    101: (0.963, 0.985), 103: (0.899, 0.963), 108: (0.668, 0.908), 110: (0.553, 0.879),
    111: (0.488, 0.865),
    114: (0.320, 0.843), 122: (0.175, 0.834), 138: (0.074, 0.815), 150: (0.103, 0.827),
    153: (0.173, 0.846),
    157: (0.485, 0.915), 158: (0.536, 0.927), 164: (0.625, 0.95), 190: (0.536, 0.944), 210: (0.521,
    0.944),
    256: (0.548, 0.959), 319: (0.557, 0.961),
}  # fmt: skip
WEIGHT_STANDARDIZATION = {
    0: (0.908, 0.97), 1: (0.973, 0.99), 2: (0.992, 0.995), 3: (0.997, 0.998), 16: (0.997, 0.998),
    17: (0.995, 0.997),
    18: (0.973, 0.99), 19: (0.848, 0.90), 20: (0.500, 0.661), 21: (0.171, 0.661), 22: (0.096,
    0.646),
    28: (0.204, 0.733), 30: (0.360, 0.807), 32: (0.298, 0.834), 34: (0.094, 0.800), 39: (0.228,
    0.822),
    46: (0.034, 0.788), 51: (0.317, 0.800), 52: (0.444, 0.827), 53: (0.598, 0.877), 54: (0.726,
    0.923),
    55: (0.771, 0.954), 56: (0.752, 0.951), 57: (0.666, 0.937), 58: (0.531, 0.906), 59: (0.368,
    0.863),
    61: (0.113, 0.781), 64: (0.022, 0.738), 67: (0.123, 0.687), 68: (0.322, 0.711), 69: (0.560,
    0.836),
    70: (0.730, 0.913), 71: (0.824, 0.959), 73: (0.870, 0.983), 75: (0.810, 0.975), 76: (0.723,
    0.959),
    77: (0.589, 0.935), 78: (0.452, 0.911), 81: (0.118, 0.851), 85: (0.019, 0.807), 88: (0.062,
    0.783),
    90: (0.308, 0.817), 93: (0.444, 0.913), 96: (0.262, 0.894), 101: (0.055, 0.817), 106: (0.178,
    0.800),
    109: (0.401, 0.836), 110: (0.509, 0.855), 111: (0.622, 0.884), 112: (0.735, 0.918),
    113: (0.831, 0.954),
    115: (0.930, 0.990), 120: (0.959, 0.997), 131: (0.954, 0.997), 134: (0.915, 0.992),
    136: (0.822, 0.988),
    137: (0.733, 0.978), 138: (0.605, 0.966), 139: (0.452, 0.947), 141: (0.144, 0.889),
    143: (0.014, 0.848),
    160: (0.435, 0.911), 181: (0.007, 0.863), 203: (0.219, 0.915), 319: (0.226, 0.947),
}  # fmt: skip
LARS_LAYER1_LAYER2 = {
    0: (0.938, 0.98), 1: (0.999, 1.0), 2: (1.001, 1.0), 8: (1.000, 1.0), 9: (0.997, 0.998),
    10: (0.989, 0.996),
    11: (0.979, 0.994), 12: (0.960, 0.991), 13: (0.919, 0.984), 14: (0.847, 0.972), 15: (0.769,
    0.961),
    16: (0.679, 0.948), 17: (0.574, 0.934), 18: (0.485, 0.919), 19: (0.427, 0.912), 20: (0.399,
    0.907),
}  # fmt: skip
LARS_MLPS = {
    0: (0.924, 0.97), 1: (0.992, 0.995), 2: (0.999, 1.0), 61: (1.000, 1.0), 65: (0.993, 0.994),
    71: (0.999, 1.0),
    82: (0.999, 1.0), 86: (0.996, 0.998), 88: (0.988, 0.996), 89: (0.986, 0.995), 90: (0.973,
    0.983),
    91: (0.957, 0.973), 93: (0.969, 0.980), 94: (0.993, 0.997), 97: (0.999, 1.0), 100: (0.999, 1.0),
}  # fmt: skip

Curve = dict[int, tuple[float, float]]


def every_epoch(curve: Curve) -> Curve:
    """Draw straight lines between the points that were read."""
    points, whole = sorted(curve), dict(curve)
    for left, right in itertools.pairwise(points):
        for epoch in range(left, right):
            share = (epoch - left) / (right - left)
            whole[epoch] = tuple(
                a + share * (b - a) for a, b in zip(curve[left], curve[right], strict=True)
            )
    return dict(sorted(whole.items()))


def spread(negative: float) -> float:
    """Return the std_z of projections of mean cosine ``negative`` if both networks are alike."""
    return math.sqrt(max(0.0, 1.0 - max(0.0, negative)))


def watch(curve: Curve) -> CollapseMonitor:
    monitor = CollapseMonitor()
    for epoch, (negative, positive) in curve.items():
        monitor.update(step=epoch, neg_cos=negative, pos_cos=positive, std_z=spread(negative))
    return monitor


def changes(monitor: CollapseMonitor) -> list[tuple[int, str]]:
    return [(event.step, event.after) for event in monitor.events]


class TestPublishedCurves:
    """Epochs in brackets are the post's, as its claims were read: where the curves cross .5."""

    def test_weight_decay_leaves_the_collapse_at_111(self) -> None:
        """And ends at .557 with an accuracy of 56 %: not on its way to a collapse."""
        monitor = watch(every_epoch(WEIGHT_DECAY))
        assert changes(monitor) == [
            (1, "collapsing"),
            (2, "collapsed"),
            (101, "recovering"),
            (111, "healthy"),
        ]

    def test_weight_standardization_comes_and_goes(self) -> None:
        """Separates at [19, 58, 77, 138], collapses again at [52, 68, 109]."""
        monitor = watch(every_epoch(WEIGHT_STANDARDIZATION))
        assert changes(monitor)[:3] == [(1, "collapsing"), (2, "collapsed"), (19, "recovering")]
        assert changes(monitor)[3:] == [
            (20, "healthy"), (54, "collapsing"), (59, "healthy"), (70, "collapsing"), (78,
            "healthy"), (112, "collapsing"),
            (139, "healthy"),
        ]  # fmt: skip

    def test_lars_on_layer1_and_layer2_separates_quickly(self) -> None:
        monitor = watch(every_epoch(LARS_LAYER1_LAYER2))
        assert changes(monitor) == [
            (1, "collapsing"),
            (1, "collapsed"),
            (12, "recovering"),
            (18, "healthy"),
        ]

    def test_lars_on_the_mlps_disturbs_the_collapse_which_returns(self) -> None:
        monitor = watch(every_epoch(LARS_MLPS))
        assert changes(monitor) == [
            (1, "collapsing"),
            (1, "collapsed"),
            (91, "recovering"),
            (94, "collapsed"),
        ]

    @pytest.mark.parametrize(
        "curve", [WEIGHT_DECAY, WEIGHT_STANDARDIZATION, LARS_LAYER1_LAYER2, LARS_MLPS]
    )
    @pytest.mark.parametrize("error", [-0.004, 0.004])
    def test_the_readings_error_moves_a_change_by_an_epoch_or_so(
        self, curve: Curve, error: float
    ) -> None:
        """+-.005, the accuracy of the digitisation: the same changes."""
        whole = every_epoch(curve)
        shifted = watch(
            {epoch: (negative + error, positive) for epoch, (negative, positive) in whole.items()}
        )
        exact = watch(whole)
        assert [after for _, after in changes(shifted)] == [after for _, after in changes(exact)]
        for (moved, _), (epoch, _) in zip(changes(shifted), changes(exact), strict=True):
            assert abs(moved - epoch) <= 2


class TestMadeUp:
    def test_a_fresh_network_is_healthy_though_its_cosine_is_high(self) -> None:
        assert CollapseMonitor().state == "healthy"
        assert (
            changes(watch({0: (0.93, 0.97), 1: (0.94, 0.98), 2: (0.8, 0.95), 3: (0.3, 0.9)})) == []
        )

    def test_one_that_has_separated_is_watched_more_closely(self) -> None:
        assert changes(watch({0: (0.93, 0.97), 1: (0.3, 0.9), 2: (0.8, 0.97)})) == [
            (2, "collapsing")
        ]

    def test_batch_norm_never_collapses(self) -> None:
        assert (
            changes(watch({epoch: (max(0.27, 0.9 - 0.1 * epoch), 0.9) for epoch in range(20)}))
            == []
        )

    def test_collapse_in_one_epoch_passes_through_collapsing(self) -> None:
        monitor = watch({7: (0.9999, 0.9999)})
        assert changes(monitor) == [(7, "collapsing"), (7, "collapsed")]
        assert monitor.events[0].before == "healthy"
        assert monitor.events[1].neg_cos == 0.9999

    def test_recovery_in_one_epoch_passes_through_recovering(self) -> None:
        assert changes(watch({0: (0.9999, 1.0), 1: (0.1, 0.9)}))[2:] == [
            (1, "recovering"),
            (1, "healthy"),
        ]

    def test_collapsed_means_a_negative_cosine_above_99(self) -> None:
        assert watch({0: (0.99, 1.0)}).state == "collapsing"
        assert watch({0: (0.9901, 1.0)}).state == "collapsed"

    def test_hovering_at_the_border_does_not_flicker(self) -> None:
        collapsed = watch({epoch: (0.985 + 0.01 * (epoch % 2), 1.0) for epoch in range(50)})
        assert changes(collapsed) == [(0, "collapsing"), (1, "collapsed")]
        separated = watch(
            {0: (0.1, 0.9), **{epoch: (0.55 + 0.1 * (epoch % 2), 0.9) for epoch in range(1, 50)}}
        )
        assert changes(separated) == []

    def test_unrelated_noise_is_no_recovery(self) -> None:
        """Positives no nearer than negatives: z tells nothing about the image."""
        assert watch({0: (0.9999, 1.0), 1: (0.02, 0.03)}).state == "recovering"

    def test_zeros_are_a_collapse_though_their_cosine_is_zero(self) -> None:
        monitor = CollapseMonitor()
        assert monitor.update(step=5, neg_cos=0.0, pos_cos=0.0, std_z=0.0) == "collapsed"

    @pytest.mark.parametrize("name", ["neg_cos", "pos_cos", "std_z"])
    def test_refuses_what_is_not_finite(self, name: str) -> None:
        monitor = CollapseMonitor()
        values = {"neg_cos": 0.5, "pos_cos": 0.9, "std_z": 0.1, name: math.nan}
        with pytest.raises(FastbyolError, match=r"step 12: .*diverged"):
            monitor.update(step=12, **values)
        assert monitor == CollapseMonitor()


cosines = st.one_of(
    st.floats(-1.0, 1.0), st.sampled_from([0.5, 0.7, 0.95, 0.97, 0.99, 1.0]), st.floats(0.9, 1.0)
)
observations = st.lists(
    st.fixed_dictionaries(
        {
            "neg_cos": cosines,
            "pos_cos": cosines,
            "std_z": st.sampled_from([0.0, 1e-6, 0.01, 0.015, 0.1, 0.8]),
        },
        optional={
            "rank_y": st.sampled_from([None, math.nan, 0.0, 1.0, 1.01, 1.03, 1.05, 40.0]),
            "dead_y": st.sampled_from([None, math.nan, 0.0, 0.99, 1.0]),
            "grad_norm": st.sampled_from([None, math.nan, 0.0, 1e-20, 1.0]),
        },
    ),
    max_size=40,
)


class TestAlways:
    @given(observations)
    def test_no_illegal_change_and_every_change_is_an_event(
        self, sequence: list[dict[str, float]]
    ) -> None:
        monitor, before = CollapseMonitor(), "healthy"
        for step, seen in enumerate(sequence):
            state = monitor.update(step=step, **seen)
            events = [event for event in monitor.events if event.step == step]
            for event in events:
                assert event.before == before
                assert event.after in TRANSITIONS[event.before]
                before = event.after
            assert state == monitor.state == before
            assert (state in ("collapsed", "dead")) >= (seen["neg_cos"] > 0.99)
            assert (state == "dead") == (seen.get("grad_norm") == 0.0 or seen.get("dead_y") == 1.0)
            # Whatever happens in one observation, no state comes twice.
            assert len({event.after for event in events}) == len(events) <= 3

    @given(observations, observations)
    def test_goes_on_from_json_as_if_never_stopped(
        self, first: list[dict[str, float]], second: list[dict[str, float]]
    ) -> None:
        whole, part = CollapseMonitor(), CollapseMonitor()
        for step, seen in enumerate(first + second):
            whole.update(step=step, **seen)
        for step, seen in enumerate(first):
            part.update(step=step, **seen)
        # Strict JSON: no NaN may have got in.
        part = CollapseMonitor.from_dict(json.loads(json.dumps(part.to_dict(), allow_nan=False)))
        for step, seen in enumerate(second, start=len(first)):
            part.update(step=step, **seen)
        assert part == whole

    @given(observations)
    def test_an_observation_twice_changes_nothing_the_second_time(
        self, sequence: list[dict[str, float]]
    ) -> None:
        monitor = CollapseMonitor()
        for step, seen in enumerate(sequence):
            state = monitor.update(step=step, **seen)
            count = len(monitor.events)
            if not (state == "healthy" and not monitor.separated):
                assert monitor.update(step=step, **seen) == state
                assert len(monitor.events) == count

    def test_reads_what_a_monitor_of_cosines_alone_wrote(self) -> None:
        old = {
            "state": "collapsed", "separated": False,
            "events": [
                {"step": 6, "before": "healthy", "after": "collapsing", "neg_cos": 0.999},
                {"step": 6, "before": "collapsing", "after": "collapsed", "neg_cos": 0.999},
            ],
        }  # fmt: skip
        monitor = CollapseMonitor.from_dict(old)
        assert (monitor.state, monitor.rank_y, monitor.events[0].std_z) == ("collapsed", None, None)
        assert monitor.update(step=12, neg_cos=0.3, pos_cos=0.9, std_z=0.8) == "healthy"

    @pytest.mark.parametrize(
        "change",
        [
            {"state": "asleep"},
            {"events": [{"step": 1, "before": "healthy", "after": "recovering", "neg_cos": 0.1}]},
            {"events": [{"step": 1, "before": "healthy", "after": "dead", "neg_cos": 0.1}]},
            {
                "events": [
                    {
                        "step": 1,
                        "before": "healthy",
                        "after": "collapsing",
                        "neg_cos": 0.1,
                        "mood": 0.1,
                    }
                ]
            },
            {"events": 3},
        ],
    )
    def test_from_dict_refuses_what_cannot_be(self, change: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="not a state"):
            CollapseMonitor.from_dict({**CollapseMonitor().to_dict(), **change})


class TestHidden:
    """Collapses that the cosines of the two networks do not show."""

    FINE: ClassVar = {"neg_cos": 0.3, "pos_cos": 0.9, "std_z": 0.8}

    def test_two_networks_with_a_point_each(self) -> None:
        """Measured: GN encoder of width 8, no MLP norm, SGD at lr .2, after an epoch."""
        monitor = CollapseMonitor()
        assert (
            monitor.update(step=16, neg_cos=0.9056, pos_cos=0.9056, std_z=1.546e-6) == "collapsed"
        )
        assert monitor.update(step=32, neg_cos=0.5, pos_cos=0.7, std_z=0.015) == "collapsed"
        assert monitor.update(step=48, neg_cos=0.5, pos_cos=0.7, std_z=0.3) == "healthy"

    def test_embeddings_along_one_direction_under_batch_norm(self) -> None:
        monitor = CollapseMonitor()
        assert monitor.update(step=1, **self.FINE, rank_y=1.0001) == "collapsed"
        assert (
            monitor.update(step=2, **self.FINE) == "collapsed"
        )  # it stands until it is measured again
        assert monitor.update(step=3, **self.FINE, rank_y=1.03) == "collapsed"
        assert monitor.update(step=4, **self.FINE, rank_y=12.0) == "healthy"
        assert [event.rank_y for event in monitor.events] == [1.0001, 1.0001, 12.0, 12.0]

    @pytest.mark.parametrize("signal", [{"grad_norm": 0.0}, {"dead_y": 1.0}])
    def test_dead_until_the_signals_return(self, signal: dict[str, float]) -> None:
        monitor = CollapseMonitor()
        assert monitor.update(step=1, **self.FINE, grad_norm=0.5, dead_y=0.4) == "healthy"
        assert monitor.update(step=2, neg_cos=1.0, pos_cos=1.0, std_z=0.0, **signal) == "dead"
        assert monitor.update(step=3, neg_cos=1.0, pos_cos=1.0, std_z=0.0, **signal) == "dead"
        assert (
            monitor.update(step=4, neg_cos=1.0, pos_cos=1.0, std_z=0.0, grad_norm=1e-9, dead_y=0.99)
            == "collapsed"
        )
        assert monitor.update(step=5, **self.FINE, grad_norm=0.5, dead_y=0.4) == "healthy"
        assert [event.after for event in monitor.events] == [
            "collapsing", "collapsed", "dead", "collapsed", "recovering", "healthy",
        ]  # fmt: skip

    def test_a_tiny_gradient_is_no_death(self) -> None:
        """LARS has left collapses in which it was a millionth of the weights'."""
        monitor = CollapseMonitor()
        assert (
            monitor.update(
                step=1, neg_cos=1.0, pos_cos=1.0, std_z=1e-4, grad_norm=1e-12, dead_y=0.97
            )
            == "collapsed"
        )
