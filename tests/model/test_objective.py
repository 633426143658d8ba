"""The losses and the measurements beside them, against sums over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastbyol.errors import UsageError
from fastbyol.model.byol import OnlineOutput
from fastbyol.model.objective import (
    byol_loss,
    contrastive_loss,
    dead_share,
    enqueue,
    observe,
    spread,
)


def rows(count: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(
        count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))
def test_loss_is_the_symmetric_sum(batch: int, features: int, seed: int) -> None:
    q, z = rows(2 * batch, features, seed), rows(2 * batch, features, seed + 1000)
    cosines = [F.cosine_similarity(q[:batch], z[batch:]), F.cosine_similarity(q[batch:], z[:batch])]
    assert byol_loss(q, z).item() == pytest.approx(
        sum(1 - c.mean().item() for c in cosines), abs=1e-12
    )


def test_loss_identities() -> None:
    q = rows(10, 6)
    swapped = torch.cat([q[5:], q[:5]])
    assert byol_loss(q, 3 * swapped).item() == pytest.approx(0.0, abs=1e-14)
    assert byol_loss(q, -swapped).item() == pytest.approx(4.0, abs=1e-14)
    assert byol_loss(0.1 * q, rows(10, 6, 1)).item() == pytest.approx(
        byol_loss(q, rows(10, 6, 1)).item(), abs=1e-14
    )


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_fp32_keeps_loss_and_gradient_of_a_collapsed_state(angle: float) -> None:
    """All predictions and projections within ``angle`` of one direction, where 1 - cos itself would
    be rounding.
    """
    centre = rows(1, 128, 7)
    q, z = ((centre + angle * rows(64, 128, seed)).float() for seed in (1, 2))
    exact, got = q.double().requires_grad_(), q.clone().requires_grad_()
    expected, loss = byol_loss(exact, z.double()), byol_loss(got, z)
    expected.backward()
    loss.backward()
    assert exact.grad is not None
    assert got.grad is not None
    error = (got.grad.double() - exact.grad).norm() / exact.grad.norm()
    # Unit vectors known to 6e-8 of each component differ by `angle`; their own rounding is all
    # there is.
    assert error < 6e-8 / angle
    assert abs(loss.item() / expected.item() - 1) < 6e-8 / angle


QUEUES = st.sampled_from([0, 1, 5, 40])
TEMPERATURES = st.floats(0.05, 5.0)


def keys_of(count: int, features: int) -> Tensor | None:
    return F.normalize(rows(count, features, 7)) if count else None


def by_logsumexp(q: Tensor, z: Tensor, temperature: float, queue: Tensor | None) -> float:
    """Sum log-sum-exp less the positive's logit, image by image, in both orders of the views."""
    half, total = len(q) // 2, 0.0
    for first, second in ((0, half), (half, 0)):
        for i in range(half):
            others = (
                [z[second + j] for j in range(half) if j != i] if queue is None else list(queue)
            )
            pairs = [
                F.cosine_similarity(q[first + i], key, dim=0) / temperature
                for key in (z[second + i], *others)
            ]
            total += (torch.stack(pairs).logsumexp(0) - pairs[0]).item() / half
    return total


@given(st.integers(2, 6), st.integers(1, 9), QUEUES, TEMPERATURES, st.integers(0, 99))
def test_contrastive_loss_is_a_logsumexp(
    batch: int, features: int, count: int, temperature: float, seed: int
) -> None:
    q, z, queue = (
        rows(2 * batch, features, seed),
        rows(2 * batch, features, seed + 1000),
        keys_of(count, features),
    )
    expected = by_logsumexp(q, z, temperature, queue)
    assert contrastive_loss(q, z, temperature, queue).item() == pytest.approx(
        expected, rel=1e-12, abs=1e-12
    )


@given(QUEUES, TEMPERATURES, st.integers(0, 99), st.floats(0.01, 100.0))
def test_contrastive_loss_sees_directions_only(
    count: int, temperature: float, seed: int, scale: float
) -> None:
    q, z, queue = rows(8, 5, seed), rows(8, 5, seed + 1000), keys_of(count, 5)
    expected = contrastive_loss(q, z, temperature, queue).item()
    scales = scale ** rows(8, 1, seed).abs()
    assert contrastive_loss(q * scales, z / scales, temperature, queue).item() == pytest.approx(
        expected, rel=1e-12
    )


@given(st.integers(1, 50), st.integers(2, 6), TEMPERATURES)
def test_equal_logits_cost_the_logarithm_of_their_number(
    count: int, batch: int, temperature: float
) -> None:
    """Of all keys in one direction each is the positive with the same probability: both orders cost
    log(1 + negatives).
    """
    q, key = rows(2 * batch, 4), F.normalize(rows(1, 4, 1))
    queued = contrastive_loss(q, key.expand(2 * batch, 4), temperature, key.expand(count, 4))
    assert queued.item() == pytest.approx(2 * math.log(1 + count), rel=1e-12)
    assert contrastive_loss(q, key.expand(2 * batch, 4), temperature).item() == pytest.approx(
        2 * math.log(batch), rel=1e-12
    )


