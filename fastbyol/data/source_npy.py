"""npy files: one with images, and beside it one with labels; and what npz files share with them, names and heads.

An array's name says what it holds and of which split: ``images``, ``x_train``, ``train_labels``, ``testY`` and so on.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import splits
from fastbyol.data.source_arrays import (
    Images,
    Labels,
    NamesAndReasons,
    Source,
    as_rgb,
    class_labels,
    demand_memory,
    demand_one_label_each,
    fit_labels,
    image_size,
    listed,
    notes_on,
    planes_first,
    read_row,
)
from fastbyol.errors import UsageError, one_line
from fastbyol.files import open_regular

IMAGE_NAMES = ("images", "image", "imgs", "img", "x", "data", "arr0")
LABEL_NAMES = ("labels", "label", "targets", "target", "y", "classes", "class", "arr1")
# numpy reads heads of 10,000 letters at most unless told to trust them.
MAX_HEAD = 1 << 14
PIECE_BYTES = 1 << 20
NO_ARRAYS = "files that are no arrays"


@dataclass(frozen=True)
class Role:
    """What an array is for by its name; ``rank`` orders the names of one role."""

    rank: int
    labels: bool
    split: str | None


def _roles() -> dict[str, Role]:
    found = {}
    for split, words in ((None, ("",)), *splits.WORDS.items()):
        for labels, names in ((False, IMAGE_NAMES), (True, LABEL_NAMES)):
            for rank, name in enumerate(names):
                for word in words:
                    found[word + name] = found[name + word] = Role(rank, labels, split)
    return found


_ROLES = _roles()


@dataclass(frozen=True)
class Named:
    """The arrays of one file or folder by what their names say. ``where`` begins the messages."""

    where: str
    names: tuple[str, ...]

    def split(self, wanted: str | None) -> str | None:
        """Return the split to take: ``wanted``, else none, train or the first; UsageError if it is not there."""
        held = [split for split in (None, *splits.WORDS) if self.find(split, labels=False) is not None]
        if not held:
            raise UsageError(
                f"{self.where}: no images under images, x, train_images, x_train or the like; its arrays are "
                f"{listed(self.names)}, save them so"
            )
        if wanted is None:
            return held[0]
        if wanted not in held:
            known = listed(split for split in held if split is not None)
            what = f"no split {wanted!r}, as {wanted}_images would be; its splits are {known}"
            raise UsageError(f"{self.where}: {what}, its arrays {listed(self.names)}")
        return wanted

    def notes(self, wanted: str | None, taken: str | None) -> tuple[str, ...]:
        """Say what a reader should know where a split was taken that nobody asked for."""
        others = [split for split in splits.WORDS if split != taken and self.find(split, labels=False) is not None]
        if wanted is not None or not others:
            return ()
        return (f"took {f'the split {taken}' if taken else 'the images of no split'}; --split takes {' or '.join(others)}",)

    def ignored(self, taken: str | None) -> tuple[tuple[str, str], ...]:
        """Return the arrays whose names say nothing, and those of ``taken`` or of no split in whose place others were taken."""
        chosen = {self.find(taken, labels=labels) for labels in (False, True)}
        found = []
        for name in self.names:
            role = role_of(name)
            if role is None or (role.split in (taken, None) and name not in chosen):
                found.append((name, "arrays of no known name" if role is None else "arrays beside those that were taken"))
        return tuple(found)

    def find(self, split: str | None, *, labels: bool) -> str | None:
        """Return the name of a split's images or labels; None where there are none, UsageError where two names mean it."""
        ranked = [
            (role.rank, name) for name in self.names if (role := role_of(name)) and (role.labels, role.split) == (labels, split)
        ]
        best = [name for rank, name in ranked if rank == min(ranked)[0]]
        if len(best) > 1:
            raise UsageError(f"{self.where}: {listed(best)} may all be meant; keep one of them under that name")
        return best[0] if best else None

    def pair(self, split: str | None) -> tuple[str, str | None, list[str]]:
        """Return the names of a split's images and labels, and of the labels of all others."""
        labels = self.find(split, labels=True)
        every = [name for other in (None, *splits.WORDS) if (name := self.find(other, labels=True))]
        return str(self.find(split, labels=False)), labels, [name for name in every if name != labels]


