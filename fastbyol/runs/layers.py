"""layers.npz: per-layer measures over a run, in arrays that numpy reads without pickle.

    steps int64 (T,)    values float32 (T, segments, metrics)    names (segments,)    metrics (metrics,)

A zip archive cannot be appended to and rewriting it at every save would cost a run's square. So rows go to an append-only
file, ``layers.rows``, and the archive is rewritten when it is a quarter behind, and when the run closes; the rows are then
removed. ``read_layers`` reads whichever is newer.
"""

from __future__ import annotations

import io
import logging
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbyol.errors import UsageError, one_line
from fastbyol.files import open_regular
from fastbyol.runs.durable import Written, append, new_digest, pieces, write_atomically, writing

_log = logging.getLogger(__name__)
LAYERS_FILE = "layers.npz"
ROWS_FILE = "layers.rows"
# What Python's zip reader and numpy's header parser are seen to raise over damaged bytes.
_DAMAGE = (
    *(ValueError, KeyError, EOFError, RuntimeError, SyntaxError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
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
        self._archive, self._rows = folder / LAYERS_FILE, folder / ROWS_FILE
        self._names, self._metrics = tuple(names), tuple(metrics)
        self._dtype = _dtype(len(self._names), len(self._metrics))
        with writing(self._rows):
            self._restore_rows()
            keep = _num_in_order(self._read_rows()["step"][: -(-resume_step // every)], every, resume_step)
            os.truncate(self._rows, keep * self._dtype.itemsize)
            self._digest = new_digest()
            for piece in pieces(self._rows):
                self._digest.update(piece)
            self._file = self._rows.open("ab", buffering=0)
            self._num_rows = keep
            self._write_archive()

    def append(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Write rows: steps int64 (k,), values float32 (k, segments, metrics)."""
        rows = np.empty(len(steps), self._dtype)
        rows["step"], rows["values"] = steps, values
        with writing(self._rows):
            append(self._file, rows.tobytes())
        self._digest.update(rows.tobytes())
        self._num_rows += len(steps)

    @property
    def written(self) -> Written:
        """What the rows' file holds now."""
        return Written(self._num_rows * self._dtype.itemsize, self._digest.hexdigest())

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
        try:
            layers = _read_archive(self._archive)
        except UsageError as error:
            _log.warning("%s: the layers of the steps before are lost", error)
            return np.empty(0, self._dtype)
        if (layers.names, layers.metrics) != (self._names, self._metrics):
            raise UsageError(f"{self._archive}: is of another network: its layers differ")
        return _as_rows(layers)

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
    layers = _read_archive(folder / LAYERS_FILE)
    rows_path = folder / ROWS_FILE
    if not rows_path.exists():
        return layers
    rows = _read_rows(rows_path, _dtype(len(layers.names), len(layers.metrics)))
    return layers._replace(steps=np.array(rows["step"]), values=np.array(rows["values"]))


def is_whole(folder: Path, held: Written) -> bool:
    """Whether the run's rows, wherever they are, still begin with what was ``held``."""
    if (folder / ROWS_FILE).exists():
        return held.matches(pieces(folder / ROWS_FILE))
    if not (folder / LAYERS_FILE).exists():
        return held.num_bytes == 0
    try:
        return held.matches([_as_rows(_read_archive(folder / LAYERS_FILE)).tobytes()])
    except UsageError:
        return False


def _num_in_order(steps: np.ndarray, every: int, resume_step: int) -> int:
    """How many of the first rows can be meant: after a power cut the tail may hold zeros, after damage anything."""
    fine = (np.diff(steps, prepend=-1) > 0) & (steps % every == 0) & (steps >= 0) & (steps < resume_step)
    return len(steps) if fine.all() else int(fine.argmin())


def _as_rows(layers: Layers) -> np.ndarray:
    rows = np.empty(len(layers.steps), _dtype(len(layers.names), len(layers.metrics)))
    rows["step"], rows["values"] = layers.steps, layers.values
    return rows


def _dtype(num_names: int, num_metrics: int) -> np.dtype:
    return np.dtype([("step", "<i8"), ("values", "<f4", (num_names, num_metrics))])


def _read_rows(path: Path, dtype: np.dtype) -> np.ndarray:
    """The whole rows of the file, mapped: a long run's do not have to fit into memory twice."""
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


def _read_archive(path: Path) -> Layers:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            steps, values, names, metrics = (_member(archive, key) for key in ("steps", "values", "names", "metrics"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise UsageError(f"{path}: damaged: {one_line(error, None)}") from None
    layers = Layers(steps, values, *(tuple(str(name) for name in part.ravel()) for part in (names, metrics)))
    kinds = (steps.dtype, steps.ndim, values.dtype, names.dtype.kind, metrics.dtype.kind)
    if kinds != (np.dtype("<i8"), 1, np.dtype("<f4"), "U", "U") or values.shape != (len(steps), names.size, metrics.size):
        raise UsageError(f"{path}: damaged: its arrays do not fit together")
    return layers


def _member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array of the archive. Its size is what the file's end says and its checksum is checked; the header of the array
    only has to agree: it might ask for any amount of memory."""
    content = archive.read(f"{key}.npy")
    version = np.lib.format.read_magic(stream := io.BytesIO(content))
    if version != (1, 0):
        raise ValueError(f"{key}: array format {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
