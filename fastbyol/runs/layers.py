"""layers.npy: per-layer measures over a run, an array of numpy's format that rows are appended to.

``np.load`` reads it at any instant: ``rows["step"]`` int64 (T,), ``rows["layers"]["rate"]`` float32
(T, segments) and so on; ``rows.dtype.fields["layers"][2].split()`` names the segments.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastbyol.errors import UsageError, one_line
from fastbyol.files import open_regular
from fastbyol.runs.durable import Written, append, new_digest, write_atomically, writing

LAYERS_FILE = "layers.npy"
# Earlier code wrote an archive, and newer rows into a file beside it: the same bytes as rows here.
_ARCHIVE, _ARCHIVE_ROWS = "layers.npz", "layers.rows"
# What Python's zip reader and numpy are seen to raise over a damaged archive.
_DAMAGE = (
    *(
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,
        SyntaxError,
        OverflowError,
        MemoryError,
        TypeError,
        AttributeError,
    ),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
# Bytes. numpy aligns rows to as many, and the header's last block contains their number.
_BLOCK = 64
_HEADER = re.compile(
    r"\{'descr': \[\('step', '<i8'\), \(\('([^']+)', 'layers'\), \[([^]]+)\], \(\d+,\)\)\], "
    r"'fortran_order': False, "
    r" *'shape': \((\d{1,18}),\), \}\n"
)
_log = logging.getLogger(__name__)


class Layers(NamedTuple):
    """``steps`` int64 (T,) from 0, ``values`` float32 (T, segments, metrics), their axes' names."""

    steps: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    metrics: tuple[str, ...]


class LayersFile:
    """The file open for appending, cut back to steps below ``resume_step``, ``every`` apart."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        metrics: Sequence[str],
        *,
        every: int,
        resume_step: int,
    ) -> None:
        self._path = folder / LAYERS_FILE
        self._names, self._metrics = tuple(names), tuple(metrics)
        self._digest = new_digest()
        self._row_bytes = _dtype(len(names), len(metrics)).itemsize
        with writing(self._path):
            layers = self._restore(folder)
            self._num_rows = _num_in_order(
                layers.steps[: -(-resume_step // every)], every, resume_step
            )
            for piece in _pieces(layers, self._num_rows):
                self._digest.update(piece)
            self._file = self._path.open("r+b", buffering=0)
            self._write_num_rows()
            # After the header: a file that is longer than it says still loads.
            self._file.truncate(self._end)

    def append(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Write rows: steps int64 (k,), values float32 (k, segments, metrics)."""
        rows = _rows(steps, values).tobytes()
        with writing(self._path):
            self._file.seek(self._end)
            append(self._file, rows)
            # Only now does the header count them: what a kill cuts lies outside.
            self._num_rows += len(steps)
            self._write_num_rows()
        self._digest.update(rows)

    @property
    def written(self) -> Written:
        """The rows that the file contains now, without its header."""
        return Written(self._num_rows * self._row_bytes, self._digest.hexdigest())

    def sync(self) -> None:
        """Force the rows to disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close; nothing is buffered."""
        self._file.close()

    def _write_num_rows(self) -> None:
        """Overwrite the header's last block in one aligned write."""
        header = _header(self._names, self._metrics, self._num_rows)
        os.pwrite(self._file.fileno(), header[-_BLOCK:], len(header) - _BLOCK)
        self._end = len(header) + self._num_rows * self._row_bytes

    def _restore(self, folder: Path) -> Layers:
        """Return the recorded layers. Make ``layers.npy`` of them where it is not whole."""
        path = recorded_file(folder)
        empty = (
            np.empty(0, np.int64),
            np.empty((0, len(self._names), len(self._metrics)), np.float32),
        )
        layers = Layers(*empty, self._names, self._metrics)
        is_new = path != self._path or not path.exists()
        if path.exists():
            try:
                layers = read_layers(folder)
            except UsageError as error:
                _log.warning("%s: the layers of the steps before are lost", error)
                is_new = True
        if layers[2:] != (self._names, self._metrics):
            raise UsageError(f"{path}: is of another network: its layers differ")
        if is_new:
            content = [_header(self._names, self._metrics, len(layers.steps)), *_pieces(layers)]
            write_atomically(self._path, lambda file: file.writelines(content))
        for name in (_ARCHIVE, _ARCHIVE_ROWS):  # not before their rows are on the disk
            (folder / name).unlink(missing_ok=True)
        return layers


def recorded_file(folder: Path) -> Path:
    """Return the path of a run's layers, which is the old archive if only that exists."""
    archive = folder / _ARCHIVE
    return (
        archive
        if archive.exists() and not (folder / LAYERS_FILE).exists()
        else folder / LAYERS_FILE
    )


def read_layers(folder: Path, skip: int = 0) -> Layers:
    """Return the measures of a run, finished or not, behind the first ``skip`` rows.

    Raises UsageError without whole ones.
    """
    path = recorded_file(folder)
    try:
        with open_regular(path) as file:
            if path.name != _ARCHIVE:
                return _read_array(file, skip)
            layers = _read_archive(path, file)
            return layers._replace(steps=layers.steps[skip:], values=layers.values[skip:])
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise UsageError(f"{path}: damaged: {one_line(error, None)}") from None


