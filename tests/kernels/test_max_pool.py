"""Max pooling's kernels against torch's: outputs bit for bit, gradients within rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels import max_pool as ops
from fastbyol_kernels.max_pool.cpu import CpuMaxPool
from fastbyol_kernels.max_pool.triton import triton_max_pool

DTYPES = (torch.float32, torch.bfloat16)


def activations(
    shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0, whole: bool = False
) -> Tensor:
    """Return channels-last values; ``whole`` numbers cause ties and zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    return (x.round() if whole else x).to(dtype).contiguous(memory_format=torch.channels_last)


def both(
    x: Tensor, dy: Tensor | None = None, own: str = "cpu"
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return output and gradient of the kernels ``own``, and of torch in float64."""
    results = []
    for kernels in (own, "reference"):
        leaf = (
            (x if kernels == own else x.double())
            .clone(memory_format=torch.preserve_format)
            .requires_grad_()
        )
        y = ops.max_pool(leaf, kernels=kernels)
        dy = activations(tuple(y.shape), x.dtype, seed=1).to(x.device) if dy is None else dy
        (dx,) = torch.autograd.grad(y, leaf, dy.to(y.dtype))
        assert y.dtype == dx.dtype == leaf.dtype
        results.append((y.detach().to(x.dtype), dx))
    return results[0], results[1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return True for equal values and signs of zeros, with NaN in the same positions."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()).all())


def check(x: Tensor, kernels: str = "cpu") -> None:
    """Compare within the roundings of a pixel's at most four windows.

    These are three sums in fp32, in any order, then one rounding to the dtype, where Triton's
    interpreter truncates.
    """
    (y, dx), (expected, gradient) = both(x, own=kernels)
    assert same_bits(y, expected)
    absolute = activations(tuple(y.shape), x.dtype, seed=1).abs().to(x.device)
    size = both(x, absolute, own=kernels)[1][1]
    rounding = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    rounding /= 1 if kernels == "triton" and not x.is_cuda else 2
    assert bool(
        ((dx.double() - gradient).abs() <= 3 * 2.0**-24 * size + rounding * gradient.abs()).all()
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 48), st.integers(1, 11), st.integers(1, 11)),
    dtype=st.sampled_from(DTYPES),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_torchs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, whole: bool, seed: int
) -> None:
    check(activations(shape, dtype, seed=seed, whole=whole))


@given(
    share=st.sampled_from([0.05, 0.5, 1.0]),
    odd=st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -0.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_what_is_no_number_is_passed_on_as_torch_does(
    share: float, odd: float, dtype: torch.dtype, seed: int
) -> None:
    x = activations((2, 20, 7, 8), dtype, seed=seed, whole=True)
    for value in (odd, -odd, -torch.inf):
        x = torch.where(
            torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 1)) < share, value, x
        )
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        check(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    x, results = activations((40, 64, 24, 24), dtype), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(both(x)[0])
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True)
    )


def test_a_byte_per_output_is_saved_instead_of_the_input() -> None:
    x, saved = activations((4, 32, 24, 24), torch.bfloat16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.max_pool(x)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, y.numel())]


def test_gradients_of_any_strides() -> None:
    x = activations((4, 16, 9, 9), torch.float32)
    dy = activations((4, 16, 5, 5), torch.float32, seed=1)
    expected = both(x, dy)[0][1]
    assert torch.equal(both(x, dy.contiguous())[0][1], expected)
    (_, ones), (_, torchs) = both(x, torch.ones(()).expand(4, 16, 5, 5))
    assert torch.equal(ones.double(), torchs)  # whole numbers


def test_everything_else_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("compiled code")

    monkeypatch.setattr(CpuMaxPool, "apply", refuse)
    x = activations((4, 16, 9, 9), torch.float32)
    for other in (x.contiguous(), x.double(), x[:0]):
        assert torch.equal(ops.max_pool(other, kernels="cpu"), F.max_pool2d(other, 3, 2, 1))
    assert torch.equal(ops.max_pool(x, kernels="reference"), F.max_pool2d(x, 3, 2, 1))
    with pytest.raises(AssertionError, match="compiled code"):
        ops.max_pool(x)
    with pytest.raises(ValueError, match="kernels must be one of"):
        ops.max_pool(x, kernels="fast")


def test_compiled_code_keeps_torchs_operation() -> None:
    x = activations((4, 16, 9, 9), torch.float32)
    run = torch.compile(ops.max_pool, backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), F.max_pool2d(x, 3, 2, 1))


# Triton's kernels alone.


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled")
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    odd=st.sampled_from([None, torch.nan, torch.inf, -torch.inf, -0.0]),
    seed=st.integers(0, 1000),
)
def test_triton_is_torchs_at_any_shape(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    odd: float | None,
    seed: int,
    device: torch.device,
) -> None:
    x = activations(shape, dtype, seed=seed, whole=True)
    if odd is not None:
        where = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
        x = torch.where(where, odd, x).contiguous(memory_format=torch.channels_last)
    check(x.to(device), "triton")


@pytest.mark.gpu
def test_triton_repeats_its_bits_and_compiles(device: torch.device) -> None:
    x = activations((3, 24, 8, 8), torch.bfloat16).to(device)
    dy = torch.ones(()).expand(3, 24, 4, 4).to(device, torch.bfloat16)
    first, again = (both(x, dy, own="triton")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    run = torch.compile(
        lambda x: ops.max_pool(x, kernels="triton"), backend="aot_eager", fullgraph=True
    )
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = run(leaf)
    assert torch.equal(y, first[0])
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], first[1])


@pytest.mark.gpu
# opcheck itself looks at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(device: torch.device) -> None:
    x = activations((2, 6, 5, 4), torch.float32).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.fastbyol.max_pool, (x,))
    y, taps = triton_max_pool(x.detach())
    torch.library.opcheck(torch.ops.fastbyol.max_pool_backward, (y, taps, 5, 4))
