"""Picture files by name, in a folder or packed inside other files."""

from __future__ import annotations

import errno
import io
import os
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from fastbyol.data.beton_write import UnreadableItemError
from fastbyol.errors import one_line
from fastbyol.files import open_regular

# Of one packed picture: 100 megapixels, the most that is decoded, of 16-bit colours.
MAX_BYTES = 600_000_000
_PIECE_BYTES = 1 << 14


class Pictures(Protocol):
    """Picture files by name, small enough to be pickled for another process."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a picture. Raises OSError or UnreadableItemError."""
        ...

    def head(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a picture to look at its head: what is not read need not be looked at."""
        ...


@dataclass(frozen=True)
class Folder:
    """The pictures below ``root``, by relative path."""

    root: Path

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a picture. Raises OSError, also for what is no regular file."""
        return open_regular(self.root / name)

    def head(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a picture, as ``open`` does."""
        return open_regular(self.root / name)


class Stretch(NamedTuple):
    """Bytes of a file: ``size`` from ``offset`` on, deflated if ``unpacked`` says to how many.

    ``checksum`` is the CRC-32 of what is unpacked.
    """

    file: int
    offset: int
    size: int
    unpacked: int | None = None
    checksum: int | None = None


@dataclass(frozen=True)
class Packed:
    """Pictures inside ``files``, such as a tar's members; ``stretches`` says where, by name."""

    files: tuple[Path, ...]
    stretches: Mapping[str, Stretch]

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Read a picture's bytes. Raises OSError, and UnreadableItemError for damaged ones."""
        with self.head(name) as file:
            data = file.read(MAX_BYTES)
        checksum = self.stretches[name].checksum
        if checksum is not None and zlib.crc32(data) != checksum:
            raise UnreadableItemError("differs from the archive's checksum")
        return io.BytesIO(data)

    def head(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a picture whose bytes are read, and unpacked, as far as they are asked for."""
        at = self.stretches.get(name)
        if at is None:
            raise FileNotFoundError(errno.ENOENT, "cannot be read from the archive", name)
        if max(at.size, at.unpacked or 0) > MAX_BYTES:
            raise UnreadableItemError(f"more than {MAX_BYTES:,} bytes")
        return _Unpacking(open_regular(self.files[at.file]), at)  # type: ignore[return-value]


class _Unpacking(io.RawIOBase):
    """A stretch as a file. Reading raises UnreadableItemError for damaged bytes."""

    def __init__(self, file: BinaryIO, at: Stretch) -> None:
        self._file, self._at, self._read = file, at, 0
        self._size = at.size if at.unpacked is None else at.unpacked
        self._inflater = None if at.unpacked is None else zlib.decompressobj(-zlib.MAX_WBITS)
        self._data, self._position = bytearray(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, (0, self._position, self._size)[whence] + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._size, self._position + size)
        while len(self._data) < stop:
            self._extend(stop - len(self._data))
        data = bytes(self._data[self._position : stop])
        self._position += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()

    def _extend(self, size: int) -> None:
        """Read, and unpack, about ``size`` more bytes."""
        inflater, wanted = self._inflater, max(size, _PIECE_BYTES)
        piece = b"" if inflater is None else inflater.unconsumed_tail
        if not piece:
            length = min(self._at.size - self._read, _PIECE_BYTES if inflater else wanted)
            piece = os.pread(self._file.fileno(), length, self._at.offset + self._read)
            self._read += len(piece)
            if len(piece) < length:
                raise UnreadableItemError("the file around it ends too early")
        try:
            data = piece if inflater is None else inflater.decompress(piece, wanted)
        except zlib.error as error:
            raise UnreadableItemError(one_line(error)) from None
        if not data and (inflater is None or inflater.eof or not piece):
            raise UnreadableItemError("shorter than the archive says")
        self._data += data
