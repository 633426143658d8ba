"""Group norm against the formula written with sums, in fp64."""

from __future__ import annotations

import pytest
import torch

from fastbyol_kernels.group_norm import group_norm

CASES = (((3, 8, 5, 3), 4), ((2, 6, 1, 1), 3), ((4, 12, 2, 7), 1), ((5, 16), 8), ((3, 10), 1))


def by_sums(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(x.shape[0], groups, -1)
    centred = rows - rows.sum(2, keepdim=True) / rows.shape[2]
    var = centred.square().sum(2, keepdim=True) / rows.shape[2]
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return (centred / (var + 1e-5).sqrt()).view(x.shape) * weight.view(shape) + bias.view(shape)


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 0.5
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], generator=g, dtype=torch.float64).unbind()
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_equals_the_formula(shape: tuple[int, ...], groups: int) -> None:
    x, weight, bias = arguments(shape)
    torch.testing.assert_close(group_norm(x, groups, weight, bias), by_sums(x, groups, weight, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_gradient(shape: tuple[int, ...], groups: int) -> None:
    leaves = [t.requires_grad_() for t in arguments(shape)]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, groups, w, b), leaves)


def test_keeps_channels_last_forward_and_backward() -> None:
    x, weight, bias = arguments((4, 8, 6, 6), torch.float32)
    x.requires_grad_()
    y = group_norm(x, 4, weight, bias)
    y.backward(torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_bf16_takes_fp32_statistics() -> None:
    x, weight, bias = arguments((4, 8, 6, 6), torch.float32)
    half = (x + 200).bfloat16()
    expected = by_sums(half.double(), 2, weight.double(), bias.double())
    got = group_norm(half, 2, weight, bias)
    assert got.dtype == torch.bfloat16
    # One rounding of the result to 8 bits; statistics in bf16 would be off by whole units at a mean of 200.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-3)
