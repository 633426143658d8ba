"""The effective rank against its formula on numpy's singular values, and where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.evaluation.rank import EPSILON, effective_rank, relative_spread


def by_formula(x: np.ndarray) -> float:
    """Compute RankMe's equation 1."""
    singular = np.linalg.svd(x, compute_uv=False)
    p = singular / np.abs(singular).sum() + EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.sampled_from([0.0, 1.0, 100.0])
)
def test_is_rankmes_formula(samples: int, features: int, seed: int, mean: float) -> None:
    x = np.random.default_rng(seed).standard_normal((samples, features)) + mean
    # Squaring loses what lies below 1e-8 of the largest singular value.
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(by_formula(x), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_orthogonal_directions_of_one_length_count_each(rank: int) -> None:
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((100, rank)))[0]
    x = q @ np.linalg.qr(np.random.default_rng(1).standard_normal((16, rank)))[0].T
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(rank, abs=2e-6 * 16 + 1e-4)


def test_a_collapse_has_rank_one_in_fp32_too() -> None:
    point = torch.rand(1, 512)
    assert effective_rank(point.expand(300, 512)) == pytest.approx(1.0, abs=2e-6 * 512)
    # Neighbours in fp32: what a collapse leaves.
    assert effective_rank(point * (1 + 6e-8 * torch.randn(300, 512))) < 1.01


def test_zeros_have_no_direction() -> None:
    assert effective_rank(torch.zeros(5, 3)) == 0.0


@given(st.integers(0, 99), st.floats(1e-6, 1e6))
def test_length_does_not_matter(seed: int, factor: float) -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert effective_rank(x * factor) == pytest.approx(effective_rank(x), rel=1e-6)


def test_the_spread_is_how_far_rows_are_from_their_mean() -> None:
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    assert relative_spread(x) == 0.0
    assert relative_spread(x + torch.tensor([[0.5, 0.0], [-0.5, 0.0]])) == pytest.approx(0.1)
    assert relative_spread(torch.tensor([[1.0], [-1.0]])) == 0.0
