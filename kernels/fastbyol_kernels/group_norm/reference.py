"""The formula of ``group_norm``, computed by torch.

Source: Wu & He, "Group Normalization", arXiv:1803.08494; eps = 1e-5 is torch's default.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels.dispatch import is_transformed

EPS = 1e-5


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = EPS,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Compute y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual).

    Mean and biased variance are taken over a group's channels and all pixels, in at least fp32. One
    group is layer norm over (C, H, W).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    y = F.group_norm(wide, num_groups, weight, bias, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    y = y.to(x.dtype)
    if x.ndim != 4 or is_transformed():  # torch.func.vmap does not support memory formats
        return y
    # On some devices torch's group norm does not keep the memory format.
    return y.contiguous(memory_format=torch.channels_last)
