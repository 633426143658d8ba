"""Max pooling 3x3, stride 2, padding 1, as behind the torchvision stem: torch's own, or one pass each way on a CPU.

Letters: N samples, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels.dispatch import dispatch


def max_pool(x: Tensor, *, kernels: str = "auto") -> Tensor:
    """Return the largest of each 3x3 window around every second pixel: (N, C, H, W) -> (N, C, (H + 1) // 2, (W + 1) // 2).

    Of equal values the first, row by row, takes the gradient; NaN is passed on. Differentiable once.

    ``kernels``: "cpu" is compiled code, for bf16 or fp32 x in channels-last on a CPU; all else, "reference" and what does not
    run at once (``dispatch.at_once``) is torch's own. "auto" is the first that can be. There are no Triton kernels: "triton" is
    torch's own. Raises ValueError for other words, and for "cpu" where x is on a GPU.
    """
    if dispatch(kernels, "x", x, has=("cpu",)) != "cpu" or not _is_compiled_for(x):
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    from fastbyol_kernels.max_pool.cpu import PlacedMaxPool  # numba: who has a GPU need not wait for it

    y: Tensor = PlacedMaxPool.apply(x)
    return y


def _is_compiled_for(x: Tensor) -> bool:
    return (
        x.ndim == 4
        and x.numel() > 0
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.is_contiguous(memory_format=torch.channels_last)
    )
