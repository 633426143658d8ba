"""What belongs to the whole process and is only borrowed: torch's switches, threads, what imports leave behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

# What importing cv2 and torchvision sets; every child process would get it.
VARIABLES = ("LD_LIBRARY_PATH", "TORCHINDUCTOR_CACHE_DIR")


@contextmanager
def left_as_found() -> Iterator[None]:
    """Work inside as in a fresh process, and put back what was changed for all of it, after an error too.

    Inside, gradients are on and new tensors are float32 on the CPU. Put back are these two, torch's TF32 and cuDNN switches and
    its threads, numba's threads, the start method of ``multiprocessing`` and the variables that imports set. What
    torch.compile leaves once it was used is torch's own. The C library's allocator cannot be asked what it was told before:
    see ``engine.allocator``.
    """
    with ExitStack() as found:
        if multiprocessing.get_start_method(allow_none=True) is None:  # numba asks for it, which settles it
            found.callback(multiprocessing.set_start_method, None, force=True)
        found.callback(_give_numba_its_threads, _numba_threads())
        found.callback(torch.set_num_threads, torch.get_num_threads())
        for name in VARIABLES:
            found.callback(_set_variable, name, os.environ.get(name))
        cudnn = torch.backends.cudnn
        for name in ("deterministic", "benchmark"):
            found.callback(setattr, cudnn, name, getattr(cudnn, name))
        _keep_precisions(found)
        found.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            found.enter_context(torch.device("cpu"))
        found.enter_context(torch.inference_mode(False))
        found.enter_context(torch.enable_grad())
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Work inside under ``exact_products``, and put torch's switches back."""
    with ExitStack() as found:
        _keep_precisions(found)
        exact_products()
        yield


def exact_products() -> None:
    """Have products and convolutions of float32 made in float32: neither TF32 nor, on a CPU, bfloat16. Process-wide."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for switch in _precisions():
        switch.fp32_precision = "ieee"


def _precisions() -> tuple[Any, ...]:
    """Where torch keeps the precision of float32 products, by library and operation."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)  # type: ignore[attr-defined]


def _keep_precisions(found: ExitStack) -> None:
    """Have torch's precisions put back: by operation, and before that the older switches, which move several at once."""
    for switch in _precisions():
        found.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
    with suppress(RuntimeError):  # who uses the newer switches cannot read the older ones
        found.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    with suppress(RuntimeError):
        found.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())


def _numba_threads() -> int | None:
    """How many threads numba has; None where its pool is not running, which asking numba itself would start."""
    pool = sys.modules.get("numba.np.ufunc.parallel")
    return sys.modules["numba"].get_num_threads() if pool is not None and pool._is_initialized else None


def _give_numba_its_threads(before: int | None) -> None:
    """``before``, or all where its pool was started since: FFCV's import leaves one."""
    if _numba_threads() is not None:
        numba = sys.modules["numba"]
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS if before is None else before)


def _set_variable(name: str, before: str | None) -> None:
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before
