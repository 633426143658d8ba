"""The files that runs read: betons, and what is made once in the cache folder to be one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastbyol.config import DataConfig
from fastbyol.data import beton, conversions, convert, sources
from fastbyol.errors import UsageError
from fastbyol.files import cache_folder

TEXTURES, FASHION = "textures", "fashion-mnist"
BUILT_IN = (TEXTURES, FASHION)


def training_file(config: DataConfig) -> Path:
    """Return the beton that a run trains on. A built-in set, or one of a source, is made once."""
    return file_of(config.train, "train", config)


def held_out_file(config: DataConfig) -> Path | None:
    """Return the beton that a run is scored on, or None.

    Without a test file, a run on a built-in set is scored on its own held-out part, and one on a
    source with labelled test or validation images on these.
    """
    name = config.test or (config.train if config.train in BUILT_IN else None)
    if name is not None:
        return file_of(name, "test", config)
    if not sources.is_source(config.train):
        _refuse_split(config.train, config.test_split)
        return None
    own, splits = conversions.splits_of(training_file(config))
    parts = (part for part in conversions.SCORED_ON if part in splits and part != own)
    split = config.test_split or next(parts, None)
    if split is None:
        return None
    file = conversions.converted(config.train, split=split, size=_size(config))
    labels = beton.inspect(file, may_lack_labels=True).labels
    unlabelled = labels is None or len(set(labels[labels >= 0].tolist())) < 2
    return None if unlabelled and config.test_split is None else file


def name_of(file: Path, named: str) -> str:
    """Return how to call the beton of what is ``named`` in a message: a source by its own name."""
    return named if sources.is_source(named) else str(file)


def prepare(config: DataConfig) -> None:
    """Convert the sources of a run, so that it is not done while the run is shown."""
    if sources.is_source(config.train):
        training_file(config)
    if sources.is_source(config.test or config.train):
        held_out_file(config)


def file_of(name: str, part: Literal["train", "test"], config: DataConfig) -> Path:
    """Return the beton of a built-in set, a source or a file, to train or to be scored on."""
    split = config.split if part == "train" else config.test_split
    if name in BUILT_IN:
        _refuse_split(name, split)
        return _built_in(name, part, config)
    if sources.is_source(name):
        is_test = part == "test"
        return conversions.converted(name, split=split, size=_size(config), scored_on=is_test)
    _refuse_split(name, split)
    return Path(name)


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise UsageError(
            f"{name}: has no split {split!r}, folders, archives and the like may have some; leave "
            "out --split and --test-split"
        )


def _size(config: DataConfig) -> int:
    return config.size or 32


def _built_in(name: str, part: Literal["train", "test"], config: DataConfig) -> Path:
    if name == FASHION:
        return _made(f"fashion-mnist-{part}-32px", source=FASHION, split=part)
    size = config.textures_size or 32
    is_test = part == "test"
    count, seed = (
        config.textures_test_count if is_test else config.textures_count,
        config.textures_seed + is_test,
    )
    stem = f"textures-{count}-{size}px-seed{seed}"
    return _made(stem, source=TEXTURES, count=count, size=size, seed=seed)


def _made(stem: str, *, source: str, **options: object) -> Path:
    """Return the beton ``stem`` of the cache folder, written on the first call.

    One process writes it while others wait: a file replaced under a reader counts as changed.
    """
    path = cache_folder() / f"{stem}.beton"
    if not path.exists():
        with conversions.alone(conversions.writable(path.parent) / f".{stem}.lock"):
            if not path.exists():
                convert.convert(source, path, overwrite=True, **options)  # type: ignore[arg-type]
    beton.inspect(path)
    return path
