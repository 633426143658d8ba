"""STL-10 as distributed (Coates, Lee, Ng, 2011), binary or MATLAB: uint8 (N, 3, 96, 96), each plane column by column.

Ten folds of 1,000 training images each are part of its protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import source_mat
from fastbyol.data.source_arrays import (
    ArraySource,
    Chain,
    Images,
    Labels,
    Part,
    Rows,
    count_rows,
    demand_range,
    inner,
    read_small,
    size_of,
    text_lines,
)
from fastbyol.errors import UsageError

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
SPLITS = ("train", "test", "unlabeled", "train+unlabeled")
FOLDS = 10
_FOLDERS = ("stl10_binary", "stl10_matlab")


def has_stl10(path: Path) -> bool:
    """Tell whether STL-10's files lie in a folder, or in the one that its archive unpacks to."""
    folder, parts = inner(path, *_FOLDERS), ("train", "test", "unlabeled")
    if any((folder / f"{part}_X.bin").exists() for part in parts):
        return True
    # CIFAR-100's MATLAB files have the same names, and meta.mat beside them.
    return any((folder / f"{part}.mat").exists() for part in parts) and not (folder / "meta.mat").exists()


def open_stl10(path: Path, split: str | None, fold: int | None = None) -> ArraySource:
    """Open ``split`` (default: train) of STL-10's files, or one ``fold`` (0 to 9) of the images of train.

    Labels are 1 to 10 in the files and 0 to 9 here. Raises UsageError: files that are missing or cut, an unknown split.
    """
    folder, split = inner(path, *_FOLDERS), split or "train"
    if split not in SPLITS:
        raise UsageError(f"{folder}: STL-10 has no split {split!r}; choose {', '.join(SPLITS)}")
    if fold is not None and split != "train":
        raise UsageError(f"{folder}: STL-10's folds are of the split train, not {split}; leave out one of the two")
    source_mat.forget()
    matlab = not any(folder.glob("*_X.bin"))
    parts: list[Part] = [(_mat_images if matlab else _images)(folder, part) for part in split.split("+")]
    labels = None
    if split != "unlabeled":
        label_of = _mat_labels if matlab else _labels
        labels = np.concatenate(
            [label_of(folder, name, part.count) for name, part in zip(split.split("+"), parts, strict=True)]
        )
    chosen = None if fold is None else _fold(folder, fold, parts[0].count, matlab)
    return ArraySource(
        kind="stl10",
        split=split,
        class_names=_classes(folder),
        labels=labels if labels is None or chosen is None else labels[chosen],
        num_images=sum(part.count for part in parts) if chosen is None else len(chosen),
        size=(SIDE, SIDE),
        load=Loader(Chain(tuple(parts)), chosen),
    )


@dataclass(frozen=True)
class Loader:
    """Loads image i of the rows, or of those ``chosen``."""

    rows: Chain
    chosen: NDArray[np.int64] | None

    def __call__(self, index: int) -> Images:
        row = self.rows(index if self.chosen is None else int(self.chosen[index]))
        return np.ascontiguousarray(row.reshape(3, SIDE, SIDE).transpose(2, 1, 0))


def _images(folder: Path, part: str) -> Rows:
    path = folder / f"{part}_X.bin"
    return Rows(path, count_rows(path, IMAGE_BYTES), IMAGE_BYTES)


def _mat_images(folder: Path, part: str) -> source_mat.MatRows:
    return source_mat.uint8_rows(folder / f"{part}.mat", "X", IMAGE_BYTES)


def _labels(folder: Path, part: str, count: int) -> Labels:
    if part == "unlabeled":
        return np.full(count, -1, np.int64)
    path = folder / f"{part}_y.bin"
    if size_of(path) != count:
        raise UsageError(f"{path}: {size_of(path)} labels for {count} images in {part}_X.bin; unpack the archive again")
    labels = np.frombuffer(read_small(path, count), np.uint8).astype(np.int64) - 1
    demand_range(path, labels, len(CLASSES))
    return labels


def _mat_labels(folder: Path, part: str, count: int) -> Labels:
    if part == "unlabeled":
        return np.full(count, -1, np.int64)
    path = folder / f"{part}.mat"
    labels = source_mat.labels(path, "y", count) - 1
    demand_range(path, labels, len(CLASSES))
    return labels


def _classes(folder: Path) -> tuple[str, ...]:
    path = folder / "class_names.txt"
    names = text_lines(path) if path.exists() else CLASSES
    if len(names) != len(CLASSES):
        raise UsageError(f"{path}: {len(names)} names for {len(CLASSES)} classes; unpack the archive again")
    return names


def _fold(folder: Path, fold: int, count: int, matlab: bool) -> NDArray[np.int64]:
    """The places of a fold's images in train; all folds are looked at."""
    if not 0 <= fold < FOLDS:
        raise UsageError(f"{folder}: STL-10 has no fold {fold}; choose 0 to {FOLDS - 1}")
    path = folder / ("train.mat" if matlab else "fold_indices.txt")
    if matlab:
        folds = [source_mat.whole_numbers(path, "fold_indices", cell) - 1 for cell in source_mat.cells(path, "fold_indices")]
    else:
        try:
            folds = [np.array(line.split(), np.int64) for line in text_lines(path)]
        except (ValueError, OverflowError):
            raise UsageError(f"{path}: not all are whole numbers; unpack the archive again") from None
    sizes = sorted({len(one) for one in folds})
    if len(folds) != FOLDS or len(sizes) != 1 or not sizes[0]:
        raise UsageError(f"{path}: {len(folds)} folds of {sizes} images, not {FOLDS} of one size; unpack the archive again")
    for one in folds:
        if one.min() < 0 or one.max() >= count or len(np.unique(one)) != len(one):
            raise UsageError(f"{path}: a fold names an image twice, or one that is none of {count}; unpack the archive again")
    return folds[fold]
