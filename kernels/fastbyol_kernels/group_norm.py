"""Group norm over channels-last activations, statistics in at least fp32.

    y = (x - mean) / sqrt(var + eps) * weight + bias,   mean and biased variance over a group's channels and all pixels

One group is layer norm over (C, H, W). Source: Wu & He, "Group Normalization", arXiv:1803.08494; eps = 1e-5 (torch's default).

Letters: N samples, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5


def reference(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """The formula above through torch's group norm, which keeps channels-last on a CPU but not on every device."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = F.group_norm(wide, num_groups, weight, bias, eps).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else y


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """Normalise ``x`` (N, C, H, W) or (N, C) in ``num_groups`` groups of adjacent channels.

    ``weight`` and ``bias`` (C,) have the dtype of the statistics: fp64 for fp64 ``x``, else fp32. Returns x's shape and dtype,
    in channels-last memory format where x has four dimensions.
    """
    return reference(x, num_groups, weight, bias, eps)
