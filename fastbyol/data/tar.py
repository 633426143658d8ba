"""The members of a tar, where they lie: ustar, GNU's and pax headers.

Unlike tarfile this keeps no header in memory, refuses what is cut off or damaged instead of ending
there, and reads on after an end that another tar follows, as ``tar -i`` does.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastbyol.data.members import Member
from fastbyol.data.pictures import Stretch
from fastbyol.errors import UsageError

BLOCK = 512
_USTAR = b"ustar\0"  # GNU's has a space at its end, and no prefix of the name
# Long names and pax records of one member.
MAX_EXTENSION_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20
_PAX_KEYS, _PAX_SPARSE = (b"path", b"linkpath", b"size"), b"GNU.sparse."
_RECORD = re.compile(rb"([0-9]{1,9}) ")
_HIGH = bytes(range(128, 256))
_NO_DATA = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.LNKTYPE)
_GNU_FOLDER = b"D"  # with the names in it as data
_MODES = {
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    _GNU_FOLDER: stat.S_IFDIR,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class _Header(NamedTuple):
    """What a header says of its member."""

    name: str
    size: int
    kind: bytes
    link: str

    @classmethod
    def of(cls, block: bytes) -> _Header:
        """Read a header of ``BLOCK`` bytes. Raises ValueError where it is none."""
        if len(block) < BLOCK:
            raise ValueError
        checked, checksum = block[:148] + b" " * 8 + block[156:], _number(block[148:156])
        # Some old programs summed signed bytes.
        total = sum(checked)
        if checksum not in (total, total - 256 * (BLOCK - len(checked.translate(None, _HIGH)))):
            raise ValueError
        name, kind = _text(block[:100]), block[156:157]
        if block[257:263] == _USTAR and block[345]:
            name = f"{_text(block[345:500])}/{name}"
        return cls(name, _number(block[124:136]), kind, _text(block[157:257]))


def members(
    file: BinaryIO, where: Path, number: int = 0, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Yield the members of the tar at ``start`` to ``end`` of a file.

    The file is ``number`` of the stretches, and ``where`` in messages. Raises UsageError for what
    is no tar, damaged or cut off.
    """
    at, end = start, os.fstat(file.fileno()).st_size if end is None else end
    extension: dict[str, str] = {}
    while at < end:
        block = os.pread(file.fileno(), BLOCK, at)
        if not block.strip(b"\0"):
            at = _after_zeros(file, at, end)
            continue
        try:
            header = _Header.of(block)
        except ValueError:
            what = f"is damaged or cut off at byte {at:,}" if at > start else "is no tar"
            raise UsageError(f"{where}: {what}; get it again") from None
        kind, at = header.kind, at + BLOCK
        if kind == tarfile.GNUTYPE_SPARSE:
            at = _after_map(file, at, block[482])
        size = 0 if kind in _NO_DATA else _pax_size(extension.get("size"), header.size)
        if not 0 <= size <= end - at:
            raise UsageError(f"{where}: ends within {header.name!r}; get it again")
        data, at = at, at + -(-size // BLOCK) * BLOCK
        if kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extension |= _records(_extension(file, where, data, size), where)
        elif kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            key = "path" if kind == tarfile.GNUTYPE_LONGNAME else "linkpath"
            text = _extension(file, where, data, size).split(b"\0")[0]
            extension[key] = text.decode("utf-8", "surrogateescape")
        elif kind != tarfile.XGLTYPE:
            yield _member(header, extension, Stretch(number, data, size))
            extension = {}
    if extension:
        raise UsageError(f"{where}: is cut off at its end; get it again")


def _member(header: _Header, extension: dict[str, str], stretch: Stretch) -> Member:
    name = extension.get("GNU.sparse.name") or extension.get("path") or header.name
    reason, kind = "", header.kind
    if kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in extension):
        reason = "stored with holes (a sparse file); pack it again without"
    elif kind not in (*_FILES, *_MODES):
        reason = f"of the unknown type {kind!r}"
    return Member(
        name,
        # Before ustar a folder was a file whose name ends in a slash.
        stat.S_IFDIR if name.endswith("/") else _MODES.get(kind, stat.S_IFREG),
        stretch,
        extension.get("linkpath", header.link)
        if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE)
        else "",
        reason,
    )


def _number(data: bytes) -> int:
    """Return a header's number: octal digits, or GNU's signed bytes behind 0x80 or 0xff."""
    if data[0] in (0x80, 0xFF):
        return int.from_bytes(data[1:], "big") - (data[0] == 0xFF) * (1 << 8 * (len(data) - 1))
    return int(data.partition(b"\0")[0].strip() or b"0", 8)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_size(text: str | None, otherwise: int) -> int:
    """Return a pax record's number of bytes; -1 for any other text."""
    if text is None:
        return otherwise
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1


def _extension(file: BinaryIO, where: Path, start: int, size: int) -> bytes:
    if size > MAX_EXTENSION_BYTES:
        raise UsageError(f"{where}: has a name of {size:,} bytes at byte {start:,}; get it again")
    return os.pread(file.fileno(), size, start)


def _records(data: bytes, where: Path) -> dict[str, str]:
    """Return the pax records that say where and how a member lies.

    Each is its length, a space, key=value and a newline.
    """
    records, at = {}, 0
    while match := _RECORD.match(data, at):
        stop = at + int(match[1])
        key, equals, value = data[match.end() : stop].partition(b"=")
        if stop <= match.end() or stop > len(data) or not equals:
            break
        if key in _PAX_KEYS or key.startswith(_PAX_SPARSE):
            records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        at = stop
    if data[at:].strip(b"\0"):
        raise UsageError(f"{where}: has a damaged pax header; get it again")
    return records


def _after_map(file: BinaryIO, at: int, is_extended: int) -> int:
    """Return where the data of an old sparse member begins, behind the rest of its map."""
    while is_extended:
        block = os.pread(file.fileno(), BLOCK, at)
        at, is_extended = at + BLOCK, block[504] if len(block) == BLOCK else 0
    return at


def _after_zeros(file: BinaryIO, at: int, end: int) -> int:
    """Return where the first block begins that is not all zeros, or ``end``."""
    while at < end:
        at = _after_hole(file.fileno(), at, end)
        piece = os.pread(file.fileno(), _PIECE_BYTES, at)
        rest = piece.lstrip(b"\0")
        if rest or not piece:
            return min(end, at + (len(piece) - len(rest)) // BLOCK * BLOCK) if rest else end
        at += len(piece)
    return end


def _after_hole(fd: int, at: int, end: int) -> int:
    """Return the first block from ``at`` on that the disk has, or ``end``."""
    before = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        return os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK
    except OSError:  # nothing but a hole
        return end
    finally:
        os.lseek(fd, before, os.SEEK_SET)  # where the file's own buffer expects it
