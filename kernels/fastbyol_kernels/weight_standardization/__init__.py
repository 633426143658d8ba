"""Weight standardization, of one weight in a layer's forward pass or of all rows of a network at once: see ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.weight_standardization import triton
from fastbyol_kernels.weight_standardization.reference import (
    EPS,
    RowTable,
    bytes_moved,
    reference,
    reference_rows,
    reference_rows_backward,
    row_table,
)

__all__ = [
    "EPS",
    "RowTable",
    "bytes_moved",
    "reference",
    "row_table",
    "standardize_rows",
    "standardize_rows_backward",
    "weight_standardization",
]


def weight_standardization(weight: Tensor, *, kernels: str = "auto") -> Tensor:
    """Standardize ``weight`` (O, ...) per output channel; same shape, dtype, device and memory format.

    Every channel needs at least two weights (the std is unbiased). Differentiable in ``weight``.

    ``kernels``: "auto" and "cpu" take compiled code for fp32 on a CPU, once differentiable, where it runs at once
    (``dispatch.at_once``); all else is plain torch, "triton" as well, whose kernels take a network at a time.
    """
    if dispatch(kernels, "weight", weight, has=("cpu",)) == "cpu":
        rows_lie_together = weight.is_contiguous() or (
            weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        )
        if weight.dtype == torch.float32 and rows_lie_together and weight.numel() > len(weight):
            from fastbyol_kernels.weight_standardization import cpu  # numba: who has a GPU need not wait for it

            standardized: Tensor = cpu.Weight.apply(weight)
            return standardized
    return reference(weight)


def standardize_rows(
    copy: Tensor, means: Tensor, stds: Tensor, flat: Tensor, table: RowTable, *, kernels: str = "auto"
) -> None:
    """Standardize all rows of ``table`` in the flat parameter ``flat``, in one launch, into buffers that stay where they are.

    Writes ``copy`` (table.copy_numel,), which keeps what it holds between the rows, and the rows' ``means`` and ``stds`` (R,).
    Not differentiable: ``standardize_rows_backward`` takes the gradient of ``copy`` back.

    ``kernels``: "triton" and "cpu" take an fp32 parameter and an fp32 or bf16 copy, "reference" (plain torch) any dtypes, and
    statistics in flat's; "auto" is whichever is for flat's device. Raises ValueError, naming the argument, for what does not
    fit.
    """
    match _choose(kernels, table, flat=flat, copy=copy, means=means, stds=stds):
        case "cpu":
            from fastbyol_kernels.weight_standardization import cpu

            cpu.standardize_rows(copy, means, stds, flat, table.rows)
        case "triton":
            triton.standardize_rows(copy, means, stds, flat, table.rows, table.num_long)
        case _:
            reference_rows(copy, means, stds, flat, table)


def standardize_rows_backward(
    out: Tensor, gradient: Tensor, flat: Tensor, means: Tensor, stds: Tensor, table: RowTable, *, kernels: str = "auto"
) -> None:
    """Write the rows' part of the gradient of ``flat`` into ``out``, from the ``gradient`` of the copy, in one launch.

    For an engine that keeps all gradients in one flat buffer: between the rows ``out`` keeps what it holds. All else is as in
    ``standardize_rows``.
    """
    match _choose(kernels, table, flat=flat, out=out, gradient=gradient, means=means, stds=stds):
        case "cpu":
            from fastbyol_kernels.weight_standardization import cpu

            cpu.standardize_rows_backward(out, gradient, flat, means, stds, table.rows)
        case "triton":
            triton.standardize_rows_backward(out, gradient, flat, means, stds, table.rows, table.num_long)
        case _:
            reference_rows_backward(out, gradient, flat, table)


def _choose(kernels: str, table: RowTable, *, flat: Tensor, **beside: Tensor) -> str:
    """Return the backend, after checking every tensor's size, dtype, device and layout."""
    backend = dispatch(kernels, "flat", flat, *beside.values(), table.rows)
    sizes = dict.fromkeys(("flat", "out"), table.flat_numel) | dict.fromkeys(("copy", "gradient"), table.copy_numel)
    device = table.rows.device
    for name, tensor in {"flat": flat, **beside}.items():
        size = sizes.get(name, len(table.rows))
        if tensor.shape != (size,) or tensor.device != device or not tensor.is_contiguous():
            found = f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            raise ValueError(f"{name} must be ({size},), contiguous, on {device} as table is, not {found}")
        dtypes = {flat.dtype} if backend == "reference" else {torch.float32}
        if name in ("copy", "gradient"):
            dtypes = {tensor.dtype} if backend == "reference" else {torch.float32, torch.bfloat16}
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(sorted(map(str, dtypes)))} for {backend}, not {tensor.dtype}")
    return backend
