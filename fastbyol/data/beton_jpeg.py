"""Frame headers of many JPEG streams inside one file, read in lockstep with numpy: no decoding, a few reads an image.

Marker layout: ITU-T T.81, annex B. Only what FFCV's writer can produce is accepted: 8 bit, one or three components,
baseline, extended or progressive Huffman frames, from SOI to EOI with nothing around them.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

# OpenCV puts the frame header at byte 158 of a colour image; 512 leaves room for other encoders and is one read.
WINDOW_BYTES = 512
CHUNK_IMAGES = 8192
# A frame header needs 10 bytes of the window: marker, length, precision, height, width, components.
FRAME_BYTES = 10
# A frame header further back than this many reads is no picture that a writer made.
MAX_WINDOWS = 512

_FRAMES = np.zeros(256, bool)
_FRAMES[[0xC0, 0xC1, 0xC2]] = True
# Markers that carry a length and may come before a frame header: DHT, DQT, DRI, APPn, COM.
_SKIPPED = np.zeros(256, bool)
_SKIPPED[[0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE]] = True


def frame_sizes(fd: int, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(widths, heights)`` in pixels from the frame headers of the streams at ``starts`` (N,), ``sizes`` (N,) bytes long.

    Where a stream is not a JPEG that can be decoded to RGB, both are 0.
    """
    parts = [
        _chunk_sizes(fd, starts[at : at + CHUNK_IMAGES], sizes[at : at + CHUNK_IMAGES])
        for at in range(0, len(starts), CHUNK_IMAGES)
    ]
    found = np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)
    return found[:, 1], found[:, 0]


def _chunk_sizes(fd: int, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, 2) heights and widths; zeros where the stream is damaged."""
    tails = _gather(fd, starts + np.maximum(sizes - 2, 0), 2)
    heads = _gather(fd, starts, 2)
    whole = (sizes >= 4) & (heads == (0xFF, 0xD8)).all(1) & (tails == (0xFF, 0xD9)).all(1)
    found = np.zeros((len(starts), 2), np.int64)
    position = np.full(len(starts), 2)
    live = np.flatnonzero(whole)
    for _ in range(MAX_WINDOWS):
        live = live[position[live] + FRAME_BYTES <= sizes[live]]
        if not live.size:
            break
        window = _gather(fd, starts[live] + position[live], WINDOW_BYTES)
        live = live[_walk(window, live, position, found)]
    return found


def _walk(
    window: NDArray[np.uint8], live: NDArray[np.int64], position: NDArray[np.int64], found: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Follow the segments inside each row of ``window`` (m, WINDOW_BYTES); true where the walk goes on behind it."""
    cursor = np.zeros(len(live), np.int64)
    walking = np.arange(len(live))
    going = np.zeros(len(live), bool)
    while walking.size:
        at = window[walking[:, None], cursor[walking][:, None] + np.arange(FRAME_BYTES)].astype(np.int64)
        length = at[:, 2] << 8 | at[:, 3]
        marked = at[:, 0] == 0xFF
        frame = marked & _FRAMES[at[:, 1]] & (at[:, 4] == 8) & np.isin(at[:, 9], (1, 3))
        found[live[walking[frame]]] = (at[:, [5, 7]] << 8 | at[:, [6, 8]])[frame]
        on = marked & _SKIPPED[at[:, 1]] & (length >= 2)
        walking = walking[on]
        cursor[walking] += length[on] + 2
        position[live[walking]] += length[on] + 2
        behind = cursor[walking] + FRAME_BYTES > WINDOW_BYTES
        going[walking[behind]] = True
        walking = walking[~behind]
    return going


def _gather(fd: int, offsets: NDArray[np.int64], count: int) -> NDArray[np.uint8]:
    """(n, count) bytes from each offset; zeros behind the end of the file."""
    out = np.zeros((len(offsets), count), np.uint8)
    view = out.reshape(-1).data
    for row, offset in enumerate(offsets.tolist()):
        os.preadv(fd, [view[row * count : (row + 1) * count]], offset)
    return out
