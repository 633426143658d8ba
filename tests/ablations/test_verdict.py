"""Verdicts on the post's own curves, on curves of the opposite, and on made-up ones for each
outcome of each claim.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from scipy.stats import binomtest

from fastbyol.ablations.claims import CLAIMS, Claim
from fastbyol.ablations.evidence import Evidence
from fastbyol.ablations.verdict import (
    Outcome,
    Statement,
    Verdict,
    decide,
    judge,
    judge_variants,
    outcome_of,
)
from made_up import (
    COLLAPSED,
    COLLAPSED_LATE,
    COMES_AND_GOES,
    DISTURBED,
    HALF_OUT,
    HEALTHY,
    RECOVERED,
    RECOVERED_LATE,
    Points,
    made_up,
)
from published import published

BY_ID = {claim.id: claim for claim in CLAIMS}
CURVES = tuple(claim for claim in CLAIMS if claim.sources)
EARLY_PEAK = {
    "encoder.layer1": {0: 1.0, 3: 9.0, 6: 0.1, 23: 0.0},
    "encoder.layer2": {0: 1.0, 4: 8.0, 6: 0.1, 23: 0.0},
}
LATE_PEAK = {"encoder.layer1": {0: 1.0, 12: 9.0, 23: 4.0}}
FLAT = {"encoder.layer1": {0: 1.0, 23: 1.5}, "encoder.layer2": {0: 1.0, 23: 1.5}}
MLPS = ("projector.linear1", "projector.linear2", "predictor.linear1", "predictor.linear2")
MLPS_CLIMB, MLPS_FLAT = (
    dict.fromkeys(MLPS, points) for points in ({0: 0.1, 12: 3.0, 23: 0.2}, {0: 0.1, 23: 0.15})
)
LEARNS, IDLE, LEARNS_LATE = (20.0, 60.0), (20.0, 19.0), {0: 20.0, 12: 20.0, 23: 60.0}
OUT_AT_ONCE = {**RECOVERED, 4: 0.95, 6: 0.9}

Story = Mapping[str, Callable[[str, int], Evidence]]


def of(neg: Points, **more: object) -> Callable[[str, int], Evidence]:
    return lambda arm, seed: made_up(arm, neg, seed=seed, **more)  # type: ignore[arg-type]


def runs(story: Story, seeds: Sequence[int] = range(5)) -> dict[str, list[Evidence]]:
    return {arm: [make(arm, seed) for seed in seeds] for arm, make in story.items()}


def one(claim: str, neg: Points, **more: object) -> Story:
    return {BY_ID[claim].arms[0]: of(neg, **more)}


def timing(
    fast: Points, fast_rates: object, slow: Points, slow_rates: object, accuracy: object = LEARNS
) -> Story:
    return {
        "gn-lars-0.5": of(fast, rates=fast_rates, accuracy=accuracy),
        "gn-lars-0.1": of(slow, rates=slow_rates),
    }


def table(accuracies: Sequence[float], none: Points = COLLAPSED) -> Story:
    """The table's arms in its order, with these last accuracies."""
    shapes = (HEALTHY, HEALTHY, HEALTHY, none, COLLAPSED, COLLAPSED, HEALTHY)
    return {
        arm: of(neg, accuracy=(20.0, acc))
        for arm, neg, acc in zip(BY_ID["M1"].arms, shapes, accuracies, strict=True)
    }


