"""Weight standardization on a processor: a row is read from memory once each way, and again from the nearest cache.

Two passes for mean and squared deviations lose no digits at any mean; the second, and the one that writes, find the row, of
some thousand weights, where the first left it. A block is a few neighbouring rows of the table, or a gap to be zeroed.

Letters: R rows, O output channels, L weights of a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from fastbyol_kernels.processor import apart, argument, blocks, floats, halves, integers, kernel, rounded, take
from fastbyol_kernels.processor import value as wide

# Weights that a thread takes at a time: some 10 us of work.
BLOCK = 1 << 15


@apart
def _standardize(row, out, eps):
    """Write a standardized row; its mean and its standard deviation."""
    total = squares = np.float32(0)
    for i in range(len(row)):
        total += row[i]
    mean = total / np.float32(len(row))
    for i in range(len(row)):
        off = row[i] - mean
        squares += off * off
    std = np.sqrt(squares / np.float32(len(row) - 1))
    scale = np.float32(1) / (std + eps)
    for i in range(len(row)):
        out[i] = rounded((row[i] - mean) * scale, out)
    return mean, std


@apart
def _gradient(upstream, row, out, mean, std, eps):
    """dw = (g - mean(g) - (w - mean) * sum(g (w - mean)) / ((std + eps) std (L - 1))) / (std + eps); 0 where the std is 0."""
    total = weighted = np.float32(0)
    for i in range(len(row)):
        g = wide(upstream[i])
        total += g
        weighted += g * (row[i] - mean)
    level = total / np.float32(len(row))
    below = (std + eps) * std * np.float32(len(row) - 1)
    slope = weighted / below if std > np.float32(0) else np.float32(0)
    scale = np.float32(1) / (std + eps)
    for i in range(len(row)):
        out[i] = (wide(upstream[i]) - level - (row[i] - mean) * slope) * scale


@numba.njit(inline="always")
def _zero(gaps, gap, out):
    for i in range(gaps[2 * gap], gaps[2 * gap] + gaps[2 * gap + 1]):
        out[i] = 0


@numba.njit(inline="always")
def _forward_block(table, copy, block):
    flat, means, stds, eps = floats(table, 0), floats(table, 2), floats(table, 3), floats(table, 6)[0]
    rows, num_rows, per_block = integers(table, 4), argument(table, 7), argument(table, 8)
    first = block * per_block
    if first >= num_rows:
        _zero(integers(table, 5), block - -(-num_rows // per_block), copy)
    for row in range(first, min(first + per_block, num_rows)):
        offset, length, target = rows[3 * row], rows[3 * row + 1], rows[3 * row + 2]
        mean, std = _standardize(flat[offset : offset + length], copy[target : target + length], eps)
        means[row] = mean
        stds[row] = std


@kernel
def _forward(table):
    """The copy, and means and stds (R,), of a few rows per block; then a gap per block."""
    half = argument(table, 9)
    block = take(table)
    while block < blocks(table):
        if half:
            _forward_block(table, halves(table, 1), block)
        else:
            _forward_block(table, floats(table, 1), block)
        block = take(table)


@numba.njit(inline="always")
def _backward_block(table, gradient, block):
    flat, means, stds, out, eps = (
        floats(table, 1), floats(table, 2), floats(table, 3), floats(table, 4), floats(table, 7)[0],
    )  # fmt: skip
    rows, num_rows, per_block = integers(table, 5), argument(table, 8), argument(table, 9)
    first = block * per_block
    if first >= num_rows:
        _zero(integers(table, 6), block - -(-num_rows // per_block), out)
    for row in range(first, min(first + per_block, num_rows)):
        offset, length, target = rows[3 * row], rows[3 * row + 1], rows[3 * row + 2]
        _gradient(
            gradient[target : target + length], flat[offset : offset + length], out[offset : offset + length],
            means[row], stds[row], eps,
        )  # fmt: skip


@kernel
def _backward(table):
    """The gradient of the flat parameter, of a few rows per block; then a gap per block."""
    half = argument(table, 10)
    block = take(table)
    while block < blocks(table):
        if half:
            _backward_block(table, halves(table, 0), block)
        else:
            _backward_block(table, floats(table, 0), block)
        block = take(table)


def standardize(flat: Tensor, copy: Tensor, means: Tensor, stds: Tensor, rows: Tensor, gaps: Tensor, eps: float) -> None:
    """Fill ``copy`` (fp32 or bf16), ``means`` and ``stds`` (R,) for ``rows`` (R, 3) of a ``RowTable``; zero the ``gaps``."""
    num_blocks, per_block = _blocks(rows)
    _forward(
        num_blocks + len(gaps), flat, copy, means, stds, rows, gaps, flat.new_tensor((eps,)), len(rows), per_block,
        int(copy.dtype == torch.bfloat16),
    )  # fmt: skip


def gradient_into(
    out: Tensor, gradient: Tensor, flat: Tensor, means: Tensor, stds: Tensor, rows: Tensor, gaps: Tensor, eps: float
) -> None:
    """Fill ``out``, as ``flat``, where rows are, given the ``gradient`` of the copy, and zero the ``gaps``."""
    num_blocks, per_block = _blocks(rows)
    _backward(
        num_blocks + len(gaps), gradient, flat, means, stds, out, rows, gaps, flat.new_tensor((eps,)), len(rows), per_block,
        int(gradient.dtype == torch.bfloat16),
    )  # fmt: skip


def _blocks(rows: Tensor) -> tuple[int, int]:
    """Blocks of rows, and rows of a block."""
    if not len(rows):
        return 0, 1
    per_block = max(1, BLOCK * len(rows) // int(rows[:, 1].sum()))
    return -(-len(rows) // per_block), per_block


class _Rows(torch.autograd.Function):
    """All rows of a table: the copy, means and stds."""

    @staticmethod
    def forward(
        ctx: Any,
        flat: Tensor,
        rows: Tensor,
        copy_gaps: Tensor,
        flat_gaps: Tensor,
        copy_numel: int,
        dtype: torch.dtype,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        copy = flat.new_empty(copy_numel, dtype=dtype)
        means, stds = flat.new_empty(2, len(rows)).unbind()
        standardize(flat, copy, means, stds, rows, copy_gaps, eps)
        ctx.eps = eps
        ctx.save_for_backward(flat, means, stds, rows, flat_gaps)
        ctx.mark_non_differentiable(means, stds)
        return copy, means, stds

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _means: Tensor, _stds: Tensor) -> tuple[Tensor | None, ...]:
        flat, means, stds, rows, gaps = ctx.saved_tensors
        out = torch.empty_like(flat)
        gradient_into(out, gradient.contiguous(), flat, means, stds, rows, gaps, ctx.eps)
        return out, None, None, None, None, None, None


def standardize_rows(
    flat: Tensor, rows: Tensor, copy_gaps: Tensor, flat_gaps: Tensor, copy_numel: int, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The copy, differentiable in ``flat``, and means and stds (R,)."""
    found: tuple[Tensor, Tensor, Tensor] = _Rows.apply(flat, rows, copy_gaps, flat_gaps, copy_numel, dtype, eps)
    return found


