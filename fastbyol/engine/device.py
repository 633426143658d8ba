"""The device a run works on and the dtype its precision asks for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastbyol.config import Config
from fastbyol.errors import UsageError, check_choice

# Images a step x pixels x width^2, of which a step's products are a multiple. Below it a second thread costs more than it
# brings (two cores, fp32, images/s with one thread and with two): 8e6 1,025 and 550; 3e7 480 and 375; 3e7, of more images,
# 1,630 and 1,540; 8e7 235 and 295; 1e8 175 and 215; 2e9 23 and 44.
SMALL_STEP = 5e7
DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?")


def pick_device(name: str) -> torch.device:
    """``auto`` takes the first CUDA device, else the CPU; cpu, cuda and cuda:N are as they say.

    Raises ``UsageError`` for another word and for a device that is not there.
    """
    if not DEVICE.fullmatch(str(name)):
        check_choice("device", name, ("auto", "cpu", "cuda", "cuda:1"))
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
        raise UsageError(
            "train.precision: auto has to be settled first (fastbyol.engine.precision.choose_precision): say fp32 or bf16"
        )
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    check_choice("train.precision", precision, dtypes)
    return dtypes[precision]


@contextmanager
def fitting_threads(config: Config) -> Iterator[None]:
    """Let torch work with one thread inside where the steps of ``config`` on a cpu are too small to share.

    By rule and not by timing: a resumed run is to take as many. OMP_NUM_THREADS, where somebody set it, is left alone.
    """
    before = torch.get_num_threads()
    size = config.train.batch_size * config.views.size**2 * config.model.width**2
    if size < SMALL_STEP and "OMP_NUM_THREADS" not in os.environ and pick_device(config.train.device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
