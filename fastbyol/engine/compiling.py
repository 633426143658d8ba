"""A CPU's kernels, compiled before a run begins, where its user can see how far that is."""

from __future__ import annotations

import time
from importlib import import_module

from fastbyol.config import Resolved
from fastbyol.engine.device import dtype_of, pick_device
from fastbyol.engine.precision import native_unit
from fastbyol.output import announced


def compile_kernels(config: Resolved) -> None:
    """Compile what the steps of ``config`` call on a CPU and the cache lacks, and say so.

    What they call besides is compiled when they do. Call it in a command's main thread, before it
    starts others.
    """
    device, precision, engine = (
        pick_device(config.train.device),
        config.train.precision,
        config.engine,
    )
    if precision == "auto":  # the gate, where there is one, takes a step in bf16 at least
        precision = "fp32" if native_unit(device) is None else "bf16"
    if (
        device.type != "cpu"
        or precision == "fp64"
        or engine.mode not in ("auto", "eager")
        or engine.kernels not in ("auto", "cpu")
    ):
        return
    dtype = dtype_of(precision)
    # Imported here because it loads numba, which a GPU run does not need.
    from fastbyol_kernels import native

    kernels = [
        each
        for name in _operations(config)
        for each in import_module(f"fastbyol_kernels.{name}.cpu").TRAINED_WITH
    ]
    missing = native.missing(kernels, dtype)
    if not missing:
        return
    begun = time.monotonic()
    with announced("compiling kernels for this cpu, once") as (progress, finish):
        done = native.compile_ahead(missing, dtype, progress)
        finish(f"compiled {done} kernels in {time.monotonic() - begun:.0f} s")


def _operations(config: Resolved) -> list[str]:
    """Return the names of the operations with kernels, those that take longest to compile first."""
    model, own = config.model, config.model.foreign is None
    used = {
        "views": True,
        "group_norm": own and model.norm in ("gn", "ln"),
        "batch_norm": own and model.norm == "bn",
        "weight_standardization": own and model.ws,
        "max_pool": own and model.stem == "torchvision",
        "lars_ema": True,
    }
    return [name for name, is_used in used.items() if is_used]
