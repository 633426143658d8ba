"""Linear layers in fp32 on TF32 tensor cores, which have 10 of fp32's 23 bits of fraction.

Each value is split into two of TF32, and of the four products all but small times small are summed:
"3xTF32" in CUTLASS (examples 27 and 28), "tf32x3" in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol_kernels.dispatch import dispatch
from fastbyol_kernels.tf32x3.triton import triton_linear

__all__ = ["linear"]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kernels: str = "auto"
) -> Tensor:
    """Return x ``weight``^T + ``bias``, (N, O), from x (N, I), ``weight`` (O, I), ``bias`` (O,).

    Relative to the sum of the products' magnitudes it is as near as an fp32 sum, and the same bits
    each time. Differentiable once.

    ``kernels`` is one of ``dispatch.BACKENDS``: "triton" and, on a GPU, "auto" split fp32 values;
    others and other dtypes are torch's product. Raises ValueError for other words, for "triton" off
    a GPU, and for tensors of shapes or dtypes that do not fit together.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be (N, I) and weight (O, I), not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), not {tuple(bias.shape)}")
    operands = (x, weight) if bias is None else (x, weight, bias)
    fits = all(t.dtype == torch.float32 and t.numel() > 0 for t in operands)
    if not fits or dispatch(kernels, "x", *operands, has=("triton",)) == "reference":
        return F.linear(x, weight, bias)
    y: Tensor = triton_linear(
        x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    )
    return y