class _Weight(torch.autograd.Function):
    """One weight, whose rows lie one after the other."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float) -> Tensor:
        rows, gaps = _rows_of(len(weight), weight[0].numel())
        out = torch.empty_like(weight)
        means, stds = weight.new_empty(2, len(weight)).unbind()
        standardize(weight, out, means, stds, rows, gaps, eps)
        ctx.eps = eps
        ctx.save_for_backward(weight, means, stds)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, means, stds = ctx.saved_tensors
        rows, gaps = _rows_of(len(weight), weight[0].numel())
        out = torch.empty_like(weight)
        if gradient.stride() != weight.stride():
            gradient = torch.empty_like(weight).copy_(gradient)
        gradient_into(out, gradient, weight, means, stds, rows, gaps, ctx.eps)
        return out, None


@cache
def _rows_of(channels: int, length: int) -> tuple[Tensor, Tensor]:
    """The rows and gaps of a weight alone."""
    starts = torch.arange(channels, device="cpu") * length
    return torch.stack((starts, torch.full_like(starts, length), starts), 1).contiguous(), starts.new_empty(0, 2)


def weight_standardization(weight: Tensor, eps: float) -> Tensor:
    """``weight_standardization`` of an fp32 weight (O, ...) of two or more weights a row, dense with O outermost in memory."""
    standardized: Tensor = _Weight.apply(weight, eps)
    return standardized
