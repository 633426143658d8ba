"""STL-10 as distributed (Coates, Lee, Ng, 2011), binary or MATLAB: uint8 (N, 3, 96, 96), each plane column by column.

Ten folds of 1,000 training images each are part of its protocol.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import source_mat
from fastbyol.data.source_arrays import (
    Images,
    Labels,
    Part,
    Source,
    count_rows,
    demand_range,
    inner,
    read_row,
    read_small,
    row_of,
    size_of,
    text_lines,
)
from fastbyol.errors import UsageError, check_choice

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


def open_stl10(path: Path, split: str | None, fold: int | None = None) -> Source:
    """Open ``split`` (default: train) of STL-10's files, or one ``fold`` (0 to 9) of the images of train.

    Labels are 1 to 10 in the files and 0 to 9 here. Raises UsageError: files that are missing or cut, an unknown split.
    """
    folder, split = inner(path, *_FOLDERS), split or "train"
    check_choice(f"{folder}: STL-10's split", split, SPLITS)
    if fold is not None and split != "train":
        raise UsageError(f"{folder}: STL-10's folds are of the split train, not {split}; leave out one of the two")
    source_mat.forget()
    matlab = not any(folder.glob("*_X.bin"))
    names = split.split("+")
    parts = tuple(_images(folder, name, matlab) for name in names)
    labels = None
    if split != "unlabeled":
        labels = np.concatenate([_labels(folder, name, part.count, matlab) for name, part in zip(names, parts, strict=True)])
    chosen = None if fold is None else _fold(folder, fold, parts[0].count, matlab)
    return Source(
        kind="stl10",
        split=split,
        class_names=_classes(folder),
        labels=labels if labels is None or chosen is None else labels[chosen],
        num_images=sum(part.count for part in parts) if chosen is None else len(chosen),
        num_bytes=IMAGE_BYTES,
        image=partial(_image, parts, chosen),
    )


def _image(parts: tuple[Part, ...], chosen: NDArray[np.int64] | None, index: int) -> Images:
    row = row_of(parts, index if chosen is None else int(chosen[index]))
    return np.ascontiguousarray(row.reshape(3, SIDE, SIDE).transpose(2, 1, 0))


def _images(folder: Path, part: str, matlab: bool) -> Part:
    if matlab:
        return source_mat.uint8_rows(folder / f"{part}.mat", "X", IMAGE_BYTES)
    path = folder / f"{part}_X.bin"
    return Part(count_rows(path, IMAGE_BYTES), partial(read_row, path, IMAGE_BYTES, 0))


def _labels(folder: Path, part: str, count: int, matlab: bool) -> Labels:
    if part == "unlabeled":
        return np.full(count, -1, np.int64)
    path = folder / (f"{part}.mat" if matlab else f"{part}_y.bin")
    if matlab:
        labels = source_mat.labels(path, "y", count) - 1
    elif size_of(path) == count:
        labels = np.frombuffer(read_small(path, count), np.uint8).astype(np.int64) - 1
    else:
        raise UsageError(f"{path}: {size_of(path)} labels for {count} images in {part}_X.bin; unpack the archive again")
    demand_range(path, labels, len(CLASSES))
    return labels


def _classes(folder: Path) -> tuple[str, ...]:
    path = folder / "class_names.txt"
    names = text_lines(path) if path.exists() else CLASSES
    if len(names) != len(CLASSES):
        raise UsageError(f"{path}: {len(names)} names for {len(CLASSES)} classes; unpack the archive again")
    return names


def _fold(folder: Path, fold: int, count: int, matlab: bool) -> NDArray[np.int64]:
    """Return the places of a fold's images in train; all folds are looked at."""
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
