"""The device a run works on and the dtype its precision asks for."""

from __future__ import annotations

import torch

from fastbyol.errors import UsageError
from fastbyol_kernels import choice


def pick_device(name: str) -> torch.device:
    """``auto`` takes the first CUDA device, else the CPU. A device that is not there is a ``UsageError``."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"train.device: {name} is not there, this machine has {torch.cuda.device_count()} CUDA devices: take --device cpu"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of the views that a step takes: bf16 products start from bf16 views, the references from their own.

    ``auto`` is no precision yet and a ``UsageError``.
    """
    if precision == "auto":
        raise UsageError("train.precision: auto has to be settled first (fastbyol.engine.precision.settle): say fp32 or bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[precision]


def pick_kernels(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """triton, processor or reference: what ``engine.kernels`` means for networks in ``dtype`` on ``device``.

    ``auto`` is Triton on CUDA, machine code on a CPU, plain torch for fp64. Raises ``UsageError`` for kernels that cannot run.
    """
    wide, on_gpu = dtype == torch.float64, device.type == "cuda"
    if name == "auto":
        return "reference" if wide else "triton" if on_gpu else "processor"
    if name != "reference" and wide:
        raise UsageError(f"engine.kernels: {name} has no kernels for fp64: take auto or reference")
    if name == "processor" and on_gpu:
        raise UsageError(f"engine.kernels: processor needs a CPU, train.device is {device}: take auto, triton or reference")
    if name == "triton" and not on_gpu and not choice.TRITON_ON_CPU:
        raise UsageError(f"engine.kernels: triton needs CUDA, train.device is {device}: take auto or reference")
    return name
