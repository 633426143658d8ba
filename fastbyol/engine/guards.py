"""Guards against a full disk, too little memory and weights that are not finite."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from fastbyol.config import Config
from fastbyol.errors import FastbyolError, UsageError, chain, size_text

# Bytes of a line of metrics.jsonl without its numbers, and of a number with its name: a line with
# 8 numbers had 290 bytes.
_LINE_BYTES, _NUMBER_BYTES = 40, 32


def disk_bytes(
    config: Config, *, checkpoint_bytes: int, steps: int, num_metrics: int, layer_numbers: int
) -> int:
    """Return an upper estimate of the bytes that ``steps`` more steps add to a run's folder.

    ``layer_numbers`` is the number of float32 in one sample of the per-layer telemetry.
    """
    run = config.run
    checkpoints = (run.keep_checkpoints + 1) * checkpoint_bytes  # the oldest goes after a new one
    metrics = steps * (_LINE_BYTES + _NUMBER_BYTES * num_metrics)
    layers = (steps // run.layers_every_steps + 1) * (8 + 4 * layer_numbers)
    return checkpoints + metrics + layers


def refuse_full_disk(folder: Path, needed: int, config: Config) -> None:
    """Raise UsageError if the file system of ``folder`` has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        run = config.run
        raise UsageError(
            f"{folder}: {size_text(needed)} are needed for checkpoints and telemetry, "
            f"{size_text(free)} are free: make room, "
            f"or lower run.keep_checkpoints ({run.keep_checkpoints}) or raise "
            f"run.layers_every_steps ({run.layers_every_steps})"
        ) from OSError(errno.ENOSPC, "too little room")


@contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Turn an out-of-memory error inside into a FastbyolError that says what to lower."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FastbyolError) or not is_out_of_memory(error):
            raise
        model = config.model
        network = (
            f"model.width ({model.width})"
            if model.foreign is None
            else f"model.encoder ({model.encoder})"
        )
        raise FastbyolError(
            f"out of memory: lower train.batch_size ({config.train.batch_size}), views.size "
            f"({config.views.size}) or {network}, or set data.cache=none ({config.data.cache}); "
            "what was saved is intact"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` or one of its causes says that memory, any device's, ran out."""
    # Compilers wrap the error, and all but Python and the caching allocator raise a bare
    # RuntimeError: torch "CUDA error: out of memory", Triton "Triton Error [CUDA]: out of memory".
    # Triton's "out of resource" is a kernel that asks for too much shared memory.
    marks = ("DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED")
    return any(
        isinstance(reason, MemoryError | torch.OutOfMemoryError)
        or any(mark in str(reason) for mark in marks)
        for reason in chain(error)
    )


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a tensor with NaN or infinity, or None. Waits for the device once."""
    # A sum is not finite if an element is not, and needs no mask as large as the tensor. float32
    # cannot overflow one in float64.
    sums = {
        name: t.detach().sum(dtype=torch.float64)
        for name, t in tensors.items()
        if t.is_floating_point()
    }
    if not sums:
        return None
    finite = torch.stack(list(sums.values())).isfinite().cpu()
    return None if finite.all() else list(sums)[int(finite.int().argmin())]
