"""Intervals of shares: against scipy, and how often they hold the true share."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastbyol.evaluation.intervals import difference_margin, wilson


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
