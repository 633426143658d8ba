"""libturbojpeg alone, FFCV's decoder, without FFCV and without any earlier image."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

# Of turbojpeg.h. FFCV decodes by the fast transform.
TJPF_RGB, TJFLAG_FASTDCT = 0, 2048


class Decompressor:
    """A handle, which keeps its last image's tables; a new one has the standard Huffman tables."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libturbojpeg.so.0")
        self._library.tjInitDecompress.restype = ctypes.c_void_p
        self._handle = ctypes.c_void_p(self._library.tjInitDecompress())

    def decode(
        self, data: bytes, height: int, width: int, *, exact: bool = False
    ) -> tuple[bool, NDArray[np.uint8]]:
        """Return failure and uint8 (height, width, 3), zeros if nothing was decoded.

        ``exact`` uses the slow transform.
        """
        pixels = np.zeros((height, width, 3), np.uint8)
        size, room = ctypes.c_ulong(len(data)), pixels.ctypes.data_as(ctypes.c_void_p)
        flags = 0 if exact else TJFLAG_FASTDCT
        failed = self._library.tjDecompress2(
            self._handle, data, size, room, width, 0, height, TJPF_RGB, flags
        )
        return bool(failed), pixels

    def __del__(self) -> None:
        self._library.tjDestroy(self._handle)
