"""The embedded procedural set as a source: blocks of images are made where they are written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import textures
from fastbyol.data.beton_write import CHUNK_ITEMS
from fastbyol.errors import UsageError


def open_textures(*, count: int, size: int, seed: int) -> TexturesSource:
    """``count`` labelled images of ``size`` pixels; the same seed gives the same images, whatever the count."""
    if not 8 <= size <= 4096:
        raise UsageError(f"textures: size {size} must be 8 to 4096 pixels")
    if not 1 <= count <= 10_000_000:
        raise UsageError(f"textures: count {count} must be 1 to 10,000,000 images")
    if not 0 <= seed < 1 << 31:
        raise UsageError(f"textures: seed {seed} must be 0 to 2**31 - 1")
    return TexturesSource(count, size, seed)


@dataclass(frozen=True)
class TexturesSource:
    """Image i depends on seed, i and size alone."""

    count: int
    size: int
    seed: int
    kind: str = "textures"
    split: None = None
    class_names: tuple[str, ...] = textures.CLASSES
    labelled: bool = True
    skipped: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> NDArray[np.uint8]:
        """(size, size, 3) uint8."""
        image: NDArray[np.uint8] = self._block(index)[0][index % CHUNK_ITEMS]
        return image

    def label(self, index: int) -> int:
        return int(self._block(index)[1][index % CHUNK_ITEMS])

    def image_bytes(self) -> NDArray[np.int64]:
        """(N,) bytes of each image."""
        return np.full(self.count, 3 * self.size * self.size, np.int64)

    def _block(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        start = index // CHUNK_ITEMS * CHUNK_ITEMS
        return _made(min(CHUNK_ITEMS, self.count - start), self.size, self.seed, start)


@lru_cache(maxsize=2)
def _made(count: int, size: int, seed: int, start: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return textures.make(count, size, seed, start=start)
