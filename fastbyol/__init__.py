"""A compiled training engine for BYOL, to study when and why it collapses.

    import fastbyol
    config = fastbyol.load_config("demo", ["model.norm=gn"])
    summary = fastbyol.train(config, out="runs/mine")
    encoder = fastbyol.load_encoder("runs/mine")

One step by hand:

    state = fastbyol.TrainState.create(config, steps_per_epoch=32)
    metrics = fastbyol.train_step(state, torch.randn(2, 8, 3, 32, 32))
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.config import Config, Resolved, resolve
from fastbyol.errors import CollapsedError, FastbyolError, NoGraphError, UsageError

if TYPE_CHECKING:
    from fastbyol.api import convert, embed, evaluate, export, fork, load_encoder, resume, train
    from fastbyol.engine.step import TrainState, train_step

__version__ = "0.1.0"
__all__ = [
    "CollapsedError",
    "Config",
    "FastbyolError",
    "NoGraphError",
    "Resolved",
    "TrainState",
    "UsageError",
    "__version__",
    "convert",
    "embed",
    "evaluate",
    "export",
    "fork",
    "load_config",
    "load_encoder",
    "resolve",
    "resume",
    "train",
    "train_step",
]

# Imported on first use: torch takes seconds to import, and `fastbyol --help` should not.
_LAZY = {
    "convert": "fastbyol.api",
    "train": "fastbyol.api",
    "resume": "fastbyol.api",
    "fork": "fastbyol.api",
    "embed": "fastbyol.api",
    "evaluate": "fastbyol.api",
    "export": "fastbyol.api",
    "load_encoder": "fastbyol.api",
    "TrainState": "fastbyol.engine.step",
    "train_step": "fastbyol.engine.step",
}


def load_config(
    preset: str = "blog", sets: Sequence[str] = (), *, file: Path | None = None
) -> Resolved:
    """Return a configuration of ``preset``, then a TOML ``file``, then ``key=value`` texts.

    Raises ``UsageError``.
    """
    from fastbyol import config_io

    return config_io.load(preset=preset, file=file, sets=sets).config


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
