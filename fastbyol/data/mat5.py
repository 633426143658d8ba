"""MATLAB files of version 5: numeric arrays and small cell arrays, of numbers or texts.

The format is MathWorks' "MAT-File Format", chapter 1. scipy.io reads more of it and ends by a signal on some damaged files;
here a number from a file is held against what is there before it is used.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.source_arrays import demand_memory

# Text, version, and which way the numbers run.
HEAD_BYTES = 128
PIECE_BYTES = 1 << 20
# The head of an array: flags, shape and name.
MOST_HEAD_BYTES = 1 << 12
# A cell array here holds names of classes or places of images.
MOST_CELL_BYTES = 1 << 24
MATRIX, COMPRESSED = 14, 15
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin1", 2: "latin1", 16: "utf-8", 4: "utf-16", 17: "utf-16", 18: "utf-32"}
_CELL, _CHAR, _COMPLEX = 1, 4, 0x0800
_NUMBERS = range(6, 16)  # double, single, and integers of 8 to 64 bits


class DamagedError(Exception):
    """The file is not what the format says; the message is one line."""


@dataclass(frozen=True)
class Variable:
    """An array in a file: MATLAB's shape, and where its ``size`` bytes begin."""

    shape: tuple[int, ...]
    start: int
    size: int
    compressed: bool


@dataclass(frozen=True)
class _Head:
    name: str
    number: int
    is_complex: bool
    shape: tuple[int, ...]
    num_bytes: int


