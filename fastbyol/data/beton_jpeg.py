"""Frame headers of JPEG streams inside a file, read without decoding.

Markers: ITU-T T.81, annex B. Only what a beton's writer can produce is accepted: 8 bit, one or
three components, baseline, extended or progressive Huffman frames, from SOI to EOI.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

# OpenCV puts the frame header at byte 158 of a colour image; other encoders need more, 512 is one
# read.
WINDOW_BYTES = 512
# A frame header needs 10 bytes of the window: marker, length, precision, height, width, components.
FRAME_BYTES = 10
# A frame header that needs more reads than this comes from no known writer.
MAX_WINDOWS = 512
SOI, EOI = b"\xff\xd8", b"\xff\xd9"
# Baseline, extended and progressive Huffman frames.
FRAMES = frozenset((0xC0, 0xC1, 0xC2))
# Markers that carry a length and may come before a frame header: DHT, DQT, DRI, APPn, COM.
SKIPPED = frozenset((0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))


def frame_sizes(
    fd: int, starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the widths and heights in pixels of the JPEG streams at ``starts`` (N,).

    ``sizes`` (N,) are the streams' bytes. Both results are 0 where a stream cannot be decoded to
    RGB.
    """
    pairs = zip(starts.tolist(), sizes.tolist(), strict=True)
    frames = np.array([_frame_size(fd, start, size) for start, size in pairs], np.int64).reshape(
        -1, 2
    )
    return frames[:, 1], frames[:, 0]


def _frame_size(fd: int, start: int, size: int) -> tuple[int, int]:
    """Return height and width, or zeros: follow a stream's segments up to its frame header."""
    if size < 4 or os.pread(fd, 2, start + size - 2) != EOI or os.pread(fd, 2, start) != SOI:
        return 0, 0
    position = 2
    for _ in range(MAX_WINDOWS):
        window, at = os.pread(fd, min(WINDOW_BYTES, size - position), start + position), 0
        while at + FRAME_BYTES <= len(window):
            marked, marker, length = (
                window[at] == 0xFF,
                window[at + 1],
                window[at + 2] << 8 | window[at + 3],
            )
            if marked and marker in FRAMES and window[at + 4] == 8 and window[at + 9] in (1, 3):
                return window[at + 5] << 8 | window[at + 6], window[at + 7] << 8 | window[at + 8]
            if not marked or marker not in SKIPPED or length < 2:
                return 0, 0
            at += length + 2
        position += at
        if not at or position + FRAME_BYTES > size:
            return 0, 0
    return 0, 0
