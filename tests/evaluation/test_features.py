"""Embeddings depend on the image and the weights alone; the encoder stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastbyol import views
from fastbyol.config import ModelConfig, ViewsConfig
from fastbyol.errors import FastbyolError
from fastbyol.evaluation.features import MOST_ROUNDING, agreeing_dtype, check_finite, embed
from fastbyol.model.resnet import build_encoder

VIEWS = ViewsConfig(size=16, blur_kernel=3)


def images(num: int = 20, side: int = 16) -> Tensor:
    return torch.randint(
        0, 256, (num, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def encoder() -> nn.Module:
    """Make an encoder with running statistics unlike a batch's and a layer in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_encoder(ModelConfig(width=4, norm="bn", stem="small"))
        net.train()
        for _ in range(3):
            net(2.0 * torch.randn(8, 3, 16, 16) + 1.0)
    net.get_submodule("layer2").eval()
    return net


@pytest.mark.parametrize("side", [16, 24])
def test_is_the_encoder_in_eval_mode_on_plain_views(encoder: nn.Module, side: int) -> None:
    """Images of another size are resized."""
    actual = embed(encoder, images(side=side), VIEWS, device="cpu", batch_size=7)
    encoder.eval()
    with torch.no_grad():
        expected = torch.cat(
            [encoder(views.plain(image[None], VIEWS)) for image in images(side=side)]
        )
    assert actual.dtype == torch.float32
    # One image at a time: other kernels, the same numbers but for rounding.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("batch_size", [1, 3, 19, 20, 512])
def test_batch_size_moves_only_rounding(encoder: nn.Module, batch_size: int) -> None:
    one = embed(encoder, images(), VIEWS, device="cpu", batch_size=20)
    other = embed(encoder, images(), VIEWS, device="cpu", batch_size=batch_size)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_leaves_the_encoder_as_it_was(encoder: nn.Module) -> None:
    modes = {name: module.training for name, module in encoder.named_modules()}
    assert set(modes.values()) == {True, False}
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    embed(encoder, images(), VIEWS, device="cpu")
    assert {name: module.training for name, module in encoder.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_restores_modes_after_an_error(encoder: nn.Module) -> None:
    with pytest.raises(ValueError, match="no images"):
        embed(encoder, images(0), VIEWS, device="cpu")
    with pytest.raises(ValueError, match="uint8"):
        embed(encoder, images().float(), VIEWS, device="cpu")
    assert encoder.training
    assert not encoder.get_submodule("layer2").training


def test_same_bits_under_autocast_and_no_graph(encoder: nn.Module) -> None:
    expected = embed(encoder, images(), VIEWS, device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = embed(encoder, images(), VIEWS, device="cpu")
    assert torch.equal(actual, expected)
    assert not actual.requires_grad
    assert not actual.is_inference()


def test_takes_a_float64_encoder(encoder: nn.Module) -> None:
    """A run with --precision fp64 has one."""
    expected = embed(encoder, images(), VIEWS, device="cpu")
    actual = embed(encoder.double(), images(), VIEWS, device="cpu")
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_check_finite_counts_rows() -> None:
    x = torch.zeros(10, 4)
    check_finite(x)
    x[2, 1] = float("-inf")
    x[5] = float("nan")
    with pytest.raises(FastbyolError, match="embeddings: 2 of 10 rows"):
        check_finite(x, "embeddings")


class Shifted(nn.Module):
    """An encoder with one direction in common plus ``scale`` times the image."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return 1.0 + self.scale.to(x.dtype) * x.flatten(1)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, torch.bfloat16), (1e-3, torch.float32)])
def test_bf16_is_chosen_where_it_keeps_the_differences(scale: float, expected: torch.dtype) -> None:
    """In a collapsed network it would round the differences away."""
    net = Shifted(scale)
    assert agreeing_dtype(net, images(), VIEWS, torch.bfloat16, device="cpu") == expected
    assert agreeing_dtype(net, images(), VIEWS, torch.float32, device="cpu") == torch.float32
    assert (
        agreeing_dtype(net.double(), images(), VIEWS, torch.bfloat16, device="cpu") == torch.float64
    )


def test_bf16_is_chosen_if_it_agrees(encoder: nn.Module) -> None:
    rounded, exact = (
        embed(encoder, images(), VIEWS, device="cpu", dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert rounded.dtype == torch.float32
    agrees = float((rounded - exact).norm() / (exact - exact.mean(0)).norm()) <= MOST_ROUNDING
    assert (
        agreeing_dtype(encoder, images(), VIEWS, torch.bfloat16, device="cpu") == torch.bfloat16
    ) == agrees
    assert not torch.equal(rounded, exact)
