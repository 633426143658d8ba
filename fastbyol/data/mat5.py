"""MATLAB files of version 5: numeric arrays and small cell arrays of numbers or texts.

Format: MathWorks, "MAT-File Format", chapter 1. scipy.io reads more but crashes on damaged files;
here a number from a file is checked against the file before use.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.source_arrays import demand_memory

# Text, version and byte order.
HEAD_BYTES = 128
PIECE_BYTES = 1 << 20
# The head of an array: flags, shape and name.
MOST_HEAD_BYTES = 1 << 12
# Cell arrays hold class names or image indices.
MOST_CELL_BYTES = 1 << 24
MATRIX, COMPRESSED = 14, 15
_TYPES = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
_TEXTS = {1: "latin1", 2: "latin1", 16: "utf-8", 4: "utf-16-{}", 17: "utf-16-{}", 18: "utf-32-{}"}
_COMPLEX = 0x0800
# Classes 6 to 15 are double, single and integers of 8 to 64 bits.
_HOLDS = {1: "cells", 4: "text"} | dict.fromkeys(range(6, 16), "numbers")


class DamagedError(Exception):
    """A violation of the format, described in one line."""


@dataclass(frozen=True)
class Variable:
    """The head of an array: its name, MATLAB's shape, and what it ``holds``.

    That is numbers, text, cells or something else. ``element`` is its offset in the file behind the
    tag, its bytes, and whether it is compressed.
    """

    name: str
    holds: str
    shape: tuple[int, ...]
    head_bytes: int
    order: str
    element: tuple[int, int, bool] = (0, 0, False)


class _Unpacked(io.RawIOBase):
    """A stream of the next ``size`` bytes of a file, uncompressed piece by piece."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.unpack = file, size, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = b""
        while not piece and not self.unpack.eof:
            packed = self.unpack.unconsumed_tail
            if not packed:
                packed = self.file.read(min(self.left, PIECE_BYTES // 16))
                self.left -= len(packed)
            if not packed:
                break
            piece = self.unpack.decompress(packed, min(len(buffer), PIECE_BYTES))
        buffer[: len(piece)] = piece
        return len(piece)


def variables(file: BinaryIO) -> dict[str, Variable]:
    """Read the heads of all arrays by name. Raises DamagedError, zlib.error."""
    file.seek(HEAD_BYTES - 2)
    order, end = "<" if file.read(2) == b"IM" else ">", file.seek(0, 2)
    heads, at = {}, HEAD_BYTES
    while at + 8 <= end:
        file.seek(at)
        kind, size = struct.unpack(f"{order}II", file.read(8))
        if at + 8 + size > end:
            raise DamagedError("ends within an array")
        if kind in (MATRIX, COMPRESSED):
            element = at + 8, size, kind == COMPRESSED
            head = _head(memoryview(_beginning(file, element, MOST_HEAD_BYTES)[0]), order)
            heads[head.name] = replace(head, element=element)
        at += 8 + size
    return heads


def read(file: BinaryIO, variable: Variable, where: str) -> NDArray[np.generic]:
    """Read a numeric array in MATLAB's shape. Raises DamagedError if the file's sizes differ."""
    if variable.holds != "numbers":
        raise DamagedError("no array of real numbers")
    begins, stream = _beginning(file, variable.element, variable.head_bytes + 8)
    _, element_bytes, compressed = variable.element
    kind, size, start = _tag(memoryview(begins), variable.head_bytes, variable.order)
    if kind not in _TYPES or size != math.prod(variable.shape) * np.dtype(_TYPES[kind]).itemsize:
        raise DamagedError(f"{size} bytes of type {kind} for shape {variable.shape}")
    if not compressed and start + size > element_bytes:
        raise DamagedError("an array is longer than its element")
    demand_memory(where, size)
    values = np.empty(size, np.uint8)
    in_tag = begins[start : start + size]
    values[: len(in_tag)] = np.frombuffer(in_tag, np.uint8)
    if stream.readinto(values.data[len(in_tag) :]) < size - len(in_tag):
        raise DamagedError("ends within an array")
    if compressed and (len(stream.read(PIECE_BYTES)) >= PIECE_BYTES or not stream.raw.unpack.eof):
        raise DamagedError(
            "unpacks to more than it says"
        )  # zlib verifies its checksum at the end only
    return values.view(np.dtype(variable.order + _TYPES[kind])).reshape(variable.shape, order="F")


def read_cells(file: BinaryIO, variable: Variable) -> list[NDArray[np.generic] | str]:
    """Read the content of a cell array in MATLAB's order: arrays of numbers, and texts."""
    if variable.holds != "cells":
        raise DamagedError("no cell array")
    content, _ = _beginning(file, variable.element, MOST_CELL_BYTES + 1)
    if len(content) > MOST_CELL_BYTES:
        raise DamagedError(f"more than {MOST_CELL_BYTES} bytes in a cell array")
    data, cells, at = memoryview(content), [], variable.head_bytes
    while at + 8 <= len(data):
        kind, part, at = _element(data, at, variable.order)
        if kind == MATRIX:
            cells.append(_cell(part, variable.order))
    if len(cells) != math.prod(variable.shape):
        raise DamagedError(f"{len(cells)} cells for shape {variable.shape}")
    return cells


def _beginning(file: BinaryIO, element: tuple[int, int, bool], most: int) -> tuple[bytes, Any]:
    """Return up to ``most`` bytes of an element behind its tag, and the stream of the rest."""
    start, size, compressed = element
    file.seek(start)
    if not compressed:
        return file.read(min(most, size)), file
    stream = io.BufferedReader(
        _Unpacked(file, size), MOST_HEAD_BYTES
    )  # reads no more than a head ahead
    stream.read(8)  # the tag of what is compressed
    return stream.read(most), stream


def _cell(data: memoryview, order: str) -> NDArray[np.generic] | str:
    head = _head(data, order)
    kind, part, _ = _element(data, head.head_bytes, order)
    if head.holds == "text" and kind in _TEXTS:
        return bytes(part).decode(_TEXTS[kind].format("le" if order == "<" else "be"), "replace")
    if head.holds != "numbers" or kind not in _TYPES:
        raise DamagedError("a cell that is no text and no array of real numbers")
    return np.frombuffer(part, np.dtype(order + _TYPES[kind]))


def _element(data: memoryview, at: int, order: str) -> tuple[int, memoryview, int]:
    """Return type and content of the element at ``at``, and the offset of the next."""
    kind, size, start = _tag(data, at, order)
    if start + size > len(data):
        raise DamagedError("an element is longer than what holds it")
    return kind, data[start : start + size], start + size + -(start + size) % 8


def _tag(data: memoryview, at: int, order: str) -> tuple[int, int, int]:
    """Return type, size and offset of the element at ``at``: up to four bytes fit into its tag."""
    if at + 8 > len(data):
        raise DamagedError("ends within the head of an array")
    kind, size = struct.unpack_from(f"{order}II", data, at)
    if not kind >> 16:
        return kind, size, at + 8
    if kind >> 16 > 4:
        raise DamagedError("an element in its tag of more than four bytes")
    return kind & 0xFFFF, kind >> 16, at + 4


def _head(data: memoryview, order: str) -> Variable:
    """Read flags, shape and name at the beginning of an array."""
    _, flags, at = _element(data, 0, order)
    _, dims, at = _element(data, at, order)
    _, name, at = _element(data, at, order)
    if len(flags) < 4 or len(dims) % 4 or not dims:
        raise DamagedError("the head of an array is not whole")
    (bits,) = struct.unpack_from(f"{order}I", flags)
    shape = struct.unpack(f"{order}{len(dims) // 4}i", dims)
    if min(shape) < 0:
        raise DamagedError(f"shape {shape}")
    holds = "complex numbers" if bits & _COMPLEX else _HOLDS.get(bits & 0xFF, "something else")
    return Variable(bytes(name).decode("latin1"), holds, shape, at, order)
