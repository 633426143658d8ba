"""Phases and events of the published curves, by each measure that a figure may show, and where
rates peak.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastbyol.ablations.claims import CLAIMS
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.phases import phases_of, rate_peak
from made_up import COLLAPSED, COLLAPSED_LATE, COMES_AND_GOES, HEALTHY, RECOVERED, made_up
from published import published


def curves_of(claim: str, arm: str | None = None) -> Evidence:
    found = published(next(c for c in CLAIMS if c.id == claim))
    return (found[arm] if arm else next(iter(found.values())))[0]


def without(run: Evidence, *measures: str) -> Evidence:
    return dataclasses.replace(run, **{name: np.full(len(run.epoch), np.nan) for name in measures})


class TestPublished:
    """The epochs in ``numbers`` were read where a curve crosses .5; phases have hysteresis, so they
    may lag by two.
    """

    def test_weight_decay_leaves_at_111(self) -> None:
        seen = phases_of(curves_of("C8"))
        assert (seen.signal, seen.collapse, seen.leaving, seen.separations, seen.relapses) == (
            "cosines",
            2,
            101,
            (111,),
            (),
        )

    def test_weight_standardization_comes_and_goes(self) -> None:
        seen = phases_of(curves_of("C9"))
        assert np.allclose(seen.separations, [19, 58, 77, 138], atol=1)
        assert np.allclose(seen.relapses, [52, 68, 109], atol=3)

    @pytest.mark.parametrize("claim", ["C8", "C9", "C10", "C11"])
    def test_losses_tell_the_same_collapse_and_end_as_cosines(self, claim: str) -> None:
        """Where a figure shows both.

        Slow slides (C8 leaves over ten epochs, C9 collapses over ten) differ by eight at most.
        """
        run = curves_of(claim)
        by_cosines, by_loss = phases_of(run), phases_of(without(run, "neg_cos", "pos_cos"))
        assert (by_cosines.signal, by_loss.signal) == ("cosines", "loss")
        assert by_cosines.end == by_loss.end or claim in ("C8", "C9")
        assert by_loss.end != "collapsed" or claim == "C11"
        assert by_loss.collapse is not None
        assert by_cosines.collapse is not None
        assert abs(by_loss.collapse - by_cosines.collapse) <= 8
        assert by_loss.leaving is not None
        assert by_cosines.leaving is not None
        assert abs(by_loss.leaving - by_cosines.leaving) <= 8

    def test_accuracy_alone_tells_when_it_became_useful(self) -> None:
        """C2: "first epoch above 40" is 20."""
        seen = phases_of(curves_of("C2"))
        assert (seen.signal, seen.collapse, seen.first("separated"), seen.end) == (
            "accuracy",
            10,
            20,
            "separated",
        )

    @pytest.mark.parametrize(
        ("claim", "arm", "group"),
        [
            ("C10", None, "encoder.layer1"),
            ("C10", None, "encoder.layer2"),
            ("C11", None, "projector.linear1"),
            ("C11", None, "predictor.linear2"),
            ("C12", "gn-lars-0.5", "encoder.layer1"),
            ("C12", "gn-lars-0.1", "encoder.layer1"),
        ],
    )
    def test_rate_peaks_are_the_claims_own_numbers(
        self, claim: str, arm: str | None, group: str
    ) -> None:
        numbers = next(c for c in CLAIMS if c.id == claim).numbers
        key = (
            arm.removeprefix("gn-lars-")
            if arm
            else group.removeprefix("encoder.").replace(".", "_")
        )
        rate, epoch = numbers[f"rate_peak_{'lr' if arm else ''}{key}"]
        peak = rate_peak(curves_of(claim, arm), group)
        assert peak is not None
        assert peak.rate == pytest.approx(rate, abs=0.5)
        # The reading of projector_linear1's flat top: 44 and 47 are equal to .1.
        assert abs(peak.epoch - epoch) <= (3 if group == "projector.linear1" else 0)


class TestMadeUp:
    @pytest.mark.parametrize(
        ("shape", "expected"),  # collapse, leaving, separations, relapses, end
        [
            (HEALTHY, (None, None, (4,), (), "separated")),
            (COLLAPSED, (1, None, (), (), "collapsed")),
            (RECOVERED, (1, 8, (12,), (), "separated")),
            (COLLAPSED_LATE, (18, None, (4,), (16,), "collapsed")),
        ],
    )
    def test_events(self, shape: dict[int, float], expected: tuple[object, ...]) -> None:
        phases = phases_of(made_up("arm", shape))
        assert (
            phases.collapse,
            phases.leaving,
            phases.separations,
            phases.relapses,
            phases.end,
        ) == expected
        assert phases.phase[0] == "fresh" or shape is not HEALTHY

    def test_comes_and_goes(self) -> None:
        phases = phases_of(made_up("arm", COMES_AND_GOES))
        assert (len(phases.separations), len(phases.relapses)) == (3, 2)

    def test_a_dead_network_is_collapsed(self) -> None:
        """Zeros have cosine 0, which is no separation."""
        run = made_up("arm", dict.fromkeys((0, 23), 0.0))
        zeros = dataclasses.replace(
            run, pos_cos=np.zeros(24), std_z=np.zeros(24), dead_y=np.ones(24)
        )
        assert phases_of(zeros).end == "collapsed"

    def test_onsets_are_told_in_epochs_and_steps(self) -> None:
        assert phases_of(made_up("arm", RECOVERED)).onset(9) == "epoch 9 (step 320)"

    def test_nothing_measured_is_an_error(self) -> None:
        run = without(made_up("arm", HEALTHY, seed=4), "neg_cos", "loss")
        with pytest.raises(ValueError, match="arm, seed 4"):
            phases_of(run)

    def test_a_peak_is_measured_against_the_first_rate_that_is_not_zero(self) -> None:
        run = made_up(
            "arm", HEALTHY, rates={"warm": {0: 0.0, 1: 1.0, 4: 3.0, 23: 0.0}, "still": {0: 0.0}}
        )
        warm, still = rate_peak(run, "warm"), rate_peak(run, "still")
        assert warm is not None
        assert still is not None
        assert warm.epoch in (3, 4)
        assert still.rise == 1.0
        assert rate_peak(run, "elsewhere") is None
