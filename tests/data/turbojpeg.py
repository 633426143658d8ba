"""libturbojpeg by itself: what FFCV decodes with, without FFCV and without anything that was decoded before."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

# Of turbojpeg.h. FFCV decodes by the fast transform.
TJPF_RGB, TJFLAG_FASTDCT = 0, 2048


class Decompressor:
    """One handle. It keeps the tables of what it decoded last; a new one has none but the standard Huffman tables."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libturbojpeg.so.0")
        self._library.tjInitDecompress.restype = ctypes.c_void_p
        self._handle = ctypes.c_void_p(self._library.tjInitDecompress())

    def decode(self, data: bytes, height: int, width: int, *, exact: bool = False) -> tuple[bool, NDArray[np.uint8]]:
        """Whether it failed, and uint8 (height, width, 3): zeros where none was decoded. ``exact``: by the slow transform."""
        pixels = np.zeros((height, width, 3), np.uint8)
        size, room = ctypes.c_ulong(len(data)), pixels.ctypes.data_as(ctypes.c_void_p)
        flags = 0 if exact else TJFLAG_FASTDCT
        failed = self._library.tjDecompress2(self._handle, data, size, room, width, 0, height, TJPF_RGB, flags)
        return bool(failed), pixels

    def __del__(self) -> None:
        self._library.tjDestroy(self._handle)
