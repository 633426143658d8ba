"""layers.npy: per-layer measures over a run, as one array of numpy's format that rows are appended to.

``np.load`` reads it at any instant: ``rows["step"]`` int64 (T,), ``rows["layers"]["rate"]`` float32 (T, segments), and
``rows.dtype.fields["layers"][2].split()`` names the segments.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastbyol.errors import UsageError, one_line
from fastbyol.files import open_regular
from fastbyol.runs.durable import Written, append, new_digest, write_atomically, writing

_log = logging.getLogger(__name__)
LAYERS_FILE = "layers.npy"
# Earlier code wrote an archive, and beside it, while the run was open, its rows alone: the same bytes as rows here.
_ARCHIVE, _ARCHIVE_ROWS = "layers.npz", "layers.rows"
# What Python's zip reader and numpy's header parser are seen to raise over a damaged archive.
_DAMAGE = (
    *(ValueError, KeyError, EOFError, RuntimeError, SyntaxError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_BLOCK = 64  # numpy aligns rows to as many bytes; the header's last block holds the number of rows
_HEADER = re.compile(
    r"\{'descr': \[\('step', '<i8'\), \(\('([^']+)', 'layers'\), \[([^]]+)\], \(\d+,\)\)\], 'fortran_order': False, "
    r" *'shape': \((\d{1,18}),\), \}\n"
)


class Layers(NamedTuple):
    """``steps`` int64 (T,) counted from 0, ``values`` float32 (T, segments, metrics), and the names of the last two axes."""

    steps: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    metrics: tuple[str, ...]


class LayersFile:
    """The file open for appending, cut back to steps below ``resume_step``; ``every`` is their spacing in steps."""

    def __init__(self, folder: Path, names: Sequence[str], metrics: Sequence[str], *, every: int, resume_step: int) -> None:
        self._path = folder / LAYERS_FILE
        self._names, self._metrics = tuple(names), tuple(metrics)
        self._dtype = _dtype(len(self._names), len(self._metrics))
        with writing(self._path):
            rows = self._restore(folder)
            self._num_rows = _num_in_order(rows["step"][: -(-resume_step // every)], every, resume_step)
            self._digest = new_digest()
            for piece in _pieces(rows[: self._num_rows]):
                self._digest.update(piece)
            self._file = self._path.open("r+b", buffering=0)
            # The header first: a file that is longer than it says still loads.
            self._write_num_rows()
            self._file.truncate(self._end)

    def append(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Write rows: steps int64 (k,), values float32 (k, segments, metrics)."""
        rows = _as_rows(steps, values).tobytes()
        with writing(self._path):
            self._file.seek(self._end)
            append(self._file, rows)
            # Only now does the header count them: whatever a kill leaves half-written lies beyond the array.
            self._num_rows += len(steps)
            self._write_num_rows()
        self._digest.update(rows)

    @property
    def written(self) -> Written:
        """The rows that the file holds now, without its header."""
        return Written(self._num_rows * self._dtype.itemsize, self._digest.hexdigest())

    def sync(self) -> None:
        """Force the rows to disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close; nothing is buffered."""
        self._file.close()

    @property
    def _header(self) -> bytes:
        return _header(self._names, self._metrics, self._num_rows)

    @property
    def _end(self) -> int:
        return len(self._header) + self._num_rows * self._dtype.itemsize

    def _write_num_rows(self) -> None:
        """Overwrite the header's last block, in one aligned write that no reader sees in part."""
        header = self._header
        os.pwrite(self._file.fileno(), header[-_BLOCK:], len(header) - _BLOCK)

    def _restore(self, folder: Path) -> np.ndarray:
        """Return the rows of ``layers.npy``, made from the files of earlier code or empty where it is missing or damaged."""
        path = recorded_file(folder)
        table = _Table(np.empty(0, self._dtype), self._names, self._metrics)
        is_new = path != self._path or not path.exists()
        if path.exists():
            try:
                table = _read(path)
            except UsageError as error:
                _log.warning("%s: the layers of the steps before are lost", error)
                is_new = True
        if table[1:] != (self._names, self._metrics):
            raise UsageError(f"{path}: is of another network: its layers differ")
        self._num_rows = len(table.rows)
        if is_new:
            write_atomically(self._path, lambda file: file.write(self._header + table.rows.tobytes()))
        for name in (_ARCHIVE, _ARCHIVE_ROWS):  # not before what they contain is on the disk
            (folder / name).unlink(missing_ok=True)
        return table.rows


def recorded_file(folder: Path) -> Path:
    """Return the path of a run's layers: ``layers.npy``, or the archive where only earlier code has worked on the run."""
    archive = folder / _ARCHIVE
    return archive if archive.exists() and not (folder / LAYERS_FILE).exists() else folder / LAYERS_FILE


def read_layers(folder: Path) -> Layers:
    """Return the per-layer measures of a run, finished or not. Raise UsageError where there are none or they are damaged."""
    rows, names, metrics = _read(recorded_file(folder))
    return Layers(rows["step"], rows["values"], names, metrics)


