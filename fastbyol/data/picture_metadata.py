"""Pictures without their metadata, for a second try where Pillow fails on damaged metadata.

Pillow parses EXIF, colour profiles and texts on opening and fails if one is damaged; other decoders
ignore them. Whatever the pixels depend on is kept.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import BinaryIO

# A larger file is tried once only.
MAX_BYTES = 1 << 28
_PNG = b"\x89PNG\r\n\x1a\n"
# PNG 1.2, 4: the critical chunks, and transparency.
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
_JPEG = b"\xff\xd8"
_SOS = 0xDA
# Markers without a length: ITU-T T.81, table B.1.
_JPEG_ALONE = (0x01, *range(0xD0, 0xD9))
_JPEG_COMMENT = 0xFE
# ISO/IEC 23008-12: an item's entry in an AVIF file's list, versions 2 and 3, up to its type.
_AVIF_EXIF = re.compile(rb"(infe[\x02\x03].{7}(?:..)?)Exif", re.DOTALL)
# WebP container specification: image, alpha and animation chunks, and VP8X's flags for them.
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_FLAGS = 0x12
_TIFF = (b"II*\0", b"MM\0*")
# TIFF 6.0 and its supplements: tags of how pixels are stored or coloured, and of the rotation.
_TIFF_PIXELS = frozenset((
    *range(256, 260), 262, 266, 273, 274, *range(277, 282), 284, 292, 293, 317, 320, *range(322,
    326), 332, 338, 339, 347,
    *range(512, 522), *range(529, 533),
))  # fmt: skip
# A private tag of one byte, which replaces tags that only describe.
_TIFF_SKIPPED = (65000, 1, 1, 0)


def without_metadata(file: BinaryIO) -> BinaryIO | None:
    """Return the picture in ``file``, from its position, reduced to what its pixels need.

    PNG, JPEG, WebP, TIFF and AVIF are known; other formats give None. EXIF that looks whole is kept
    for its rotation.
    """
    data = file.read(12)
    is_known = data.startswith((_PNG, _JPEG, b"RIFF", *_TIFF)) or data[4:8] == b"ftyp"
    data += file.read(MAX_BYTES) if is_known else b""
    if len(data) > MAX_BYTES:
        return None
    if data.startswith(_PNG):
        return io.BytesIO(_png(data))
    if data.startswith(_JPEG):
        return io.BytesIO(_jpeg(data))
    if data[4:8] == b"ftyp":
        return io.BytesIO(_AVIF_EXIF.sub(rb"\1skip", data))  # unknown types are ignored
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return io.BytesIO(_webp(data))
    if data.startswith(_TIFF):
        return io.BytesIO(_tiff(data))
    return None


def _png(data: bytes) -> bytes:
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        (size,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        end = at + 12 + size
        checksum = data[end - 4 : end]
        is_whole = len(checksum) == 4 and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(
            checksum, "big"
        )
        if kind in _PNG_PIXELS or (kind == b"eXIf" and is_whole):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _webp(data: bytes) -> bytes:
    kept, at = [], 12
    while at + 8 <= len(data):
        kind, (size,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        end = at + 8 + size + size % 2
        if kind == b"VP8X":
            kept.append(
                data[at : at + 8] + bytes((data[at + 8] & _WEBP_FLAGS,)) + data[at + 9 : end]
            )
        elif kind in _WEBP_PIXELS:
            kept.append(data[at:end])
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _jpeg(data: bytes) -> bytes:
    kept, at = [_JPEG], len(_JPEG)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_ALONE or marker == 0xFF:  # the latter is a fill byte
            at += 2 if marker != 0xFF else 1
            continue
        if marker == _SOS:
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if _is_needed(marker, data[at + 4 : end]):
            kept.append(data[at:end])
        at = end
    return b"".join((*kept, data[at:]))


def _is_needed(marker: int, content: bytes) -> bool:
    """Return whether a segment affects colours (JFIF, Adobe), rotation (EXIF) or decoding."""
    if 0xE0 <= marker <= 0xEF:
        heads = ((0xE0, b"JFIF\0", 14), (0xE1, b"Exif\0\0", 14), (0xEE, b"Adobe", 12))
        return any(
            marker == m and content.startswith(head) and len(content) >= size
            for m, head, size in heads
        )
    return marker != _JPEG_COMMENT


def _tiff(data: bytes) -> bytes:
    order = "<" if data.startswith(b"II") else ">"
    made = bytearray(data)
    (start,) = struct.unpack_from(f"{order}I", data, 4) if len(data) >= 8 else (len(data),)
    (entries,) = struct.unpack_from(f"{order}H", data, start) if start + 2 <= len(data) else (0,)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(data) - 11), 12):
        if struct.unpack_from(f"{order}H", data, at)[0] not in _TIFF_PIXELS:
            struct.pack_into(f"{order}HHII", made, at, *_TIFF_SKIPPED)
    return bytes(made)
