"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in their three versions: rows of 3,072 bytes, planes R, G, B.

Python: pickled dicts. Unpickling runs code by design, so only what an array is made of may be named in these files. Binary:
a row's label, or its coarse and its fine label, before it. MATLAB: arrays ``data`` and ``labels``.
"""

from __future__ import annotations

import pickle
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import source_mat
from fastbyol.data.source_arrays import (
    Images,
    Labels,
    Part,
    Source,
    count_rows,
    demand_memory,
    demand_range,
    inner,
    read_row,
    row_of,
    size_of,
    text_lines,
)
from fastbyol.errors import UsageError, check_choice, one_line
from fastbyol.files import open_regular

IMAGE_BYTES = 3 * 32 * 32
SPLITS = ("train", "test")
Version = Literal["python", "binary", "matlab"]
_FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-batches-mat"),
    "cifar100": ("cifar-100-python", "cifar-100-binary", "cifar-100-matlab"),
}
_ENDINGS: dict[Version, str] = {"python": "", "binary": ".bin", "matlab": ".mat"}
_NAMES: dict[Version, tuple[str, str]] = {
    "python": ("batches.meta", "meta"),
    "binary": ("batches.meta.txt", "fine_label_names.txt"),
    "matlab": ("batches.meta.mat", "meta.mat"),
}


def has_cifar(path: Path, kind: str) -> bool:
    """Tell whether the files of CIFAR-10 or CIFAR-100 lie in a folder, or in the one that an archive unpacks to."""
    folder = inner(path, *_FOLDERS[kind])
    if kind == "cifar10":
        return any((folder / f"{name}{end}").exists() for name in ("data_batch_1", "test_batch") for end in _ENDINGS.values())
    return any(
        _no_folder(folder / _NAMES[version][1]) and any(_no_folder(folder / f"{split}{end}") for split in SPLITS)
        for version, end in _ENDINGS.items()
    )


def open_cifar(path: Path, kind: str, split: str | None) -> Source:
    """Open ``split`` (default: train) of CIFAR-10 or CIFAR-100, with the fine labels, in the version that lies there."""
    folder, split = inner(path, *_FOLDERS[kind]), split or "train"
    check_choice(f"{folder}: CIFAR's split", split, SPLITS)
    version = _version(folder, kind)
    files = [folder / f"{name}{_ENDINGS[version]}" for name in _files(kind, split)]
    _kept_rows.cache_clear()
    source_mat.forget()
    names = _class_names(folder, kind, version)
    key = "labels" if kind == "cifar10" else "fine_labels"
    parts: list[Part] = []
    labels: list[Labels] = []
    for file in files:
        part, own = {"python": _python, "binary": _binary, "matlab": _matlab}[version](file, key)
        demand_range(file, own, 10 if kind == "cifar10" else 100)
        parts.append(part)
        labels.append(own)
    image = partial(_image, tuple(parts))
    return Source(kind, split, names, np.concatenate(labels), sum(map(len, labels)), IMAGE_BYTES, image)


def _image(parts: tuple[Part, ...], index: int) -> Images:
    planes = row_of(parts, index)[-IMAGE_BYTES:].reshape(3, 32, 32)  # what stands before the pixels is left out
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _no_folder(path: Path) -> bool:
    """Tell whether something lies there that is no folder: what else it is no file is said when it is opened."""
    return path.exists() and not path.is_dir()


def _files(kind: str, split: str) -> tuple[str, ...]:
    if kind == "cifar100":
        return (split,)
    return tuple(f"data_batch_{k}" for k in range(1, 6)) if split == "train" else ("test_batch",)


def _version(folder: Path, kind: str) -> Version:
    """Tell the version whose files are there; the Python version where none is, for its messages."""
    for version, end in _ENDINGS.items():
        if any((folder / f"{name}{end}").exists() for split in SPLITS for name in _files(kind, split)):
            return version
    return "python"


def _class_names(folder: Path, kind: str, version: Version) -> tuple[str, ...]:
    path = folder / _NAMES[version][kind == "cifar100"]
    key = "label_names" if kind == "cifar10" else "fine_label_names"
    if version == "binary":
        names: object = list(text_lines(path))
    else:
        names = _unpickled(path).get(key) if version == "python" else source_mat.cells(path, key)
    wanted = 10 if kind == "cifar10" else 100
    if not isinstance(names, list) or len(names) != wanted or not all(isinstance(name, str | bytes) for name in names):
        raise UsageError(f"{path}: {key!r} is not a list of {wanted} names; unpack the archive again")
    return tuple(_text(name) for name in names)


def _binary(path: Path, key: str) -> tuple[Part, Labels]:
    before = 1 if key == "labels" else 2
    row_bytes = before + IMAGE_BYTES
    count = count_rows(path, row_bytes)
    with open_regular(path) as file:
        labels = np.array([file.read(row_bytes)[before - 1] for _ in range(count)], np.int64)
    return Part(count, partial(read_row, path, row_bytes, 0)), labels


def _matlab(path: Path, key: str) -> tuple[Part, Labels]:
    rows = source_mat.uint8_rows(path, "data", IMAGE_BYTES)
    return rows, source_mat.labels(path, key, rows.count)


@lru_cache(maxsize=5)
def _kept_rows(path: Path) -> Images:
    return _rows(path, _unpickled(path))


def _pickled_row(path: Path, index: int) -> NDArray[np.uint8]:
    row: Images = _kept_rows(path)[index]
    return row


def _rows(path: Path, batch: dict[str, Any]) -> Images:
    rows = batch.get("data")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != IMAGE_BYTES:
        raise UsageError(f"{path}: 'data' is not uint8 of shape (N, {IMAGE_BYTES}); unpack the archive again")
    if not len(rows):
        raise UsageError(f"{path}: holds no images; unpack the archive again")
    return rows


def _python(path: Path, key: str) -> tuple[Part, Labels]:
    batch = _unpickled(path)
    values, rows = batch.get(key), _rows(path, batch)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UsageError(f"{path}: {key!r} is not a list of integers; unpack the archive again")
    if len(values) != len(rows):
        raise UsageError(f"{path}: {len(values)} labels for {len(rows)} images; unpack the archive again")
    if not all(0 <= value < 100 for value in values):
        raise UsageError(f"{path}: labels go beyond {10 if key == 'labels' else 100} classes; unpack the archive again")
    return Part(len(rows), partial(_pickled_row, path)), np.array(values, np.int64)


def _text(name: object) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _unpickled(path: Path) -> dict[str, Any]:
    """Read the dict in a CIFAR file, its keys as text. Nothing but arrays and plain values is ever constructed."""
    demand_memory(str(path), size_of(path))
    try:
        with open_regular(path) as file:
            value = _ArraysOnly(file, encoding="bytes").load()
        return {_text(key): item.values if isinstance(item, _Array) else item for key, item in value.items()}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except Exception as error:  # a damaged pickle raises anything
        raise UsageError(f"{path}: not a CIFAR file ({one_line(error)}); unpack the archive again") from None


class _Type:
    """What a pickle says of an array's type: its code; then a state that says the byte order, which bytes have none of."""

    def __init__(self, code: str | bytes, align: object = False, copy: object = False) -> None:
        self.code = _text(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if self.code not in ("u1", "uint8", "B"):
            raise pickle.UnpicklingError(f"an array of {self.code!r}, not of bytes")


class _Array:
    """An array of bytes as a pickle rebuilds it; made from data that is there, so that no number alone takes memory."""

    values: Images

    def __init__(self, kind: object, shape: object, code: object) -> None:
        self.values = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self._fill(data, kind, shape, "F" if fortran else "C")

    def _fill(self, data: Any, kind: object, shape: Any, order: Any) -> None:
        if not isinstance(kind, _Type):
            raise pickle.UnpicklingError("an array without a type")
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order=order)


def _from_buffer(data: object, kind: object, shape: object, order: object) -> _Array:
    found = _Array(None, None, None)
    found._fill(data, kind, shape, order)
    return found


def _latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes into an old pickle.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): None,  # the first argument of _reconstruct
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
}


# The unpickler in Python: the one in C zeroes a table as long as the largest number that a file gives to a remembered value.
class _ArraysOnly(pickle._Unpickler):
    """Reconstructs arrays of bytes and built-in values; any other name in the pickle is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return _ALLOWED[module, name]
