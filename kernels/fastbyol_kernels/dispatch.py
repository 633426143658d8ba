"""The choice of an operation's backend: Triton kernels, compiled CPU kernels, or plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

BACKENDS = ("auto", "triton", "cpu", "reference")
# Triton kernels accept CPU tensors when they are interpreted, which Triton decides when a kernel is
# defined, and inside `ahead_of_time.recording`, which launches nothing.
TRITON_ON_CPU: bool = knobs.runtime.interpret


def resolve(
    kernels: str, device: torch.device, dtype: torch.dtype, *, what: str = "the network"
) -> str:
    """Return the backend that ``kernels``, one of ``BACKENDS``, selects for ``what`` on ``device``.

    "auto" selects Triton on CUDA, compiled code elsewhere, and the reference for fp64. Raises
    ValueError for an unknown word and for a backend that ``device`` or ``dtype`` does not support.
    """
    check(kernels)
    if kernels == "auto":
        return (
            "reference" if dtype == torch.float64 else "triton" if device.type == "cuda" else "cpu"
        )
    if kernels != "reference" and dtype == torch.float64:
        raise ValueError(f"kernels={kernels} has no kernels for fp64: take auto or reference")
    if kernels == "cpu" and device.type == "cuda":
        raise ValueError(
            f"kernels=cpu needs a CPU, {what} is on {device}: take auto, triton or reference"
        )
    if kernels == "triton" and device.type != "cuda" and not TRITON_ON_CPU:
        raise ValueError(
            f"kernels=triton needs CUDA, {what} is on {device}: take auto or reference (or "
            "TRITON_INTERPRET=1 from the start)"
        )
    return kernels


def check(kernels: str) -> None:
    """Raise ValueError unless ``kernels`` is one of ``BACKENDS``."""
    if kernels not in BACKENDS:
        raise ValueError(f"kernels must be one of {', '.join(BACKENDS)}, not {kernels!r}")


def dispatch(
    kernels: str,
    name: str,
    tensor: Tensor,
    *beside: Tensor | None,
    has: tuple[str, ...] = ("triton", "cpu"),
) -> str:
    """Return the backend, never "auto", for an operation on ``tensor`` and those ``beside`` it.

    ``name`` is the argument that errors mention, ``has`` lists the operation's kernels. The
    reference replaces a backend that the operation lacks. It also runs fp64, operations under
    torch.func, which cannot transform kernels, and CPU operations that do not run ``at_once``.
    Raises ValueError as ``resolve`` does.
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
    """Return True if an operation on ``tensors`` executes eagerly on values in CPU memory.

    Only then may compiled code use the tensors' addresses. The result is False while the operation
    is recorded (torch.compile, torch.export, torch.jit.trace, make_fx) or transformed (torch.func,
    forward-mode derivatives), and for tensors without plain values (meta, FakeTensor and other
    subclasses, sparse tensors).
    """
    # A separate statement, and the first: Dynamo evaluates it and skips the rest, which it cannot
    # trace.
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not is_transformed()
        and all(tensor is None or is_plain(tensor) for tensor in tensors)
    )


def is_plain(tensor: Tensor) -> bool:
    """Return True if ``tensor`` is a dense Tensor or Parameter, not a subclass, in CPU memory."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def is_activation(x: Tensor) -> bool:
    """Return True if ``x`` is (N, C, H, W), not empty, channels-last, and bf16 or fp32."""
    fits = x.ndim == 4 and x.numel() > 0 and x.dtype in (torch.bfloat16, torch.float32)
    return fits and x.is_contiguous(memory_format=torch.channels_last)


def is_transformed() -> bool:
    """Return True if torch.func or forward-mode differentiation is active.

    The result is False under torch.compile, which handles both by itself.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
