"""Weight standardization in plain torch, and the table of a network's rows.

Source: Qiao et al., "Weight Standardization", arXiv:1903.10520, in the form of the authors' code
and the post's: eps = 1e-5 is added to the std, outside the square root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

EPS = 1e-5
# A row with more elements than this is worth a Triton program of its own.
SHORT = 256


def reference(weight: Tensor) -> Tensor:
    """Return (w - mean(w)) / (std(w) + eps), with mean and unbiased std per output channel.

    A channel of equal weights becomes zeros, with a finite gradient.
    """
    dims = tuple(range(1, weight.ndim))
    centred = weight - weight.mean(dims, keepdim=True)
    # A norm rather than a std: on a CPU it is vectorised (3x3 over 128 channels: 53 instead of 722
    # us), and its gradient at zero is zero, where that of sqrt(var) would be infinity times zero.
    std = (
        torch.linalg.vector_norm(centred, dim=dims, keepdim=True) * (weight[0].numel() - 1) ** -0.5
    )
    standardized: Tensor = centred / (std + EPS)
    return standardized


@dataclass(frozen=True)
class RowTable:
    """The rows (output channels) of many weights, in a flat parameter and in a flat copy.

    ``rows`` (R, 3) int64 are offset in the parameter, length, and offset in the copy. Each of the
    first ``num_long`` rows gets a Triton program. ``weights``, in the same order, are offset,
    number of rows, length of a row, and offset in the copy.
    """

    rows: Tensor
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
    """Return the table of weights (O, ...) at ``offsets`` that are copied to ``copy_offsets``.

    Rows must be contiguous, in any inner order, such as (O, kh, kw, I) for convolutions. Raises
    ValueError for rows of fewer than two elements and for weights that overlap or exceed a buffer.
    """
    if not len(offsets) == len(shapes) == len(copy_offsets):
        raise ValueError(
            f"{len(offsets)} offsets, {len(shapes)} shapes and {len(copy_offsets)} copy_offsets"
        )
    weights = [
        (at, shape[0], prod(shape[1:]), to)
        for at, shape, to in zip(offsets, shapes, copy_offsets, strict=True)
    ]
    for shape, (_, _, length, _) in zip(shapes, weights, strict=True):
        if length < 2:
            raise ValueError(
                f"shapes: {tuple(shape)} has rows of {length}, whose standard deviation needs two "
                "or more"
            )
    _check_spans(
        [(offset, num * length) for offset, num, length, _ in weights],
        flat_numel,
        "offsets",
        "flat_numel",
    )
    _check_spans(
        [(offset, num * length) for _, num, length, offset in weights],
        copy_numel,
        "copy_offsets",
        "copy_numel",
    )
    # The longest rows start first.
    weights.sort(key=lambda weight: (not _is_long(*weight), -weight[2]))
    rows = [
        (at + i * length, length, to + i * length)
        for at, num, length, to in weights
        for i in range(num)
    ]
    return RowTable(
        rows=torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3),
        weights=tuple(weights),
        num_long=sum(weight[1] for weight in weights if _is_long(*weight)),
        flat_numel=flat_numel,
        copy_numel=copy_numel,
    )


def _is_long(offset: int, num_rows: int, length: int, copy_offset: int) -> bool:
    """Return True if a weight's rows are long, and aligned to 16 bytes in fp32 and in bf16."""
    return length > SHORT and not (offset % 8 or length % 8 or copy_offset % 8)


def _check_spans(spans: list[tuple[int, int]], numel: int, offsets: str, size: str) -> None:
    end = 0
    for offset, length in sorted(spans):
        if offset < end:
            raise ValueError(f"{offsets}: two weights overlap at {offset}")
        end = offset + length
    if end > numel:
        raise ValueError(f"{size} is {numel}, but {offsets} and shapes reach {end}")


@torch.no_grad()
def reference_rows(
    copy: Tensor, means: Tensor, stds: Tensor, flat: Tensor, table: RowTable
) -> None:
    """Compute ``standardize_rows`` in plain torch, weight by weight."""
    first = 0
    for offset, num_rows, length, copy_offset in table.weights:
        rows = flat.narrow(0, offset, num_rows * length).view(num_rows, length)
        copy.narrow(0, copy_offset, rows.numel()).copy_(reference(rows).flatten())
        own = slice(first, first + num_rows)
        stds[own], means[own] = torch.std_mean(rows, 1)
        first += num_rows


def reference_rows_backward(out: Tensor, gradient: Tensor, flat: Tensor, table: RowTable) -> None:
    """Compute ``standardize_rows_backward`` in plain torch, weight by weight."""
    for offset, num_rows, length, copy_offset in table.weights:
        rows = (
            flat.detach()
            .narrow(0, offset, num_rows * length)
            .view(num_rows, length)
            .requires_grad_()
        )
        with torch.enable_grad():
            copy = reference(rows).to(gradient.dtype).flatten()
        (own,) = torch.autograd.grad(copy, rows, gradient.narrow(0, copy_offset, len(copy)))
        out.narrow(0, offset, len(copy)).copy_(own.flatten())


def bytes_moved(table: RowTable, copy_bytes: int, *, backward: bool = False) -> int:
    """Return the bytes that one pass moves if every element crosses the memory bus once.

    Forward reads the fp32 weights and writes the copy of ``copy_bytes`` per element. Backward reads
    the copy's gradient and the weights and writes the fp32 gradient. The statistics, 8 bytes a row,
    are not counted.
    """
    return sum(num_rows * length for _, num_rows, length, _ in table.weights) * (
        copy_bytes + 4 + 4 * backward
    )
