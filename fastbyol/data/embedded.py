"""The built-in sets as beton files, made once in the user's cache folder."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from fastbyol.config import DataConfig
from fastbyol.data import beton, convert
from fastbyol.errors import UsageError
from fastbyol.files import cache_folder

TEXTURES, FASHION = "textures", "fashion-mnist"
BUILT_IN = (TEXTURES, FASHION)
_log = logging.getLogger(__name__)


def training_file(config: DataConfig) -> Path:
    """Return the file that a run trains on. A built-in set is made if it is missing."""
    return _file(config.train, "train", config)


def held_out_file(config: DataConfig) -> Path | None:
    """Return the file that a run is scored on, or None.

    A built-in training set without a test file is scored on its own held-out part.
    """
    name = config.test or (config.train if config.train in BUILT_IN else None)
    return None if name is None else _file(name, "test", config)


def _file(name: str, split: Literal["train", "test"], config: DataConfig) -> Path:
    if name == FASHION:
        return _made(f"fashion-mnist-{split}-32px", source=FASHION, split=split)
    if name == TEXTURES:
        size = config.textures_size or 32
        is_test = split == "test"
        count, seed = (
            config.textures_test_count if is_test else config.textures_count,
            config.textures_seed + is_test,
        )
        stem = f"textures-{count}-{size}px-seed{seed}"
        return _made(stem, source=TEXTURES, count=count, size=size, seed=seed)
    return Path(name)


def _made(stem: str, *, source: str, **options: object) -> Path:
    """Return the beton ``stem`` of the cache folder, written on the first call.

    One process writes it while others wait: a file replaced under a reader counts as changed.
    """
    path = cache_folder() / f"{stem}.beton"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{stem}.lock").open("ab")
        except OSError as error:
            raise UsageError(
                f"{path.parent}: {error.strerror}: name a folder that can be written with "
                "FASTBYOL_CACHE=DIR"
            ) from None
        with _alone(lock):
            if not path.exists():
                convert.convert(source, path, overwrite=True, **options)  # type: ignore[arg-type]
    beton.inspect(path)
    return path


@contextmanager
def _alone(lock: BinaryIO) -> Iterator[None]:
    """Hold the file ``lock``, if the disk has locks; the system releases it when the process dies.

    The lock file stays: otherwise two processes could lock two files of one name.
    """
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            _log.info("%s: no lock: %s", lock.name, error.strerror)
        yield
