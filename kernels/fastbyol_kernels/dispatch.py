"""Which backend runs an operation: Triton's kernels, a CPU's compiled ones, or the reference in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

BACKENDS = ("auto", "triton", "cpu", "reference")
# Whether Triton's kernels take tensors on a CPU: where they are interpreted, which Triton decides when a kernel is defined, and
# while `ahead_of_time.recording` launches nothing.
TRITON_ON_CPU: bool = knobs.runtime.interpret


def resolve(kernels: str, device: torch.device, dtype: torch.dtype, *, what: str = "the network") -> str:
    """Return the backend that ``kernels``, one of ``BACKENDS``, means for ``what``, in ``dtype`` on ``device``.

    "auto" is Triton on CUDA, compiled code elsewhere, and the reference for fp64. Raises ValueError for a word that is none of
    them, and for kernels that are not there.
    """
    check(kernels)
    if kernels == "auto":
        return "reference" if dtype == torch.float64 else "triton" if device.type == "cuda" else "cpu"
    if kernels != "reference" and dtype == torch.float64:
        raise ValueError(f"kernels={kernels} has no kernels for fp64: take auto or reference")
    if kernels == "cpu" and device.type == "cuda":
        raise ValueError(f"kernels=cpu needs a CPU, {what} is on {device}: take auto, triton or reference")
    if kernels == "triton" and device.type != "cuda" and not TRITON_ON_CPU:
        raise ValueError(
            f"kernels=triton needs CUDA, {what} is on {device}: take auto or reference (or TRITON_INTERPRET=1 from the start)"
        )
    return kernels


def check(kernels: str) -> None:
    """Raise ValueError for a word that is none of ``BACKENDS``."""
    if kernels not in BACKENDS:
        raise ValueError(f"kernels must be one of {', '.join(BACKENDS)}, not {kernels!r}")


def dispatch(kernels: str, name: str, tensor: Tensor, *beside: Tensor | None, has: tuple[str, ...] = ("triton", "cpu")) -> str:
    """Return the backend, never "auto", of an operation on ``tensor``, called ``name``, and on what it takes ``beside``.

    The reference stands in for a backend that the operation does not have, for fp64, and where the operation does not run
    ``at_once`` on a CPU or is transformed by torch.func, which knows no kernels. Raises ValueError as ``resolve`` does.
    """
    wide = tensor.dtype == torch.float64
    if kernels == "triton" and (wide or "triton" not in has):
        return "reference"
    backend = resolve(kernels, tensor.device, torch.float32, what=name)
    if wide or backend not in has:
        return "reference"
    if backend == "triton":
        return "reference" if is_transformed() else backend
    return backend if at_once(tensor, *beside) else "reference"


def at_once(*tensors: Tensor | None) -> bool:
    """Return whether an operation on ``tensors`` runs now and on numbers in a CPU's memory.

    Compiled code may take their addresses then.

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
    """Return whether ``tensor`` is one of torch's own, dense and in a CPU's memory."""
    kind = type(tensor)
    return (kind is Tensor or kind is torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is at work.

    Not under torch.compile, which sees to them itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
