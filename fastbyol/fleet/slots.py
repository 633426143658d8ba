"""Where this machine's workers run: which GPU or how many threads each may use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

import torch

from fastbyol.engine import interrupt
from fastbyol.engine.device import pick_device
from fastbyol.errors import FastbyolError, one_line

# Runs on one GPU share it by turns; a run of the post's size takes less than this.
BYTES_A_RUN = 20 * 2**30
MOST_ON_A_GPU = 4
VISIBLE = "CUDA_VISIBLE_DEVICES"


def slots(device: str, jobs: int | None = None) -> tuple[Mapping[str, str], ...]:
    """Return the variables of each worker that this machine is to have on ``device``.

    auto and cuda are all GPUs, cuda:N is that one. A GPU gets as many workers as its free memory
    has room for, a CPU one a core; ``jobs`` is another number of workers, dealt out to the GPUs in
    turns. Raises UsageError for a device that is not there.
    """
    where = pick_device(device)
    if where.type == "cpu":
        return ({"OMP_NUM_THREADS": "1"},) * (jobs or cores())
    only = int(device.partition(":")[2]) if ":" in device else None
    gpus = [index for index in range(torch.cuda.device_count()) if only in (None, index)]
    if jobs is None:
        free = free_bytes()
        room = {gpu: max(1, min(free[gpu] // BYTES_A_RUN, MOST_ON_A_GPU)) for gpu in gpus}
        turns = [gpu for turn in range(MOST_ON_A_GPU) for gpu in gpus if turn < room[gpu]]
        turns = turns[: max(len(gpus), cores())]
    else:
        turns = [gpus[number % len(gpus)] for number in range(jobs)]
    return tuple({VISIBLE: _visible(gpu)} for gpu in turns)


def cores() -> int:
    """Return how many cores this process may use, by the system or by SLURM."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Not every SLURM binds a job to the cores that it gave it.
    allotted = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return min(here, int(allotted)) if allotted.isdecimal() else here


def free_bytes() -> list[int]:
    """Return the free memory of each visible GPU.

    Another process asks: it takes some memory on each GPU, and only its end gives that back.
    """
    each = "torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())"
    command = [sys.executable, "-c", f"import json, torch; print(json.dumps([{each}]))"]
    with interrupt.held_back():  # one to all processes of a job is for this one to handle
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return [int(size) for size in json.loads(done.stdout)]
    except ValueError as error:
        why = done.stderr.strip().rpartition("\n")[2] or one_line(error)
        raise FastbyolError(f"the GPUs' free memory: {why}: name the workers with --jobs") from None


def _visible(index: int) -> str:
    """Return the name of the GPU ``index`` of this process for another's variable."""
    names = os.environ.get(VISIBLE)
    return names.split(",")[index].strip() if names else str(index)
