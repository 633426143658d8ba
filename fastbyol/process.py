"""State of the process that is borrowed and restored: torch's switches, threads, variables."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

# Set by importing cv2 and torchvision; every child process would inherit them.
VARIABLES = ("LD_LIBRARY_PATH", "TORCHINDUCTOR_CACHE_DIR")


@contextmanager
def left_as_found() -> Iterator[None]:
    """Run the body as in a fresh process and restore the process's state, after an error too.

    Inside, gradients are on and new tensors are float32 on the cpu. Restored are these two, torch's
    TF32 and cuDNN switches and its threads, numba's threads, the start method of
    ``multiprocessing`` and the variables that imports set. State that torch.compile creates is
    torch's own. The C library's allocator has no way to read its settings: see
    ``engine.allocator``.
    """
    with ExitStack() as stack:
        if (
            multiprocessing.get_start_method(allow_none=True) is None
        ):  # numba reads it, which fixes it
            stack.callback(multiprocessing.set_start_method, None, force=True)
        stack.callback(_give_numba_its_threads, _numba_threads())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        for name in VARIABLES:
            stack.callback(_set_variable, name, os.environ.get(name))
        cudnn = torch.backends.cudnn
        for name in ("deterministic", "benchmark"):
            stack.callback(setattr, cudnn, name, getattr(cudnn, name))
        _keep_precisions(stack)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Run the body under ``exact_products``, and restore torch's switches."""
    with ExitStack() as stack:
        _keep_precisions(stack)
        exact_products()
        yield


def exact_products() -> None:
    """Compute products and convolutions of float32 in float32, without TF32 or, on a cpu, bfloat16.

    The setting holds for the whole process.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for switch in _precisions():
        switch.fp32_precision = "ieee"


def _precisions() -> tuple[Any, ...]:
    """Return torch's settings of the precision of float32 products, by library and operation."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    products = torch.backends.cuda.matmul
    return (products, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)


def _keep_precisions(stack: ExitStack) -> None:
    """Restore torch's precisions on exit.

    The older switches, which move several, come first, and then each operation.
    """
    for switch in _precisions():
        stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
    with suppress(RuntimeError):  # the older switches cannot be read once the newer ones are used
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    with suppress(RuntimeError):
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())


def _numba_threads() -> int | None:
    """Return numba's number of threads, or None if its pool does not run: asking starts it."""
    pool = sys.modules.get("numba.np.ufunc.parallel")
    return (
        sys.modules["numba"].get_num_threads()
        if pool is not None and pool._is_initialized
        else None
    )


def _give_numba_its_threads(before: int | None) -> None:
    """Set ``before``, or all threads if the pool started since, as FFCV's import does with one."""
    if _numba_threads() is not None:
        numba = sys.modules["numba"]
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS if before is None else before)


def _set_variable(name: str, before: str | None) -> None:
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before
