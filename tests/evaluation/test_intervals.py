"""Intervals of shares: against scipy, and how often they hold the true share."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastbyol.evaluation.intervals import (
    Accuracy,
    accuracy_interval,
    accuracy_text,
    difference_margin,
    wilson,
)


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_equals_scipys(counts: tuple[int, int]) -> None:
    hits, total = counts
    theirs = stats.binomtest(hits, total).proportion_ci(method="wilson")
    assert wilson(hits, total) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_ends_are_where_the_share_is_one_quantile_away() -> None:
    """The interval's definition: |share - p| = z sqrt(p (1 - p) / n) at both of its ends."""
    for hits, total in ((1, 5), (3, 4), (617, 1024)):
        for end in wilson(hits, total):
            assert abs(hits / total - end) == pytest.approx(
                1.959963984540054 * math.sqrt(end * (1 - end) / total), abs=1e-12
            )


def test_knows_nothing_of_no_trials() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((6, 7), (2, 7),
    0.0582, 0.8062),
     ((5, 56), (0, 29), -0.0381, 0.1926), ((0, 10), (0, 20), -0.1611, 0.2775), ((10, 10), (0, 20),
     0.6791, 1.0)],
)  # fmt: skip
def test_a_differences_interval_is_newcombes(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    """His table II, method 10.

    The upper end is the lower one of the difference the other way round.
    """
    (a, m), (b, n) = first, second
    assert a / m - b / n - difference_margin(a / m, m, b / n, n) == pytest.approx(low, abs=6e-5)
    assert a / m - b / n + difference_margin(b / n, n, a / m, m) == pytest.approx(high, abs=6e-5)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("total", [5, 30, 1024])
def test_holds_the_true_share_nine_times_in_ten_or_more(share: float, total: int) -> None:
    """Its level is 95 % on average over shares, and near it for each:

    Brown, Cai, DasGupta (2001), section 3.1.
    """
    inside = [
        hits
        for hits in range(total + 1)
        if wilson(hits, total)[0] <= share <= wilson(hits, total)[1]
    ]
    assert stats.binom.pmf(inside, total, share).sum() > 0.9


def coverage(total: int, shares: np.ndarray) -> np.ndarray:
    """How often the printed interval of an accuracy on ``total`` images holds the true share.

    Not simulated but exact: the probability of every count of right answers whose interval does.
    """
    hits = np.arange(total + 1)
    ends = np.array([accuracy_interval(100.0 * k / total, total) for k in hits]) / 100.0
    return np.array(
        [
            stats.binom.pmf(hits[(ends[:, 0] <= p) & (p <= ends[:, 1])], total, p).sum()
            for p in shares
        ]
    )


@pytest.mark.parametrize("total", [10, 30, 100, 1000, 10_000])
def test_an_accuracys_interval_holds_the_truth_as_often_as_it_says(total: int) -> None:
    """On average over accuracies from 50 to 100 % in 95 of 100 test sets.

    For one accuracy it differs, because counts are whole numbers: at n = 10 by up to five points
    either way, less for more images.
    """
    covered = coverage(total, np.linspace(0.5, 1.0, 101))
    assert 0.947 < covered.mean() < 0.962
    # The accuracies with ten wrong answers or more to expect, where the spread is small.
    steady = coverage(total, np.linspace(0.5, max(0.5, 1.0 - 10.0 / total), 101))
    assert steady.min() > (0.92 if total > 10 else 0.95 - 0.06)
    assert coverage(total, np.array([1.0])) == 1.0


@pytest.mark.parametrize("total", [10, 100, 1000, 10_000])
def test_its_worst_is_where_one_wrong_answer_is_rare(total: int) -> None:
    """Brown, Cai, DasGupta (2001) derive .838 as the limit, near a share of 1 - .18 / n."""
    worst = coverage(total, 1.0 - np.array([0.1, 0.17, 0.1765, 0.18, 0.2, 0.5, 1.0, 2.0]) / total)
    assert 0.835 < worst.min() < 0.9


def test_simulated_test_sets_agree_with_the_enumeration() -> None:
    """20,000 test sets of 200 images: their share is known to .005 at three standard errors."""
    g = np.random.default_rng(0)
    for share in (0.55, 0.8, 0.97):
        ends = [accuracy_interval(100.0 * k / 200, 200) for k in g.binomial(200, share, 20_000)]
        inside = np.mean([low <= 100.0 * share <= high for low, high in ends])
        assert inside == pytest.approx(coverage(200, np.array([share]))[0], abs=0.006)


def test_words_and_fields_have_the_same_ends() -> None:
    low, high = (100.0 * end for end in wilson(617, 1024))
    accuracy = Accuracy(61700.0 / 1024, 1024)
    assert accuracy.in_words() == f"60.3% ({low:.1f} to {high:.1f})"
    fields = accuracy.fields("top5_accuracy")
    assert list(fields) == ["top5_accuracy", "top5_accuracy_low", "top5_accuracy_high"]
    assert list(fields.values()) == pytest.approx([61700.0 / 1024, low, high])
    assert accuracy_text(60.0, None) == accuracy_text(60.0, 0) == "60.0%"
