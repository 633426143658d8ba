"""Batch norm in training mode with statistics of each view alone, optional residual and ReLU.

    y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)

mean and biased variance over a view's samples and pixels, by channels. The running buffers take one update per view, in order,
by mean and unbiased variance: running <- (1 - momentum) * running + momentum * new.
Source: Ioffe & Szegedy, "Batch Normalization", arXiv:1502.03167, in torch's form; statistics per view as separate passes
through the network have them.

Letters: V views, N samples of all views, C channels, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels.dispatch import at_once


def reference(
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
) -> Tensor:
    """Compute the formula above by torch's batch norm: bit for bit what ``num_views`` separate passes give."""
    running = (running_mean, running_var)
    if at_once(x, weight, bias, *running) and _is_dense(x):
        y: Tensor = _OfViews.apply(x, weight, bias, *running, num_views, momentum, eps)
    else:
        chunks = x.chunk(num_views)
        y = torch.cat([F.batch_norm(chunk, *running, weight, bias, True, momentum, eps) for chunk in chunks])
    return add_and_relu(y, residual, relu)


def _is_dense(x: Tensor) -> bool:
    """Return whether ``x`` has elements and no gaps: torch's kernel rounds otherwise when it writes with other strides."""
    contiguous = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.numel() > 0 and contiguous


def add_and_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return relu(``y`` + ``residual``), either of the two optional. ``y`` is overwritten: nobody else may keep it."""
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y


class _OfViews(torch.autograd.Function):
    """torch's batch norm kernel on each chunk, written straight into its part of one output.

    Saves the copy of a ``torch.cat``, a quarter of the forward's time on a CPU (16 channels of 32x32, 256 samples: 2.6 instead
    of 3.4 ms on one core). Compiled code fuses the copy away, and so takes the plain expression, as does
    what does not run at once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor,
        num_views: int, momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        y = torch.empty_like(x)
        saved_mean, saved_invstd = weight.new_empty(2, num_views, weight.numel()).unbind()
        for v, (chunk, out) in enumerate(zip(x.chunk(num_views), y.chunk(num_views), strict=True)):
            torch.ops.aten.native_batch_norm.out(
                chunk, weight, bias, mean, var, True, momentum, eps,
                out=out, save_mean=saved_mean[v], save_invstd=saved_invstd[v],
            )  # fmt: skip
        ctx.eps = eps
        ctx.save_for_backward(x, weight, saved_mean, saved_invstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved_mean, saved_invstd = ctx.saved_tensors
        num_views = len(saved_mean)
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                grad, chunk, weight, None, None, saved_mean[v], saved_invstd[v], True, ctx.eps, [True] * 3
            )
            for v, (grad, chunk) in enumerate(zip(grads[0].chunk(num_views), x.chunk(num_views), strict=True))
        ]
        dx, dweight, dbias = zip(*parts, strict=True)
        return torch.cat(dx), torch.stack(dweight).sum(0), torch.stack(dbias).sum(0), *[None] * 5
