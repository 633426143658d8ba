"""CIFAR-10 and CIFAR-100, python version (Krizhevsky, 2009): pickled dicts of uint8 (N, 3072) rows, planes R, G, B.

Unpickling runs code by design, so only what an array is made of may be named in these files.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol.data.source_arrays import ArraySource, Images, Labels, demand_range, size_of
from fastbyol.errors import UsageError

IMAGE_BYTES = 3 * 32 * 32
SPLITS = ("train", "test")


def open_cifar(folder: Path, kind: str, split: str) -> ArraySource:
    """CIFAR-10 or CIFAR-100's python version: pickled dicts of (N, 3072) uint8 rows, planes R, G, B (Krizhevsky, 2009)."""
    if split not in SPLITS:
        raise UsageError(f"{folder}: CIFAR has no split {split!r}; choose {', '.join(SPLITS)}")
    files = _files(folder, kind, split)
    _kept_rows.cache_clear()
    load, key = Loader(files), "labels" if kind == "cifar10" else "fine_labels"
    labels = [_labels(path, key, 10 if kind == "cifar10" else 100) for path in files]
    return ArraySource(
        kind=kind,
        split=split,
        class_names=_class_names(folder, kind),
        labels=np.concatenate(labels),
        num_images=sum(map(len, labels)),
        size=(32, 32),
        load=load,
    )


def _class_names(folder: Path, kind: str) -> tuple[str, ...]:
    path, key = (folder / "batches.meta", "label_names") if kind == "cifar10" else (folder / "meta", "fine_label_names")
    names = _unpickled(path).get(key)
    if not isinstance(names, list):
        raise UsageError(f"{path}: {key!r} is not a list; unpack the archive again")
    return tuple(_text(name) for name in names)


def _files(folder: Path, kind: str, split: str) -> tuple[Path, ...]:
    if kind == "cifar100":
        return (folder / split,)
    return tuple(folder / f"data_batch_{k}" for k in range(1, 6)) if split == "train" else (folder / "test_batch",)


@dataclass(frozen=True)
class Loader:
    """Loads image i of the files in turn."""

    files: tuple[Path, ...]

    def __call__(self, index: int) -> Images:
        for path in self.files:
            rows = _kept_rows(path)
            if index < len(rows):
                return np.ascontiguousarray(rows[index].reshape(3, 32, 32).transpose(1, 2, 0))
            index -= len(rows)
        raise IndexError(index)


@lru_cache(maxsize=5)
def _kept_rows(path: Path) -> Images:
    return _rows(path, _unpickled(path))


def _rows(path: Path, batch: dict[str, Any]) -> Images:
    rows = batch.get("data")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != IMAGE_BYTES:
        raise UsageError(f"{path}: 'data' is not uint8 of shape (N, {IMAGE_BYTES}); unpack the archive again")
    return rows


def _labels(path: Path, key: str, num_classes: int) -> Labels:
    batch = _unpickled(path)
    values, rows = batch.get(key), _rows(path, batch)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UsageError(f"{path}: {key!r} is not a list of integers; unpack the archive again")
    if len(values) != len(rows):
        raise UsageError(f"{path}: {len(values)} labels for {len(rows)} images; unpack the archive again")
    labels = np.array(values, np.int64)
    demand_range(path, labels, num_classes)
    return labels


def _text(name: object) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _unpickled(path: Path) -> dict[str, Any]:
    """The dict in a CIFAR file, its keys as text. Nothing but arrays and plain values is ever constructed."""
    size_of(path)
    try:
        with path.open("rb") as file:
            value = _ArraysOnly(file, encoding="bytes").load()
        return {_text(key): item for key, item in value.items()}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except Exception as error:  # a damaged pickle raises anything
        raise UsageError(f"{path}: not a CIFAR file ({' '.join(str(error).split())[:200]}); unpack the archive again") from None


def _dtype(code: str | bytes, align: object = False, copy: object = False) -> np.dtype[Any]:
    # The flags are the integers 0 and 1 in the published files, which numpy 2.4 warns about.
    return np.dtype(_text(code), bool(align), bool(copy))


def _latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes into an old pickle.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Reconstructs numpy arrays and built-in values; any other name in the pickle is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct, from_buffer = np.zeros(0).__reduce__()[0], np.zeros(0).__reduce_ex__(5)[0]
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy.core.numeric", "_frombuffer"): from_buffer,
            ("numpy._core.numeric", "_frombuffer"): from_buffer,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return allowed[module, name]
