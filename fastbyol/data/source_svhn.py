"""SVHN's cropped digits (Netzer et al., 2011): ``X`` uint8 (32, 32, 3, N) and ``y`` 1 to 10."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from fastbyol.data import source_mat
from fastbyol.data.source_arrays import Images, Source
from fastbyol.errors import UsageError, check_choice

FILES = {split: f"{split}_32x32.mat" for split in ("train", "test", "extra")}


def has_svhn(path: Path) -> bool:
    """Return whether ``path`` has the name of one of SVHN's files, or is a folder of some."""
    return (
        path.name in FILES.values()
        if path.is_file()
        else any((path / name).exists() for name in FILES.values())
    )


def open_svhn(path: Path, *, split: str | None, **others: object) -> Source:
    """Open ``split`` (default: train, or the file's). Raises UsageError for damaged files."""
    is_folder = path.is_dir()
    if not is_folder:
        of = next((split for split, name in FILES.items() if path.name == name), None)
        if of is None or split not in (None, of):
            raise UsageError(
                f"{path}: not SVHN's {split or 'train'} images by its name; give that file, or "
                "its folder"
            )
        split, path = of, path.parent
    split = split or "train"
    check_choice(f"{path}: SVHN's split", split, FILES)
    file = path / FILES[split]
    source_mat.forget()
    count = source_mat.shape_of(file, "X", 32, 32, 3, None)[3]
    labels = source_mat.labels(file, "y", count)
    # The label 10 is the digit 0. torchvision and others make it class 0; some converted files
    # already do.
    if labels.min() < 0 or labels.max() > 10:
        raise UsageError(
            f"{file}: labels from {labels.min()} to {labels.max()}, not 1 to 10; get the file again"
        )
    return Source(
        "svhn",
        split,
        tuple("0123456789"),
        labels % 10,
        count,
        3 * 32 * 32,
        partial(_image, file),
        splits=tuple(of for of, name in FILES.items() if is_folder and (path / name).exists()),
    )


def _image(path: Path, index: int) -> Images:
    return np.ascontiguousarray(source_mat.pixels(path, "X")[:, :, :, index])
