"""npy files of images and labels, and the array names and heads that npz files share with them.

An array's name says what it holds and of which split: ``images``, ``x_train``, ``testY`` and so on.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import source_arrays, splits
from fastbyol.data.source_arrays import Images, Labels, Source, listed
from fastbyol.errors import UsageError
from fastbyol.files import open_regular

IMAGE_NAMES = ("images", "image", "imgs", "img", "x", "data", "arr0")
LABEL_NAMES = ("labels", "label", "targets", "target", "y", "classes", "class", "arr1")
# numpy reads heads of at most 10,000 letters unless told to trust them.
MAX_HEAD = 1 << 14


class Role(NamedTuple):
    """The purpose of an array by its name; ``rank`` orders the names of one role."""

    split: str | None
    labels: bool
    rank: int


_ROLES = {
    name: Role(split, labels, rank)
    for split, words in ((None, ("",)), *splits.WORDS.items())
    for labels, names in ((False, IMAGE_NAMES), (True, LABEL_NAMES))
    for rank, what in enumerate(names)
    for word in words
    for name in (word + what, what + word)
}


def role_of(name: str) -> Role | None:
    """Return the role that a name tells, however it writes ``_``, ``-`` and capitals."""
    return _ROLES.get("".join(letter for letter in name.lower() if letter.isalnum()))


class Head(NamedTuple):
    """The head of an array in npy format; the values begin at ``offset``."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int


@dataclass(frozen=True)
class NpyFile:
    """An array in npy format in a file of its own. As text it begins error messages."""

    path: Path
    alone: ClassVar[bool] = True

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, int]]:
        """Open the array's bytes; yield them and their number."""
        with open_regular(self.path) as file:
            yield file, os.fstat(file.fileno()).st_size

    def head(self) -> Head:
        """Read the head, at most ``MAX_HEAD`` bytes.

        Raises UsageError if the file's size differs.
        """
        with self.open() as (file, num_bytes):
            start = io.BytesIO(file.read(MAX_HEAD))
        with _parsing(self), warnings.catch_warnings(action="ignore"):  # of damaged literals
            version = np.lib.format.read_magic(start)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"of version {version}")
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(start)
        if min(shape, default=0) < 0 or dtype.itemsize == 0:
            raise UsageError(f"{self}: its head says shape {shape} of {dtype}; save it again")
        size, stated = num_bytes - start.tell(), math.prod(shape) * dtype.itemsize
        if size != stated and not dtype.hasobject:  # objects are refused later
            raise UsageError(
                f"{self}: holds {size} bytes of values, its head says {stated}; save it again"
            )
        return Head(tuple(map(int, shape)), fortran, dtype, start.tell())

    def values(self) -> NDArray[Any]:
        """Read the whole array, after a check that it fits into memory."""
        head = self.head()
        source_arrays.demand_memory(str(self), math.prod(head.shape) * head.dtype.itemsize)
        with self.open() as (file, _), _parsing(self):
            values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # zipfile verifies the checksum only at a member's end
        return values


def _parsing(array: NpyFile) -> AbstractContextManager[None]:
    return source_arrays.untrusted(array, "not a whole array in npy format", "save it again")


def has_npy(path: Path) -> bool:
    """Return whether a folder holds an npy file that is named like images."""
    return any((role := role_of(name)) is not None and not role.labels for name in _arrays_in(path))


def open_npy(path: Path, *, split: str | None, **others: object) -> Source:
    """Open the npy images of ``split`` in a folder, or those of one file, with their labels.

    The labels of ``x_train.npy`` are in ``y_train.npy`` or ``train_labels.npy``, those of
    ``cats.npy`` in ``cats_labels.npy``.
    """
    if path.is_dir():
        names = sorted(
            each.name for each in path.iterdir() if not _is_array(each.name) and each.name[0] != "."
        )
        return open_named("npy", str(path), _arrays_in(path), names, split)
    arrays, role = _arrays_in(path.parent), role_of(path.stem)
    if role is None:
        if split is not None:
            raise UsageError(
                f"{path}: its name says no split; call it {split}_images.npy, or leave out the "
                "split"
            )
        beside = [f"{path.stem}{mark}{name}" for mark in ("_", "-", ".") for name in LABEL_NAMES]
        labels = next((arrays[name] for name in beside if name in arrays), None)
        named = {"images": NpyFile(path)} | ({} if labels is None else {"labels": labels})
    elif role.labels:
        raise UsageError(
            f"{path}: holds labels by its name; give the file with the images, or the folder of "
            "both"
        )
    elif split not in (None, role.split):
        raise UsageError(f"{path}: is not of the split {split} by its name")
    else:
        named = {
            name: array for name, array in arrays.items() if (of := role_of(name)) and of.labels
        }
        named[path.stem] = NpyFile(path)
    return replace(open_named("npy", str(path.parent), named, (), split), ignored=())