STORIES: tuple[tuple[str, Outcome, Story], ...] = (
    *((claim, "reproduced", one(claim, HEALTHY, accuracy=LEARNS)) for claim in ("C1", "C3", "C4")),
    *((claim, "partly", one(claim, HEALTHY, accuracy=IDLE)) for claim in ("C1", "C3", "C4")),
    *((claim, "not reproduced", one(claim, COLLAPSED, accuracy=LEARNS)) for claim in ("C1", "C3",
    "C4")),
    ("C1", "not reproduced", one("C1", COLLAPSED_LATE)),
    ("C2", "reproduced", one("C2", RECOVERED, accuracy=LEARNS)),
    ("C2", "partly", one("C2", RECOVERED, accuracy=IDLE)),
    ("C2", "not reproduced", one("C2", COLLAPSED, accuracy=LEARNS)),
    ("C2", "not reproduced", one("C2", HEALTHY, accuracy=LEARNS)),
    ("C5", "reproduced", one("C5", COLLAPSED, accuracy=IDLE)),
    ("C5", "partly", one("C5", COLLAPSED, accuracy=LEARNS)),
    ("C5", "partly", one("C5", DISTURBED, accuracy=IDLE)),
    ("C5", "not reproduced", one("C5", HEALTHY, accuracy=IDLE)),
    ("C5", "not reproduced", one("C5", RECOVERED)),
    ("C5", "not reproduced", one("C5", COLLAPSED_LATE)),
    ("C6", "reproduced", one("C6", RECOVERED, accuracy=LEARNS)),
    ("C6", "partly", one("C6", RECOVERED_LATE, accuracy=LEARNS)),
    ("C6", "not reproduced", one("C6", HEALTHY, accuracy=LEARNS)),
    ("C6", "not reproduced", one("C6", COLLAPSED, accuracy=LEARNS)),
    ("C6", "not reproduced", one("C6", RECOVERED, accuracy=IDLE)),
    ("C6", "undetermined", one("C6", RECOVERED)),
    ("C7", "reproduced", one("C7", COLLAPSED, accuracy=IDLE)),
    ("C7", "partly", one("C7", COLLAPSED, accuracy=LEARNS)),
    ("C7", "not reproduced", one("C7", RECOVERED, accuracy=IDLE)),
    ("C8", "reproduced", one("C8", RECOVERED_LATE, accuracy=LEARNS)),
    ("C8", "partly", one("C8", RECOVERED_LATE, accuracy=IDLE)),
    ("C8", "partly", one("C8", HALF_OUT, accuracy=LEARNS)),
    ("C8", "not reproduced", one("C8", COLLAPSED, accuracy=LEARNS)),
    ("C8", "not reproduced", one("C8", HEALTHY, accuracy=LEARNS)),
    ("C9", "reproduced", one("C9", COMES_AND_GOES, accuracy=LEARNS)),
    ("C9", "partly", one("C9", COMES_AND_GOES, accuracy=IDLE)),
    ("C9", "partly", one("C9", RECOVERED, accuracy=LEARNS)),
    ("C9", "not reproduced", one("C9", COLLAPSED, accuracy=LEARNS)),
    ("C9", "not reproduced", one("C9", HEALTHY, accuracy=LEARNS)),
    ("C10", "reproduced", one("C10", RECOVERED, rates=EARLY_PEAK)),
    ("C10", "partly", one("C10", HALF_OUT, rates=EARLY_PEAK)),
    ("C10", "not reproduced", one("C10", RECOVERED, rates=FLAT)),
    ("C10", "not reproduced", one("C10", COLLAPSED, rates=EARLY_PEAK)),
    ("C11", "reproduced", one("C11", DISTURBED, rates=MLPS_CLIMB)),
    ("C11", "partly", one("C11", DISTURBED, rates=MLPS_FLAT)),
    ("C11", "not reproduced", one("C11", RECOVERED, rates=MLPS_CLIMB)),
    ("C11", "not reproduced", one("C11", COLLAPSED, rates=MLPS_CLIMB)),
    ("C12", "reproduced", timing(OUT_AT_ONCE, EARLY_PEAK, COLLAPSED, LATE_PEAK)),
    ("C12", "partly", timing(RECOVERED, EARLY_PEAK, COLLAPSED, LATE_PEAK)),
    ("C12", "partly", timing(OUT_AT_ONCE, EARLY_PEAK, COLLAPSED, LATE_PEAK, LEARNS_LATE)),
    ("C12", "not reproduced", timing(OUT_AT_ONCE, EARLY_PEAK, COLLAPSED, LATE_PEAK, IDLE)),
    ("C12", "not reproduced", timing(RECOVERED, LATE_PEAK, COLLAPSED, EARLY_PEAK)),
    ("C12", "not reproduced", timing(COLLAPSED, EARLY_PEAK, COLLAPSED, LATE_PEAK)),
    ("C12", "not reproduced", timing(RECOVERED, EARLY_PEAK, RECOVERED_LATE, LATE_PEAK)),
    ("C13", "reproduced", {**one("C13", COLLAPSED), "gn-lars-0.2-replayed": of(COLLAPSED)}),
    ("C13", "reproduced", one("C13", COLLAPSED)),
    ("C13", "reproduced", {**one("C13", COLLAPSED), "gn-lars-layer1-layer2": of(RECOVERED)}),
    ("C13", "partly", {**one("C13", COLLAPSED), "gn-lars-layer1-layer2": of(COLLAPSED)}),
    ("C13", "partly", {**one("C13", COLLAPSED), "gn-lars-0.2-replayed": of(RECOVERED)}),
    ("C13", "not reproduced", one("C13", RECOVERED)),
    ("M1", "reproduced", table((57.7, 55.3, 48.0, 28.3, 29.4, 28.8, 44.1))),
    ("M1", "reproduced", table((57.7, 55.3, 48.0, 28.3, 29.4, 28.8, 60.0))),
    ("M1", "partly", table((57.7, 55.3, 48.0, 28.3, 29.4, 28.8, 29.0))),
    ("M1", "partly", table((48.0, 50.0, 57.7, 28.3, 29.4, 28.8, 44.1))),
    ("M1", "partly", table((57.7, 55.3, 48.0, 28.3, 29.4, 28.8, 44.1), none=HEALTHY)),
    ("M1", "not reproduced", table((57.7, 55.3, 48.0, 47.0, 29.4, 28.8, 44.1))),
    ("M1", "not reproduced", table((57.7, 55.3, 48.0, 28.3, 40.0, 28.8, 44.1))),
)  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "outcome", "story"),
    STORIES,
    ids=[f"{c}-{o}-{n}" for n, (c, o, _) in enumerate(STORIES)],
)
def test_made_up(claim: str, outcome: Outcome, story: Story) -> None:
    assert judge(BY_ID[claim], runs(story), "mini").outcome == outcome
    assert judge(BY_ID[claim], runs(story, seeds=(0,)), "mini").outcome == "undetermined"
    assert judge(BY_ID[claim], {}, "mini").outcome == "undetermined"


