"""Weight standardization against the formula written with sums, in fp64."""

from __future__ import annotations

import pytest
import torch

from fastbyol_kernels.weight_standardization import EPS, weight_standardization

SHAPES = ((4, 3, 7, 7), (5, 8, 3, 3), (7, 6, 1, 1), (9, 16), (1, 2))


def by_sums(w: torch.Tensor) -> torch.Tensor:
    rows = w.flatten(1)
    count = rows.shape[1]
    centred = rows - rows.sum(1, keepdim=True) / count
    std = (centred.square().sum(1, keepdim=True) / (count - 1)).sqrt()
    return (centred / (std + 1e-5)).view(w.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    # Rounding only: some ten operations at 1e-16.
    torch.testing.assert_close(weight_standardization(w), by_sums(w), rtol=1e-13, atol=1e-13)
    # fp32 rounds inputs of size 3 around a mean of 1, so 1e-6 is ten roundings.
    torch.testing.assert_close(weight_standardization(w.float()).double(), by_sums(w), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradient(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(weight_standardization, (w,))


def test_keeps_channels_last_and_dtype() -> None:
    w = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    out = weight_standardization(w)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.float32


def test_a_channel_of_equal_weights_is_zero_with_a_finite_gradient() -> None:
    w = torch.full((2, 4, 3, 3), 0.25, dtype=torch.float64, requires_grad=True)
    out = weight_standardization(w)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert w.grad is not None
    assert w.grad.isfinite().all()


def test_scale_and_shift_of_a_channel_do_not_matter() -> None:
    w = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # eps beside a std of at least .5 leaves a relative 2e-5.
    assert EPS == 1e-5
    torch.testing.assert_close(weight_standardization(w * 7 - 3), weight_standardization(w), rtol=4e-5, atol=0.0)
