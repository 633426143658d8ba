"""Images for measurements: ten smooth colour patterns, shifted and noisy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.convert import convert

NUM_CLASSES = 10
CELLS = 6


def pictures(count: int, size: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return uint8 images (count, size, size, 3) and int64 labels (count,), ten classes in turn."""
    random = np.random.default_rng(seed)
    coarse = np.random.default_rng(7).integers(0, 256, (NUM_CLASSES, CELLS, CELLS, 3))
    cell = -(-size // CELLS)
    whole = coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :size, :size]
    labels = np.arange(count, dtype=np.int64) % NUM_CLASSES
    images = np.empty((count, size, size, 3), np.uint8)
    for index, label in enumerate(labels):
        shifted = np.roll(whole[label], tuple(random.integers(0, size, 2)), axis=(0, 1))
        noise = random.integers(-60, 61, shifted.shape)
        images[index] = np.clip(shifted + noise, 0, 255)
    return images, labels


def beton(folder: Path, count: int, size: int) -> Path:
    """Write the pictures to a raw beton in ``folder`` and return its path."""
    images, labels = pictures(count, size)
    arrays, path = (
        folder / f"pictures-{count}-{size}.npz",
        folder / f"pictures-{count}-{size}.beton",
    )
    np.savez(arrays, images=images, labels=labels)
    convert(str(arrays), path, overwrite=True)
    return path
