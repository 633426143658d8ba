"""Weight standardization of one weight in its layer, or of all weights of a network at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.weight_standardization import triton
from fastbyol_kernels.weight_standardization.reference import (
    EPS,
    Moved,
    RowTable,
    bytes_moved,
    reference,
    reference_rows,
    reference_rows_backward,
    row_table,
)

__all__ = [
    "EPS",
    "Moved",
    "RowTable",
    "bytes_moved",
    "reference",
    "row_table",
    "standardize_rows",
    "standardize_rows_backward",
    "weight_standardization",
]


def weight_standardization(weight: Tensor, *, kernels: str = "auto") -> Tensor:
    """Standardize ``weight`` (O, ...) per output channel; keep its dtype, device and memory format.

    Every channel needs at least two weights (the std is unbiased). Differentiable in ``weight``.

    ``kernels``: "auto" and "cpu" run compiled code, once differentiable, on fp32 weights on a CPU.
    Other weights, operations that do not run eagerly (``dispatch.at_once``), "reference" and
    "triton" (whose kernels standardize a whole network) run in plain torch.
    """
    if dispatch(kernels, "weight", weight, has=("cpu",)) == "cpu":
        channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        has_dense_rows = weight.is_contiguous() or channels_last
        if weight.dtype == torch.float32 and has_dense_rows and weight.numel() > len(weight):
            # Imported here because it loads numba, which a GPU run does not need.
            from fastbyol_kernels.weight_standardization import cpu

            standardized: Tensor = cpu.Weight.apply(weight)
            return standardized
    return reference(weight)


def standardize_rows(
    copy: Tensor,
    means: Tensor,
    stds: Tensor,
    flat: Tensor,
    table: RowTable,
    *,
    kernels: str = "auto",
) -> None:
    """Standardize all rows of ``table`` in the flat parameter ``flat`` in one launch.

    Writes the rows to ``copy`` (table.copy_numel,), which is not changed between the rows, and
    their ``means`` and ``stds`` (R,), in flat's dtype. Not differentiable:
    ``standardize_rows_backward`` takes the gradient of ``copy`` to ``flat``.

    ``kernels``: "triton" and "cpu" need an fp32 ``flat`` and an fp32 or bf16 ``copy``, "reference"
    (plain torch) accepts any dtypes, "auto" follows flat's device. "cpu" moves no rows. Raises
    ValueError, naming the argument, for a tensor that does not fit.
    """
    match _choose(kernels, table, flat=flat, copy=copy, means=means, stds=stds):
        case "cpu":
            from fastbyol_kernels.weight_standardization import cpu

            cpu.standardize_rows(copy, means, stds, flat, table.rows)
        case "triton":
            triton.standardize_rows(copy, means, stds, flat, *triton.arguments(table))
        case _:
            reference_rows(copy, means, stds, flat, table)


def standardize_rows_backward(
    out: Tensor,
    gradient: Tensor,
    flat: Tensor,
    means: Tensor,
    stds: Tensor,
    table: RowTable,
    *,
    kernels: str = "auto",
) -> None:
    """Write the gradient of ``flat`` to ``out``, from the ``gradient`` of the copy, in one launch.

    ``out`` is not changed between the rows, so it may be the gradient of all parameters. ``means``
    and ``stds`` are those of ``standardize_rows``, as are ``kernels`` and errors.
    """
    match _choose(kernels, table, flat=flat, out=out, gradient=gradient, means=means, stds=stds):
        case "cpu":
            from fastbyol_kernels.weight_standardization import cpu

            cpu.standardize_rows_backward(out, gradient, flat, means, stds, table.rows)
        case "triton":
            triton.standardize_rows_backward(
                out, gradient, flat, means, stds, *triton.arguments(table)
            )
        case _:
            reference_rows_backward(out, gradient, flat, table)


def _choose(kernels: str, table: RowTable, *, flat: Tensor, **beside: Tensor) -> str:
    """Return the backend, after checking every tensor's size, dtype, device and layout."""
    backend = dispatch(kernels, "flat", flat, *beside.values(), table.rows)
    sizes = {
        "flat": table.flat_numel,
        "out": table.flat_numel,
        "copy": table.copy_numel,
        "gradient": table.copy_numel,
    }
    if backend == "cpu" and table.moved:
        raise ValueError("table has moved rows, which the kernels for a cpu do not write")
    device = table.rows.device
    for name, tensor in {"flat": flat, **beside}.items():
        size = sizes.get(name, len(table.rows))
        if tensor.shape != (size,) or tensor.device != device or not tensor.is_contiguous():
            layout = f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            raise ValueError(
                f"{name} must be ({size},), contiguous, on {device} as table is, not {layout}"
            )
        dtypes = [flat.dtype if backend == "reference" else torch.float32]
        if name in ("copy", "gradient"):
            dtypes = [tensor.dtype] if backend == "reference" else [torch.float32, torch.bfloat16]
        if tensor.dtype not in dtypes:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, dtypes))} for {backend}, not {tensor.dtype}"
            )
    return backend
