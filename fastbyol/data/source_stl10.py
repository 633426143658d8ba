"""STL-10 (Coates, Lee, Ng, 2011), binary or MATLAB: uint8 (N, 3, 96, 96), planes column by column.

Its protocol has ten folds of 1,000 training images each.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import source_arrays, source_mat
from fastbyol.data.source_arrays import Images, Labels, Source, inner
from fastbyol.errors import UsageError, check_choice

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
SPLITS = ("train", "test", "unlabeled", "train+unlabeled")
FOLDS = 10
_FOLDERS = ("stl10_binary", "stl10_matlab")


def has_stl10(path: Path) -> bool:
    """Return whether STL-10's files are in a folder, or in the one that its archive unpacks to."""
    folder, parts = inner(path, *_FOLDERS), ("train", "test", "unlabeled")
    if any((folder / f"{part}_X.bin").exists() for part in parts):
        return True
    # CIFAR-100's MATLAB files have the same names, and meta.mat beside them.
    return (
        any((folder / f"{part}.mat").exists() for part in parts)
        and not (folder / "meta.mat").exists()
    )


def open_stl10(path: Path, *, split: str | None, fold: int | None, **others: object) -> Source:
    """Open ``split`` (default: train) of STL-10's files, or one ``fold`` (0 to 9) of train.

    Labels are 1 to 10 in the files and 0 to 9 here. Raises UsageError for missing or cut files.
    """
    folder, split = inner(path, *_FOLDERS), split or "train"
    check_choice(f"{folder}: STL-10's split", split, SPLITS)
    if fold is not None and split != "train":
        raise UsageError(
            f"{folder}: STL-10's folds are of the split train, not {split}; leave out one of the "
            "two"
        )
    source_mat.forget()
    matlab = not any(folder.glob("*_X.bin"))
    parts = [_part(folder, name, matlab) for name in split.split("+")]
    labels = np.concatenate([own for _, own in parts])
    chosen = np.arange(len(labels)) if fold is None else _fold(folder, fold, len(labels), matlab)
    return Source(
        kind="stl10",
        split=split,
        class_names=_classes(folder),
        labels=None if split == "unlabeled" else labels[chosen],
        num_images=len(chosen),
        num_bytes=IMAGE_BYTES,
        image=partial(_image, tuple((file, len(own)) for file, own in parts), chosen),
        splits=tuple(
            name
            for name in ("train", "test", "unlabeled")
            if (folder / (f"{name}.mat" if matlab else f"{name}_X.bin")).exists()
        ),
    )


def _image(files: tuple[tuple[Path, int], ...], rows: NDArray[np.int64], index: int) -> Images:
    row = int(rows[index])  # counted through all files
    for file, count in files:
        if row < count:
            is_matlab = file.suffix == ".mat"
            pixels = (
                source_mat.pixels(file, "X")[row]
                if is_matlab
                else source_arrays.read_row(file, IMAGE_BYTES, 0, row)
            )
            return np.ascontiguousarray(pixels.reshape(3, SIDE, SIDE).transpose(2, 1, 0))
        row -= count
    raise IndexError(index)


def _part(folder: Path, part: str, matlab: bool) -> tuple[Path, Labels]:
    """Return the file with a part's images, and their labels, -1 where there are none."""
    if matlab:
        file = labels_file = folder / f"{part}.mat"
        count = source_mat.shape_of(file, "X", None, IMAGE_BYTES)[0]
    else:
        file, labels_file = folder / f"{part}_X.bin", folder / f"{part}_y.bin"
        count = source_arrays.count_rows(file, source_arrays.size_of(file), IMAGE_BYTES)
    if part == "unlabeled":
        return file, np.full(count, -1, np.int64)
    labels = (
        source_mat.labels(file, "y", count)
        if matlab
        else np.frombuffer(source_arrays.read_whole(labels_file), np.uint8)
    )
    if len(labels) != count:
        raise UsageError(
            f"{labels_file}: {len(labels)} labels for {count} images in {file.name}; unpack the "
            "archive again"
        )
    labels = labels.astype(np.int64) - 1
    source_arrays.demand_range(labels_file, labels, len(CLASSES))
    return file, labels


def _classes(folder: Path) -> tuple[str, ...]:
    path = folder / "class_names.txt"
    names = source_arrays.text_lines(path) if path.exists() else CLASSES
    if len(names) != len(CLASSES):
        raise UsageError(
            f"{path}: {len(names)} names for {len(CLASSES)} classes; unpack the archive again"
        )
    return names


def _fold(folder: Path, fold: int, count: int, matlab: bool) -> NDArray[np.int64]:
    """Return the indices of a fold's images in train, after a check of all folds."""
    if not 0 <= fold < FOLDS:
        raise UsageError(f"{folder}: STL-10 has no fold {fold}; choose 0 to {FOLDS - 1}")
    path = folder / ("train.mat" if matlab else "fold_indices.txt")
    if matlab:
        folds = [
            source_mat.whole_numbers(path, "fold_indices", cell) - 1
            for cell in source_mat.cells(path, "fold_indices")
        ]
    else:
        try:
            folds = [np.array(line.split(), np.int64) for line in source_arrays.text_lines(path)]
        except (ValueError, OverflowError):
            raise UsageError(
                f"{path}: not all are whole numbers; unpack the archive again"
            ) from None
    sizes = sorted({len(indices) for indices in folds})
    if len(folds) != FOLDS or len(sizes) != 1 or not sizes[0]:
        raise UsageError(
            f"{path}: {len(folds)} folds of {sizes} images, not {FOLDS} of one size; unpack the "
            "archive again"
        )
    for indices in folds:
        if indices.min() < 0 or indices.max() >= count or len(np.unique(indices)) != len(indices):
            raise UsageError(
                f"{path}: a fold names an image twice, or one that is none of {count}; unpack the "
                "archive again"
            )
    return folds[fold]
