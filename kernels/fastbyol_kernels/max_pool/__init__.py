"""Max pooling 3x3, stride 2, padding 1, of torchvision's stem: torch's, or kernels of our own."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels.dispatch import dispatch, is_activation
from fastbyol_kernels.max_pool.triton import triton_max_pool


def max_pool(x: Tensor, *, kernels: str = "auto") -> Tensor:
    """Return the maxima of the 3x3 windows around every second pixel of ``x`` (N, C, H, W).

    The result is (N, C, (H + 1) // 2, (W + 1) // 2). Of equal values the first, row by row,
    receives the gradient. NaN is passed on. Differentiable once.

    ``kernels`` is one of ``dispatch.BACKENDS``. The kernels run on bf16 or fp32 x in channels-last
    memory; torch's max pooling runs on other inputs, and on a CPU also where operations do not run
    eagerly (``dispatch.at_once``). Raises ValueError for other words, for "cpu" if x is on a GPU,
    and for "triton" if it is not.
    """
    backend = dispatch(kernels, "x", x)
    if backend == "reference" or not is_activation(x):
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    if backend == "triton":
        pooled: Tensor = triton_max_pool(x)[0]
        return pooled
    # Imported here because it loads numba, which a GPU run does not need.
    from fastbyol_kernels.max_pool.cpu import CpuMaxPool

    y: Tensor = CpuMaxPool.apply(x)
    return y
