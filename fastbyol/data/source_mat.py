"""Arrays in MATLAB files: version 5, and version 7.3, which is HDF5 and read by h5py where that is installed.

Shapes come first; an array is read only where file and memory can hold what it is said to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import mat5
from fastbyol.data.source_arrays import MOST_PER_BYTE, Part, demand_memory, listed, size_of
from fastbyol.errors import UsageError, one_line
from fastbyol.files import open_regular


def shape_of(path: Path, name: str) -> tuple[int, ...]:
    """Return MATLAB's shape of the array ``name``; UsageError where there is none."""
    size_of(path)
    arrays = _shapes(path)
    if name not in arrays:
        raise UsageError(f"{path}: no array {name!r} in it, but {listed(arrays)}; get the file again")
    return arrays[name]


def pixels(path: Path, name: str) -> NDArray[np.uint8]:
    """Read the array ``name`` whole; UsageError unless it is uint8 of the shape that was said. The last few are kept."""
    found = _kept(path, name)
    if found.dtype != np.uint8 or found.shape != shape_of(path, name):
        raise UsageError(f"{path}: {name!r} is {found.dtype} of shape {found.shape}, not uint8 as said; get the file again")
    return found


def uint8_rows(path: Path, name: str, row_bytes: int) -> Part:
    """Return the rows of the array ``name``, whose shape is (N, ``row_bytes``); the file is read whole on first use."""
    shape = shape_of(path, name)
    if len(shape) != 2 or shape[1] != row_bytes or shape[0] < 1:
        raise UsageError(f"{path}: {name!r} has shape {shape}, not (N, {row_bytes}); get the file again")
    return Part(shape[0], partial(_row, path, name))


def _row(path: Path, name: str, index: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels(path, name)[index])


def labels(path: Path, name: str, count: int) -> NDArray[np.int64]:
    """Return the whole numbers (count,) of the array ``name``, (N, 1) or (1, N)."""
    shape = shape_of(path, name)
    if math.prod(shape) != count:
        raise UsageError(f"{path}: {name!r} has shape {shape} for {count} images; get the file again")
    return whole_numbers(path, name, _kept(path, name))


def whole_numbers(path: Path, name: str, numbers: object) -> NDArray[np.int64]:
    """Return any array as (N,) int64; UsageError unless all are whole numbers that a double holds."""
    given = np.asarray(numbers).reshape(-1)
    if given.dtype.kind in "iuf" and (np.abs(given.astype(np.float64)) < 1 << 53).all():
        found = given.astype(np.int64)
        if (found == given).all():
            return found
    raise UsageError(f"{path}: {name!r} does not hold whole numbers; get the file again")


def cells(path: Path, name: str) -> list[Any]:
    """Read what a small cell array of a version 5 file holds: texts as str, numbers as arrays."""
    shape_of(path, name)
    if _is_hdf5(path):
        raise UsageError(f"{path}: cell arrays are read from version 5 alone; save it with save -v7")
    with _reading(path), open_regular(path) as file:
        return mat5.read_cells(file, mat5.variables(file)[name])


def forget() -> None:
    """Drop the arrays that are kept: files may have changed."""
    _kept.cache_clear()
    _shapes.cache_clear()


@lru_cache(maxsize=6)
def _kept(path: Path, name: str) -> NDArray[Any]:
    """Read the array whole, as it is stored."""
    if not _is_hdf5(path):
        with _reading(path), open_regular(path) as file:
            return mat5.read(file, mat5.variables(file)[name], f"{path}: {name!r}")
    with _hdf5(path) as opened:
        item = dict(_datasets(opened))[name]
        if item.dtype.kind not in "iufb":
            raise UsageError(f"{path}: {name!r} is {item.dtype}, no array of numbers; get the file again")
        if item.nbytes > item.id.get_storage_size() * MOST_PER_BYTE:
            raise UsageError(f"{path}: cannot hold the {item.nbytes} bytes that {name!r} is said to take; get the file again")
        demand_memory(f"{path}: {name!r}", item.nbytes)
        return np.asarray(item[()]).T


@lru_cache(maxsize=16)
def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays, as MATLAB says them."""
    if not _is_hdf5(path):
        with _reading(path), open_regular(path) as file:
            return {name: variable.shape for name, variable in mat5.variables(file).items()}
    with _hdf5(path) as opened:
        return {name: tuple(map(int, item.shape[::-1])) for name, item in _datasets(opened)}


def _datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays that lie in the file itself: no links, and nothing that leads to other files."""
    import h5py

    for name in file:
        item = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if isinstance(item, h5py.Dataset) and item.shape is not None and not item.external and not item.is_virtual:
            yield name, item


def _is_hdf5(path: Path) -> bool:
    with open_regular(path) as file:
        head = file.read(mat5.HEAD_BYTES)
    if head[:10] == b"MATLAB 7.3":
        return True
    if head[:10] != b"MATLAB 5.0" or head[126:] not in (b"IM", b"MI"):
        raise UsageError(f"{path}: no MATLAB file of version 5 or 7.3 by its head; get it again, or save it with save -v7")
    return False


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError:
        raise UsageError(f"{path}: is of MATLAB's version 7.3, which h5py reads; pip install h5py") from None
    with _reading(path), open_regular(path) as file, h5py.File(file, "r") as opened:
        yield opened


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Make a UsageError of whatever a library meets in the bytes of a file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{path}: not a whole MATLAB file ({one_line(error)}); get it again") from None
