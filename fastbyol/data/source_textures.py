"""The embedded procedural set as a source: blocks of images are made where they are written."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import textures
from fastbyol.data.beton_write import CHUNK_ITEMS
from fastbyol.data.source_arrays import Images, Source
from fastbyol.errors import UsageError


def open_textures(*, count: int, size: int, seed: int) -> Source:
    """Make ``count`` labelled images of ``size`` pixels; image i depends on ``seed``, i and ``size`` alone."""
    if not 8 <= size <= 4096:
        raise UsageError(f"textures: size {size} must be 8 to 4096 pixels")
    if not 1 <= count <= 10_000_000:
        raise UsageError(f"textures: count {count} must be 1 to 10,000,000 images")
    if not 0 <= seed < 1 << 31:
        raise UsageError(f"textures: seed {seed} must be 0 to 2**31 - 1")
    labels = textures.labels(np.arange(count, dtype=np.uint64), seed)
    return Source("textures", None, textures.CLASSES, labels, count, 3 * size * size, partial(_image, count, size, seed))


def _image(count: int, size: int, seed: int, index: int) -> Images:
    start = index // CHUNK_ITEMS * CHUNK_ITEMS
    image: Images = _block(min(CHUNK_ITEMS, count - start), size, seed, start)[index - start]
    return image


@lru_cache(maxsize=2)
def _block(count: int, size: int, seed: int, start: int) -> NDArray[np.uint8]:
    return textures.make(count, size, seed, start=start)[0]
