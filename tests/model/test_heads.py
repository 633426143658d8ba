"""The MLP heads against the same layers from torch.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol.config import HeadConfig
from fastbyol.errors import UsageError
from fastbyol.model.heads import Head
from fastbyol.model.norm import use_kernels
from fastbyol.model.objective import byol_loss
from fastbyol.model.standardizing import use_products

THEIRS = {
    "bn": lambda: nn.BatchNorm1d(24),
    "ln": lambda: nn.LayerNorm(24),
    "gn": lambda: nn.GroupNorm(12, 24),
    "none": nn.Identity,
}


@pytest.mark.parametrize("norm", THEIRS)
@pytest.mark.parametrize("ws", [False, True])
def test_equals_torchs_layers(norm: str, ws: bool) -> None:
    torch.manual_seed(0)
    head = Head(
        HeadConfig.model_validate({"norm": norm, "hidden": 24, "out": 6, "ws": ws}),
        10,
        groups=32,
        num_views=1,
    )
    first, last = nn.Linear(10, 24), nn.Linear(24, 6)
    first.load_state_dict(head.linear1.state_dict())
    last.load_state_dict(head.linear2.state_dict())
    if ws:
        with torch.no_grad():
            w = first.weight - first.weight.mean(1, keepdim=True)
            first.weight.copy_(w / (w.std(1, keepdim=True) + 1e-5))
    x = torch.randn(8, 10)
    expected = last(nn.functional.relu(THEIRS[norm]()(first(x))))
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-6)


def test_names_and_initialisation_are_torchs() -> None:
    head = Head(HeadConfig(hidden=512, out=128), 512, groups=32)
    assert [n for n, _ in head.named_parameters()] == [
        "linear1.weight", "linear1.bias", "norm.weight", "norm.bias", "linear2.weight",
        "linear2.bias",
    ]  # fmt: skip
    for linear in (head.linear1, head.linear2):
        bound = linear.in_features**-0.5
        for p in linear.parameters():
            assert p.abs().max() <= bound
            # A uniform variable's std; four standard errors for 128 draws.
            assert abs(p.std().item() / (bound / 3**0.5) - 1) < 0.2


def test_bf16_input_is_multiplied_in_fp32() -> None:
    head = Head(HeadConfig(hidden=16, out=4, norm="gn"), 8, groups=32)
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(head(x), head(x.float()))


def test_weight_standardization_of_one_input_feature_is_refused() -> None:
    with pytest.raises(UsageError, match="two input features"):
        Head(HeadConfig(ws=True), 1, groups=32)


class Cut(torch.autograd.Function):
    """A linear layer of values cut to TF32, as tensor cores multiply fp32 when they may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return cut(x) @ cut(weight).t() + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (x, weight), dy = ctx.saved_tensors, grads[0]
        return cut(dy) @ cut(weight), cut(dy).t() @ cut(x), dy.sum(0)


def cut(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


def collapsed_gradients(products: str, *, ws: bool) -> dict[str, Tensor]:
    """Return the gradients of heads whose embeddings differ in the fourth digit, and of those.

    The predictor has learned the constant that all projections are near to, up to a small error.
    """
    torch.manual_seed(0)
    dtype = torch.float64 if products == "fp64" else torch.float32
    sizes = HeadConfig(hidden=48, out=16, norm="gn", ws=ws)
    projector, predictor = (Head(sizes, n, groups=4) for n in (40, 16))
    y = (torch.rand(40) + 1e-4 * torch.randn(2, 24, 40)).flatten(0, 1)
    with torch.no_grad():
        near = projector(y).mean(0) + 4e-5 * torch.randn(16)
        predictor.linear2.weight *= 0.1
        predictor.linear2.bias += near - predictor(near[None])[0]
    heads = nn.ModuleDict({"projector": projector, "predictor": predictor}).to(dtype)
    use_kernels(heads, "triton" if products == "tf32x3" else "reference")
    use_products(heads, "tf32x3" if products == "tf32x3" else "fp32")
    leaf = y.to(dtype).requires_grad_()
    z = projector(leaf)
    loss = byol_loss(predictor(z), z.detach())
    assert products == "tf32" or loss.detach() < 7e-8
    named = {"y": leaf, **dict(heads.named_parameters())}
    gradients = torch.autograd.grad(loss, [*named.values()])
    return dict(zip(named, map(Tensor.double, gradients), strict=True))


@pytest.mark.parametrize("ws", [False, True])
def test_products_of_split_values_keep_a_collapsed_states_gradient(
    ws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LARS divides by |g|.

    At worst fp32's gradient was off by .0014 here, that of split values by .002, TF32's by 1.5.
    """
    exact = collapsed_gradients("fp64", ws=ws)

    def off(products: str) -> float:
        got = collapsed_gradients(products, ws=ws)
        return max(float((got[n] - g).norm() / g.norm()) for n, g in exact.items())

    assert off("fp32") < 5e-3
    assert off("tf32x3") < 5e-3
    monkeypatch.setattr(F, "linear", Cut.apply)
    assert off("tf32") > 0.5
