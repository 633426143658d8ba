"""Max pooling 3x3, stride 2, padding 1, of torchvision's stem: torch's, or compiled on a CPU."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels.dispatch import dispatch, is_activation


def max_pool(x: Tensor, *, kernels: str = "auto") -> Tensor:
    """Return the maxima of the 3x3 windows around every second pixel of ``x`` (N, C, H, W).

    The result is (N, C, (H + 1) // 2, (W + 1) // 2). Of equal values the first, row by row,
    receives the gradient. NaN is passed on. Differentiable once.

    ``kernels``: "auto" and "cpu" run compiled code on bf16 or fp32 x in channels-last memory on a
    CPU. Other inputs, operations that do not run eagerly (``dispatch.at_once``), "reference" and
    "triton" (there are no Triton kernels) run torch's max pooling. Raises ValueError for other
    words, and for "cpu" if x is on a GPU.
    """
    if dispatch(kernels, "x", x, has=("cpu",)) != "cpu" or not is_activation(x):
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    # Imported here because it loads numba, which a GPU run does not need.
    from fastbyol_kernels.max_pool.cpu import CpuMaxPool

    y: Tensor = CpuMaxPool.apply(x)
    return y
