"""Which implementation of an operation runs: Triton's kernels, a processor's machine code, or plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

KERNELS = ("auto", "triton", "processor", "reference")
# Whether Triton's kernels take tensors on a CPU: where they are interpreted, which Triton decides when a kernel is defined, and
# while `ahead_of_time.recording` launches nothing.
TRITON_ON_CPU: bool = knobs.runtime.interpret


def choose_kernels(
    kernels: str, name: str, tensor: Tensor, *beside: Tensor | None, triton: bool = True, processor: bool = False
) -> str:
    """triton, processor or reference: what ``kernels`` means for an operation on ``tensor``, which is called ``name``.

    "auto" is Triton for CUDA tensors and else machine code where the operation has such (``processor``). Without it, for fp64,
    on other devices and where ``at_once`` says no of ``tensor`` and what it takes ``beside``, "processor" is plain torch; under
    torch.func's transforms, which know no kernels, all of them are. ``triton``: whether the operation has Triton kernels;
    without them "triton" is no error anywhere. Raises ValueError for a word that is none of ``KERNELS``, and for kernels that
    cannot run where the tensor is.
    """
    check_kernels(kernels)
    if kernels == "processor" and tensor.is_cuda:
        raise ValueError(f'kernels="processor" needs tensors on a CPU, {name} is on {tensor.device}')
    if kernels == "reference" or tensor.dtype == torch.float64:
        return "reference"
    if kernels == "triton" and triton and not tensor.is_cuda and not TRITON_ON_CPU:
        raise ValueError(f'kernels="triton" needs CUDA tensors, {name} is on {tensor.device} (or TRITON_INTERPRET=1 at import)')
    if kernels == "triton" or (kernels == "auto" and tensor.is_cuda):
        return "reference" if is_transformed() else "triton"
    return "processor" if processor and at_once(tensor, *beside) else "reference"


def check_kernels(kernels: str) -> None:
    """Raise ValueError for a word that is none of ``KERNELS``."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")


def at_once(*tensors: Tensor | None) -> bool:
    """Whether an operation on ``tensors`` runs now and on numbers in a CPU's memory, so that machine code may take addresses.

    It does not while something records it (torch.compile, torch.export, torch.jit.trace, make_fx), transforms it (torch.func,
    forward-mode derivatives) or has tensors without numbers (meta, FakeTensor and other subclasses, sparse ones).
    """
    # First, and alone: Dynamo evaluates this at once and does not look at what follows, which it cannot trace.
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not is_transformed()
        and all(tensor is None or is_plain(tensor) for tensor in tensors)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one of torch's own, dense and in a CPU's memory."""
    kind = type(tensor)
    return (kind is Tensor or kind is torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, and not under torch.compile, which sees to them itself."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
