"""Weight standardization in Triton: all rows of a network in one launch each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol_kernels.weight_standardization.reference import EPS, RowTable

# A step of a long row, which has a program of its own and moves 16 bytes at a time: 16 elements per
# thread of 4 warps, four 16-byte loads of fp32 in flight. 4,608 elements (3x3 over 512 channels)
# are three steps. 16 such programs fill an SM with 64 warps at 32 registers, 8 do at 64.
BLOCK = 2048
# Short or unaligned rows (27 or 147 elements of a stem, 3x3x3 and 7x7x3) start on odd elements and
# move one element at a time, 8 rows per program and a 7x7x3 row per step. They are 2 % of
# ResNet-18's weights, and 9 % of ResNet-50's.
ROWS, COLUMNS = 8, 256
_OPTIONS = {
    "BLOCK": BLOCK,
    "ROWS": ROWS,
    "COLUMNS": COLUMNS,
    "num_warps": 4,
    "enable_fp_fusion": True,
}


@triton.jit
def _long_forward(flat, copy, means, stds, table, row, eps, BLOCK: tl.constexpr):
    """Standardize a row whose offsets and length are multiples of 8. The second read hits L1."""
    source = flat + tl.multiple_of(tl.load(table + row * 3), 8)
    length = tl.multiple_of(tl.load(table + row * 3 + 1).to(tl.int32), 8)
    target = copy + tl.multiple_of(tl.load(table + row * 3 + 2), 8)
    columns = tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    m2 = tl.zeros((BLOCK,), tl.float32)
    steps = 0.0
    for start in range(0, length, BLOCK):
        mask = start + columns < length
        value = tl.load(source + start + columns, mask=mask, other=0.0)
        # Welford's recurrence in each lane, Chan's combination after: no cancellation at any mean.
        steps += 1.0
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / steps)
        m2 += delta * (value - mean)
    counts = ((length - columns + BLOCK - 1) // BLOCK).to(tl.float32)
    center = tl.sum(counts * mean, 0) / length
    apart = mean - center
    std = tl.sqrt(tl.sum(m2 + counts * apart * apart, 0) / (length - 1))
    tl.store(means + row, center)
    tl.store(stds + row, std)
    scale = 1.0 / (std + eps)
    blocks = tl.cdiv(length, BLOCK)
    for step in range(blocks):
        at = (blocks - 1 - step) * BLOCK + columns
        value = tl.load(source + at, mask=at < length, other=0.0)
        tl.store(
            target + at, ((value - center) * scale).to(copy.dtype.element_ty), mask=at < length
        )


@triton.jit
def _short_rows(table, first, num_rows, ROWS: tl.constexpr):
    """Return numbers, mask, offsets, lengths and copy offsets (ROWS,) of rows.

    Lengths are 0 beyond the last row.
    """
    rows = first + tl.arange(0, ROWS)
    mask = rows < num_rows
    length = tl.load(table + rows * 3 + 1, mask=mask, other=0).to(tl.int32)
    return (
        rows,
        mask,
        tl.load(table + rows * 3, mask=mask, other=0),
        length,
        tl.load(table + rows * 3 + 2, mask=mask, other=0),
    )


@triton.jit
def _in_copy(rows, columns, places, first_moved, end_moved, length):
    """Return the places in the copy's rows, (ROWS, COLUMNS), of columns: where ``Moved`` has them.

    ``length`` is that of a moved row.
    """
    at = columns[None, :]
    if places is not None:
        moved = (rows >= first_moved) & (rows < end_moved)
        there = tl.load(places + columns, mask=columns < length, other=0)
        at = tl.where(moved[:, None], there[None, :], at)
    return at


@triton.jit
def _short_forward(
    flat, copy, means, stds, table, places, first_moved, end_moved, num_places, first, num_rows,
    eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Standardize ROWS rows of any length and alignment in three passes: sum, deviations, copy."""
    rows, mask, offset, length, target = _short_rows(table, first, num_rows, ROWS)
    columns = tl.arange(0, COLUMNS)
    longest = tl.max(length, 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, longest, COLUMNS):
        inside = (start + columns)[None, :] < length[:, None]
        total += tl.load(
            flat + offset[:, None] + (start + columns)[None, :], mask=inside, other=0.0
        )
    mean = tl.sum(total, 1) / tl.maximum(length, 1)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, longest, COLUMNS):
        inside = (start + columns)[None, :] < length[:, None]
        value = tl.load(flat + offset[:, None] + (start + columns)[None, :], mask=inside, other=0.0)
        apart = tl.where(inside, value - mean[:, None], 0.0)
        squares += apart * apart
    std = tl.sqrt(tl.sum(squares, 1) / tl.maximum(length - 1, 1))
    tl.store(means + rows, mean, mask=mask)
    tl.store(stds + rows, std, mask=mask)
    scale = 1.0 / (std + eps)
    for start in range(0, longest, COLUMNS):
        inside = (start + columns)[None, :] < length[:, None]
        value = tl.load(flat + offset[:, None] + (start + columns)[None, :], mask=inside, other=0.0)
        value = (value - mean[:, None]) * scale[:, None]
        at = _in_copy(rows, start + columns, places, first_moved, end_moved, num_places)
        tl.store(copy + target[:, None] + at, value.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    flat, copy, means, stds, table, places, first_moved, end_moved, num_places, num_long, num_rows,
    eps, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Standardize a long row, or ROWS short ones, per program."""
    program = tl.program_id(0)
    if program < num_long:
        _long_forward(flat, copy, means, stds, table, program, eps, BLOCK)
    else:
        first = num_long + (program - num_long) * ROWS
        _short_forward(
            flat, copy, means, stds, table, places, first_moved, end_moved, num_places, first,
            num_rows, eps, ROWS, COLUMNS
        )  # fmt: skip


@triton.jit
def _slope(weighted, std, length, eps):
    """Return the factor of (w - mean) in the gradient: 0 for a std of 0, as for torch's norm."""
    below = (std + eps) * std * (length - 1)
    return tl.where(std > 0, weighted / tl.where(std > 0, below, 1.0), 0.0)


@triton.jit
def _long_backward(gradient, flat, means, stds, out, table, row, eps, BLOCK: tl.constexpr):
    source = tl.multiple_of(tl.load(table + row * 3), 8)
    length = tl.multiple_of(tl.load(table + row * 3 + 1).to(tl.int32), 8)
    g = gradient + tl.multiple_of(tl.load(table + row * 3 + 2), 8)
    mean = tl.load(means + row)
    std = tl.load(stds + row)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        at = start + columns
        upstream = tl.load(g + at, mask=at < length, other=0.0).to(tl.float32)
        total += upstream
        weighted += upstream * (tl.load(flat + source + at, mask=at < length, other=0.0) - mean)
    level = tl.sum(total, 0) / length
    slope = _slope(tl.sum(weighted, 0), std, length, eps)
    scale = 1.0 / (std + eps)
    blocks = tl.cdiv(length, BLOCK)
    for step in range(blocks):
        at = (blocks - 1 - step) * BLOCK + columns
        upstream = tl.load(g + at, mask=at < length, other=0.0).to(tl.float32)
        centred = tl.load(flat + source + at, mask=at < length, other=0.0) - mean
        tl.store(out + source + at, (upstream - level - centred * slope) * scale, mask=at < length)


@triton.jit
def _short_backward(
    gradient, flat, means, stds, out, table, places, first_moved, end_moved, num_places, first,
    num_rows, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    rows, mask, offset, length, target = _short_rows(table, first, num_rows, ROWS)
    mean = tl.load(means + rows, mask=mask, other=0.0)[:, None]
    std = tl.load(stds + rows, mask=mask, other=1.0)
    columns = tl.arange(0, COLUMNS)
    longest = tl.max(length, 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    weighted = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, longest, COLUMNS):
        at = (start + columns)[None, :]
        inside = at < length[:, None]
        there = _in_copy(rows, start + columns, places, first_moved, end_moved, num_places)
        upstream = tl.load(gradient + target[:, None] + there, mask=inside, other=0.0).to(
            tl.float32
        )
        total += upstream
        weighted += upstream * (tl.load(flat + offset[:, None] + at, mask=inside, other=0.0) - mean)
    level = (tl.sum(total, 1) / tl.maximum(length, 1))[:, None]
    slope = _slope(tl.sum(weighted, 1), std, tl.maximum(length, 2), eps)[:, None]
    scale = (1.0 / (std + eps))[:, None]
    for start in range(0, longest, COLUMNS):
        at = (start + columns)[None, :]
        inside = at < length[:, None]
        there = _in_copy(rows, start + columns, places, first_moved, end_moved, num_places)
        upstream = tl.load(gradient + target[:, None] + there, mask=inside, other=0.0).to(
            tl.float32
        )
        centred = tl.load(flat + offset[:, None] + at, mask=inside, other=0.0) - mean
        tl.store(
            out + offset[:, None] + at, (upstream - level - centred * slope) * scale, mask=inside
        )


@triton.jit
def _backward_kernel(
    gradient, flat, means, stds, out, table, places, first_moved, end_moved, num_places, num_long,
    num_rows, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write dw = (g - mean(g) - d sum(g d) / (s std (n - 1))) / s, d = w - mean, s = std + eps."""
    program = tl.program_id(0)
    if program < num_long:
        _long_backward(gradient, flat, means, stds, out, table, program, eps, BLOCK)
    else:
        first = num_long + (program - num_long) * ROWS
        _short_backward(
            gradient, flat, means, stds, out, table, places, first_moved, end_moved, num_places,
            first, num_rows, eps, ROWS, COLUMNS
        )  # fmt: skip


@torch.library.custom_op("fastbyol::standardize_rows", mutates_args=("copy", "means", "stds"))
def standardize_rows(
    copy: Tensor, means: Tensor, stds: Tensor, flat: Tensor, rows: Tensor, places: Tensor | None,
    first_moved: int, end_moved: int, num_long: int,
) -> None:  # fmt: skip
    """Launch the forward kernel on the ``arguments`` of a ``RowTable``."""
    _check_starts(copy=copy, flat=flat)
    moved = (places, first_moved, end_moved, 0 if places is None else len(places))
    _forward_kernel[_grid(rows, num_long)](
        flat, copy, means, stds, rows, *moved, num_long, len(rows), EPS, **_OPTIONS
    )


@torch.library.custom_op("fastbyol::standardize_rows_backward", mutates_args=("out",))
def standardize_rows_backward(
    out: Tensor, gradient: Tensor, flat: Tensor, means: Tensor, stds: Tensor, rows: Tensor,
    places: Tensor | None, first_moved: int, end_moved: int, num_long: int,
) -> None:  # fmt: skip
    """Launch the backward kernel on the ``arguments`` of a ``RowTable``."""
    _check_starts(out=out, gradient=gradient, flat=flat)
    moved = (places, first_moved, end_moved, 0 if places is None else len(places))
    _backward_kernel[_grid(rows, num_long)](
        gradient, flat, means, stds, out, rows, *moved, num_long, len(rows), EPS, **_OPTIONS
    )


def arguments(table: RowTable) -> tuple[Tensor, Tensor | None, int, int, int]:
    """Return the arguments of both operations that describe ``table``."""
    return table.rows, table.places, table.moved.start, table.moved.stop, table.num_long


def _grid(rows: Tensor, num_long: int) -> tuple[int]:
    return (max(1, num_long + triton.cdiv(len(rows) - num_long, ROWS)),)


def _check_starts(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} must start on a multiple of 16 bytes: the kernel moves that many at a time"
            )
