"""Batch norm in training mode with statistics of each view alone, optional residual and ReLU.

    y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)

mean and biased variance over a view's samples and pixels, by channels. The running buffers take one update per view, in order,
by mean and unbiased variance: running <- (1 - momentum) * running + momentum * new.
Source: Ioffe & Szegedy, "Batch Normalization", arXiv:1502.03167, in torch's form; statistics per view as separate passes
through the network have them.

Letters: V views, N samples of all views, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
    y = torch.cat([F.batch_norm(chunk, *running, weight, bias, True, momentum, eps) for chunk in x.chunk(num_views)])
    return add_and_relu(y, residual, relu)


def add_and_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return relu(``y`` + ``residual``), either of the two optional. ``y`` is overwritten: nobody else may keep it."""
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y
