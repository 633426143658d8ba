"""STL-10's binary files as distributed (Coates, Lee, Ng, 2011): uint8 (N, 3, 96, 96), each plane column by column."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastbyol.data.source_arrays import ArraySource, Images, Labels, demand_range, size_of
from fastbyol.errors import UsageError

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
SPLITS = ("train", "test", "unlabeled", "train+unlabeled")


def open_stl10(folder: Path, split: str) -> ArraySource:
    """STL-10's files as distributed: (N, 3, 96, 96) uint8 column by column, labels 1 to 10 (Coates et al., 2011)."""
    if split not in SPLITS:
        raise UsageError(f"{folder}: STL-10 has no split {split!r}; choose {', '.join(SPLITS)}")
    _mapped.cache_clear()
    parts = [ImageFile(folder / f"{part}_X.bin", _count(folder / f"{part}_X.bin")) for part in split.split("+")]
    labels = [_labels(folder, part.path, part.count) for part in parts] if split != "unlabeled" else None
    return ArraySource(
        kind="stl10",
        split=split,
        class_names=_classes(folder),
        labels=None if labels is None else np.concatenate(labels),
        num_images=sum(part.count for part in parts),
        size=(SIDE, SIDE),
        load=Loader(tuple(parts)),
    )


@dataclass(frozen=True)
class ImageFile:
    """One image file and how many images it holds."""

    path: Path
    count: int


@dataclass(frozen=True)
class Loader:
    """Loads image i of the files in turn."""

    parts: tuple[ImageFile, ...]

    def __call__(self, index: int) -> Images:
        for part in self.parts:
            if index < part.count:
                return np.ascontiguousarray(_mapped(part.path)[index].transpose(2, 1, 0))
            index -= part.count
        raise IndexError(index)


@lru_cache
def _mapped(path: Path) -> Images:
    return np.memmap(path, np.uint8, "r").reshape(-1, 3, SIDE, SIDE)


def _count(path: Path) -> int:
    num_bytes = size_of(path)
    if num_bytes == 0 or num_bytes % IMAGE_BYTES:
        raise UsageError(f"{path}: {num_bytes} bytes is no whole number of {IMAGE_BYTES}-byte images; unpack the archive again")
    return num_bytes // IMAGE_BYTES


def _labels(folder: Path, images: Path, count: int) -> Labels:
    if images.name == "unlabeled_X.bin":
        return np.full(count, -1, np.int64)
    path = folder / images.name.replace("_X", "_y")
    if size_of(path) != count:
        raise UsageError(f"{path}: {size_of(path)} labels for {count} images in {images.name}; unpack the archive again")
    labels = np.fromfile(path, np.uint8).astype(np.int64) - 1
    demand_range(path, labels, len(CLASSES))
    return labels


def _classes(folder: Path) -> tuple[str, ...]:
    path = folder / "class_names.txt"
    return tuple(path.read_text("ascii").split()) if path.is_file() else CLASSES
