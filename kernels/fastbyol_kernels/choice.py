"""Which implementation of an operation runs: Triton's kernels, a processor's machine code, or plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

KERNELS = ("auto", "triton", "processor", "reference")
# Whether Triton's kernels take tensors on a CPU: where they are interpreted, which Triton decides when a kernel is defined, and
# while `ahead_of_time.recording` launches nothing.
TRITON_ON_CPU: bool = knobs.runtime.interpret


def choose_kernels(kernels: str, name: str, tensor: Tensor, *, triton: bool = True, processor: bool = False) -> str:
    """triton, processor or reference: what ``kernels`` means for an operation on ``tensor``, which is called ``name``.

    "auto" is Triton for CUDA tensors and else machine code where the operation has such (``processor``). Without it, for fp64
    and while torch.compile traces, "processor" is plain torch. ``triton``: whether the operation has Triton kernels; without
    them "triton" is no error anywhere. Raises ValueError for a word that is none of ``KERNELS``, and for kernels that cannot
    run where the tensor is.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")
    if kernels == "processor" and tensor.is_cuda:
        raise ValueError(f'kernels="processor" needs tensors on a CPU, {name} is on {tensor.device}')
    if kernels == "reference" or tensor.dtype == torch.float64:
        return "reference"
    if kernels == "triton" and triton and not tensor.is_cuda and not TRITON_ON_CPU:
        raise ValueError(f'kernels="triton" needs CUDA tensors, {name} is on {tensor.device} (or TRITON_INTERPRET=1 at import)')
    if kernels == "triton" or (kernels == "auto" and tensor.is_cuda):
        return "triton"
    return "processor" if processor and not torch.compiler.is_compiling() else "reference"
