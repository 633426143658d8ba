"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in three versions: rows of 3,072 bytes, planes R, G, B.

Python: pickled dicts. Binary: a row's label, or coarse and fine label, before its pixels. MATLAB:
arrays ``data`` and ``labels``.
"""

from __future__ import annotations

import io
import pickle
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastbyol.data import source_arrays, source_mat
from fastbyol.data.source_arrays import Images, Labels, Source, inner
from fastbyol.errors import UsageError, check_choice

IMAGE_BYTES = 3 * 32 * 32


class _Set(NamedTuple):
    """The names of a set's files, and of the arrays in them."""

    num_classes: int
    labels: str
    label_names: str
    folders: tuple[str, ...]
    files: dict[str, tuple[str, ...]]  # by split
    names: dict[str, str]  # file of class names by ending: Python, binary, MATLAB


SETS = {
    "cifar10": _Set(
        num_classes=10,
        labels="labels",
        label_names="label_names",
        folders=("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-batches-mat"),
        files={"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
        names={"": "batches.meta", ".bin": "batches.meta.txt", ".mat": "batches.meta.mat"},
    ),
    "cifar100": _Set(
        num_classes=100,
        labels="fine_labels",
        label_names="fine_label_names",
        folders=("cifar-100-python", "cifar-100-binary", "cifar-100-matlab"),
        files={"train": ("train",), "test": ("test",)},
        names={"": "meta", ".bin": "fine_label_names.txt", ".mat": "meta.mat"},
    ),
}


def has_cifar(path: Path, kind: str) -> bool:
    """Return whether a set's files are in a folder, or in the one that its archive unpacks to."""
    folder = inner(path, *SETS[kind].folders)
    endings = _endings(folder, kind)
    # CIFAR-100's file names are common, so its class names have to be there, too.
    return (
        bool(endings)
        if kind == "cifar10"
        else any(_lies(folder / SETS[kind].names[end]) for end in endings)
    )


def open_cifar(path: Path, *, kind: str, split: str | None, **others: object) -> Source:
    """Open ``split`` (default: train) with its fine labels, in the version that is there."""
    of, split = SETS[kind], split or "train"
    folder = inner(path, *of.folders)
    check_choice(f"{folder}: CIFAR's split", split, of.files)
    # If none is there, the Python version's missing file is reported.
    end = next(iter(_endings(folder, kind)), "")
    files = tuple(folder / f"{name}{end}" for name in of.files[split])
    _kept.cache_clear()
    source_mat.forget()
    names = _class_names(folder / of.names[end], end, of)
    labels = np.concatenate([_read(file, end, of)[1] for file in files])
    return Source(
        kind,
        split,
        names,
        labels,
        len(labels),
        IMAGE_BYTES,
        partial(_image, kind, files, end),
        splits=tuple(
            name
            for name, stems in of.files.items()
            if all(_lies(folder / f"{stem}{end}") for stem in stems)
        ),
    )


def _image(kind: str, files: tuple[Path, ...], end: str, index: int) -> Images:
    return np.ascontiguousarray(
        _kept(kind, files, end)[index].reshape(3, 32, 32).transpose(1, 2, 0)
    )


@lru_cache(maxsize=1)
def _kept(kind: str, files: tuple[Path, ...], end: str) -> Images:
    return np.concatenate([_read(file, end, SETS[kind])[0] for file in files])


def _endings(folder: Path, kind: str) -> list[str]:
    """Return the endings of the versions that have a file there."""
    names = [name for files in SETS[kind].files.values() for name in files]
    return [
        end for end in SETS[kind].names if any(_lies(folder / f"{name}{end}") for name in names)
    ]


def _lies(path: Path) -> bool:
    # Opening the file reports pipes and the like.
    return path.exists() and not path.is_dir()


def _class_names(path: Path, end: str, of: _Set) -> tuple[str, ...]:
    if end == ".bin":
        names: object = list(source_arrays.text_lines(path))
    else:
        names = (
            source_mat.cells(path, of.label_names) if end else _unpickled(path).get(of.label_names)
        )
    wanted = of.num_classes
    if (
        not isinstance(names, list)
        or len(names) != wanted
        or not all(isinstance(name, str | bytes) for name in names)
    ):
        raise UsageError(
            f"{path}: {of.label_names!r} is not a list of {wanted} names; unpack the archive again"
        )
    return tuple(_text(name) for name in names)


def _read(path: Path, end: str, of: _Set) -> tuple[Images, Labels]:
    """Read a whole file: rows of pixels (N, ``IMAGE_BYTES``) and labels (N,)."""
    if end == ".mat":
        rows: Any = source_mat.pixels(path, "data", None, IMAGE_BYTES)
        labels = source_mat.labels(path, of.labels, len(rows))
    elif end == ".bin":
        data, before = (
            np.frombuffer(source_arrays.read_whole(path), np.uint8),
            1 if of.num_classes == 10 else 2,
        )
        data = data.reshape(source_arrays.count_rows(path, data.size, before + IMAGE_BYTES), -1)
        rows, labels = data[:, before:], data[:, before - 1].astype(np.int64)
    else:
        batch = _unpickled(path)
        rows, values = batch.get("data"), batch.get(of.labels)
        if (
            not isinstance(rows, np.ndarray)
            or rows.ndim != 2
            or rows.shape[1] != IMAGE_BYTES
            or not len(rows)
        ):
            raise UsageError(
                f"{path}: 'data' is not uint8 of shape (N, {IMAGE_BYTES}); unpack the archive again"
            )
        if not isinstance(values, list) or not all(
            type(value) is int and value.bit_length() < 64 for value in values
        ):
            raise UsageError(
                f"{path}: {of.labels!r} is not a list of integers; unpack the archive again"
            )
        if len(values) != len(rows):
            raise UsageError(
                f"{path}: {len(values)} labels for {len(rows)} images; unpack the archive again"
            )
        labels = np.array(values, np.int64)
    source_arrays.demand_range(path, labels, of.num_classes)
    return rows, labels


def _text(name: object) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _unpickled(path: Path) -> dict[str, Any]:
    """Read the dict in a CIFAR file, its keys as text."""
    data = source_arrays.read_whole(path)
    with source_arrays.untrusted(path, "not a CIFAR file", "unpack the archive again"):
        value = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        return {
            _text(key): item.values if isinstance(item, _Array) else item
            for key, item in value.items()
        }


class _Type:
    """An array's type in a pickle: only bytes are accepted. The state (byte order) is ignored."""

    def __init__(self, code: object, *_: object) -> None:
        if _text(code) not in ("u1", "uint8", "B"):
            raise pickle.UnpicklingError(f"an array of {_text(code)!r}, not of bytes")

    def __setstate__(self, state: object) -> None: ...


class _Array:
    """An array of bytes, rebuilt from data that is there: a number in the file takes no memory."""

    values = np.zeros(0, np.uint8)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Type):
            raise pickle.UnpicklingError("an array without a type")
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


def _from_buffer(data: object, kind: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _latin1(text: str, encoding: str) -> bytes:
    # Python 3 writes bytes into an old pickle in this way.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): None,  # the first argument of _reconstruct
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
}


# Unpickling runs code by design, so only the parts of an array may be named. This is the unpickler
# in Python, since the one in C zeroes a table as long as the largest memo index in the file.
class _ArraysOnly(pickle._Unpickler):
    """An unpickler of built-in values and arrays of bytes that refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        key = module.replace("numpy._core", "numpy.core"), name  # numpy 2 renamed it
        if key not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return _ALLOWED[key]
