"""Weight standardization: every output channel's weights are shifted to mean 0 and scaled to standard deviation 1.

    w_hat = (w - mean(w)) / (std(w) + eps),   mean and unbiased std over everything but the first dimension

Source: Qiao et al., "Weight Standardization", arXiv:1903.10520; eps = 1e-5 inside the sum, outside the square root, as the
authors' code and the post's have it.

``standardize_rows`` does so for all weights of a network in one launch: a table says where every row (output channel) lies in
one flat parameter and in one flat copy. Rows whose offsets and length are multiples of 8 elements take a program each and move
16 bytes at a time; a program reads its row twice, the second time from cache. Other rows (27 and 147 elements of a stem: 3x3x3
and 7x7x3) start on odd elements, so they move one element at a time, several rows to a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch

EPS = 1e-5


def reference(weight: Tensor, eps: float = EPS) -> Tensor:
    """The formula above in plain torch. A channel of equal weights gives zeros, and a finite gradient."""
    dims = tuple(range(1, weight.ndim))
    centred = weight - weight.mean(dims, keepdim=True)
    # A norm rather than a std: on a CPU it is vectorised (3x3 over 128 channels: 53 instead of 722 us), and its gradient at
    # zero is zero, where that of sqrt(var) would be infinity times zero.
    std = torch.linalg.vector_norm(centred, dim=dims, keepdim=True) * (weight[0].numel() - 1) ** -0.5
    standardized: Tensor = centred / (std + eps)
    return standardized


def weight_standardization(weight: Tensor, eps: float = EPS, *, kernels: str = "auto") -> Tensor:
    """Standardize ``weight`` (O, ...) per output channel; same shape, dtype, device and memory format.

    Every channel needs at least two weights (the std is unbiased). Differentiable in ``weight``.

    ``kernels``: "auto" and "cpu" take machine code for fp32 on a CPU, once differentiable, where it runs at once
    (``dispatch.at_once``); all else is plain torch, "triton" as well, whose kernels take a network at a time.
    """
    if kernels != "triton" and dispatch(kernels, "weight", weight) == "cpu":
        rows_lie_together = weight.is_contiguous() or (
            weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        )
        if weight.dtype == torch.float32 and rows_lie_together and weight.numel() > len(weight):
            from fastbyol_kernels import weight_standardization_processor  # numba: who has a GPU need not wait for it

            return weight_standardization_processor.weight_standardization(weight, eps)
    return reference(weight, eps)


# The multi-tensor op: every row of a network in one launch each way.


@dataclass(frozen=True)
class RowTable:
    """Rows (output channels) of many weights: where they lie in a flat parameter and in the flat copy.

    ``rows`` (R, 3) int64: offset in the parameter, length, offset in the copy; first the ``num_long`` rows that take a program
    each, longest first, then the rest, longest first. ``copy_gaps`` and ``flat_gaps`` (., 2) int64: offset and length of what
    no row covers, in pieces of at most ``GAP``: zeros in the copy, and in the parameter's gradient. All on one device.
    ``weights``: offset, rows, row length and copy offset of each weight; ``order`` (R,) the index, weight by weight, of each of
    ``rows``.
    """

    rows: Tensor
    copy_gaps: Tensor
    flat_gaps: Tensor
    order: Tensor
    weights: tuple[tuple[int, int, int, int], ...]
    num_long: int
    flat_numel: int
    copy_numel: int


def row_table(
    offsets: Sequence[int],
    shapes: Sequence[Sequence[int]],
    copy_offsets: Sequence[int],
    *,
    flat_numel: int,
    copy_numel: int,
    device: torch.device | str = "cpu",
) -> RowTable:
    """The table of the weights at ``offsets`` with ``shapes`` (O, ...), to be copied to ``copy_offsets``.

    A weight's rows are contiguous: (O, kh, kw, I) in memory for convolutions, any order within a row will do. Raises
    ValueError for a weight of fewer than two elements per row, one beyond its buffer, and weights that overlap.
    """
    if not len(offsets) == len(shapes) == len(copy_offsets):
        raise ValueError(f"{len(offsets)} offsets, {len(shapes)} shapes and {len(copy_offsets)} copy_offsets")
    weights, rows = [], []
    for offset, (num_rows, *rest), copy_offset in zip(offsets, shapes, copy_offsets, strict=True):
        length = prod(rest)
        if length < 2:
            raise ValueError(f"shapes: {(num_rows, *rest)} has rows of {length}, whose standard deviation needs two or more")
        weights.append((offset, num_rows, length, copy_offset))
        rows += [(offset + i * length, length, copy_offset + i * length) for i in range(num_rows)]
    flat_gaps = _gaps([row[:2] for row in rows], flat_numel, "offsets", "flat_numel")
    copy_gaps = _gaps([(row[2], row[1]) for row in rows], copy_numel, "copy_offsets", "copy_numel")
    order = sorted(range(len(rows)), key=lambda i: (not _is_long(rows[i]), -rows[i][1]))
    return RowTable(
        rows=_table([rows[i] for i in order], 3, device),
        copy_gaps=_table(copy_gaps, 2, device),
        flat_gaps=_table(flat_gaps, 2, device),
        order=torch.tensor(order, dtype=torch.int64, device=device),
        weights=tuple(weights),
        num_long=sum(map(_is_long, rows)),
        flat_numel=flat_numel,
        copy_numel=copy_numel,
    )


def _table(rows: Sequence[tuple[int, ...]], columns: int, device: torch.device | str) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, columns)


def _is_long(row: tuple[int, int, int]) -> bool:
    """Whether every part of the row can move 16 bytes at a time in fp32 and bf16, and it is long enough to be worth it."""
    return row[1] > SHORT and not any(number % 8 for number in row)


def _gaps(covered: list[tuple[int, int]], numel: int, offsets: str, size: str) -> list[tuple[int, int]]:
    gaps, end = [], 0
    for offset, length in [*sorted(covered), (numel, 0)]:
        if offset < end:
            if offset == numel:
                raise ValueError(f"{size} is {numel}, but {offsets} and shapes reach {end}")
            raise ValueError(f"{offsets}: two rows overlap at {offset}")
        gaps += [(start, min(GAP, offset - start)) for start in range(end, offset, GAP)]
        end = offset + length
    return gaps


def reference_rows(flat: Tensor, table: RowTable, dtype: torch.dtype, eps: float = EPS) -> Tensor:
    """The multi-tensor op in plain torch, differentiable in ``flat``, weight by weight."""
    pieces, end = [], 0
    for offset, num_rows, length, copy_offset in sorted(table.weights, key=lambda weight: weight[3]):
        rows = flat.narrow(0, offset, num_rows * length).view(num_rows, length)
        pieces += [flat.new_zeros(copy_offset - end, dtype=dtype), reference(rows, eps).to(dtype).flatten()]
        end = copy_offset + num_rows * length
    return torch.cat([*pieces, flat.new_zeros(table.copy_numel - end, dtype=dtype)])


@triton.jit
def _long_forward(flat, copy, means, stds, table, row, eps, BLOCK: tl.constexpr):
    """One row of a multiple of 8 elements, all of it aligned to 8: read, then read again from cache and written."""
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
        tl.store(target + at, ((value - center) * scale).to(copy.dtype.element_ty), mask=at < length)


@triton.jit
def _short_rows(table, first, num_rows, ROWS: tl.constexpr):
    """Offsets, lengths and copy offsets (ROWS,) of rows of any length and alignment, lengths 0 beyond the last."""
    rows = first + tl.arange(0, ROWS)
    mask = rows < num_rows
    length = tl.load(table + rows * 3 + 1, mask=mask, other=0).to(tl.int32)
    return rows, mask, tl.load(table + rows * 3, mask=mask, other=0), length, tl.load(table + rows * 3 + 2, mask=mask, other=0)


@triton.jit
def _short_forward(flat, copy, means, stds, table, first, num_rows, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS rows of any length and alignment: the sum, then the squared deviations, then the copy."""
    rows, mask, offset, length, target = _short_rows(table, first, num_rows, ROWS)
    columns = tl.arange(0, COLUMNS)
    longest = tl.max(length, 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, longest, COLUMNS):
        inside = (start + columns)[None, :] < length[:, None]
        total += tl.load(flat + offset[:, None] + (start + columns)[None, :], mask=inside, other=0.0)
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
        tl.store(copy + target[:, None] + (start + columns)[None, :], value.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _zero_gap(out, gaps, gap, SIZE: tl.constexpr):
    offset = tl.load(gaps + gap * 2)
    columns = tl.arange(0, SIZE)
    zeros = tl.zeros((SIZE,), tl.float32).to(out.dtype.element_ty)
    tl.store(out + offset + columns, zeros, mask=columns < tl.load(gaps + gap * 2 + 1))


@triton.jit
def _forward_kernel(
    flat,
    copy,
    means,
    stds,
    table,
    gaps,
    num_long,
    num_rows,
    num_short_programs,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A long row, ROWS short ones or a gap per program, in that order: the longest work starts first."""
    program = tl.program_id(0)
    if program < num_long:
        _long_forward(flat, copy, means, stds, table, program, eps, BLOCK)
    elif program < num_long + num_short_programs:
        first = num_long + (program - num_long) * ROWS
        _short_forward(flat, copy, means, stds, table, first, num_rows, eps, ROWS, COLUMNS)
    else:
        _zero_gap(copy, gaps, program - num_long - num_short_programs, SIZE)


@triton.jit
def _slope(weighted, std, length, eps):
    """The factor of (w - mean) in the gradient; 0 where the std is, as torch's norm has it."""
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
def _short_backward(gradient, flat, means, stds, out, table, first, num_rows, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
        upstream = tl.load(gradient + target[:, None] + at, mask=inside, other=0.0).to(tl.float32)
        total += upstream
        weighted += upstream * (tl.load(flat + offset[:, None] + at, mask=inside, other=0.0) - mean)
    level = (tl.sum(total, 1) / tl.maximum(length, 1))[:, None]
    slope = _slope(tl.sum(weighted, 1), std, tl.maximum(length, 2), eps)[:, None]
    scale = (1.0 / (std + eps))[:, None]
    for start in range(0, longest, COLUMNS):
        at = (start + columns)[None, :]
        inside = at < length[:, None]
        upstream = tl.load(gradient + target[:, None] + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.load(flat + offset[:, None] + at, mask=inside, other=0.0) - mean
        tl.store(out + offset[:, None] + at, (upstream - level - centred * slope) * scale, mask=inside)


@triton.jit
def _backward_kernel(
    gradient,
    flat,
    means,
    stds,
    out,
    table,
    gaps,
    num_long,
    num_rows,
    num_short_programs,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """dw = (g - mean(g) - (w - mean) * sum(g (w - mean)) / ((std + eps) std (n - 1))) / (std + eps), and zeros in the gaps."""
    program = tl.program_id(0)
    if program < num_long:
        _long_backward(gradient, flat, means, stds, out, table, program, eps, BLOCK)
    elif program < num_long + num_short_programs:
        first = num_long + (program - num_long) * ROWS
        _short_backward(gradient, flat, means, stds, out, table, first, num_rows, eps, ROWS, COLUMNS)
    else:
        _zero_gap(out, gaps, program - num_long - num_short_programs, SIZE)


# A long row's step: 16 elements per thread of 4 warps, four 16-byte loads of fp32 in flight. 4,608 elements (3x3 over 512
# channels) are three steps; 16 such programs fill an SM with 64 warps' worth of threads at 32 registers, 8 at 64.
BLOCK = 2048
# Short or unaligned rows: 8 of them side by side, a 7x7x3 row (147) in one step. They are 2 % of ResNet-18's weights.
ROWS, COLUMNS = 8, 256
SHORT = 256
# Elements of a gap that one program zeroes.
GAP = 4096
NUM_WARPS = 4
_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
_TILES = {"BLOCK": BLOCK, "ROWS": ROWS, "COLUMNS": COLUMNS, "SIZE": GAP}


def _programs(rows: Tensor, num_long: int, num_gaps: int) -> tuple[int, tuple[int]]:
    num_short = -(-(len(rows) - num_long) // ROWS)
    return num_short, (max(1, num_long + num_short + num_gaps),)


@torch.library.custom_op("fastbyol::standardize_rows", mutates_args=())
def _standardize_rows(
    flat: Tensor,
    rows: Tensor,
    copy_gaps: Tensor,
    flat_gaps: Tensor,
    num_long: int,
    copy_numel: int,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The copy, and mean and std (R,) of the rows."""
    copy = torch.empty(copy_numel, dtype=dtype, device=flat.device)
    means, stds = (torch.empty(len(rows), dtype=torch.float32, device=flat.device) for _ in range(2))
    _launch_forward(flat, copy, means, stds, rows, copy_gaps, num_long, len(copy_gaps), eps)
    return copy, means, stds


@_standardize_rows.register_fake
def _(
    flat: Tensor,
    rows: Tensor,
    copy_gaps: Tensor,
    flat_gaps: Tensor,
    num_long: int,
    copy_numel: int,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    means, stds = (flat.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(2))
    return flat.new_empty(copy_numel, dtype=dtype), means, stds


@torch.library.custom_op("fastbyol::standardize_rows_into", mutates_args=("copy", "means", "stds"))
def _standardize_rows_into(
    copy: Tensor, means: Tensor, stds: Tensor, flat: Tensor, rows: Tensor, num_long: int, eps: float
) -> None:
    """As above into buffers that stay where they are; between the rows ``copy`` keeps what it holds."""
    _launch_forward(flat, copy, means, stds, rows, rows, num_long, 0, eps)


def _launch_forward(
    flat: Tensor,
    copy: Tensor,
    means: Tensor,
    stds: Tensor,
    rows: Tensor,
    gaps: Tensor,
    num_long: int,
    num_gaps: int,
    eps: float,
) -> None:
    for name, tensor in (("copy", copy), ("flat", flat)):
        _check_start(name, tensor)
    num_short, grid = _programs(rows, num_long, num_gaps)
    _forward_kernel[grid](flat, copy, means, stds, rows, gaps, num_long, len(rows), num_short, eps, **_TILES, **_OPTIONS)


@torch.library.custom_op("fastbyol::standardize_rows_backward", mutates_args=())
def _standardize_rows_backward(
    gradient: Tensor, flat: Tensor, means: Tensor, stds: Tensor, rows: Tensor, flat_gaps: Tensor, num_long: int, eps: float
) -> Tensor:
    """The gradient of the flat parameter, zeros where no row is."""
    out = torch.empty_like(flat)
    _launch_backward(gradient, flat, means, stds, out, rows, flat_gaps, num_long, len(flat_gaps), eps)
    return out


@_standardize_rows_backward.register_fake
def _(
    gradient: Tensor, flat: Tensor, means: Tensor, stds: Tensor, rows: Tensor, flat_gaps: Tensor, num_long: int, eps: float
) -> Tensor:
    return torch.empty_like(flat)


@torch.library.custom_op("fastbyol::standardize_rows_backward_into", mutates_args=("out",))
def _standardize_rows_backward_into(
    out: Tensor, gradient: Tensor, flat: Tensor, means: Tensor, stds: Tensor, rows: Tensor, num_long: int, eps: float
) -> None:
    """As above into ``out``, which keeps what it holds where no row is."""
    _launch_backward(gradient, flat, means, stds, out, rows, rows, num_long, 0, eps)


def _launch_backward(
    gradient: Tensor,
    flat: Tensor,
    means: Tensor,
    stds: Tensor,
    out: Tensor,
    rows: Tensor,
    gaps: Tensor,
    num_long: int,
    num_gaps: int,
    eps: float,
) -> None:
    for name, tensor in (("out", out), ("gradient", gradient), ("flat", flat)):
        _check_start(name, tensor)
    num_short, grid = _programs(rows, num_long, num_gaps)
    _backward_kernel[grid](
        gradient, flat, means, stds, out, rows, gaps, num_long, len(rows), num_short, eps, **_TILES, **_OPTIONS
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    flat, rows, _, flat_gaps, ctx.num_long, _, _, ctx.eps = inputs
    _, means, stds = output
    ctx.mark_non_differentiable(means, stds)
    ctx.save_for_backward(flat, means, stds, rows, flat_gaps)


def _backward(ctx: Any, gradient: Tensor, _means: Tensor, _stds: Tensor) -> tuple[Tensor | None, ...]:
    out = _standardize_rows_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.num_long, ctx.eps)
    return out, None, None, None, None, None, None, None


_standardize_rows.register_autograd(_backward, setup_context=_save)


def standardize_rows(
    flat: Tensor, table: RowTable, dtype: torch.dtype, eps: float = EPS, *, kernels: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of ``table`` in the flat parameter ``flat`` standardized, in one launch, forward and backward.

    Returns the flat copy (``table.copy_numel``,) in ``dtype``, zeros between the rows, differentiable in ``flat`` (whose
    gradient is zeros between the rows), and the rows' means and stds (R,), which ``standardize_rows_backward_into`` takes.

    ``kernels``: "reference" (plain torch, also fp64), "triton" (fp32 parameter, fp32 or bf16 copy; on a CPU only in Triton's
    interpreter), "cpu" (the same in a CPU's machine code), "auto" (whichever of the two is for flat's device). Raises
    ValueError, naming the argument, for what does not fit.
    """
    chosen = _choose(flat, dtype, kernels)
    if chosen == "cpu":
        from fastbyol_kernels import weight_standardization_processor

        _check_rows(flat, table, dtype)
        return weight_standardization_processor.standardize_rows(
            flat, table.rows, table.copy_gaps, table.flat_gaps, table.copy_numel, dtype, eps
        )
    if chosen == "triton":
        _check_rows(flat, table, dtype)
        copy, means, stds = _standardize_rows(
            flat, table.rows, table.copy_gaps, table.flat_gaps, table.num_long, table.copy_numel, dtype, eps
        )
        return copy, means, stds
    _check_sizes(flat, table)
    means, stds = _row_statistics(flat.detach(), table)
    return reference_rows(flat, table, dtype, eps), means, stds


def standardize_rows_into(
    copy: Tensor, means: Tensor, stds: Tensor, flat: Tensor, table: RowTable, eps: float = EPS, *, kernels: str = "auto"
) -> None:
    """``standardize_rows`` into buffers that stay where they are: ``copy`` (table.copy_numel,), whose dtype it takes, and
    ``means`` and ``stds`` (R,). Between the rows ``copy`` keeps what it holds. Not differentiable:
    ``standardize_rows_backward_into`` takes the gradient of ``copy`` back.
    """
    _check_sizes(flat, table)
    _check_copy("copy", copy, flat, table)
    _check_statistics(flat, table, means=means, stds=stds)
    chosen = _choose(flat, copy.dtype, kernels, copy, means, stds, table.rows)
    if chosen == "cpu":
        from fastbyol_kernels import weight_standardization_processor

        _check_rows(flat, table, copy.dtype)
        weight_standardization_processor.standardize(flat, copy, means, stds, table.rows, table.rows[:0], eps)
        return
    if chosen == "triton":
        _check_rows(flat, table, copy.dtype)
        _standardize_rows_into(copy, means, stds, flat, table.rows, table.num_long, eps)
        return
    with torch.no_grad():
        made, *statistics = standardize_rows(flat, table, copy.dtype, eps, kernels="reference")
        for buffer, values in zip((means, stds), statistics, strict=True):
            buffer.copy_(values)
        for _, num_rows, length, at in table.weights:
            copy.narrow(0, at, num_rows * length).copy_(made.narrow(0, at, num_rows * length))


def standardize_rows_backward_into(
    out: Tensor,
    gradient: Tensor,
    flat: Tensor,
    means: Tensor,
    stds: Tensor,
    table: RowTable,
    eps: float = EPS,
    *,
    kernels: str = "auto",
) -> None:
    """Write the rows' part of the gradient of ``flat`` into ``out``, given the ``gradient`` of the copy, in one launch.

    For an engine that keeps all gradients in one flat buffer: between the rows ``out`` keeps what it holds.
    """
    _check_sizes(flat, table)
    if out.shape != flat.shape or out.dtype != flat.dtype or out.device != flat.device or not out.is_contiguous():
        raise ValueError(f"out must be as flat, {flat.dtype} {tuple(flat.shape)} on {flat.device}, contiguous")
    _check_copy("gradient", gradient, flat, table)
    _check_statistics(flat, table, means=means, stds=stds)
    chosen = _choose(flat, gradient.dtype, kernels, out, gradient, means, stds, table.rows)
    if chosen == "cpu":
        from fastbyol_kernels import weight_standardization_processor

        _check_rows(flat, table, gradient.dtype)
        weight_standardization_processor.gradient_into(
            out, gradient, flat, means, stds, table.rows, table.rows[:0], eps
        )  # fmt: skip
        return
    if chosen == "triton":
        _check_rows(flat, table, gradient.dtype)
        _standardize_rows_backward_into(out, gradient, flat, means, stds, table.rows, table.num_long, eps)
        return
    leaf = flat.detach().requires_grad_()
    with torch.enable_grad():
        (rows,) = torch.autograd.grad(reference_rows(leaf, table, gradient.dtype, eps), leaf, gradient)
    for offset, num_rows, length, _ in table.weights:
        out.narrow(0, offset, num_rows * length).copy_(rows.narrow(0, offset, num_rows * length))


def _row_statistics(flat: Tensor, table: RowTable) -> tuple[Tensor, Tensor]:
    of_weights = [torch.std_mean(flat.narrow(0, w[0], w[1] * w[2]).view(w[1], w[2]), 1) for w in table.weights]
    stds, means = (torch.cat(parts) for parts in zip(*of_weights, strict=True))
    return means[table.order], stds[table.order]


def _choose(flat: Tensor, dtype: torch.dtype, kernels: str, *beside: Tensor) -> str:
    """A CPU takes what its kernels do not know, such as a copy in fp16, in plain torch unless they were asked for."""
    chosen = dispatch(kernels, "flat", flat, *beside)
    known = flat.dtype == torch.float32 and dtype in (torch.float32, torch.bfloat16)
    return "reference" if chosen == "cpu" and kernels == "auto" and not known else chosen


def _check_sizes(flat: Tensor, table: RowTable) -> None:
    if flat.shape != (table.flat_numel,) or not flat.is_contiguous():
        raise ValueError(f"flat must be ({table.flat_numel},), contiguous, as table says, not {tuple(flat.shape)}")
    if table.rows.device != flat.device:
        raise ValueError(f"table is on {table.rows.device}, flat on {flat.device}")


def _check_rows(flat: Tensor, table: RowTable, dtype: torch.dtype) -> None:
    _check_sizes(flat, table)
    if flat.dtype != torch.float32:
        raise ValueError(f"flat must be float32 for the kernels, not {flat.dtype}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype of the copy must be float32 or bfloat16 for the kernels, not {dtype}")


def _check_copy(name: str, copy: Tensor, flat: Tensor, table: RowTable) -> None:
    if copy.shape != (table.copy_numel,) or copy.device != flat.device or not copy.is_contiguous():
        found = f"{tuple(copy.shape)} with strides {copy.stride()} on {copy.device}"
        raise ValueError(f"{name} must be ({table.copy_numel},) on {flat.device}, contiguous, not {found}")


def _check_statistics(flat: Tensor, table: RowTable, **tensors: Tensor) -> None:
    dtype = torch.promote_types(flat.dtype, torch.float32)
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (
            (len(table.rows),),
            dtype,
            flat.device,
        ) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {dtype} ({len(table.rows)},) on {flat.device}, contiguous")


def _check_start(name: str, tensor: Tensor) -> None:
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} must start on a multiple of 16 bytes: the kernel moves that many at a time")


def bytes_moved(table: RowTable, copy_bytes: int, *, backward: bool = False) -> int:
    """Bytes one pass must read and write if every element crosses the memory bus once (the statistics, 8 a row, left out).

    Forward: fp32 weights in, the copy of ``copy_bytes`` per element out. Backward: the copy's gradient and the weights in, the
    fp32 gradient out.
    """
    return int(table.rows[:, 1].sum()) * (copy_bytes + 4 + 4 * backward)