def record_of(written: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """Return the record of the rows, which a checkpoint of earlier code has for the archive."""
    return written[LAYERS_FILE if LAYERS_FILE in written else _ARCHIVE]


def is_whole(folder: Path, recorded: Written) -> bool:
    """Return whether the run's rows still begin with those that were ``recorded``."""
    if not recorded_file(folder).exists():
        return recorded.num_bytes == 0
    try:
        return recorded.matches(_pieces(read_layers(folder)))
    except UsageError:
        return False


def copy(source: Path, num_bytes: int, out: Path) -> Written:
    """Write the first ``num_bytes`` of the rows of the run ``source`` into the new folder ``out``.

    Returns their record. Raises UsageError where they cannot be read, FastbyolError where they
    cannot be written.
    """
    if not recorded_file(source).exists():  # a run that has recorded no step yet
        return Written.of(b"")
    layers = read_layers(source)
    stop = num_bytes // _dtype(*layers.values.shape[1:]).itemsize
    content = [*_pieces(layers, stop)]
    header = _header(layers.names, layers.metrics, stop)
    with writing(out / LAYERS_FILE):
        write_atomically(out / LAYERS_FILE, lambda file: file.writelines([header, *content]))
    return Written.of(b"".join(content))


def _num_in_order(steps: np.ndarray, every: int, resume_step: int) -> int:
    """Return the number of rows in order: a power cut may leave zeros at the end."""
    fine = (
        (np.diff(steps, prepend=-1) > 0)
        & (steps % every == 0)
        & (steps >= 0)
        & (steps < resume_step)
    )
    return len(steps) if fine.all() else int(fine.argmin())


def _dtype(num_names: int, num_metrics: int) -> np.dtype:
    return np.dtype([("step", "<i8"), ("values", "<f4", (num_names, num_metrics))])


def _rows(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    rows = np.empty(len(steps), _dtype(*values.shape[1:]))
    rows["step"], rows["values"] = steps, values
    return rows


def _pieces(layers: Layers, stop: int | None = None, size: int = 1024) -> Iterator[bytes]:
    """Yield the bytes of the rows in pieces, since a long run's may not fit into memory twice."""
    for start in range(0, len(layers.steps[:stop]), size):
        part = slice(start, start + size)
        yield _rows(layers.steps[:stop][part], layers.values[:stop][part]).tobytes()


def _header(names: Sequence[str], metrics: Sequence[str], num_rows: int) -> bytes:
    """Return the array's header (numpy.lib.format, version 1.0), as long for any number of rows.

    np.load refuses headers of over 10,000 bytes, which a field for each segment and metric would
    take. So metrics are fields and segments an axis: their names are the title of ``layers``.
    """
    fields = [
        ("step", "<i8"),
        ((" ".join(names), "layers"), [(metric, "<f4") for metric in metrics], (len(names),)),
    ]
    text = f"{{'descr': {fields!r}, 'fortran_order': False, ".encode("latin1")
    size = -(-(10 + len(text)) // _BLOCK) * _BLOCK
    shape = f"'shape': ({num_rows},), }}\n".rjust(_BLOCK).encode()
    return (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", size + _BLOCK - 10) + text.ljust(size - 10) + shape
    )


def _read_array(file: BinaryIO, skip: int) -> Layers:
    header = file.read(10)
    header += file.read(int.from_bytes(header[8:], "little"))
    match = _HEADER.fullmatch(header[10:].decode("latin1"))
    if match is None:
        raise ValueError("its header is not one of layers")
    names, metrics, num_rows = (
        tuple(match[1].split()),
        tuple(re.findall(r"'([^']+)', '<f4'", match[2])),
        int(match[3]),
    )
    if header != _header(names, metrics, num_rows):
        raise ValueError("its header contradicts itself")
    skip = min(skip, num_rows)
    file.seek(skip * _dtype(len(names), len(metrics)).itemsize, os.SEEK_CUR)
    return Layers(*_read_rows(file, len(names), len(metrics), num_rows - skip), names, metrics)


def _read_rows(
    file: BinaryIO, num_names: int, num_metrics: int, most: int = 2**63
) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values) of ``most`` rows, or of fewer where a power cut took counted ones."""
    dtype = _dtype(num_names, num_metrics)
    rows = np.fromfile(
        file,
        dtype,
        min(most, max(0, os.fstat(file.fileno()).st_size - file.tell()) // dtype.itemsize),
    )
    return rows["step"], rows["values"]


def _read_archive(path: Path, file: BinaryIO) -> Layers:
    """Return the archive's arrays, or the rows beside it, which are newer."""
    with np.load(file, allow_pickle=False) as archive:
        steps, values, *labels = (archive[key] for key in ("steps", "values", "names", "metrics"))
    kinds = (steps.dtype, steps.ndim, values.dtype, *(label.dtype.kind for label in labels))
    shape = (len(steps), *(label.size for label in labels))
    if kinds != (np.dtype("<i8"), 1, np.dtype("<f4"), "U", "U") or values.shape != shape:
        raise ValueError("its arrays do not fit together")
    if (rows := path.with_name(_ARCHIVE_ROWS)).exists():
        with open_regular(rows) as newer:
            steps, values = _read_rows(newer, *shape[1:])
    return Layers(steps, values, *(tuple(str(name) for name in label.ravel()) for label in labels))
