"""Batch norm in training mode with statistics per view: torch's, or fused passes of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbyol_kernels.batch_norm.reference import (
    Gather,
    add_and_relu,
    merge_moments,
    moments,
    reference,
)
from fastbyol_kernels.batch_norm.triton import TritonBatchNorm
from fastbyol_kernels.dispatch import dispatch, is_activation
from fastbyol_kernels.max_pool import max_pool

__all__ = ["Gather", "add_and_relu", "batch_norm", "merge_moments", "moments", "reference"]


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_views: int,
    *,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    pool: bool = False,
    num_batches_tracked: Tensor | None = None,
    kernels: str = "auto",
    gather: Gather | None = None,
) -> Tensor:
    """Return relu(batch norm of ``x`` + ``residual``), where residual and ReLU are optional.

    ``x`` is (N, C, H, W) or (N, C). Each of its ``num_views`` equal consecutive chunks is
    normalised by its own statistics, and each updates the running buffers (C,) in place.
    ``residual`` has x's shape and dtype. ``weight``, ``bias`` (C,) and the running buffers have the
    dtype of the statistics: fp64 for fp64 ``x``, else fp32. ``num_batches_tracked``, 0-d int64,
    grows by ``num_views``. Returns x's shape, dtype and memory format, or ``max_pool`` of that with
    ``pool``, which excludes a residual. Differentiable once in x, weight, bias and residual.

    ``gather`` stacks a tensor of every rank that has a part of the batch, in their order and the
    same on all; the statistics are then those of the whole batch, in the running buffers, too. It
    is called once forward and once backward. Gradients of weight and bias stay a rank's own.

    ``kernels`` is one of ``dispatch.BACKENDS``. The kernels run on bf16 or fp32 x (N, C, H, W) in
    channels-last memory, Triton's also on contiguous (N, C). torch's batch norm runs on other
    inputs, and on a CPU also where operations do not run eagerly (``dispatch.at_once``). Raises
    ValueError, naming the argument, for a wrong shape or dtype.
    """
    _check(x, weight, bias, running_mean, running_var, num_views, residual, pool, gather)
    affine = (weight, bias, running_mean, running_var)
    backend = dispatch(kernels, "x", x, *affine, residual)
    if backend != "reference" and not _has_kernels(x, affine, flat=backend == "triton"):
        backend = "reference"
    if backend != "reference" and residual is not None:
        residual = residual.contiguous(
            memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format
        )
    y: Tensor
    if backend == "triton":
        y = TritonBatchNorm.apply(
            x, *affine, num_batches_tracked, num_views, momentum, eps, residual, relu, pool, gather
        )
        return y
    if num_batches_tracked is not None:
        num_batches_tracked.add_(num_views)
    if backend == "cpu":
        # Imported here because it loads numba, which a GPU run does not need.
        from fastbyol_kernels.batch_norm.cpu import FusedBatchNorm

        y = FusedBatchNorm.apply(x, *affine, num_views, momentum, eps, residual, relu, gather)
    else:
        y = reference(
            x, *affine, num_views, momentum=momentum, eps=eps, residual=residual, relu=relu,
            gather=gather,
        )  # fmt: skip
    return max_pool(y, kernels=kernels) if pool else y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_views: int,
    residual: Tensor | None,
    pool: bool,
    gather: Gather | None,
) -> None:
    if x.ndim not in (2, 4):
        raise ValueError(f"x must be (N, C, H, W) or (N, C), not of {x.ndim} dimensions")
    if num_views < 1 or len(x) % num_views:
        raise ValueError(
            f"a batch of {len(x)} cannot be split into {num_views} views of equal size"
        )
    # As in torch: the unbiased variance would divide by zero. Other ranks may have more values.
    if gather is None and x.numel() == num_views * x.shape[1] > 0:
        raise ValueError(
            f"x has one value per channel and view, {tuple(x.shape)} for {num_views} views: two "
            "or more have a variance"
        )
    named = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, tensor in named.items():
        if tensor.shape != (x.shape[1],):
            raise ValueError(f"{name} must be ({x.shape[1]},), not {tuple(tensor.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be as x, {tuple(x.shape)} {x.dtype}, not {tuple(residual.shape)} "
            f"{residual.dtype}"
        )
    if pool and (x.ndim != 4 or residual is not None):
        raise ValueError("pool needs x (N, C, H, W) and no residual")


def _has_kernels(x: Tensor, affine: tuple[Tensor, ...], *, flat: bool = False) -> bool:
    """Tell whether kernels run on these; ``flat`` says that they also run on x (N, C)."""
    fits = is_activation(x if x.ndim == 4 or not flat else x[:, :, None, None])
    # Triton's offsets into a view have 32 bits.
    fits = fits and x.numel() < 1 << 31
    return fits and all(t.dtype == torch.float32 and t.is_contiguous() for t in affine)
