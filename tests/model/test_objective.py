"""The loss and what is watched beside it, against sums over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastbyol.model.byol import OnlineOutput
from fastbyol.model.objective import byol_loss, dead_share, observe, spread


def rows(count: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))
def test_loss_is_the_symmetric_sum(batch: int, features: int, seed: int) -> None:
    q, z = rows(2 * batch, features, seed), rows(2 * batch, features, seed + 1000)
    cosines = [F.cosine_similarity(q[:batch], z[batch:]), F.cosine_similarity(q[batch:], z[:batch])]
    assert byol_loss(q, z).item() == pytest.approx(sum(1 - c.mean().item() for c in cosines), abs=1e-12)


def test_loss_identities() -> None:
    q = rows(10, 6)
    swapped = torch.cat([q[5:], q[:5]])
    assert byol_loss(q, 3 * swapped).item() == pytest.approx(0.0, abs=1e-14)
    assert byol_loss(q, -swapped).item() == pytest.approx(4.0, abs=1e-14)
    assert byol_loss(0.1 * q, rows(10, 6, 1)).item() == pytest.approx(byol_loss(q, rows(10, 6, 1)).item(), abs=1e-14)


def test_loss_gradient_is_orthogonal_to_the_prediction() -> None:
    q = rows(8, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: byol_loss(q, rows(8, 5, 1)), (q,))
    (grad,) = torch.autograd.grad(byol_loss(q, rows(8, 5, 1)), q)
    torch.testing.assert_close((grad * q).sum(1), torch.zeros(8, dtype=torch.float64), rtol=0.0, atol=1e-15)


def test_low_precision_goes_through_fp32() -> None:
    q, z = rows(16, 32).bfloat16(), rows(16, 32, 1).bfloat16()
    assert byol_loss(q, z).dtype == torch.float32
    assert byol_loss(q, z).item() == pytest.approx(byol_loss(q.double(), z.double()).item(), abs=1e-6)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_fp32_keeps_loss_and_gradient_of_a_collapsed_state(angle: float) -> None:
    """All predictions and projections within ``angle`` of one direction, where 1 - cos itself would be rounding."""
    centre = rows(1, 128, 7)
    q, z = ((centre + angle * rows(64, 128, seed)).float() for seed in (1, 2))
    exact, got = q.double().requires_grad_(), q.clone().requires_grad_()
    expected, loss = byol_loss(exact, z.double()), byol_loss(got, z)
    expected.backward()
    loss.backward()
    assert exact.grad is not None
    assert got.grad is not None
    error = (got.grad.double() - exact.grad).norm() / exact.grad.norm()
    # Unit vectors known to 6e-8 of each component differ by `angle`; their own rounding is all there is.
    assert error < 6e-8 / angle
    assert abs(loss.item() / expected.item() - 1) < 6e-8 / angle


@given(st.integers(2, 8), st.integers(2, 10), st.integers(0, 99))
def test_cosines_are_means_over_pairs(batch: int, features: int, seed: int) -> None:
    z, t = rows(2 * batch, features, seed), rows(2 * batch, features, seed + 1000)
    matrices = [F.normalize(a) @ F.normalize(b).T for a, b in ((z[:batch], t[batch:]), (z[batch:], t[:batch]))]
    off = ~torch.eye(batch, dtype=torch.bool)
    pos, neg, _, _, _ = observe(OnlineOutput(z, z, z), t)
    assert pos.item() == pytest.approx(sum(m.diagonal().mean().item() for m in matrices) / 2, abs=1e-12)
    assert neg.item() == pytest.approx(sum(m[off].mean().item() for m in matrices) / 2, abs=1e-12)


def test_dead_units_are_those_that_are_zero_in_both_views_of_all_images() -> None:
    y = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, -0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    assert dead_share(y).item() == 0.5
    assert observe(OnlineOutput(y, y + 1, y), y + 1)[4].item() == 0.5
    assert dead_share(torch.full((4, 3), 1e-45)).item() == 0.0


def test_spread_of_collapsed_and_even_representations() -> None:
    assert spread(rows(1, 16).expand(10, 16) * rows(10, 1).abs()).item() == pytest.approx(0.0, abs=1e-12)
    # Directions even on the sphere: each coordinate has variance 1 / D. Three standard errors of 2 x 4096 draws.
    assert spread(rows(8192, 64)).item() == pytest.approx(1.0, abs=0.01)
    # Two points opposite each other: every coordinate's deviation is its size, their mean |x_i| sqrt(D).
    x = rows(1, 64)
    expected = (x / x.norm()).abs().mean().item() * math.sqrt(64)
    assert spread(torch.cat([x, -x, x, -x])).item() == pytest.approx(expected, rel=1e-12)
