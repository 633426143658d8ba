"""Products by pixel against torch's convolution in float64, for every shape and stride that they
can meet.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastbyol.model import convolution
from fastbyol.model.convolution import convolve, convolve_by_pixel, pays


@settings(max_examples=60)
@given(
    sides=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    samples=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_equals_the_convolution_forward_and_backward(
    sides: tuple[int, int], stride: int, channels: tuple[int, int], samples: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(
        samples, channels[0], *sides, generator=generator, dtype=torch.float64, requires_grad=True
    )
    w = torch.randn(
        channels[1], channels[0], 3, 3, generator=generator, dtype=torch.float64, requires_grad=True
    )
    ours, theirs = convolve_by_pixel(x, w, stride), F.conv2d(x, w, None, stride, 1)
    gradient = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    # float64 sums of at most 45 products of order one.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ours, theirs, **close)
    for a, b in zip(
        torch.autograd.grad(ours, (x, w), gradient),
        torch.autograd.grad(theirs, (x, w), gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("channels", [1, 2, 4, 7, 12, 15, 16, 24])
@pytest.mark.parametrize("side", [96, 95])
def test_a_strided_1x1_kernel_of_few_channels(channels: int, side: int) -> None:
    """torch's own ends in SIGSEGV here, or corrupts the heap, for 2 to 12 channels of 96 pixels."""
    torch.manual_seed(0)
    x = torch.randn(16, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(2 * channels, channels, 1, 1).requires_grad_()
    exact_x, exact_w = (tensor.detach().double().requires_grad_() for tensor in (x, w))
    exact, ours = F.conv2d(exact_x, exact_w, None, 2), convolve(x, w, 2, 0)
    gradient = torch.randn(exact.shape)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, (x, w), gradient)),
        (exact, *torch.autograd.grad(exact, (exact_x, exact_w), gradient.double())),
        strict=True,
    )
    for got, truth in pairs:  # sums of up to 36,864 products of order one
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (6, 2), (2, 1), (1, 1), (2, 2), (4, 2)])
def test_rounds_no_more_than_the_convolution(dtype: torch.dtype, side: int, stride: int) -> None:
    torch.manual_seed(0)
    x = (
        torch.randn(16, 64, side, side)
        .to(dtype)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    w = (
        (torch.randn(48, 64, 3, 3) / 24)
        .to(dtype)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    exact_x, exact_w = (tensor.detach().double().requires_grad_() for tensor in (x, w))
    exact = F.conv2d(exact_x, exact_w, None, stride, 1)
    gradient = torch.randn_like(exact)
    truth = (exact, *torch.autograd.grad(exact, (exact_x, exact_w), gradient))

    def worst(out: torch.Tensor) -> list[float]:
        got = (out, *torch.autograd.grad(out, (x, w), gradient.to(dtype)))
        return [
            ((a.double() - b).abs().max() / b.abs().max()).item()
            for a, b in zip(got, truth, strict=True)
        ]

    theirs = worst(F.conv2d(x, w, None, stride, 1))
    # Each rounds its sum once; the floor is for cases in which the library happens to be exact.
    floor = 4 * torch.finfo(dtype).eps
    assert all(
        a <= 2 * b + floor
        for a, b in zip(worst(convolve_by_pixel(x, w, stride)), theirs, strict=True)
    )


def test_is_channels_last_and_twice_the_same() -> None:
    x, w = torch.randn(4, 8, 3, 3), torch.randn(8, 8, 3, 3)
    first, second = convolve_by_pixel(x, w, 1), convolve_by_pixel(x, w, 1)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("side", "stride", "kernel", "dtype", "expected"),
    [
        (3, 1, 3, torch.bfloat16, True),
        (6, 2, 3, torch.bfloat16, True),
        (4, 1, 3, torch.bfloat16, False),
        (3, 1, 3, torch.float32, False),
        (2, 1, 3, torch.float32, True),
        (2, 2, 3, torch.float32, True),
        (4, 2, 3, torch.float32, False),
        (1, 1, 1, torch.float32, False),
        (2, 1, 3, torch.float64, False),
    ],
)
def test_is_chosen_where_it_was_measured_to_pay(
    side: int, stride: int, kernel: int, dtype: torch.dtype, expected: bool
) -> None:
    x, w = (
        torch.zeros(1, 4, side, side, dtype=dtype),
        torch.zeros(4, 4, kernel, kernel, dtype=dtype),
    )
    assert pays(x, w, stride, kernel // 2) is expected


def test_compiled_code_takes_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution.torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(convolution, "convolve_by_pixel", lambda *_: pytest.fail("went by pixel"))
    x, w = torch.randn(2, 4, 1, 1), torch.randn(4, 4, 3, 3)
    assert torch.equal(convolve(x, w, 1, 1), F.conv2d(x, w, None, 1, 1))


def test_a_relu_may_overwrite_the_result() -> None:
    """As it does in an encoder without norms."""
    x, w = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    results = [F.relu(convolve_by_pixel(x, w, 1), inplace=True), F.relu(F.conv2d(x, w, None, 1, 1))]
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (x, w)) for y in results)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-5
        )  # fp32 sums of at most 27 products of order one
