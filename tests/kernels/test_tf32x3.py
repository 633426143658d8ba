"""Products of split values against float64, where TF32's own would be off by 3e-4."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels import tf32x3
from fastbyol_kernels.tf32x3 import triton
from fastbyol_kernels.tf32x3.triton import MIN_PROGRAMS, TILES, tile, triton_linear

# Each split value is within 2^-22 of its own, and so is what is left out; fp32 sums of up to 512
# products, in blocks, come to no more.
MOST = 1e-6


def operands(n: int, i: int, o: int, device: torch.device) -> list[Tensor]:
    """Return x (n, i), weight (o, i), bias (o,) and the gradient of y (n, o)."""
    g = torch.Generator().manual_seed(n + i + o)
    shapes = ((n, i), (o, i), (o,), (n, o))
    return [torch.randn(shape, generator=g).to(device) for shape in shapes]


def off(got: Tensor, exact: Tensor) -> float:
    assert got.dtype == torch.float32
    return float((got.detach().double() - exact).norm() / exact.norm())


# Blocks that end in every direction, sizes that no vector load divides, long sums.
CASES = (
    *(((130, 40, 70), tiles) for tiles in TILES),
    ((7, 33, 65), TILES[1]), ((9, 512, 3), TILES[2]), ((1, 1, 1), TILES[2]),
)  # fmt: skip


@pytest.mark.parametrize(("shape", "tiles"), CASES, ids=str)
@pytest.mark.usefixtures("nan_filled")
def test_output_and_gradients_are_near_float64s(
    shape: tuple[int, int, int],
    tiles: tuple[int, int, int],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "TILES", (tiles,))
    *inputs, dy = operands(*shape, device)
    leaves = [t.requires_grad_() for t in inputs]
    y = tf32x3.linear(*leaves, kernels="triton")
    gradients = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = F.linear(*wide)
    expected = torch.autograd.grad(exact, wide, dy.double())
    assert off(y, exact.detach()) < MOST
    assert all(off(g, e) < MOST for g, e in zip(gradients, expected, strict=True))
    again = tf32x3.linear(*leaves, kernels="triton")
    assert torch.equal(again, y)
    assert all(map(torch.equal, torch.autograd.grad(again, leaves, dy), gradients))


def test_each_tile_is_used() -> None:
    sizes = ((512, 4096), (512, 512), (512, 256), (64, 32), (1, 1))
    assert {tile(*size) for size in sizes} == set(TILES)
    for m, n in sizes[:3]:  # the heads' products at 256 images
        block_m, block_n, _ = tile(m, n)
        assert math.ceil(m / block_m) * math.ceil(n / block_n) >= MIN_PROGRAMS


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter
def test_a_value_comes_through_whole_and_what_is_not_finite_stays_so(device: torch.device) -> None:
    """A product with the unit matrix shows the split's own error, at any exponent."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=g) * 2.0 ** torch.randint(-90, 90, (64, 32), generator=g)
    x = x.to(device)
    unit = torch.eye(32, device=device)
    for got in (
        tf32x3.linear(x, unit, kernels="triton"),
        tf32x3.linear(unit, x, kernels="triton").t(),
    ):
        assert bool(((got.double() - x).abs() <= 2.0**-22 * x.abs()).all())
    for odd in (math.inf, -math.inf, math.nan):
        x[3, 5] = odd
        # An infinite value may come out as NaN, too: the step is skipped either way.
        finite = tf32x3.linear(x, torch.ones(4, 32, device=device), kernels="triton").isfinite()
        assert not finite[3].any()
        assert finite[:3].all()


# opcheck itself looks at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operator_is_sound_and_compiles_whole(device: torch.device) -> None:
    *inputs, dy = (t.requires_grad_() for t in operands(6, 5, 9, device))
    torch.library.opcheck(triton_linear, tuple(inputs))
    x, weight, bias = inputs

    def work(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return tf32x3.linear(x, weight, bias, kernels="triton")

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    # Transposed x and weight and a broadcast gradient are copied.
    turned = (x.t().contiguous().t(), weight.t().contiguous().t(), None)
    for arguments in ((x, weight, bias), turned):
        got, expected = compiled(*arguments), work(x, weight, arguments[2])
        assert torch.equal(got, expected)
        for upstream in (dy, dy[:1, :1].expand_as(dy)):
            assert torch.equal(
                torch.autograd.grad(got, x, upstream, retain_graph=True)[0],
                torch.autograd.grad(expected, x, upstream, retain_graph=True)[0],
            )


def test_other_inputs_are_torchs_product(device: torch.device) -> None:
    x, weight, bias, _ = operands(6, 5, 9, device)
    for others in (
        (x.double(), weight.double(), bias.double()),
        (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        (x[:0], weight, bias),
    ):
        assert torch.equal(tf32x3.linear(*others, kernels="triton"), F.linear(*others))
    for wrong in ((x, weight[:, 1:], bias), (x, weight, bias[1:]), (x[0], weight, bias)):
        with pytest.raises(ValueError, match=r"must be \("):
            tf32x3.linear(*wrong, kernels="triton")
