"""Norm layers against torch's own, separate passes, and the paper's formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastbyol.model.norm import BatchNorm, BatchRenorm, GroupNorm, make_norm, num_groups


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
            dtype
        )
        * 3
        + 1
    )
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def set_affine(layer: nn.Module, seed: int = 7) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("shape", [(12, 16, 8, 8), (12, 5, 3, 3), (12, 24), (12, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_the_reference_is_bit_for_bit_separate_passes_of_torch(
    shape: tuple[int, ...], num_views: int
) -> None:
    ours = BatchNorm(shape[1], num_views)
    ours.kernels = "reference"
    theirs = nn.BatchNorm2d(shape[1]) if len(shape) == 4 else nn.BatchNorm1d(shape[1])
    set_affine(ours)
    theirs.load_state_dict(ours.state_dict())
    for step in range(3):
        x, grad = activations(*shape, seed=step), activations(*shape, seed=100 + step)
        whole, parts = (
            x.clone().requires_grad_(),
            [c.clone().requires_grad_() for c in x.chunk(num_views)],
        )
        y = ours(whole)
        y.backward(grad)
        z = [theirs(part) for part in parts]
        for out, g in zip(z, grad.chunk(num_views), strict=True):
            out.backward(g)
        assert torch.equal(y, torch.cat(z))
        assert whole.grad is not None
        assert torch.equal(whole.grad, torch.cat([p.grad for p in parts if p.grad is not None]))
        assert y.stride() == x.stride()
        for (name, a), b in zip(
            ours.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Sums of up to nine terms in another order.
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert int(ours.num_batches_tracked) == 3 * num_views


def test_views_do_not_see_each_other() -> None:
    layer = BatchNorm(4, 2)
    x = activations(8, 4, 3, 3)
    moved = x.clone()
    moved[4:] *= 100
    assert torch.equal(layer(x)[:4], layer(moved)[:4])


def test_batch_norm_gradient() -> None:
    x = activations(6, 3, 2, 2, dtype=torch.float64).requires_grad_()
    layer = BatchNorm(3, 2).double()
    set_affine(layer)

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))

    assert torch.autograd.gradcheck(f, (x, layer.weight, layer.bias))


def test_batch_norm_in_bf16_keeps_fp32_statistics() -> None:
    layer = BatchNorm(4, 2)
    x = (activations(16, 4, 5, 5) + 200).bfloat16().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    mean = torch.stack([c.double().mean((0, 2, 3)) for c in x.detach().chunk(2)])
    assert y.dtype == torch.bfloat16
    # Two updates with momentum .1 from 0, in fp32: bf16 would hold 200 to the nearest 1.
    torch.testing.assert_close(
        layer.running_mean.double(), 0.09 * mean[0] + 0.1 * mean[1], rtol=1e-5, atol=1e-5
    )
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_compiled_batch_norm_takes_the_same_values() -> None:
    eager, compiled = BatchNorm(4, 2), BatchNorm(4, 2)
    eager.kernels = "reference"
    x = activations(8, 4, 3, 3)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), eager(x), rtol=1e-6, atol=1e-6)
    for (name, a), b in zip(
        compiled.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_odd_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batch of 7 cannot be split into 2"):
        BatchNorm(4, 2)(activations(7, 4, 3, 3))
    with pytest.raises(ValueError, match="batch of 7 cannot be split into 2"):
        BatchRenorm(4, 2)(activations(7, 4))


def renorm_by_hand(
    x: Tensor, state: dict[str, Tensor], weight: Tensor, bias: Tensor, k: int
) -> Tensor:
    """Apply Ioffe's algorithm 1 with the post's constants to one chunk; changes ``state``."""
    mean = x.sum(0) / len(x)
    std = ((x - mean).square().sum(0) / len(x)).sqrt() + 1e-3
    rmax = min(max(2 / 35000 * k + 25 / 35, 1.0), 3.0)
    dmax = min(max(5 / 20000 * k - 25 / 20, 0.0), 5.0)
    r = (std / state["std"]).detach().clamp(1 / rmax, rmax)
    d = ((mean - state["mean"]) / state["std"]).detach().clamp(-dmax, dmax)
    state["mean"] = state["mean"] + 0.01 * (mean.detach() - state["mean"])
    state["std"] = state["std"] + 0.01 * (std.detach() - state["std"])
    return ((x - mean) / std * r + d) * weight + bias


@pytest.mark.parametrize("k", [0, 5001, 12345, 24999, 45000])
def test_batch_renorm_follows_the_paper(k: int) -> None:
    layer = BatchRenorm(6, 2).double()
    set_affine(layer)
    layer.num_batches_tracked.fill_(k)
    layer.running_mean.uniform_(-0.5, 0.5)
    layer.running_std.uniform_(0.5, 4.0)
    state = {"mean": layer.running_mean.clone(), "std": layer.running_std.clone()}
    x, grad = (
        activations(10, 6, dtype=torch.float64).requires_grad_(),
        activations(10, 6, dtype=torch.float64, seed=3),
    )
    y = layer(x)
    (got,) = torch.autograd.grad(y, x, grad)
    z = torch.cat(
        [
            renorm_by_hand(c, state, layer.weight, layer.bias, k + v)
            for v, c in enumerate(x.chunk(2))
        ]
    )
    (expected,) = torch.autograd.grad(z, x, grad)
    for a, b in (
        (y, z),
        (got, expected),
        (layer.running_mean, state["mean"]),
        (layer.running_std, state["std"]),
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert int(layer.num_batches_tracked) == k + 2
    eval_y = layer.eval()(x)
    torch.testing.assert_close(
        eval_y,
        (x - state["mean"]) / state["std"] * layer.weight + layer.bias,
        rtol=1e-12,
        atol=1e-12,
    )


def test_layer_norm_is_one_group() -> None:
    x = activations(5, 12)
    layer = make_norm("ln", 12, groups=32, num_views=2)
    set_affine(layer)
    theirs = nn.LayerNorm(12)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 4096), st.integers(1, 512))
def test_groups_divide_the_channels(channels: int, most: int) -> None:
    groups = num_groups(channels, most)
    limit = min(most, max(1, channels // 2))
    assert groups <= limit
    assert [d for d in range(groups + 1, limit + 1) if channels % d == 0] == []
    assert channels % groups == 0
    assert channels == 1 or channels // groups >= 2


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 32), (512, 32), (16, 8), (48, 24), (4, 2), (1, 1), (7, 1)]
)
def test_group_counts(channels: int, groups: int) -> None:
    layer = make_norm("gn", channels, groups=32, num_views=2)
    assert isinstance(layer, GroupNorm)
    assert layer.num_groups == groups
