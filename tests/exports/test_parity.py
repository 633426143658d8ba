"""The check of an export: what it lets pass and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbyol.errors import FastbyolError
from fastbyol.exports import parity

IMAGES = parity.Images(torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0)), "made")


class Sum(nn.Module):
    """Sums over pixels (N, 3), through ``offset``, which costs digits."""

    def __init__(self, offset: float, factor: float = 1.0) -> None:
        super().__init__()
        self.offset, self.factor = offset, factor

    def forward(self, x: Tensor) -> Tensor:
        return (x.sum((2, 3)) * self.factor + self.offset) - self.offset


def compared(encoder: nn.Module, model: Callable[[Any], Any], *, of_arrays: bool = False) -> Any:
    return parity.compare(model, encoder, IMAGES, of_arrays=of_arrays)  # type: ignore[arg-type]


def test_the_largest_difference_is_measured_in_every_pass() -> None:
    def off_at_the_end(x: Tensor) -> Tensor:
        y = x.sum((2, 3))
        return y + 5e-5 if len(x) < 16 else y  # the second pass has four images

    result = compared(Sum(0.0), off_at_the_end)
    assert 4e-5 < result.max_difference < 6e-5
    largest = float(IMAGES.tensor.sum((2, 3)).max())
    assert result.tolerance == pytest.approx(1e-5 * largest)
    assert (result.num_images, result.data) == (20, "made")
    assert compared(Sum(0.0), lambda x: x.sum((2, 3)), of_arrays=True).max_difference < 5e-6


def test_small_numbers_are_compared_with_one() -> None:
    small = Sum(0.0, factor=1e-6)
    assert compared(small, lambda x: small(x) + 9e-6).tolerance == 1e-5
    with pytest.raises(FastbyolError, match=r"more than 1\.0e-05: nothing was written"):
        compared(small, lambda x: small(x) + 1.1e-5)


def test_a_network_that_amplifies_rounding_has_the_bound_of_its_own() -> None:
    """In float32 numbers near 2**20 are 1/8 apart, so half of that is its own error."""
    rough = Sum(2.0**20)
    result = compared(rough, lambda x: x.sum((2, 3)))
    assert 0.02 < result.max_difference < result.tolerance
    assert 4 * 0.04 < result.tolerance <= 4 / 16
    with pytest.raises(FastbyolError, match="nothing was written"):
        compared(rough, lambda x: x.sum((2, 3)) + 0.4)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(FastbyolError, match="it has diverged"):
        compared(Sum(float("nan")), lambda x: x.sum((2, 3)))
    with pytest.raises(FastbyolError, match="nan from the run's own encoder"):
        compared(Sum(0.0), lambda x: x.sum((2, 3)) * float("nan"))
    with pytest.raises(FastbyolError, match=r"gives \(20, 1\), the run's encoder \(20, 3\)"):
        compared(Sum(0.0), lambda x: x.sum((1, 2, 3))[:, None])


def test_names_of_data_have_no_folder() -> None:
    names = {"/a/b/c.beton": "c.beton", "fashion-mnist": "fashion-mnist", "/": "/", "d/": "d"}
    names["torchvision:CIFAR10"] = "torchvision:CIFAR10"
    assert {name: parity.data_name(name) for name in names} == names
