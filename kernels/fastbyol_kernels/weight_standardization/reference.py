"""Weight standardization in plain torch, and the table of a network's rows.

Source: Qiao et al., "Weight Standardization", arXiv:1903.10520, in the form of the authors' code
and the post's: eps = 1e-5 is added to the std, outside the square root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

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


class Moved(NamedTuple):
    """The rearranged rows of one weight in the copy, with gaps that are never written.

    Column c is at ``places[c]``, int32 (length,), of a row of ``pitch`` elements. ``weight`` is the
    weight's index.
    """

    weight: int
    places: Tensor
    pitch: int


@dataclass(frozen=True)
class RowTable:
    """The rows (output channels) of many weights, in a flat parameter and in a flat copy.

    ``rows`` (R, 3) int64 are offset in the parameter, length, and offset in the copy. Each of the
    first ``num_long`` rows gets a Triton program. ``weights``, in the same order, are offset,
    number of rows, length of a row, and offset in the copy. ``places`` are those of the rows from
    ``moved.start`` to ``moved.stop`` (``Moved``), None if there are none.
    """

    rows: Tensor
    weights: tuple[tuple[int, int, int, int], ...]
    num_long: int
    flat_numel: int
    copy_numel: int
    places: Tensor | None
    moved: range


def row_table(
    offsets: Sequence[int],
    shapes: Sequence[Sequence[int]],
    copy_offsets: Sequence[int],
    *,
    flat_numel: int,
    copy_numel: int,
    moved: Moved | None = None,
    device: torch.device | str = "cpu",
) -> RowTable:
    """Return the table of weights (O, ...) at ``offsets`` that are copied to ``copy_offsets``.

    Rows must be contiguous, in any inner order, such as (O, kh, kw, I) for convolutions; in the
    copy those of one short weight may be ``moved``. Raises ValueError for rows of fewer than two
    elements and for weights that overlap or exceed a buffer.
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
    pitches = {weight: weight[2] for weight in weights}
    if moved is not None:
        pitches[weights[moved.weight]] = moved.pitch
    _check_spans(
        [(weight[3], weight[1] * pitch) for weight, pitch in pitches.items()],
        copy_numel,
        "copy_offsets",
        "copy_numel",
    )
    which = None if moved is None else weights[moved.weight]
    # The longest rows start first.
    weights.sort(key=lambda weight: (not _is_long(*weight), -weight[2]))
    rows, rows_moved = list[tuple[int, int, int]](), range(0)
    for weight in weights:
        at, num, length, to = weight
        if weight == which:
            rows_moved = range(len(rows), len(rows) + num)
        rows += [(at + i * length, length, to + i * pitches[weight]) for i in range(num)]
    num_long = sum(weight[1] for weight in weights if _is_long(*weight))
    if rows_moved and rows_moved.start < num_long:
        raise ValueError(f"moved: only rows of up to {SHORT} elements can be, not {which}")
    return RowTable(
        rows=torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3),
        weights=tuple(weights),
        num_long=num_long,
        flat_numel=flat_numel,
        copy_numel=copy_numel,
        places=None if moved is None else moved.places.to(device, torch.int32),
        moved=rows_moved,
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
    for own, source, target in _indices(table):
        rows = flat[source]
        copy[target] = reference(rows).to(copy.dtype)
        stds[own], means[own] = torch.std_mean(rows, 1)


def reference_rows_backward(out: Tensor, gradient: Tensor, flat: Tensor, table: RowTable) -> None:
    """Compute ``standardize_rows_backward`` in plain torch, weight by weight."""
    for _, source, target in _indices(table):
        rows = flat.detach()[source].requires_grad_()
        with torch.enable_grad():
            copy = reference(rows).to(gradient.dtype)
        (out[source],) = torch.autograd.grad(copy, rows, gradient[target])


def _indices(table: RowTable) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each weight's rows, and the indices (rows, length) of its elements in both buffers."""
    first = 0
    for _, num_rows, length, _ in table.weights:
        own = slice(first, first + num_rows)
        columns = torch.arange(length, device=table.rows.device)
        places = columns if table.places is None or first not in table.moved else table.places
        yield own, table.rows[own, :1] + columns, table.rows[own, 2:] + places
        first += num_rows


def bytes_moved(table: RowTable, copy_bytes: int, *, backward: bool = False) -> int:
    """Return the bytes that one pass moves if every element crosses the memory bus once.

    Forward reads the fp32 weights and writes the copy of ``copy_bytes`` per element. Backward reads
    the copy's gradient and the weights and writes the fp32 gradient. The statistics, 8 bytes a row,
    are not counted.
    """
    return sum(num_rows * length for _, num_rows, length, _ in table.weights) * (
        copy_bytes + 4 + 4 * backward
    )
