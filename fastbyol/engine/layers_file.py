"""layers.npz: per-layer measures over a run, in arrays that numpy reads without pickle.

    steps int64 (T,)    values float32 (T, segments, metrics)    names (segments,)    metrics (metrics,)

A zip archive cannot be appended to and rewriting it at every save would cost a run's square. So rows go to an append-only
file, ``layers.rows``, and the archive is rewritten when it is a quarter behind, and when the run closes; the rows are then
removed. ``read_layers`` reads whichever is newer.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbyol.engine.durable import append, write_atomically, writing
from fastbyol.errors import UsageError

NAME = "layers.npz"
ROWS_NAME = "layers.rows"
_GROWTH = 1.25  # the archive is rewritten at most log(T) / log(1.25) times: 5 bytes written per byte in the end


class Layers(NamedTuple):
    """``steps`` int64 (T,) counted from 0, ``values`` float32 (T, segments, metrics), and what the two last axes are."""

    steps: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    metrics: tuple[str, ...]


class LayersFile:
    """The rows open for appending, cut back to steps below ``resume_step``; ``every`` is their spacing in steps."""

    def __init__(self, folder: Path, names: Sequence[str], metrics: Sequence[str], *, every: int, resume_step: int) -> None:
        self._archive, self._rows = folder / NAME, folder / ROWS_NAME
        self._names, self._metrics = tuple(names), tuple(metrics)
        self._dtype = _dtype(len(self._names), len(self._metrics))
        with writing(self._rows):
            self._restore_rows()
            # Counted, not only searched: after a power cut the tail may hold zeros, which would not be in order.
            keep = int(np.searchsorted(self._read_rows()["step"][: -(-resume_step // every)], resume_step))
            os.truncate(self._rows, keep * self._dtype.itemsize)
            self._file = self._rows.open("ab", buffering=0)
            self._num_rows = keep
            self._write_archive()

    def append(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Write rows: steps int64 (k,), values float32 (k, segments, metrics)."""
        rows = np.empty(len(steps), self._dtype)
        rows["step"], rows["values"] = steps, values
        with writing(self._rows):
            append(self._file, rows.tobytes())
        self._num_rows += len(steps)

    def sync(self) -> None:
        """Force the rows to disk, and bring the archive up to date when it has fallen behind by a quarter."""
        with writing(self._archive):
            os.fsync(self._file.fileno())
            if self._num_rows >= max(self._num_archived * _GROWTH, self._num_archived + 1):
                self._write_archive()

    def close(self) -> None:
        """Write the archive and remove the rows."""
        with self._file, writing(self._archive):
            self._write_archive()
            self._rows.unlink()

    def _restore_rows(self) -> None:
        """After a clean end only the archive is there: its rows are written out again, to be appended to."""
        if not self._rows.exists():
            write_atomically(self._rows, lambda file: file.write(self._archived_rows().tobytes()))

    def _archived_rows(self) -> np.ndarray:
        if not self._archive.exists():
            return np.empty(0, self._dtype)
        layers = _read_archive(self._archive)
        if (layers.names, layers.metrics) != (self._names, self._metrics):
            raise UsageError(f"{self._archive}: is of another network: its layers differ")
        rows = np.empty(len(layers.steps), self._dtype)
        rows["step"], rows["values"] = layers.steps, layers.values
        return rows

    def _read_rows(self) -> np.ndarray:
        return _read_rows(self._rows, self._dtype)

    def _write_archive(self) -> None:
        rows = self._read_rows()
        names, metrics = np.array(self._names, dtype=np.str_), np.array(self._metrics, dtype=np.str_)
        arrays = {"steps": rows["step"], "values": rows["values"], "names": names, "metrics": metrics}
        write_atomically(self._archive, lambda file: np.savez(file, allow_pickle=False, **arrays))
        self._num_archived = self._num_rows


def read_layers(folder: Path) -> Layers:
    """The per-layer measures of a run, finished or not. Raises UsageError where there are none or they are damaged."""
    layers = _read_archive(folder / NAME)
    rows_path = folder / ROWS_NAME
    if not rows_path.exists():
        return layers
    rows = _read_rows(rows_path, _dtype(len(layers.names), len(layers.metrics)))
    return layers._replace(steps=np.array(rows["step"]), values=np.array(rows["values"]))


def _dtype(num_names: int, num_metrics: int) -> np.dtype:
    return np.dtype([("step", "<i8"), ("values", "<f4", (num_names, num_metrics))])


def _read_rows(path: Path, dtype: np.dtype) -> np.ndarray:
    """The whole rows of the file, mapped: a long run's do not have to fit into memory twice."""
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


def _read_archive(path: Path) -> Layers:
    try:
        with np.load(path, allow_pickle=False) as file:
            names, metrics = (tuple(str(name) for name in file[key]) for key in ("names", "metrics"))
            return Layers(file["steps"], file["values"], names, metrics)
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror}") from None
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: damaged: {' '.join(str(error).split())}") from None