def test_every_claim_has_a_story_for_every_outcome_that_evidence_can_decide() -> None:
    told = {(claim, outcome) for claim, outcome, _ in STORIES}
    assert told >= {
        (claim.id, outcome)
        for claim in CLAIMS
        for outcome in ("reproduced", "partly", "not reproduced")
    }


class TestPublished:
    @pytest.mark.parametrize("claim", [*CURVES, BY_ID["M1"]], ids=lambda claim: claim.id)
    def test_the_posts_own_curves_reproduce_it(self, claim: Claim) -> None:
        verdict = judge(claim, published(claim), "published")
        assert verdict.outcome == "reproduced", verdict

    def test_no_curve_and_no_number_leaves_c13_undetermined(self) -> None:
        assert published(BY_ID["C13"]) == {}
        assert judge(BY_ID["C13"], {}, "published").outcome == "undetermined"

    # For each claim published curves that do the opposite of what it says.
    OPPOSITE = (
        ("C1", "C7"), ("C1", "C2"), ("C2", "C1"), ("C2", "C5"), ("C3", "C2"), ("C4", "C5"), ("C5",
        "C4"), ("C5", "C6"),
        ("C6", "C7"), ("C6", "C5"), ("C7", "C6"), ("C7", "C1"), ("C8", "C5"), ("C8", "C11"), ("C9",
        "C11"), ("C9", "C7"),
        ("C10", "C11"), ("C11", "C9"), ("C11", "C8"), ("C13", "C8"), ("C13", "C6"),
    )  # fmt: skip

    @pytest.mark.parametrize(("claim", "other"), OPPOSITE)
    def test_curves_of_the_opposite_do_not(self, claim: str, other: str) -> None:
        arm = BY_ID[claim].arms[0]
        (opposite,) = published(BY_ID[other]).values()
        verdict = judge(
            BY_ID[claim],
            {arm: [dataclasses.replace(run, arm=arm) for run in opposite]},
            "published",
        )
        assert verdict.outcome in ("not reproduced", "undetermined")
        # Undecided only for want of rates in the other figure.
        assert verdict.outcome == "not reproduced" or "no rates" in str(verdict)

    def test_timing_the_other_way_round_does_not(self) -> None:
        fast, slow = published(BY_ID["C12"]).values()
        assert (
            judge(BY_ID["C12"], {"gn-lars-0.5": slow, "gn-lars-0.1": fast}, "published").outcome
            == "not reproduced"
        )

    def test_the_table_with_rows_swapped_does_not(self) -> None:
        found = published(BY_ID["M1"])
        swapped = {
            **found,
            "bn-sgd-mlp-none": found["bn-sgd-mlp-bn"],
            "bn-sgd-mlp-bn": found["bn-sgd-mlp-none"],
        }
        assert judge(BY_ID["M1"], swapped, "published").outcome == "not reproduced"

    @pytest.mark.parametrize("claim", CURVES, ids=lambda claim: claim.id)
    def test_a_level_off_by_eight_points_is_partly(self, claim: Claim) -> None:
        """Levels count at full scale, and refine: the event decides.

        No phase changes at eight points less.
        """
        moved = {
            arm: [
                dataclasses.replace(
                    run, accuracy=np.append(run.accuracy[:-1], run.accuracy[-1] - 8.0)
                )
                for run in found
            ]
            for arm, found in published(claim).items()
        }
        expected = (
            "partly"
            if any(name.startswith("accuracy@") for name in claim.numbers)
            else "reproduced"
        )
        assert judge(claim, moved, "published").outcome == expected


