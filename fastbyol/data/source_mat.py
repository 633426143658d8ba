"""Arrays in MATLAB files of version 5, and of version 7.3, which is HDF5 and needs h5py.

Shapes are read first: an array is read only if file and memory can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import mat5
from fastbyol.data.source_arrays import MOST_PER_BYTE, demand_memory, listed, size_of, untrusted
from fastbyol.errors import UsageError
from fastbyol.files import open_regular


def shape_of(path: Path, name: str, *wanted: int | None) -> tuple[int, ...]:
    """Return MATLAB's shape of the array ``name``. Raises UsageError unless it is as ``wanted``.

    None in ``wanted`` stands for any number but 0; without ``wanted`` any shape is right.
    """
    size_of(path)
    shapes = _shapes(path)
    if name not in shapes:
        raise UsageError(
            f"{path}: no array {name!r} in it, but {listed(shapes)}; get the file again"
        )
    shape = shapes[name]
    pairs = zip(shape, wanted, strict=False)
    fits = len(shape) == len(wanted) and all(
        size == want or (want is None and size > 0) for size, want in pairs
    )
    if wanted and not fits:
        text = ", ".join("N" if want is None else str(want) for want in wanted)
        raise UsageError(f"{path}: {name!r} has shape {shape}, not ({text}); get the file again")
    return shape


def pixels(path: Path, name: str, *wanted: int | None) -> NDArray[np.uint8]:
    """Read a whole uint8 array, of which the last few stay cached. Raises UsageError."""
    shape, values = shape_of(path, name, *wanted), _kept(path, name)
    if values.dtype != np.uint8 or values.shape != shape:
        raise UsageError(
            f"{path}: {name!r} is {values.dtype} of shape {values.shape}, not uint8 as said; get "
            "the file again"
        )
    return values


def labels(path: Path, name: str, count: int) -> NDArray[np.int64]:
    """Return the whole numbers (count,) of the array ``name``, which is (N, 1) or (1, N)."""
    shape = shape_of(path, name)
    if math.prod(shape) != count:
        raise UsageError(
            f"{path}: {name!r} has shape {shape} for {count} images; get the file again"
        )
    return whole_numbers(path, name, _kept(path, name))


def whole_numbers(path: Path, name: str, numbers: object) -> NDArray[np.int64]:
    """Return an array as (N,) int64. Raises UsageError unless all are whole, below 2**53."""
    values = np.asarray(numbers).reshape(-1)
    if values.dtype.kind in "iuf" and (np.abs(values.astype(np.float64)) < 1 << 53).all():
        whole = values.astype(np.int64)
        if (whole == values).all():
            return whole
    raise UsageError(f"{path}: {name!r} does not hold whole numbers; get the file again")


def cells(path: Path, name: str) -> list[Any]:
    """Read a small cell array of a version 5 file: texts as str, numbers as arrays."""
    shape_of(path, name)
    with _opened(path) as (file, arrays):
        if isinstance(arrays[name], mat5.Variable):
            return mat5.read_cells(file, arrays[name])
    raise UsageError(f"{path}: cell arrays are read from version 5 alone; save it with save -v7")


def forget() -> None:
    """Drop the cached arrays, since files may have changed."""
    _kept.cache_clear()
    _shapes.cache_clear()


@lru_cache(maxsize=6)
def _kept(path: Path, name: str) -> NDArray[Any]:
    """Read the whole array as it is stored."""
    where = f"{path}: {name!r}"
    with _opened(path) as (file, arrays):
        item = arrays[name]
        if isinstance(item, mat5.Variable):
            return mat5.read(file, item, where)
        if item.dtype.kind not in "iufb":
            raise UsageError(f"{where} is {item.dtype}, no array of numbers; get the file again")
        if item.nbytes > item.id.get_storage_size() * MOST_PER_BYTE:
            raise UsageError(
                f"{path}: cannot hold the {item.nbytes} bytes that {name!r} is said to take; get "
                "the file again"
            )
        demand_memory(where, item.nbytes)
        return np.asarray(item[()]).T


@lru_cache(maxsize=16)
def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays as MATLAB states them; HDF5's are reversed."""
    with _opened(path) as (_, arrays):
        return {
            name: item.shape
            if isinstance(item, mat5.Variable)
            else tuple(map(int, item.shape[::-1]))
            for name, item in arrays.items()
        }


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """Open a file and its arrays by name, as mat5 or h5py describe them."""
    with untrusted(path, "not a whole MATLAB file", "get it again"), open_regular(path) as file:
        head = file.read(mat5.HEAD_BYTES)
        if head[:10] == b"MATLAB 7.3":
            try:
                import h5py
            except ImportError:
                raise UsageError(
                    f"{path}: is of MATLAB's version 7.3, which h5py reads; pip install h5py"
                ) from None
            with h5py.File(file, "r") as opened:
                yield file, dict(_datasets(opened))
        elif head[:10] == b"MATLAB 5.0" and head[126:] in (b"IM", b"MI"):
            yield file, mat5.variables(file)
        else:
            says = "no MATLAB file of version 5 or 7.3 by its head"
            raise UsageError(f"{path}: {says}; get it again, or save it with save -v7")


def _datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays stored in the file itself; follow no links to other files."""
    import h5py

    for name in file:
        item = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if (
            isinstance(item, h5py.Dataset)
            and item.shape is not None
            and not item.external
            and not item.is_virtual
        ):
            yield name, item
