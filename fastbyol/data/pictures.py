"""Picture files by name, in a folder or packed inside other files."""

from __future__ import annotations

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


class Pictures(Protocol):
    """Picture files by name, small enough to be pickled for another process."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a picture. Raises OSError or UnreadableItemError."""
        ...


@dataclass(frozen=True)
class Folder:
    """The pictures below ``root``, by relative path."""

    root: Path

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a picture. Raises OSError, also for what is no regular file."""
        return open_regular(self.root / name)


class Stretch(NamedTuple):
    """Bytes of a file: ``size`` from ``offset`` on, deflated if ``unpacked`` says to how many."""

    file: int
    offset: int
    size: int
    unpacked: int | None = None


@dataclass(frozen=True)
class Packed:
    """Pictures inside ``files``, such as a tar's members; ``stretches`` says where, by name."""

    files: tuple[Path, ...]
    stretches: Mapping[str, Stretch]

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Read a picture's bytes. Raises OSError, and UnreadableItemError for damaged ones."""
        at = self.stretches[name]
        if max(at.size, at.unpacked or 0) > MAX_BYTES:
            raise UnreadableItemError(f"more than {MAX_BYTES:,} bytes")
        with open_regular(self.files[at.file]) as file:
            data = os.pread(file.fileno(), at.size, at.offset)
        if len(data) != at.size:
            raise UnreadableItemError("the file around it ends too early")
        if at.unpacked is not None:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, at.unpacked)
            except zlib.error as error:
                raise UnreadableItemError(one_line(error)) from None
            if len(data) != at.unpacked:
                raise UnreadableItemError("shorter than the archive says")
        return io.BytesIO(data)
