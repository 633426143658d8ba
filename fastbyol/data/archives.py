"""Tars, compressed or not, and zips, read where they lie.

A compressed tar is unpacked into one scratch file, as the tar that it is.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastbyol.data import beton_write, tar
from fastbyol.data.beton_write import UnreadableItemError
from fastbyol.data.folder_walk import Listing
from fastbyol.data.members import MAX_NAME, Member, list_members
from fastbyol.data.pictures import Packed, Stretch
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import untrusted
from fastbyol.errors import FastbyolError, UsageError, one_line, size_text
from fastbyol.files import open_regular

TARS = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    *(".tar.zst", ".tzst"),
)
SUFFIXES = (*TARS, ".zip")
# Left on the disk where a tar is unpacked, for the rest of the system.
RESERVE_BYTES = 64 << 20
# `xz -9` needs 65 MiB to unpack; a damaged head may ask for 4 GiB.
_XZ_BYTES = 256 << 20
_PIECE_BYTES = 1 << 20
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_ZIP_MAGIC = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
_ZIP_LOCAL = struct.Struct("<4s22xHH")  # APPNOTE 4.3.7: signature, lengths of name and extra field
_UTF8, _ENCRYPTED = 0x800, 0x1
_DOS, _UNIX, _MAC = 0, 3, 19


class Archive(NamedTuple):
    """The content of an archive: names, and where the bytes lie in ``file``."""

    file: Path
    listing: Listing
    stretches: dict[str, Stretch]
    is_zip: bool


def read(path: Path, scratch: Scratch | None, number: int = 0) -> Archive:
    """List a tar or zip; its stretches are of file ``number``.

    Raises UsageError where it is damaged, FastbyolError where a disk is too small to unpack it,
    OSError where it cannot be read.
    """
    with open_regular(path) as file:
        magic = file.read(8)
        file.seek(0)
        packed = next((kind for begin, kind in _MAGIC.items() if magic.startswith(begin)), None)
        if magic.startswith(_ZIP_MAGIC) or (packed is None and path.suffix.lower() == ".zip"):
            return Archive(path, *list_members(_zip_members(file, path, number)), is_zip=True)
        if packed is None:
            return Archive(path, *list_members(tar.members(file, path, number)), is_zip=False)
        unpacked = _unpacked(file, path, packed, scratch, f"{number}.tar")
    with open_regular(unpacked) as file:
        return Archive(unpacked, *list_members(tar.members(file, path, number)), is_zip=False)


def _unpacked(file: BinaryIO, path: Path, kind: str, scratch: Scratch | None, name: str) -> Path:
    """Unpack a compressed file into the scratch file ``name``; return its path."""
    if scratch is None or kind == "zst":
        command = f"unzstd {path}" if kind == "zst" else f"tar -xf {path}"
        raise UsageError(f"{path}: is packed; unpack it (`{command}`) and give what comes of it")
    out = scratch.file(name)
    with beton_write.disk_errors(), out.open("wb") as target:
        for piece in _pieces(file, path, kind):
            free = shutil.disk_usage(scratch.path).free
            if free - len(piece) < RESERVE_BYTES:
                raise FastbyolError(
                    f"{path}: needs more than {size_text(target.tell())} of room to be "
                    f"unpacked, {scratch.path.parent} has {size_text(free)} left; make room, "
                    "or write to another disk"
                )
            target.write(piece)
    return out


def _pieces(file: BinaryIO, path: Path, kind: str) -> Iterator[bytes]:
    """Yield what a compressed file unpacks to. Raises UsageError where it is damaged."""
    try:
        if kind == "xz":
            yield from _xz_pieces(file)
            return
        opened = gzip.GzipFile(fileobj=file) if kind == "gz" else bz2.BZ2File(file)
        with opened as stream:
            while piece := stream.read(_PIECE_BYTES):
                yield piece
    # These are OSErrors, EOFErrors, zlib's and lzma's own; a failing disk says its number.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UsageError(
            f"{path}: is damaged or cut off ({one_line(error)}); get it again"
        ) from None


def _xz_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield what one or more xz streams unpack to, within a bound of memory."""
    decompressor, data = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_BYTES), b""
    while True:
        if decompressor.eof:
            data = (decompressor.unused_data or file.read(_PIECE_BYTES)).lstrip(b"\0")
            if not data:
                return
            decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_BYTES)
        elif decompressor.needs_input and not (data := file.read(_PIECE_BYTES)):
            raise EOFError("it ends too early")
        yield decompressor.decompress(data, _PIECE_BYTES)
        data = b""


def _zip_members(file: BinaryIO, path: Path, number: int) -> Iterator[Member]:
    with (
        untrusted(path, "is a damaged zip", "get it again"),
        zipfile.ZipFile(file) as archive,
    ):
        infos = archive.infolist()
    end = os.fstat(file.fileno()).st_size
    for info in infos:
        mode = stat.S_IFMT(info.external_attr >> 16) if info.create_system in (_UNIX, _MAC) else 0
        name, link = _zip_name(info), ""
        if name.endswith("/"):
            yield Member(name, stat.S_IFDIR)
            continue
        stretch, reason = _zip_stretch(file, info, number, end)
        if mode == stat.S_IFLNK and stretch is not None:
            try:
                with Packed((path,), {name: stretch._replace(file=0)}).head(name) as target:
                    link = os.fsdecode(target.read(MAX_NAME))
            except UnreadableItemError as error:
                mode, reason = stat.S_IFREG, str(error)
        yield Member(name, mode or stat.S_IFREG, stretch, link, reason)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name. Unix writes it in UTF-8, whether it says so or not."""
    name = info.filename
    if info.create_system in (_UNIX, _MAC) and not info.flag_bits & _UTF8:
        with contextlib.suppress(ValueError):  # an older one, then
            name = name.encode("cp437").decode("utf-8")
    # Some programs for Windows write its slashes.
    return name.replace("\\", "/") if info.create_system == _DOS and "/" not in name else name


def _zip_stretch(
    file: BinaryIO, info: zipfile.ZipInfo, number: int, end: int
) -> tuple[Stretch | None, str]:
    """Return where a member's bytes lie, or None and why they cannot be read."""
    if info.flag_bits & _ENCRYPTED:
        return None, "is encrypted; unpack the archive and give the folder"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return None, (
            f"is compressed by zip's method {info.compress_type}; unpack the archive and give the "
            "folder"
        )
    head = b""
    if 0 <= info.header_offset < end:
        head = os.pread(file.fileno(), _ZIP_LOCAL.size, info.header_offset)
    if len(head) < _ZIP_LOCAL.size or not head.startswith(_ZIP_MAGIC[0]):
        return None, "is not where the archive says"
    _, name_bytes, extra_bytes = _ZIP_LOCAL.unpack(head)
    offset = info.header_offset + _ZIP_LOCAL.size + name_bytes + extra_bytes
    if info.compress_size > end - offset:
        return None, "goes beyond the end of the archive"
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    if not deflated and info.compress_size != info.file_size:
        return None, "has two sizes in the archive"
    return (
        Stretch(number, offset, info.compress_size, info.file_size if deflated else None, info.CRC),
        "",
    )
