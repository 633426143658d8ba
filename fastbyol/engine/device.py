"""A run's device, its dtype and its number of threads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastbyol.config import Config
from fastbyol.engine.worker import OUTCOME, worker
from fastbyol.errors import UsageError, check_choice

# Images a step x pixels x width^2; a step's products are a multiple of it. Below this a second
# thread costs more than it brings (two cores, fp32, images/s with one thread and with two): 8e6
# 1,025 and 550; 3e7 480 and 375; 3e7, with more images, 1,630 and 1,540; 8e7 235 and 295; 1e8 175
# and 215; 2e9 23 and 44.
SMALL_STEP = 5e7
DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?")


def pick_device(name: str) -> torch.device:
    """Return the device ``name``: cpu, cuda, cuda:N or auto, the first CUDA device or else the cpu.

    A worker of torchrun takes the device of its number on its node for auto and cuda. Raises
    UsageError for another word and for a device that does not exist.
    """
    if not DEVICE.fullmatch(str(name)):
        check_choice("device", name, ("auto", "cpu", "cuda", "cuda:1"))
    here = worker()
    index = 0 if here is None else here.local_rank
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda" if name == "auto" else name)
    if here is not None and here.local_count > 1 and device.index is not None:
        raise UsageError(f"train.device: {name} is one device, for each process its own: say cuda")
    device = torch.device("cuda", index) if device == torch.device("cuda") else device
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"train.device: {name} is not there, this machine has {torch.cuda.device_count()} "
            "CUDA devices: take --device cpu"
        )
    return device


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of a step's views, and so of its products: fp32, bf16 or fp64.

    Raises UsageError for another word and for ``auto``, which ``choose_precision`` replaces.
    """
    if precision == "auto":
        raise UsageError(
            "train.precision: auto has to be chosen first "
            "(fastbyol.engine.precision.choose_precision): say fp32 or bf16"
        )
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    check_choice("train.precision", precision, dtypes)
    return dtypes[precision]


@contextmanager
def fitting_threads(config: Config, ranks: int = 1) -> Iterator[None]:
    """Give torch one thread inside if the steps of ``config`` on a cpu are too small for more.

    The ``ranks`` of a node share its cores. A rule and not a timing: a resumed run must take as
    many, in threads or in processes. OMP_NUM_THREADS comes first if set, but not if torchrun has
    set it to 1, as it does unless told otherwise.
    """
    before = torch.get_num_threads()
    size = config.train.batch_size * config.views.size**2 * config.model.width**2
    by_torchrun = "1" if worker() is not None and OUTCOME not in os.environ else None
    is_set = os.environ.get("OMP_NUM_THREADS", by_torchrun) != by_torchrun
    if not is_set and pick_device(config.train.device).type == "cpu":
        if size < SMALL_STEP * ranks:
            torch.set_num_threads(1)
        elif ranks > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    try:
        yield
    finally:
        torch.set_num_threads(before)
