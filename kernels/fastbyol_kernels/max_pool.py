"""Max pooling 3x3, stride 2, padding 1, as behind the torchvision stem.

Letters: N samples, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels.dispatch import dispatch

DTYPES = (torch.bfloat16, torch.float32)  # of the machine code
# Channels that it takes at a time: numbers of a vector of 512 bits in fp32, which narrower processors take in parts.
TILE = 16


def reference(x: Tensor) -> Tensor:
    """torch's own."""
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def max_pool(x: Tensor, *, kernels: str = "auto") -> Tensor:
    """The largest of each 3x3 window around every second pixel, (N, C, H, W) -> (N, C, (H + 1) // 2, (W + 1) // 2), as torch's.

    Of equal values the first, row by row, takes the gradient; NaN is passed on. Differentiable once.

    ``kernels``: "cpu" is machine code, for bf16 or fp32 x in channels-last on a CPU, of 16 channels or more; all else,
    "reference" and what does not run at once (``dispatch.at_once``) is torch's own. "auto" is the first that can be. There
    are no Triton kernels: "triton" is the reference. Raises ValueError for other words, and for "cpu" where x is on a GPU.
    """
    chosen = dispatch(kernels, "x", x, has=("cpu",))
    if chosen != "cpu" or not _suits(x):
        return reference(x)
    from fastbyol_kernels.max_pool_processor import PlacedMaxPool  # numba: who has a GPU need not wait for it

    y: Tensor = PlacedMaxPool.apply(x)
    return y


def _suits(x: Tensor) -> bool:
    """Whether the machine code knows this."""
    return (
        x.ndim == 4
        and x.numel() > 0
        and x.dtype in DTYPES
        and x.shape[1] >= TILE
        and x.is_contiguous(memory_format=torch.channels_last)
    )