def record_of(written: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """Return the record of a run's rows among those of its files. A checkpoint of earlier code names the archive."""
    return written[LAYERS_FILE if LAYERS_FILE in written else _ARCHIVE]


def is_whole(folder: Path, recorded: Written) -> bool:
    """Return whether the run's rows still begin with those that were ``recorded``."""
    path = recorded_file(folder)
    try:
        return recorded.matches(_pieces(_read(path).rows) if path.exists() else [])
    except UsageError:
        return False


class _Table(NamedTuple):
    """``rows`` of ``_dtype``, and the names of the two axes of their values."""

    rows: np.ndarray
    names: tuple[str, ...]
    metrics: tuple[str, ...]


def _num_in_order(steps: np.ndarray, every: int, resume_step: int) -> int:
    """Return the number of rows before the first impossible one: after a power cut the tail may be zeros."""
    fine = (np.diff(steps, prepend=-1) > 0) & (steps % every == 0) & (steps >= 0) & (steps < resume_step)
    return len(steps) if fine.all() else int(fine.argmin())


def _dtype(num_names: int, num_metrics: int) -> np.dtype:
    return np.dtype([("step", "<i8"), ("values", "<f4", (num_names, num_metrics))])


def _as_rows(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    rows = np.empty(len(steps), _dtype(*values.shape[1:]))
    rows["step"], rows["values"] = steps, values
    return rows


def _pieces(rows: np.ndarray, size: int = 1024) -> Iterator[bytes]:
    return (rows[start : start + size].tobytes() for start in range(0, len(rows), size))


def _header(names: Sequence[str], metrics: Sequence[str], num_rows: int) -> bytes:
    """Return the array's header (numpy.lib.format, version 1.0), of one length whatever the number of rows.

    A field for each segment and metric would take more than the 10,000 bytes that np.load accepts. So the metrics are the
    fields of one segment, and the segments' names are the title of the field that holds all segments.
    """
    columns = [(metric, "<f4") for metric in metrics]
    fields = [("step", "<i8"), ((" ".join(names), "layers"), columns, (len(names),))]
    text = f"{{'descr': {fields!r}, 'fortran_order': False, ".encode("latin1")
    size = -(-(10 + len(text)) // _BLOCK) * _BLOCK
    shape = f"'shape': ({num_rows},), }}\n".rjust(_BLOCK).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", size + _BLOCK - 10) + text.ljust(size - 10) + shape


def _read(path: Path) -> _Table:
    try:
        with open_regular(path) as file:
            return _read_archive(path, file) if path.name == _ARCHIVE else _read_array(file)
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise UsageError(f"{path}: damaged: {one_line(error, None)}") from None


def _read_array(file: BinaryIO) -> _Table:
    header = file.read(10)
    header += file.read(int.from_bytes(header[8:], "little"))
    match = _HEADER.fullmatch(header[10:].decode("latin1"))
    if match is None:
        raise ValueError("its header is not one of layers")
    names, metrics, num_rows = tuple(match[1].split()), tuple(re.findall(r"'([^']+)', '<f4'", match[2])), int(match[3])
    if header != _header(names, metrics, num_rows):
        raise ValueError("its header contradicts itself")
    return _Table(_read_rows(file, _dtype(len(names), len(metrics)), num_rows), names, metrics)


def _read_rows(file: BinaryIO, dtype: np.dtype, most: int) -> np.ndarray:
    """Return the whole rows from here on, ``most`` of them at most: a power cut may take rows that a header counts."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    return np.fromfile(file, dtype, min(most, left // dtype.itemsize))


def _read_archive(path: Path, file: BinaryIO) -> _Table:
    """Return what earlier code wrote: the archive, or the rows beside it where the run was killed, which are newer."""
    with zipfile.ZipFile(file) as archive:
        steps, values, *labels = (_member(archive, key) for key in ("steps", "values", "names", "metrics"))
    kinds = (steps.dtype, steps.ndim, values.dtype, *(label.dtype.kind for label in labels))
    sizes = tuple(label.size for label in labels)
    if kinds != (np.dtype("<i8"), 1, np.dtype("<f4"), "U", "U") or values.shape != (len(steps), *sizes):
        raise ValueError("its arrays do not fit together")
    names, metrics = (tuple(str(name) for name in label.ravel()) for label in labels)
    if (rows_path := path.with_name(_ARCHIVE_ROWS)).exists():
        with open_regular(rows_path) as rows_file:
            return _Table(_read_rows(rows_file, _dtype(*sizes), sys.maxsize), names, metrics)
    return _Table(_as_rows(steps, values), names, metrics)


def _member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Return one array of the archive. Its size is what the archive says and its checksum is checked; the array's header
    only has to agree: it might ask for any amount of memory."""
    content = archive.read(f"{key}.npy")
    version = np.lib.format.read_magic(stream := io.BytesIO(content))
    if version != (1, 0):
        raise ValueError(f"array format {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
