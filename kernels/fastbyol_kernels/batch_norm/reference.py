"""The formula of ``batch_norm``, computed by torch.

Source: Ioffe & Szegedy, "Batch Normalization", arXiv:1502.03167, in torch's form.
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
    """Compute y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual).

    Per channel, mean and biased variance are taken over a view's samples and pixels. The running
    buffers are updated once per view, in order, by mean and unbiased variance:
    running <- (1 - momentum) * running + momentum * new. So the result has the same bits as
    ``num_views`` separate passes.
    """
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
