"""fp32 matrix products on TF32 tensor cores by three products of split values, in Triton.

Letters: N rows of x, I features in, O features out; M, N and K of a product C (M, N) = A B, whose
sum goes over K.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of C, rows by columns, with their warps, the largest first. A product takes the first that
# makes as many programs as an H100 has multiprocessors (132), or nearly.
TILES = ((128, 64, 8), (64, 32, 4), (32, 32, 4))
MIN_PROGRAMS = 128
BLOCK_K, NUM_STAGES = 32, 3


@triton.jit
def to_tf32(x):
    """Round fp32 ``x`` to TF32's 10 bits of fraction, to nearest, ties away from zero."""
    # Spelled out, where tensor cores would cut the other 13 bits off, and an interpreter none.
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    """Return TF32 values ``big`` and ``small`` whose sum is ``x`` to within 2^-22 of it."""
    big = to_tf32(x)
    return big, to_tf32(x - big)


@triton.jit
def _product_kernel(
    a, b, bias, c, M, N, K,
    TRANSPOSED_A: tl.constexpr, TRANSPOSED_B: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write C (M, N) = A B + bias. Each transposed operand lies in memory as (K, M) or (N, K)."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        if TRANSPOSED_A:
            at = k.to(tl.int64)[None, :] * M + rows[:, None]
        else:
            at = rows.to(tl.int64)[:, None] * K + k[None, :]
        left = tl.load(a + at, mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        if TRANSPOSED_B:
            at = columns.to(tl.int64)[None, :] * K + k[:, None]
        else:
            at = k.to(tl.int64)[:, None] * N + columns[None, :]
        right = tl.load(b + at, mask=(k < K)[:, None] & (columns < N)[None, :], other=0.0)
        left_big, left_small = _split(left)
        right_big, right_small = _split(right)
        # The small ones first. small times small is below fp32's rounding.
        part = tl.dot(left_small, right_big, input_precision="tf32")
        part = tl.dot(left_big, right_small, part, input_precision="tf32")
        part = tl.dot(left_big, right_big, part, input_precision="tf32")
        # Tensor cores round their sums towards zero, so only short ones are theirs (Ootomo and
        # Yokota, arXiv:2203.03341); the sum over blocks rounds to nearest.
        total += part
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(c + rows.to(tl.int64)[:, None] * N + columns[None, :], total, mask=inside)


def _launch(
    a: Tensor, b: Tensor, bias: Tensor | None, *, transposed_a: bool, transposed_b: bool
) -> Tensor:
    c = _result(a, b, transposed_a=transposed_a, transposed_b=transposed_b)
    (m, n), k = c.shape, a.shape[0 if transposed_a else 1]
    block_m, block_n, num_warps = tile(m, n)
    _product_kernel[(triton.cdiv(n, block_n), triton.cdiv(m, block_m))](
        a, b, c if bias is None else bias, c, m, n, k,
        TRANSPOSED_A=transposed_a, TRANSPOSED_B=transposed_b, HAS_BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK_K,
        num_warps=num_warps, num_stages=NUM_STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return c


def tile(m: int, n: int) -> tuple[int, int, int]:
    """Return rows, columns and warps of the tiles of C (``m``, ``n``)."""
    for block_m, block_n, num_warps in TILES:
        if triton.cdiv(m, block_m) * triton.cdiv(n, block_n) >= MIN_PROGRAMS:
            return block_m, block_n, num_warps
    return TILES[-1]


def _result(a: Tensor, b: Tensor, *, transposed_a: bool, transposed_b: bool) -> Tensor:
    shape = a.shape[1 if transposed_a else 0], b.shape[0 if transposed_b else 1]
    return torch.empty(shape, dtype=a.dtype, device=a.device)


@torch.library.custom_op("fastbyol::tf32x3_linear", mutates_args=())
def triton_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x ``weight``^T + ``bias``, of contiguous fp32 x (N, I) and weight (O, I)."""
    return _launch(x, weight, bias, transposed_a=False, transposed_b=True)


@triton_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _result(x, weight, transposed_a=False, transposed_b=True)


@torch.library.custom_op("fastbyol::tf32x3_product", mutates_args=())
def _triton_product(a: Tensor, b: Tensor, transposed_a: bool) -> Tensor:
    """Return A ``b``, of contiguous fp32 ``b`` (K, N) and ``a``, A (M, K) or its transpose."""
    return _launch(a, b, None, transposed_a=transposed_a, transposed_b=False)


@_triton_product.register_fake
def _(a: Tensor, b: Tensor, transposed_a: bool) -> Tensor:
    return _result(a, b, transposed_a=transposed_a, transposed_b=False)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dy = dy.contiguous()
    return (
        _triton_product(dy, weight, False) if needs_x else None,
        _triton_product(dy, x, True) if needs_weight else None,
        dy.sum(0) if needs_bias else None,
    )


triton_linear.register_autograd(_backward, setup_context=_save)