def role_of(name: str) -> Role | None:
    """Tell what an array's name says, in any spelling of ``_``, ``-`` and capitals."""
    return _ROLES.get("".join(letter for letter in name.lower() if letter.isalnum()))


@dataclass(frozen=True)
class Head:
    """What an array in npy format says of itself; its values begin at ``offset``."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_head(file: BinaryIO, where: str) -> Head:
    """Read the head of an array in npy format at the beginning of ``file``; no more than ``MAX_HEAD`` bytes are read."""
    start = io.BytesIO(file.read(MAX_HEAD))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the literals in a damaged head
            version = np.lib.format.read_magic(start)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"of version {version}")
            first = version == (1, 0)
            shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(
                start
            )
    except Exception as error:  # heads are parsed from untrusted bytes
        raise UsageError(f"{where}: not a whole array in npy format ({one_line(error)}); save it again") from None
    if min(shape, default=0) < 0 or dtype.itemsize == 0:
        raise UsageError(f"{where}: its head says shape {shape} of {dtype}; save it again")
    return Head(tuple(map(int, shape)), fortran, dtype, start.tell())


def demand_held(where: str, head: Head, num_bytes: int) -> None:
    """Raise UsageError unless ``num_bytes``, head included, are what the head says."""
    held = num_bytes - head.offset
    if head.dtype.hasobject or held == head.num_bytes:  # of objects, which are refused elsewhere, no number is known
        return
    raise UsageError(f"{where}: holds {held} bytes of values, its head says {head.num_bytes}; save it again")


def read_values(file: BinaryIO, where: str, head: Head) -> NDArray[Any]:
    """Read the array whose ``head`` was read; ``file`` stands at its beginning. Memory is taken once, if it is there."""
    demand_memory(where, head.num_bytes)
    file.read(head.offset)
    try:
        values = np.empty(head.num_bytes, np.uint8)
    except MemoryError:
        raise UsageError(f"{where}: no memory for {head.num_bytes} bytes; save it in parts") from None
    rest = values.data
    # A zip archive's member makes its own copy of what is asked for at once.
    while rest and (count := file.readinto(rest[:PIECE_BYTES])):  # type: ignore[attr-defined]
        rest = rest[count:]
    if rest:
        raise UsageError(f"{where}: ends {len(rest)} bytes before its head says; save it again")
    return values.view(head.dtype).reshape(head.shape, order="F" if head.fortran else "C")


def has_npy(path: Path) -> bool:
    """Tell whether ``path`` is an npy file, or a folder that holds one with images by its name."""
    if path.is_file():
        return path.name.lower().endswith(".npy")
    return any((role := role_of(name)) is not None and not role.labels for name in _arrays_in(path))


def open_npy(path: Path, split: str | None) -> Source:
    """Open npy files: the images of ``split`` in a folder, or those of one file, with the labels beside them.

    Beside ``x_train.npy`` lies ``y_train.npy`` or ``train_labels.npy``, beside ``cats.npy`` ``cats_labels.npy``.
    """
    folder, only = (path, None) if path.is_dir() else (path.parent, path.stem)
    files = _arrays_in(folder)
    ignored: NamesAndReasons = ()
    notes, others = tuple[str, ...](), list[str]()
    role = None if only is None else role_of(only)
    if only is None:
        named = Named(str(folder), tuple(files))
        wanted, split = split, named.split(split)
        notes, ignored = named.notes(wanted, split), named.ignored(split) + _others_in(folder)
        image, label, others = named.pair(split)
    elif role is None:
        if split is not None:
            raise UsageError(f"{path}: its name says no split; call it {split}_images.npy, or leave out the split")
        image, label = only, next((name for name in _beside(only) if name in files), None)
    elif role.labels:
        raise UsageError(f"{path}: holds labels by its name; give the file with the images, or the folder of both")
    elif split not in (None, role.split):
        raise UsageError(f"{path}: is not of the split {split} by its name")
    else:
        split = role.split
        image, (_, label, others) = only, Named(str(folder), tuple(files)).pair(split)
    paths = [str(files[name]) for name in others]
    source = opened("npy", Files(), str(files.get(image, path)), None if label is None else str(files[label]), paths, split)
    return replace(source, ignored=ignored, notes=notes + source.notes)


class Arrays(Hashable, Protocol):
    """Arrays in npy format by name: ``where`` begins messages on one."""

    def where(self, name: str, /) -> str: ...
    def head(self, name: str, /) -> Head: ...
    def values(self, name: str, /) -> NDArray[Any]: ...


def opened(kind: str, arrays: Arrays, image: str, label: str | None, others: list[str], split: str | None) -> Source:
    """Open the array ``image`` with the labels in the array ``label``; ``others`` are the labels of the other splits."""
    _kept.cache_clear()
    head, where = arrays.head(image), arrays.where(image)
    num_labels = None if label is None else math.prod(arrays.head(label).shape)
    height, width = image_size(where, head.shape, head.dtype, num_labels)
    labels: Labels | None = None
    names: tuple[str, ...] = ()
    if label is not None:
        own = _labels(arrays, head.shape[0], label)
        labels, names = class_labels(arrays.where(label), own, fit_labels(partial(_labels, arrays, None), others))
    load = partial(_image, arrays, image, head)
    return Source(kind, split, names, labels, head.shape[0], 3 * height * width, load, notes=notes_on(names))


def _labels(arrays: Arrays, count: int | None, name: str) -> NDArray[Any]:
    head = arrays.head(name)
    demand_one_label_each(arrays.where(name), head.shape, head.dtype, math.prod(head.shape) if count is None else count)
    return arrays.values(name)


def _image(arrays: Arrays, name: str, head: Head, index: int) -> Images:
    # Alone, unless it lies in an archive, or not in one piece (Fortran order).
    if isinstance(arrays, Files) and not head.fortran:
        image = read_row(Path(name), math.prod(head.shape[1:]), head.offset, index).reshape(head.shape[1:])
    else:
        image = _kept(arrays, name)[index]
    return as_rgb(image, planes_first(head.shape))


@lru_cache(maxsize=1)
def _kept(arrays: Arrays, name: str) -> NDArray[Any]:
    return arrays.values(name)


@dataclass(frozen=True)
class Files:
    """npy files, named by their paths."""

    def where(self, path: str) -> str:
        return path

    def head(self, path: str) -> Head:
        """Read the head of a file, which holds what it says."""
        with open_regular(Path(path)) as file:
            head = read_head(file, path)
            demand_held(path, head, os.fstat(file.fileno()).st_size)
        return head

    def values(self, path: str) -> NDArray[Any]:
        """Read an array whole."""
        head = self.head(path)
        with open_regular(Path(path)) as file:
            return read_values(file, path, head)


def _arrays_in(folder: Path) -> dict[str, Path]:
    """Return the npy files of a folder by their names without the ending."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(".npy") and entry.name[0] != ".")
    return {name[:-4]: folder / name for name in names}


def _others_in(folder: Path) -> tuple[tuple[str, str], ...]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.lower().endswith(".npy") and entry.name[0] != ".")
    return tuple((name, NO_ARRAYS) for name in names)


def _beside(stem: str) -> list[str]:
    return [f"{stem}{mark}{name}" for mark in ("_", "-", ".") for name in LABEL_NAMES]
