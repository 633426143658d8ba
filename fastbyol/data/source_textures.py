"""The embedded procedural set as a source: the workers that write images also make them."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from fastbyol.data import textures
from fastbyol.data.beton_write import CHUNK_ITEMS
from fastbyol.data.source_arrays import Images, Source
from fastbyol.errors import UsageError


def open_textures(
    _: Path, *, split: str | None, count: int, size: int | None, seed: int, **others: object
) -> Source:
    """Make labelled images; image i depends on the seed, i and the size (default 32) alone."""
    size = 32 if size is None else size
    if split is not None:
        raise UsageError(f"textures: has no split {split!r}; take another --seed for another set")
    ranges = (
        ("size", size, 8, 4096),
        ("count", count, 1, 10_000_000),
        ("seed", seed, 0, (1 << 31) - 1),
    )
    for name, value, least, most in ranges:
        if not least <= value <= most:
            raise UsageError(f"textures: {name} {value} must be {least} to {most:,}")
    labels = textures.labels(np.arange(count, dtype=np.uint64), seed)
    return Source(
        "textures",
        None,
        textures.CLASSES,
        labels,
        count,
        3 * size * size,
        partial(_image, count, size, seed),
    )


def _image(count: int, size: int, seed: int, index: int) -> Images:
    start = index // CHUNK_ITEMS * CHUNK_ITEMS
    return _kept(min(CHUNK_ITEMS, count - start), size, seed, start=start)[0][index - start, ...]


_kept = lru_cache(maxsize=2)(textures.make)