def open_named(
    kind: str, where: str, arrays: Mapping[str, NpyFile], others: Iterable[str], split: str | None
) -> Source:
    """Open the images of ``split`` and their labels by the names of the arrays.

    Without ``split`` take the images of no split, of train, or of the first split there is.
    ``where`` begins messages; ``others`` names the files beside that are no arrays.
    """
    names = _by_role(where, arrays)
    splits_here = [part for part in (None, *splits.WORDS) if (part, False) in names]
    if not splits_here:
        wanted = "no images under images, x, train_images, x_train or the like"
        raise UsageError(f"{where}: {wanted}; its arrays are {listed(arrays)}, save them so")
    taken = splits_here[0] if split is None else split
    if taken not in splits_here:
        what = (
            f"no split {taken!r}, as {taken}_images would be; its splits are "
            f"{listed(filter(None, splits_here))}"
        )
        raise UsageError(f"{where}: {what}, its arrays {listed(arrays)}")
    notes: tuple[str, ...] = ()
    if split is None and (untaken := [part for part in splits_here if part not in (taken, None)]):
        notes = (
            f"took {f'the split {taken}' if taken else 'the images of no split'}; --split takes "
            f"{' or '.join(untaken)}",
        )
    chosen = names[taken, False], names.get((taken, True))
    ignored = [
        (name, "arrays of no known name" if role is None else "arrays beside those that were taken")
        for name in arrays
        if (role := role_of(name)) is None or (role.split in (taken, None) and name not in chosen)
    ]
    ignored += [(name, "files that are no arrays") for name in others]
    image, label = arrays[chosen[0]], None if chosen[1] is None else arrays[chosen[1]]
    _kept.cache_clear()
    head = image.head()
    num_labels = None if label is None else math.prod(label.head().shape)
    height, width = source_arrays.image_size(str(image), head.shape, head.dtype, num_labels)
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    if label is not None:
        other_labels = [
            arrays[name]
            for (_, are_labels), name in names.items()
            if are_labels and name != chosen[1]
        ]
        labels, class_names = source_arrays.class_labels(
            str(label), _labels(label, head.shape[0]), _fit(other_labels)
        )
    return Source(
        kind=kind,
        split=taken,
        class_names=class_names,
        labels=labels,
        num_images=head.shape[0],
        num_bytes=3 * height * width,
        image=partial(_image, image, head),
        ignored=tuple(ignored),
        notes=notes + source_arrays.notes_on(class_names),
        splits=tuple(filter(None, splits_here)),
    )


def _by_role(where: str, names: Iterable[str]) -> dict[tuple[str | None, bool], str]:
    """Map (split, is for labels) to a name. Raises UsageError where two names mean the same."""
    ranked: dict[tuple[str | None, bool], list[tuple[int, str]]] = {}
    for name in names:
        if role := role_of(name):
            ranked.setdefault((role.split, role.labels), []).append((role.rank, name))
    for rows in ranked.values():
        best = [name for rank, name in rows if rank == min(rows)[0]]
        if len(best) > 1:
            raise UsageError(
                f"{where}: {listed(best)} may all be meant; keep one of them under that name"
            )
    return {key: min(rows)[1] for key, rows in ranked.items()}


def _fit(arrays: Iterable[NpyFile]) -> Iterator[NDArray[Any]]:
    """Yield the labels of other splits but skip invalid ones, since nothing asked for them."""
    for array in arrays:
        with suppress(UsageError):
            yield _labels(array, math.prod(array.head().shape))


def _labels(array: NpyFile, count: int) -> NDArray[Any]:
    head = array.head()
    source_arrays.demand_one_label_each(str(array), head.shape, head.dtype, count)
    return array.values()


def _image(array: NpyFile, head: Head, index: int) -> Images:
    # Only a C-ordered array in a file of its own can be read row by row.
    if array.alone and not head.fortran:
        image = source_arrays.read_row(
            array.path, math.prod(head.shape[1:]), head.offset, index
        ).reshape(head.shape[1:])
    else:
        image = _kept(array)[index]
    return source_arrays.as_rgb(image, source_arrays.planes_first(head.shape))


_kept = lru_cache(maxsize=1)(NpyFile.values)


def _arrays_in(folder: Path) -> dict[str, NpyFile]:
    """Map the npy files of a folder by their names without the ending."""
    names = sorted(
        each.name for each in folder.iterdir() if _is_array(each.name) and each.name[0] != "."
    )
    return {name[:-4]: NpyFile(folder / name) for name in names}


def _is_array(name: str) -> bool:
    return name.lower().endswith(".npy")
