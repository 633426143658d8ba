"""The embedded textures set as beton files: made once, kept in the user's cache folder, found again by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastbyol.config import DataConfig
from fastbyol.data import beton, convert

TEXTURES = "textures"
Progress = Callable[[int, int], None]


def cache_folder() -> Path:
    """``$FASTBYOL_CACHE``, else ``$XDG_CACHE_HOME/fastbyol``, else ``~/.cache/fastbyol``."""
    own = os.environ.get("FASTBYOL_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastbyol"


def textures_beton(count: int, size: int, seed: int, *, progress: Progress | None = None) -> Path:
    """The beton of ``count`` textures images of ``size`` pixels, written on the first call.

    Two processes may ask at once: each writes its own temporary file and the last rename wins with the same bytes.
    """
    path = cache_folder() / f"textures-{count}-{size}px-seed{seed}.beton"
    if path.exists():
        beton.inspect(path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    convert.convert(TEXTURES, path, count=count, size=size, seed=seed, progress=progress, overwrite=True)
    return path


def training_file(config: DataConfig, *, progress: Progress | None = None) -> Path:
    """The file a run trains on; the embedded set is made where it is asked for."""
    if config.train != TEXTURES:
        return Path(config.train)
    return textures_beton(config.textures_count, _size(config), config.textures_seed, progress=progress)


def held_out_file(config: DataConfig, *, progress: Progress | None = None) -> Path | None:
    """The file a run is scored on, or None.

    With the embedded training set and no test file of one's own, it is the embedded one of the next seed.
    """
    if config.test == TEXTURES or (config.test is None and config.train == TEXTURES):
        return textures_beton(config.textures_test_count, _size(config), config.textures_seed + 1, progress=progress)
    return Path(config.test) if config.test else None


def _size(config: DataConfig) -> int:
    return config.textures_size or 32