class TestSeeds:
    @pytest.mark.parametrize(
        ("yes", "asked", "held"),
        [
            (3, 3, True), (2, 3, None), (1, 3, None), (0, 3, False), (4, 4, True), (3, 4, None),
            (1, 4, None), (0, 4, False),
            (5, 5, True), (4, 5, True), (3, 5, None), (2, 5, None), (1, 5, False), (0, 5, False),
            (5, 7, True), (2, 7, False),
            (2, 2, None), (0, 0, None),
        ],
    )  # fmt: skip
    def test_a_share_decides_where_its_interval_does(
        self, yes: int, asked: int, held: bool | None
    ) -> None:
        makers = [of(COLLAPSED)] * yes + [of(HEALTHY)] * (asked - yes)
        evidence = {
            "gn-sgd-mlp-none": [make("gn-sgd-mlp-none", seed) for seed, make in enumerate(makers)]
        }
        end = statement("It is collapsed at the end.", judge(BY_ID["C5"], evidence, "mini"))
        assert end.held is held
        assert (end.yes, end.asked) == (yes, asked)

    @pytest.mark.parametrize(
        ("yes", "outcome"),
        [
            *enumerate(
                ("not reproduced", "not reproduced", "mixed", "mixed", "reproduced", "reproduced")
            )
        ],
    )
    @pytest.mark.parametrize("claim", ["C7", "C12"])
    def test_claims_at_a_border_say_their_share_of_five(
        self, claim: str, yes: int, outcome: Outcome
    ) -> None:
        arm, slow = "gn-lars-0.1", [of(COLLAPSED, accuracy=IDLE, rates=LATE_PEAK)] * yes
        slow += [of(RECOVERED, accuracy=IDLE, rates=LATE_PEAK)] * (5 - yes)
        evidence = runs(timing(OUT_AT_ONCE, EARLY_PEAK, COLLAPSED, LATE_PEAK))
        evidence[arm] = [make(arm, seed) for seed, make in enumerate(slow)]
        verdict = judge(BY_ID[claim], evidence, "mini")
        assert verdict.outcome == outcome
        stays = statement(
            "collapsed at the end." if claim == "C7" else "At lr .1 it stays collapsed.", verdict
        )
        low, high = binomtest(yes, 5).proportion_ci(method="wilson")
        assert stays.interval == pytest.approx((low, high), abs=1e-12)
        share = f"{yes / 5:.2f}".removeprefix("0")
        interval = f"{low:.2f} to {high:.2f}".replace("0.", ".")
        words = f"held for {yes} of 5 seeds (share {share}, 95 % interval {interval})"
        assert stays.evidence.startswith(words)

    def test_the_words_of_four_of_five(self) -> None:
        assert decide(4, 1, 5, 5) == (
            True,
            "held for 4 of 5 seeds (share .80, 95 % interval .38 to .96)",
        )
        assert decide(1, 0, 1, 3)[1].endswith("; too few to decide: 1 of 3 needed")
        assert decide(2, 1, 3, 3)[1].endswith(": mixed")
        assert decide(3, 0, 8, 3) == (None, "held for 3 of 8 seeds, open for 5; too many are open")
        assert decide(1, 0, 1, 1) == (True, "held for 1 of 1 seed")
        assert decide(0, 0, 3, 3) == (
            None,
            "held for 0 of 3 seeds, open for 3; too few to decide: 0 of 3 needed",
        )
        assert decide(4, 0, 5, 3) == (True, "held for 4 of 5 seeds, open for 1")

    @given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))
    def test_yes_and_no_are_alike_and_more_of_one_never_undoes_it(
        self, yes: int, no: int, open_: int
    ) -> None:
        asked = yes + no + open_
        held, _ = decide(yes, no, asked, 3)
        mirrored, _ = decide(no, yes, asked, 3)
        assert mirrored is (None if held is None else not held)
        if held is True:
            assert decide(yes + 1, no, asked + 1, 3)[0] is True
            assert binomtest(yes, asked).proportion_ci(method="wilson").low > 1 / 3

    def test_runs_of_two_arms_are_compared_seed_by_seed(self) -> None:
        evidence = runs(timing(OUT_AT_ONCE, EARLY_PEAK, COLLAPSED, LATE_PEAK))
        evidence["gn-lars-0.1"] = [
            dataclasses.replace(run, seed=run.seed + 4) for run in evidence["gn-lars-0.1"]
        ]
        verdict = judge(BY_ID["C12"], evidence, "mini")
        assert verdict.statements[0].held is None
        assert "1 of 5 needed" in verdict.statements[0].evidence

    def test_two_runs_with_one_seed_are_refused(self) -> None:
        with pytest.raises(ValueError, match="two runs with one seed"):
            judge(
                BY_ID["C5"], {"gn-sgd-mlp-none": [of(COLLAPSED)("gn-sgd-mlp-none", 3)] * 2}, "mini"
            )

    @pytest.mark.parametrize(
        ("claim", "outcome", "story"),
        STORIES[::3],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_their_order_does_not_matter(self, claim: str, outcome: Outcome, story: Story) -> None:
        evidence = runs(story, seeds=range(5))
        shuffled = {
            arm: random.Random(7).sample(found, len(found))
            for arm, found in reversed(evidence.items())
        }
        assert judge(BY_ID[claim], shuffled, "mini") == judge(BY_ID[claim], evidence, "mini")

    def test_unfinished_runs_show_what_happened_and_leave_the_end_open(self) -> None:
        verdict = judge(BY_ID["C5"], runs(one("C5", COLLAPSED, done=12)), "mini")
        assert statement("It collapses at once.", verdict).held is True
        assert statement("It is collapsed at the end.", verdict).held is None
        assert (
            judge(BY_ID["C1"], runs(one("C1", COLLAPSED, done=3)), "mini").outcome
            == "not reproduced"
        )
        assert (
            judge(BY_ID["C1"], runs(one("C1", HEALTHY, done=3)), "mini").outcome == "undetermined"
        )


def test_a_variant_is_judged_from_one_seed() -> None:
    arm = BY_ID["C5"].arms[0]
    evidence = {
        arm: runs({arm: of(COLLAPSED)})[arm],
        f"{arm}@lr0.2": [of(HEALTHY)(f"{arm}@lr0.2", 0)],
    }
    (verdict,) = judge_variants(BY_ID["C5"], evidence, "mini").values()
    assert verdict.outcome == "not reproduced"
    assert "0 of 1 seed" in verdict.statements[0].evidence


def test_variants_are_judged_in_the_place_of_their_arm() -> None:
    arm = BY_ID["C5"].arms[0]
    evidence = runs(
        {arm: of(COLLAPSED), f"{arm}@lr0.2": of(HEALTHY), "gn-ws-sgd@heads": of(COLLAPSED)}
    )
    verdicts = judge_variants(BY_ID["C5"], evidence, "mini")
    assert {what: verdict.outcome for what, verdict in verdicts.items()} == {
        "lr0.2": "not reproduced"
    }


class TestLongRuns:
    """A step is as far as one of the post's there: limits are the post's epochs times 410, whatever
    a run's own epochs are.
    """

    def run(
        self, arm: str, leaves: int | None, steps: int, steps_per_epoch: int = 128, **more: object
    ) -> list[Evidence]:
        """Runs of ``steps`` steps that are collapsed from the second epoch to step ``leaves``."""
        length = steps // steps_per_epoch
        neg = {0: 0.97, 1: 0.999, length - 1: 0.9999}
        if leaves is not None:
            at = leaves // steps_per_epoch - 1
            neg = {0: 0.97, 1: 0.999, at - 1: 0.999, at: 0.4, length - 1: 0.3}
        make = of(
            neg,
            scale="long",
            epochs=length,
            steps_per_epoch=steps_per_epoch,
            accuracy=LEARNS,
            **more,
        )
        return [make(arm, seed) for seed in range(3)]

    def held(self, claim: str, text: str, found: list[Evidence]) -> Statement:
        return statement(text, judge(BY_ID[claim], {found[0].arm: found}, "long"))

    @pytest.mark.parametrize(("leaves", "held"), [(16_384, True), (16_512, False)])
    def test_quickly_is_within_16400_steps(self, leaves: int, held: bool) -> None:
        found = self.run("gn-lars-layer1-layer2", leaves, 20_480)
        assert self.held("C10", "It leaves the collapse quickly.", found).held is held

    @pytest.mark.parametrize(("leaves", "held"), [(4_096, False), (4_224, True)])
    def test_at_once_is_within_4100_steps(self, leaves: int, held: bool) -> None:
        """C8 stays collapsed for longer than that."""
        assert (
            self.held(
                "C8",
                "It stays collapsed for long.",
                self.run("gn-sgd-weight-decay", leaves, 51_200),
            ).held
            is held
        )

    @pytest.mark.parametrize(("leaves", "held"), [(40_992, True), (41_008, False)])
    def test_in_time_is_within_41000_steps_of_any_epochs(self, leaves: int, held: bool) -> None:
        found = self.run("gn-ws-sgd", leaves, 48_000, steps_per_epoch=16)
        assert (
            self.held("C9", "After a collapse, its representations separate.", found).held is held
        )

    def test_what_was_not_seen_is_said_with_the_steps(self) -> None:
        end = self.held("C8", "Weight decay alone", self.run("gn-sgd-weight-decay", None, 51_200))
        assert end.held is False
        assert (
            "collapsed in epoch 399 (step 51200), negative cosine 0.9999, not left within 51,200 "
            "steps" in end.evidence
        )

    def test_a_run_that_is_over_before_the_posts_time_leaves_it_open(self) -> None:
        """8,000 steps cannot refute "within 100 epochs".

        C10's figure ends at epoch 30, 12,300 steps: so may a run of it.
        """
        short = judge(
            BY_ID["C9"],
            {"gn-ws-sgd": self.run("gn-ws-sgd", None, 8_000, steps_per_epoch=16)},
            "long",
        )
        assert short.outcome == "undetermined"
        assert short.statements[0].evidence.startswith(
            "held for 0 of 3 seeds, open for 3; too few to decide: 0 of 3 needed. seed"
        )
        assert "not separated within 8,000 steps" in short.statements[0].evidence
        assert (short.statements[0].asked, short.statements[0].open) == (3, 3)
        quickly = "It leaves the collapse quickly."
        assert (
            self.held("C10", quickly, self.run("gn-lars-layer1-layer2", None, 12_288)).held is False
        )
        assert (
            self.held("C10", quickly, self.run("gn-lars-layer1-layer2", None, 11_000)).held is None
        )

    def test_a_warm_up_alone_is_no_explosion(self) -> None:
        """Rates that follow the learning rate's ramp, and ones that rise tenfold beside it."""
        groups, ramp = ("encoder.layer1", "encoder.layer2"), {0: 0.0, 32: 0.2, 119: 0.2}
        for points, explodes in ((ramp, False), ({0: 0.0, 16: 0.1, 32: 2.0, 119: 2.0}, True)):
            make = of(
                COLLAPSED,
                scale="long",
                epochs=120,
                rates=dict.fromkeys(groups, points),
                warmup_steps=32 * 32,
            )
            found = [make("gn-lars-layer1-layer2", seed) for seed in range(3)]
            assert self.held("C10", "explode as it collapses", found).held is explodes
            without = [dataclasses.replace(run, warmup_steps=0) for run in found]
            assert self.held("C10", "explode as it collapses", without).held is True

    def test_a_loss_that_rounds_to_nothing_and_climbs_is_disturbed(self) -> None:
        (run,) = runs(one("C11", COLLAPSED), seeds=[0])["gn-lars-mlps"]
        nothing = dataclasses.replace(
            run, loss=np.concatenate([[1e-2, 1e-2], np.zeros(5), np.full(17, 1e-3)])
        )
        found = [dataclasses.replace(nothing, seed=seed) for seed in range(3)]
        assert self.held("C11", "The collapse is disturbed.", found).held is True
        still = [dataclasses.replace(each, loss=np.zeros(24)) for each in found]
        assert self.held("C11", "The collapse is disturbed.", still).held is False

    def test_coming_and_going_begins_with_a_collapse(self) -> None:
        never = {0: 0.9, 2: 0.3, 4: 0.75, 5: 0.85, 7: 0.3, 23: 0.3}
        ((_, wholly),) = runs(one("C9", never)).items()
        assert self.held("C9", "several times", wholly).held is not True

    def test_both_arms_of_c13(self) -> None:
        runs = {"gn-sgd-high-lr-layer1-layer2": None, "gn-lars-layer1-layer2": 9_000}
        evidence = {arm: self.run(arm, leaves, 15_360) for arm, leaves in runs.items()}
        assert judge(BY_ID["C13"], evidence, "long").outcome == "reproduced"


class TestAccuracy:
    def learns(self, *, num_scored: int | None, last: float) -> bool | None:
        story = one("C6", RECOVERED, accuracy=(48.0, last), num_scored=num_scored)
        return statement("It learns.", judge(BY_ID["C6"], runs(story), "mini")).held

    @pytest.mark.parametrize("num_scored", [256, 1024, 3968])
    def test_it_learns_where_two_samples_of_its_size_would_not_differ_so(
        self, num_scored: int
    ) -> None:
        """The margin found here by bisection is the root of Newcombe's formula, with scipy's Wilson
        intervals.
        """
        low, high = 48.0, 70.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (
                (low, middle) if self.learns(num_scored=num_scored, last=middle) else (middle, high)
            )
        p1, p2 = 0.48, high / 100

        def end(share: float, sign: int) -> float:
            return float(
                optimize.brentq(
                    lambda p: (p - share) ** 2 - 3.8414588 * p * (1 - p) / num_scored,
                    share,
                    share + sign * 0.2,
                )
            )

        assert p2 - p1 == pytest.approx(np.hypot(p2 - end(p2, -1), end(p1, 1) - p1), rel=1e-4)

    def test_one_scored_image_says_nothing(self) -> None:
        story = one("C6", RECOVERED, accuracy=(0.0, 100.0), num_scored=1)
        assert statement("It learns.", judge(BY_ID["C6"], runs(story), "mini")).held is False

    def test_an_unknown_number_is_that_of_the_small_scales(self) -> None:
        for last in (50.0, 52.0, 52.3, 52.4, 54.0):
            assert self.learns(num_scored=None, last=last) == self.learns(
                num_scored=1024, last=last
            )

    def test_the_untrained_weights_are_what_counts_and_not_the_first_epoch(self) -> None:
        (run, *_), *_ = runs(one("C5", COLLAPSED, accuracy=(48.0, 49.0))).values()
        fell = dataclasses.replace(run, accuracy=np.append(np.full(23, 10.0), 30.0))
        verdict = judge(
            BY_ID["C5"],
            {run.arm: [dataclasses.replace(fell, seed=seed) for seed in range(3)]},
            "mini",
        )
        useless = statement("worth no more than random", verdict)
        assert useless.held is True
        assert "accuracy 48.0 % untrained, 30.0 % at last" in useless.evidence

    def test_a_run_that_did_not_score_them_leaves_it_open(self) -> None:
        found = runs(one("C6", RECOVERED, accuracy=LEARNS))
        old = {
            arm: [dataclasses.replace(run, untrained_accuracy=np.nan) for run in rows]
            for arm, rows in found.items()
        }
        assert statement("It learns.", judge(BY_ID["C6"], old, "mini")).held is None
        assert judge(BY_ID["C6"], old, "mini").outcome == "undetermined"

    def test_the_contrastive_row_is_between_random_and_byol(self) -> None:
        verdict = judge(BY_ID["M1"], published(BY_ID["M1"]), "published")
        found = [s for s in verdict.statements if "contrastive" in s.text]
        assert [(s.held, s.role) for s in found] == [(True, "other"), (True, "told")]
        assert "bn-sgd-contrastive 44.1 %, random 28.8 %" in found[0].evidence


def test_controls_are_told_and_do_not_count_against_c6() -> None:
    story = {
        **one("C6", RECOVERED, accuracy=LEARNS),
        "gn-lars-0.2-replayed": of(RECOVERED),
        "gn-lars-0.2-capped": of(COLLAPSED),
    }
    verdict = judge(BY_ID["C6"], runs(story), "mini")
    assert verdict.outcome == "reproduced"
    assert [s.held for s in verdict.statements if s.role == "told"] == [None, False, True]


def statement(text: str, verdict: Verdict) -> Statement:
    """The one statement that has ``text`` in it."""
    (found,) = (row for row in verdict.statements if text in row.text)
    return found


statements = st.lists(
    st.builds(
        Statement,
        st.just(""),
        st.sampled_from([True, False, None]),
        st.just(""),
        st.sampled_from(["main", "other", "told"]),
    ),
    max_size=6,
)
BETTER = ("reproduced", "partly", "mixed", "undetermined", "not reproduced")


@given(statements, st.data())
def test_a_statement_that_ceases_to_hold_never_improves_the_outcome(
    sequence: list[Statement], data: st.DataObject
) -> None:
    if sequence:
        at = data.draw(st.integers(0, len(sequence) - 1))
        if sequence[at].held is not False:
            for worse in (False, None) if sequence[at].held else (False,):
                changed = [
                    s._replace(held=worse) if place == at else s for place, s in enumerate(sequence)
                ]
                assert BETTER.index(outcome_of(changed)) >= BETTER.index(outcome_of(sequence))


@given(statements, st.randoms())
def test_the_order_of_statements_does_not_matter(
    sequence: list[Statement], shuffle: random.Random
) -> None:
    assert outcome_of(shuffle.sample(sequence, len(sequence))) == outcome_of(sequence)


@given(
    st.lists(
        st.sampled_from([HEALTHY, COLLAPSED, RECOVERED, COLLAPSED_LATE, DISTURBED]),
        min_size=3,
        max_size=7,
    )
)
def test_one_seed_that_collapses_instead_never_improves_never_collapses(
    shapes: list[Points],
) -> None:
    def verdict(of_seeds: list[Points]) -> Verdict:
        return judge(
            BY_ID["C1"],
            {
                "bn-sgd-mlp-bn": [
                    made_up("bn-sgd-mlp-bn", s, seed=n) for n, s in enumerate(of_seeds)
                ]
            },
            "mini",
        )

    assert BETTER.index(verdict([COLLAPSED, *shapes[1:]]).outcome) >= BETTER.index(
        verdict(shapes).outcome
    )