class _Unpacked:
    """What lies compressed in the next ``size`` bytes of a file, piece by piece."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.rest, self.unpack = file, size, b"", zlib.decompressobj()

    def read(self, count: int) -> bytes:
        """Unpack up to ``count`` bytes: less at the end alone."""
        parts = []
        while count and not self.unpack.eof:
            if not self.rest:
                self.rest = self.file.read(min(self.left, PIECE_BYTES // 16))
                self.left -= len(self.rest)
                if not self.rest:
                    break
            parts.append(self.unpack.decompress(self.rest, count))
            self.rest, count = self.unpack.unconsumed_tail, count - len(parts[-1])
        return b"".join(parts)


def variables(file: BinaryIO) -> dict[str, Variable]:
    """Find every array of a file by its name. Raises DamagedError, zlib.error."""
    order, end = _order(file), file.seek(0, 2)
    found, at = {}, HEAD_BYTES
    while at + 8 <= end:
        file.seek(at)
        kind, size = struct.unpack(f"{order}II", file.read(8))
        if at + 8 + size > end:
            raise DamagedError("ends within an array")
        if kind in (MATRIX, COMPRESSED):
            if kind == COMPRESSED:  # an element with a head of its own
                head = _head(memoryview(_Unpacked(file, size).read(8 + MOST_HEAD_BYTES))[8:], order)
            else:
                head = _head(memoryview(file.read(min(MOST_HEAD_BYTES, size))), order)
            found[head.name] = Variable(head.shape, at + 8, size, kind == COMPRESSED)
        at += 8 + size
    return found


def read(file: BinaryIO, variable: Variable, where: str) -> NDArray[np.generic]:
    """Read a numeric array as it is stored, in MATLAB's shape. Memory is taken once, if the file says what the shape says."""
    order, stream = _order(file), _stream(file, variable)
    start = stream.read(MOST_HEAD_BYTES)
    head = _head(memoryview(start), order)
    if head.number not in _NUMBERS or head.is_complex or head.shape != variable.shape:
        raise DamagedError("no array of real numbers")
    kind, size, skipped = _tag(memoryview(start), head.num_bytes, order)
    if kind not in _TYPES or size != math.prod(head.shape) * np.dtype(_TYPES[kind]).itemsize:
        raise DamagedError(f"{size} bytes of type {kind} for shape {head.shape}")
    if not variable.compressed and skipped + size > variable.size:
        raise DamagedError("an array is longer than its element")
    demand_memory(where, size)
    values = np.empty(size, np.uint8)
    have = np.frombuffer(start, np.uint8)[skipped:][:size]
    values[: len(have)] = have
    at = len(have)
    while at < size and (piece := stream.read(min(PIECE_BYTES, size - at))):
        values[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    if at < size:
        raise DamagedError("ends within an array")
    if isinstance(stream, _Unpacked) and (len(stream.read(PIECE_BYTES)) >= PIECE_BYTES or not stream.unpack.eof):
        raise DamagedError("unpacks to more than it says")  # and where it ends, its checksum has been held against it
    return values.view(np.dtype(order + _TYPES[kind])).reshape(head.shape, order="F")


def read_cells(file: BinaryIO, variable: Variable) -> list[NDArray[np.generic] | str]:
    """Read what a cell array holds, in MATLAB's order: arrays of numbers, and texts."""
    order, content = _order(file), _stream(file, variable).read(min(MOST_CELL_BYTES, 1 << 30) + 1)
    if not variable.compressed:
        content = content[: variable.size]
    if len(content) > MOST_CELL_BYTES:
        raise DamagedError(f"more than {MOST_CELL_BYTES} bytes in a cell array")
    head = _head(memoryview(content), order)
    if head.number != _CELL:
        raise DamagedError("no cell array")
    cells = [_cell(data, order) for kind, data in _elements(memoryview(content)[head.num_bytes :], order) if kind == MATRIX]
    if len(cells) != math.prod(head.shape):
        raise DamagedError(f"{len(cells)} cells for shape {head.shape}")
    return cells


def _cell(data: memoryview, order: str) -> NDArray[np.generic] | str:
    head = _head(data, order)
    kind, size, start = _tag(data, head.num_bytes, order)
    part = bytes(data[start : start + size])
    if head.number == _CHAR and kind in _TEXTS:
        encoding = _TEXTS[kind] + ({"<": "-le", ">": "-be"}[order] if kind in (4, 17, 18) else "")
        return part.decode(encoding, "replace")
    if head.number not in _NUMBERS or head.is_complex or kind not in _TYPES or len(part) != size:
        raise DamagedError("a cell that is no text and no array of real numbers")
    return np.frombuffer(part, np.dtype(order + _TYPES[kind]))


def _order(file: BinaryIO) -> str:
    file.seek(HEAD_BYTES - 2)
    return "<" if file.read(2) == b"IM" else ">"


def _stream(file: BinaryIO, variable: Variable) -> BinaryIO | _Unpacked:
    """Open the content of an array's element, its tag left out."""
    file.seek(variable.start)
    if not variable.compressed:
        return file
    stream = _Unpacked(file, variable.size)
    stream.read(8)
    return stream


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        kind, size, start = _tag(data, at, order)
        if start + size > len(data):
            raise DamagedError("an element is longer than what holds it")
        yield kind, data[start : start + size]
        at = start + size if start == at + 4 else start + size + -size % 8
        at += -at % 8


def _tag(data: memoryview, at: int, order: str) -> tuple[int, int, int]:
    """Return type, bytes and place of the element at ``at``; of up to four bytes it lies in the tag itself."""
    if at + 8 > len(data):
        raise DamagedError("ends within the head of an array")
    kind, size = struct.unpack_from(f"{order}II", data, at)
    if not kind >> 16:
        return kind, size, at + 8
    if kind >> 16 > 4:
        raise DamagedError("an element in its tag of more than four bytes")
    return kind & 0xFFFF, kind >> 16, at + 4


def _head(data: memoryview, order: str) -> _Head:
    """Read flags, shape and name at the beginning of an array."""
    parts, at = [], 0
    for _ in range(3):
        _, size, start = _tag(data, at, order)
        if start + size > len(data):
            raise DamagedError("ends within the head of an array")
        parts.append(data[start : start + size])
        at = start + size + -(start + size) % 8
    flags, dims, name = parts
    if len(flags) < 4 or len(dims) % 4 or not dims:
        raise DamagedError("the head of an array is not whole")
    (bits,) = struct.unpack_from(f"{order}I", flags)
    shape = struct.unpack(f"{order}{len(dims) // 4}i", dims)
    if min(shape) < 0:
        raise DamagedError(f"shape {shape}")
    return _Head(bytes(name).decode("latin1"), bits & 0xFF, bool(bits & _COMPLEX), shape, at)
