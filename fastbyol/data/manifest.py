"""The manifest of a beton written by fastbyol: a checksum a sample, in pages that FFCV ignores.

It lies between the last sample and the allocation table: one rename publishes both.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Little-endian, up to the allocation table at A:
#   pages     N u32: CRC-32 of each sample's image region, in file order
#             the note, JSON: where the images came from; then zeros
#   A - 64    tail, 64 B (TAIL), whose last 16 B are a BLAKE2b of all manifest bytes before them
#
# CRC-32 finds every burst of up to 32 flipped bits (Peterson and Brown 1961), any other damage but
# for one in 2**32. It takes 9.5 us for 96 x 96 pixels, 2.9 GB/s; BLAKE2b takes 41 us, SHA-256 29
# (one core, zlib 1.2.13).
MAGIC = b"fastbyol sealed"
VERSION = 1
CHUNK_BYTES = 1 << 24

TAIL = np.dtype(
    {
        "names": ["magic", "version", "note_bytes", "num_bytes", "samples", "structure", "digest"],
        "formats": ["S16", "<u4", "<u4", "<u8", "<u8", "<u4", "S16"],
        "offsets": [0, 16, 20, 24, 32, 40, 48],
    }
)
DIGEST_BYTES = 16


class DamagedError(ValueError):
    """A manifest that is damaged or of a later version."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """The ``checksums`` (N,) uint32 of the image regions, and a ``note`` on their source.

    ``structure`` is the CRC-32 of the file's header, descriptors, rows and allocation table.
    """

    num_bytes: int
    structure: int
    checksums: NDArray[np.uint32]
    note: Mapping[str, Any] = field(default_factory=dict)

    def pack(self, page: int) -> bytes:
        """Return the manifest's pages, each ``page`` bytes."""
        note = json.dumps(dict(self.note)).encode()
        tail = np.zeros(1, TAIL)
        tail["magic"], tail["version"], tail["note_bytes"] = MAGIC, VERSION, len(note)
        tail["num_bytes"], tail["samples"], tail["structure"] = (
            self.num_bytes,
            len(self.checksums),
            self.structure,
        )
        body = self.checksums.astype("<u4").tobytes() + note
        body += bytes(num_bytes(len(self.checksums), len(note), page) - len(body) - TAIL.itemsize)
        pages = body + tail.tobytes()[:-DIGEST_BYTES]
        return pages + _digest(pages)


def num_bytes(samples: int, note: int, page: int) -> int:
    """Return the bytes of a manifest's pages for ``samples`` checksums and a note."""
    return -(-(TAIL.itemsize + 4 * samples + note) // page) * page


def length(tail: bytes, page: int) -> int | None:
    """Return the bytes of the manifest that ends with ``tail`` (64 bytes), or None without one."""
    read = np.frombuffer(tail, TAIL, 1)[0]
    return (
        num_bytes(int(read["samples"]), int(read["note_bytes"]), page)
        if read["magic"] == MAGIC
        else None
    )


def parse(pages: bytes) -> Manifest:
    """Read a manifest from its pages. Raises DamagedError if they do not hold a whole one."""
    tail = np.frombuffer(pages, TAIL, 1, len(pages) - TAIL.itemsize)[0]
    if tail["magic"] != MAGIC or pages[-DIGEST_BYTES:] != _digest(pages[:-DIGEST_BYTES]):
        raise DamagedError("its manifest is damaged")
    if tail["version"] != VERSION:
        raise DamagedError(
            f"its manifest has version {tail['version']}, this fastbyol knows {VERSION}"
        )
    at = 4 * int(tail["samples"])
    note = json.loads(pages[at : at + int(tail["note_bytes"])])
    return Manifest(
        int(tail["num_bytes"]), int(tail["structure"]), np.frombuffer(pages, "<u4", at // 4), note
    )


def structure_checksum(fd: int, rows_end: int, table_start: int, file_bytes: int) -> int:
    """Return the CRC-32 of [0, rows_end) and [table_start, file_bytes) of the file."""
    value = 0
    for start, end in ((0, rows_end), (table_start, file_bytes)):
        for at in range(start, end, CHUNK_BYTES):
            value = zlib.crc32(os.pread(fd, min(CHUNK_BYTES, end - at), at), value)
    return value


def region_checksums(
    fd: int, starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Return the CRC-32 (n,) of the file's bytes [start, start + size)."""
    pairs = zip(starts.tolist(), sizes.tolist(), strict=True)
    return np.fromiter(
        (zlib.crc32(os.pread(fd, size, start)) for start, size in pairs), np.uint32, len(starts)
    )


def _digest(pages: bytes) -> bytes:
    return hashlib.blake2b(pages, digest_size=DIGEST_BYTES).digest()
