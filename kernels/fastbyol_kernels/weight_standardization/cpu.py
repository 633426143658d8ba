"""Weight standardization on a CPU: a row comes from memory once per pass, then from the cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbyol_kernels.native import F32, I64, Activation, kernel, narrowed, noalias, widened
from fastbyol_kernels.weight_standardization.reference import EPS

# Weights of a block: about 10 us of work.
BLOCK = 1 << 15
_EPS = np.float32(EPS)


@noalias
def _standardize(row, out):
    """Write a standardized row. Return its mean and its standard deviation."""
    # Separate passes for mean and squared deviations, which are exact at any mean. The row, of some
    # thousand weights, is in the cache after the first one.
    total = squares = np.float32(0)
    for i in range(len(row)):
        total += row[i]
    mean = total / np.float32(len(row))
    for i in range(len(row)):
        off = row[i] - mean
        squares += off * off
    std = np.sqrt(squares / np.float32(len(row) - 1))
    scale = np.float32(1) / (std + _EPS)
    for i in range(len(row)):
        out[i] = narrowed((row[i] - mean) * scale, out)
    return mean, std


@noalias
def _gradient(upstream, row, out, mean, std):
    """Write dw = (g - mean(g) - d sum(g d) / (s std (n - 1))) / s, d = w - mean, s = std + eps."""
    total = weighted = np.float32(0)
    for i in range(len(row)):
        g = widened(upstream[i])
        total += g
        weighted += g * (row[i] - mean)
    level = total / np.float32(len(row))
    below = (std + _EPS) * std * np.float32(len(row) - 1)
    # The gradient at a std of zero is zero, as that of torch's norm.
    slope = weighted / below if std > np.float32(0) else np.float32(0)
    scale = np.float32(1) / (std + _EPS)
    for i in range(len(row)):
        out[i] = (widened(upstream[i]) - level - (row[i] - mean) * slope) * scale


@kernel
def _forward(
    block: int,
    copy: Activation,
    means: F32,
    stds: F32,
    flat: F32,
    rows: I64,
    num_rows: int,
    per_block: int,
) -> None:
    """Standardize ``per_block`` neighbouring rows of the table."""
    for row in range(block * per_block, min((block + 1) * per_block, num_rows)):
        offset, length, target = rows[3 * row], rows[3 * row + 1], rows[3 * row + 2]
        mean, std = _standardize(flat[offset : offset + length], copy[target : target + length])
        means[row] = mean
        stds[row] = std


@kernel
def _backward(
    block: int,
    out: F32,
    gradient: Activation,
    flat: F32,
    means: F32,
    stds: F32,
    rows: I64,
    num_rows: int,
    per_block: int,
) -> None:
    """Write the gradient of ``per_block`` neighbouring rows of the table."""
    for row in range(block * per_block, min((block + 1) * per_block, num_rows)):
        offset, length, target = rows[3 * row], rows[3 * row + 1], rows[3 * row + 2]
        upstream, own = gradient[target : target + length], flat[offset : offset + length]
        _gradient(upstream, own, out[offset : offset + length], means[row], stds[row])


def standardize_rows(copy: Tensor, means: Tensor, stds: Tensor, flat: Tensor, rows: Tensor) -> None:
    """Write ``copy`` (fp32 or bf16), ``means`` and ``stds`` (R,) for ``RowTable.rows`` (R, 3)."""
    num_blocks, per_block = _blocks(rows)
    _forward(num_blocks, copy, means, stds, flat, rows, len(rows), per_block)


def standardize_rows_backward(
    out: Tensor, gradient: Tensor, flat: Tensor, means: Tensor, stds: Tensor, rows: Tensor
) -> None:
    """Write the gradient of ``rows`` in ``flat`` to ``out``, from the ``gradient`` of the copy."""
    num_blocks, per_block = _blocks(rows)
    _backward(num_blocks, out, gradient, flat, means, stds, rows, len(rows), per_block)


def _blocks(rows: Tensor) -> tuple[int, int]:
    """Return the number of blocks, and the rows of each."""
    per_block = max(1, BLOCK * len(rows) // max(1, int(rows[:, 1].sum())))
    return -(-len(rows) // per_block), per_block


class Weight(torch.autograd.Function):
    """Standardization of one fp32 weight (O, ...) with two or more elements per row.

    The weight is dense in memory with O outermost.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        out = torch.empty_like(weight)
        means, stds = weight.new_empty(2, len(weight)).unbind()
        standardize_rows(out, means, stds, weight, _rows_of(len(weight), weight[0].numel()))
        ctx.save_for_backward(weight, means, stds)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        weight, means, stds = ctx.saved_tensors
        out = torch.empty_like(weight)
        if gradient.stride() != weight.stride():
            gradient = torch.empty_like(weight).copy_(gradient)
        standardize_rows_backward(
            out, gradient, weight, means, stds, _rows_of(len(weight), weight[0].numel())
        )
        return out


@cache
def _rows_of(num_rows: int, length: int) -> Tensor:
    """Return the ``RowTable.rows`` of a single weight."""
    starts = torch.arange(num_rows, device="cpu") * length
    return torch.stack((starts, torch.full_like(starts, length), starts), 1).contiguous()


# What a step calls, for ``native.compile_ahead``.
TRAINED_WITH = (_forward, _backward)
