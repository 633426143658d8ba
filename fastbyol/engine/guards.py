"""What stops a run before it does harm: too little disk, too little memory, weights that are no numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from fastbyol.config import Config
from fastbyol.errors import FastbyolError, UsageError, chain, size_text

# Bytes of a line of metrics.jsonl beside its numbers' texts, and of one number with its name: 290 bytes were counted for 8.
_LINE_BYTES, _NUMBER_BYTES = 40, 32


def disk_bytes(config: Config, *, checkpoint_bytes: int, steps: int, num_metrics: int, layer_numbers: int) -> int:
    """What a run of ``steps`` more steps may add to its folder at its fullest: an upper estimate.

    ``layer_numbers`` is how many float32 one sample of the per-layer telemetry holds.
    """
    run = config.run
    checkpoints = (run.keep_checkpoints + 1) * checkpoint_bytes  # one is written before the oldest goes
    metrics = steps * (_LINE_BYTES + _NUMBER_BYTES * num_metrics)
    layers = (steps // run.layers_every_steps + 1) * (8 + 4 * layer_numbers)
    return checkpoints + metrics + layers


def refuse_full_disk(folder: Path, needed: int, config: Config) -> None:
    """Raise UsageError where the file system of ``folder`` has less than ``needed`` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        run = config.run
        raise UsageError(
            f"{folder}: {size_text(needed)} are needed for checkpoints and telemetry, {size_text(free)} are free: make room, "
            f"or lower run.keep_checkpoints ({run.keep_checkpoints}) or raise run.layers_every_steps ({run.layers_every_steps})"
        )


@contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Turn running out of memory, the device's or the machine's, into a FastbyolError that says what to lower."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FastbyolError) or not is_out_of_memory(error):
            raise
        raise FastbyolError(
            f"out of memory: lower train.batch_size ({config.train.batch_size}), views.size ({config.views.size}) or "
            f"model.width ({config.model.width}), or set data.cache=none ({config.data.cache}); what was saved is intact"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or one that led to it, is Python's, CUDA's or the CPU allocator's want of memory.

    Compilers wrap it in errors of their own, and all but Python and the caching allocator raise a bare RuntimeError.
    """
    # CUDA says so in several ways: torch "CUDA error: out of memory", Triton "Triton Error [CUDA]: out of memory". Triton's
    # "out of resource" is another matter: a kernel that asks for more shared memory than there is.
    marks = ("DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED")
    return any(
        isinstance(reason, MemoryError | torch.OutOfMemoryError) or any(mark in str(reason) for mark in marks)
        for reason in chain(error)
    )


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None. Waits for the device once."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floats:
        return None
    # A sum is not finite where an element is not (32 bits cannot overflow it), and takes no mask as large as the tensor.
    fine = torch.stack([tensor.detach().sum(dtype=torch.float64).isfinite() for tensor in floats.values()]).cpu()
    return None if fine.all() else list(floats)[int(fine.int().argmin())]
