"""The formula of ``batch_norm``, computed by torch.

Source: Ioffe & Szegedy, "Batch Normalization", arXiv:1502.03167, in torch's form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Stacks a tensor of every rank, in their order: (*shape) -> (R, *shape), the same on all.
Gather = Callable[[Tensor], Tensor]


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
    gather: Gather | None = None,
) -> Tensor:
    """Compute y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual).

    Per channel, mean and biased variance are taken over a view's samples and pixels. The running
    buffers are updated once per view, in order, by mean and unbiased variance:
    running <- (1 - momentum) * running + momentum * new. So the result has the same bits as
    ``num_views`` separate passes. With ``gather`` a view's samples are those of all ranks.
    """
    if gather is not None:
        mean, var, count = moments(x, num_views, gather)
        with torch.no_grad():
            for view in range(num_views):
                unbiased = var[view] * (count[view] / (count[view] - 1))
                running_mean.lerp_(mean[view], momentum)
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        scale = (var + eps).rsqrt() * weight
        y = (
            (x.unflatten(0, (num_views, -1)) - _over(mean, x)) * _over(scale, x)
            + _over(bias[None], x)
        ).flatten(0, 1)
        return add_and_relu(_in_memory_of(x, y.to(x.dtype)), residual, relu)
    running = (running_mean, running_var)
    y = torch.cat(
        [
            F.batch_norm(chunk, *running, weight, bias, True, momentum, eps)
            for chunk in x.chunk(num_views)
        ]
    )
    return add_and_relu(y, residual, relu)


def add_and_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return relu(``y`` + ``residual``), where residual and ReLU are optional. Overwrites ``y``."""
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y


class _Moments(torch.autograd.Function):
    """Mean, biased variance and count over all ranks; see ``moments``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_views: int, gather: Gather
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_view = x.unflatten(0, (num_views, -1))
        dims = [1, *range(3, by_view.ndim)]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean = by_view.mean(dims, dtype=dtype)
        # Of deviations, not of squares: a collapsed layer's variance is far below its mean squared.
        m2 = (by_view - _over(mean, x)).square().sum(dims)
        count = mean.new_full((num_views, 1), x.numel() // (num_views * x.shape[1]))
        every = merge_moments(gather(torch.cat((count, mean, m2), dim=1).double()))
        count, mean, m2 = every[:, :1], every[:, 1 : 1 + x.shape[1]], every[:, 1 + x.shape[1] :]
        ctx.gather = gather
        ctx.save_for_backward(x, mean, count)
        ctx.mark_non_differentiable(count)
        return mean.to(dtype), (m2 / count).to(dtype), count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, count = ctx.saved_tensors
        # The variance depends on the mean, too, but at a mean's own place not to first order.
        of_mean, of_var = ctx.gather(torch.stack(grads[:2]).double()).sum(0).unbind()
        dtype = grads[0].dtype
        by_view, of_mean, of_var = (
            x.unflatten(0, (len(count), -1)),
            of_mean / count,
            2 * of_var / count,
        )
        dx = (by_view - _over(mean.to(dtype), x)) * _over(of_var.to(dtype), x)
        return (dx + _over(of_mean.to(dtype), x)).flatten(0, 1).to(x.dtype), None, None


def moments(x: Tensor, num_views: int, gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance (V, C) and count (V, 1) of each view over all ranks.

    ``x`` (N, C) or (N, C, H, W) is this rank's. One message forward and one backward, both views in
    it. Differentiable once: each rank's gradient is that of the sum of all ranks' results.
    """
    mean, var, count = _Moments.apply(x, num_views, gather)
    return mean, var, count


def merge_moments(every: Tensor) -> Tensor:
    """Merge counts, means and sums of squared deviations (R, V, 1 + 2 C) fp64 of R ranks.

    Returns (V, 1 + 2 C) of all values together. Source: Chan, Golub & LeVeque, 1979, summed over
    the ranks at once.
    """
    counts, means, m2 = every.split((1, every.shape[-1] // 2, every.shape[-1] // 2), dim=-1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    m2 = m2.sum(0) + (counts * (means - mean).square()).sum(0)
    return torch.cat((count, mean, m2), dim=-1)


def _over(statistics: Tensor, x: Tensor) -> Tensor:
    """Lay ``statistics`` (V, C) over x's samples and pixels: (V, 1, C) or (V, 1, C, 1, 1)."""
    return statistics.view(len(statistics), 1, -1, *[1] * (x.ndim - 2))


def _in_memory_of(x: Tensor, y: Tensor) -> Tensor:
    """Return ``y`` in x's memory format."""
    return y if x.ndim != 4 else y.contiguous(memory_format=torch.channels_last)
