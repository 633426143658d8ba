"""Picture files in folders: one folder a class, or one folder of anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import rgb
from fastbyol.data.beton import UnreadableItemError
from fastbyol.errors import UsageError

# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".tga", ".avif",
))
# fmt: on
SPLIT_FOLDERS = ("train", "test", "val", "valid", "validation", "unlabeled")


@dataclass(frozen=True)
class FolderSource:
    """Picture files under ``root``. ``labels`` is None for a plain folder; ``unreadable`` holds (name, reason) of left out
    files, ``sizes`` (N,) the bytes of each decoded image."""

    kind: str
    split: str | None
    class_names: tuple[str, ...]
    root: Path
    files: tuple[str, ...]
    labels: NDArray[np.int64] | None
    sizes: NDArray[np.int64]
    unreadable: tuple[tuple[str, str], ...]
    num_ignored: int

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def name(self, index: int) -> str:
        return self.files[index]

    def image(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8; UnreadableItemError if the file is damaged."""
        return rgb.read(self.root / self.files[index])

    def label(self, index: int) -> int:
        assert self.labels is not None
        return int(self.labels[index])

    def image_bytes(self) -> NDArray[np.int64]:
        """(N,) bytes of each decoded image."""
        return self.sizes


def open_plain(root: Path, *, split: str | None, strict: bool) -> FolderSource:
    """Every picture below ``root``, in the order of their names, without labels."""
    pictures, ignored = _pictures(root)
    return _opened("folder", root, pictures, None, (), split, ignored, strict)


def open_classes(root: Path, *, class_names: tuple[str, ...], split: str | None, strict: bool) -> FolderSource:
    """Every picture below ``root``'s subfolders; the label is the place of the subfolder's name in ``class_names``."""
    files: list[str] = []
    labels: list[int] = []
    num_ignored = 0
    for label, name in enumerate(class_names):
        pictures, ignored = _pictures(root / name) if (root / name).is_dir() else ([], 0)
        files += [f"{name}/{file}" for file in pictures]
        labels += [label] * len(pictures)
        num_ignored += ignored
    return _opened("classes", root, files, np.array(labels, np.int64), class_names, split, num_ignored, strict)


def subfolders(root: Path) -> list[str]:
    """Names of the folders in ``root`` that are not hidden and not an archive program's litter, sorted."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name != "__MACOSX")


def has_pictures(root: Path) -> bool:
    """Whether a picture file lies in ``root`` itself."""
    with os.scandir(root) as entries:
        return any(_is_picture(entry.name) and entry.is_file() for entry in entries)


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - called a million times


def _pictures(root: Path) -> tuple[list[str], int]:
    """Picture files below ``root``, sorted, relative to it, and the number of other files that are not hidden."""
    names = [name for name in _walk(root) if not os.path.basename(name).startswith(".")]  # noqa: PTH119
    pictures = sorted(name for name in names if _is_picture(name))
    return pictures, len(names) - len(pictures)


def _walk(root: Path) -> Iterator[str]:
    """Files below ``root``; links to folders are followed once."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            yield os.path.relpath(os.path.join(folder, name), root)  # noqa: PTH118


def _opened(
    kind: str,
    root: Path,
    files: list[str],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...],
    split: str | None,
    num_ignored: int,
    strict: bool,
) -> FolderSource:
    """Look at every file's head: what is no picture at all is left out before any decoding."""
    sizes = np.zeros(len(files), np.int64)
    unreadable = []
    for k, name in enumerate(files):
        try:
            height, width = rgb.probe(root / name)
            sizes[k] = 3 * height * width
        except UnreadableItemError as error:
            if strict:
                raise UsageError(f"{root / name}: {error}; correct or remove it, or leave out --strict") from None
            unreadable.append((name, str(error)))
    keep = np.flatnonzero(sizes)
    kept = tuple(files[k] for k in keep)
    labels = None if labels is None else labels[keep]
    return FolderSource(kind, split, class_names, root, kept, labels, sizes[keep], tuple(unreadable), num_ignored)