@given(
    st.lists(st.floats(0.0, math.pi), min_size=2, max_size=2, unique=True),
    QUEUES.filter(bool),
    st.floats(0.5, 5.0),
)
def test_contrastive_loss_falls_as_the_positive_cosine_rises(
    angles: list[float], count: int, temperature: float
) -> None:
    q, queue = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2), keys_of(count, 2)
    keys = [
        torch.tensor([[math.cos(a), math.sin(a)]], dtype=torch.float64).expand(4, 2)
        for a in sorted(angles)
    ]
    # Colder, a positive far ahead of the negatives costs less than the last bit of its logit.
    near, far = (contrastive_loss(q, key, temperature, queue).item() for key in keys)
    assert near < far or math.cos(min(angles)) - math.cos(max(angles)) < 1e-9


@pytest.mark.parametrize("count", [None, 0, 7])
def test_gradients(count: int | None) -> None:
    """The derivative, which is orthogonal to each prediction, since only directions count."""
    q, z = rows(8, 5).requires_grad_(), rows(8, 5, 1)

    def loss(q: Tensor) -> Tensor:
        return byol_loss(q, z) if count is None else contrastive_loss(q, z, 0.2, keys_of(count, 5))

    assert torch.autograd.gradcheck(loss, (q,))
    (grad,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(
        (grad * q).sum(1), torch.zeros(8, dtype=torch.float64), rtol=0.0, atol=1e-14
    )


def test_losses_of_low_precision_go_through_fp32() -> None:
    """In fp32 logits of up to 20 are off by 2e-6; bf16 at a temperature of .05 by .1."""
    q, z, queue = rows(16, 32).bfloat16(), rows(16, 32, 1).bfloat16(), F.normalize(rows(50, 32, 2))
    assert byol_loss(q, z).dtype == torch.float32
    assert byol_loss(q, z).item() == pytest.approx(
        byol_loss(q.double(), z.double()).item(), abs=1e-6
    )
    got, exact = (
        contrastive_loss(q, z, 0.05, queue.float()),
        contrastive_loss(q.double(), z.double(), 0.05, queue),
    )
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), abs=1e-5)


@given(st.integers(1, 6), st.integers(0, 9), st.lists(st.booleans(), max_size=12))
def test_the_queue_holds_the_latest_keys(batch: int, more: int, taken: list[bool]) -> None:
    """Against a list of rows; a step that is left out leaves its rows as they were."""
    queue = rows(batch + more, 3)
    expected = [row.clone() for row in queue]
    for step, good in enumerate(taken):
        keys = (
            rows(batch, 3, 100 + step)
            if good
            else torch.full((batch, 3), torch.nan, dtype=torch.float64)
        )
        enqueue(queue, keys, torch.tensor(step), torch.tensor(good))
        for i, key in enumerate(keys) if good else ():
            expected[(step * batch + i) % len(expected)] = key
    assert torch.equal(queue, torch.stack(expected))


def test_a_queue_shorter_than_a_batch_is_refused() -> None:
    queue = rows(5, 3)
    with pytest.raises(
        UsageError,
        match=r"^method.queue: 5 keys are fewer than the 6 of a batch: take 6 or more, or 0$",
    ):
        enqueue(queue, rows(6, 3, 1), torch.tensor(0), torch.tensor(True))
    assert torch.equal(queue, rows(5, 3))


@given(st.integers(2, 8), st.integers(2, 10), st.integers(0, 99))
def test_cosines_are_means_over_pairs(batch: int, features: int, seed: int) -> None:
    z, t = rows(2 * batch, features, seed), rows(2 * batch, features, seed + 1000)
    matrices = [
        F.normalize(a) @ F.normalize(b).T
        for a, b in ((z[:batch], t[batch:]), (z[batch:], t[:batch]))
    ]
    off = ~torch.eye(batch, dtype=torch.bool)
    pos, neg, _, _, _ = observe(OnlineOutput(z, z, z), t)
    assert pos.item() == pytest.approx(
        sum(m.diagonal().mean().item() for m in matrices) / 2, abs=1e-12
    )
    assert neg.item() == pytest.approx(sum(m[off].mean().item() for m in matrices) / 2, abs=1e-12)


def test_dead_units_are_those_that_are_zero_in_both_views_of_all_images() -> None:
    y = torch.tensor(
        [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, -0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]
    )
    assert dead_share(y).item() == 0.5
    assert observe(OnlineOutput(y, y + 1, y), y + 1)[4].item() == 0.5
    assert dead_share(torch.full((4, 3), 1e-45)).item() == 0.0


def test_spread_of_collapsed_and_even_representations() -> None:
    assert spread(rows(1, 16).expand(10, 16) * rows(10, 1).abs()).item() == pytest.approx(
        0.0, abs=1e-12
    )
    # Directions even on the sphere: each coordinate has variance 1 / D. Three standard errors of 2
    # x 4096 draws.
    assert spread(rows(8192, 64)).item() == pytest.approx(1.0, abs=0.01)
    # Two points opposite each other: every coordinate's deviation is its size, their mean |x_i|
    # sqrt(D).
    x = rows(1, 64)
    expected = (x / x.norm()).abs().mean().item() * math.sqrt(64)
    assert spread(torch.cat([x, -x, x, -x])).item() == pytest.approx(expected, rel=1e-12)
