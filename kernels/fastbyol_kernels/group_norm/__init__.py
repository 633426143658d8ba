"""Group norm with optional residual and ReLU in one operation; ``reference`` has the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.group_norm import triton
from fastbyol_kernels.group_norm.reference import EPS, reference

__all__ = ["EPS", "bytes_moved", "group_norm", "reference", "sum_samples", "sum_table"]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = EPS,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """Return relu(group norm of ``x`` + ``residual``), where residual and ReLU are optional.

    Groups are ``num_groups`` runs of adjacent channels. ``x`` is (N, C, H, W) or (N, C),
    ``residual`` has its shape and dtype. ``weight`` and ``bias`` (C,) have the dtype of the
    statistics: fp64 for fp64 ``x``, else fp32. Returns x's shape and dtype, in channels-last memory
    if x has four dimensions. Differentiable once in all four tensors.

    With "triton" ``weight`` and ``bias`` may be (N, C), one row expanded: their gradients are then
    those of each sample, (N, C) too, and ``sum_samples`` adds up those of many layers at once.

    ``kernels`` is one of ``dispatch.BACKENDS``. Triton and CPU kernels need bf16 or fp32 x in
    channels-last memory. The reference runs all (N, C) inputs, and with "auto" on a CPU all inputs
    that the kernels do not support. Raises ValueError, naming the argument, for a tensor that does
    not fit.
    """
    backend = dispatch(kernels, "x", x, weight, bias, residual)
    _check(x, num_groups, weight, bias, residual, by_sample=backend == "triton" and x.ndim == 4)
    misfit = None if backend == "reference" or x.ndim == 2 else _misfit(x, weight, bias, residual)
    if misfit and (backend, kernels) != ("cpu", "auto"):
        raise ValueError(misfit)
    if backend == "reference" or x.ndim == 2 or misfit or x.numel() == 0:
        return reference(x, num_groups, weight, bias, eps, residual=residual, relu=relu)
    if backend == "triton":
        y: Tensor = triton.group_norm(x, weight, bias, residual, num_groups, eps, relu)[0]
    else:
        # Imported here because it loads numba, which a GPU run does not need.
        from fastbyol_kernels.group_norm.cpu import CpuGroupNorm

        y = CpuGroupNorm.apply(x, weight, bias, residual, num_groups, eps, relu)
    return y


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    *,
    by_sample: bool,
) -> None:
    if x.ndim not in (2, 4):
        raise ValueError(f"x must be (N, C, H, W) or (N, C), not of {x.ndim} dimensions")
    if not x.is_floating_point():
        raise ValueError(f"x must be of floating point numbers, not {x.dtype}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups is {num_groups}, which does not divide x's {channels} channels"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        expanded = tensor.shape == (len(x), channels) and tensor.stride(0) == 0
        if tensor.shape != (channels,) and not (by_sample and expanded):
            raise ValueError(f"{name} must be ({channels},), not {tuple(tensor.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be as x, {tuple(x.shape)} {x.dtype}, not {tuple(residual.shape)} "
            f"{residual.dtype}"
        )


def _misfit(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> str | None:
    """Return why the kernels do not support these tensors, or None if they do."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        return f"x must be bfloat16 or float32 for the kernels, not {x.dtype}"
    named = {"x": x, "weight": weight, "bias": bias} | (
        {} if residual is None else {"residual": residual}
    )
    for name, tensor in named.items():
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
        if name in ("weight", "bias") and tensor.dtype != torch.float32:
            return f"{name} must be float32 for the kernels, not {tensor.dtype}"
        row = tensor[0] if tensor.ndim == 2 else tensor
        if not row.is_contiguous(
            memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        ):
            return (
                f"{name} must be {'channels-last' if tensor.ndim == 4 else 'contiguous'}: "
                f"strides {tensor.stride()}"
            )
    return None


def sum_table(offsets: Sequence[int], numels: Sequence[int], device: torch.device) -> Tensor:
    """Return the table of ``sum_samples`` for parts of ``numels`` columns, which go to ``offsets``.

    It is (P, 4) int32, with a row for each program.
    """
    rows = [
        (part, first, numel, offset)
        for part, (offset, numel) in enumerate(zip(offsets, numels, strict=True))
        for first in range(0, numel, triton.SUM_COLUMNS)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 4)


def sum_samples(parts: Sequence[Tensor], out: Tensor, table: Tensor) -> None:
    """Sum each of ``parts``, (N, C) fp32 with adjacent columns, over N to its columns of ``out``.

    ``out`` (L,) is not changed between them. One launch in Triton, in a fixed order; ``table`` is
    the ``sum_table`` of the parts.
    """
    triton.sum_samples(parts, out, table)


def bytes_moved(
    shape: tuple[int, int, int, int],
    element_bytes: int,
    *,
    residual: bool = False,
    relu: bool = False,
    backward: bool = False,
) -> int:
    """Return the bytes that one pass moves if every element crosses the memory bus once.

    Forward reads x and the residual and writes y. Backward reads dy and x and writes dx. If a
    residual was added before a ReLU, it also reads y and writes the residual's gradient; without
    the ReLU that gradient is dy itself. The statistics are not counted.
    """
    n, c, h, w = shape
    tensors = (3 + 2 * (residual and relu)) if backward else (2 + residual)
    return n * c * h * w * element_bytes * tensors
