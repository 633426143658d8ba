"""The loop over a batch without FFCV: raw images by a copy, JPEG by torchvision, crops by OpenCV.

Raw images have FFCV's pixels, cropped or not. JPEG images have Pillow's, by libjpeg's exact
transform; FFCV uses the fast one, which differs by up to 6 levels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.errors import UsageError, one_line
from fastbyol.process import left_as_found

Image = NDArray[np.uint8]


def loop(crop: bool, has_jpeg: bool) -> Any:
    """Return the loop over images, a ``decoder.Loop``, with or without cropping them."""
    shrink = _shrink() if crop else None
    if has_jpeg:
        _decode_jpeg()  # fail now where it is missing, not in a batch

    def decode(
        images: Image, status: NDArray[np.int32], data: Image, regions: NDArray[Any]
    ) -> None:
        rows = images.reshape(len(images), -1)  # copying flat rows takes two thirds of the time
        for row, (start, end, height, width, raw) in enumerate(regions.tolist()):
            stored = data[start:end]
            image = stored.reshape(height, width, 3) if raw else _decoded(stored)
            if image is None or image.shape != (height, width, 3):
                status[row] = 1
            elif shrink is None:
                rows[row] = image.reshape(-1)
            else:
                side = min(height, width)
                top, left = (height - side) // 2, (width - side) // 2
                shrink(image[top : top + side, left : left + side], images.shape[1:3], images[row])

    return decode


def first_damaged(streams: Sequence[Image], threads: Executor) -> int | None:
    """Return the index of the first JPEG stream that libjpeg finds damaged, or None.

    To libjpeg most damage is a warning, and the rest of the picture gray. FFCV's decoder returns
    warnings as errors; torchvision lets libjpeg write them to C's standard error.
    """
    with _c_stderr_bytes() as written:
        decodable = list(threads.map(_can_decode, streams))  # all: none may write below
        if all(decodable) and not written():
            return None
        for index, stream in enumerate(streams):
            before = written()
            if not _can_decode(stream) or written() != before:
                return index
    return None  # another library wrote the line


def _can_decode(stream: Image) -> bool:
    return _decoded(stream) is not None


def _decoded(stream: Image) -> Image | None:
    """Decode a JPEG stream to (H, W, 3). Returns None if that fails."""
    decode_jpeg = _decode_jpeg()
    try:
        planes = decode_jpeg(torch.from_numpy(stream.copy()))  # torch warns of read-only memory
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # out of memory
            raise
        return None
    return planes.permute(1, 2, 0).numpy()  # channels lie last in its memory, too


@functools.cache
def _decode_jpeg() -> Callable[[torch.Tensor], torch.Tensor]:
    """Import torchvision, which takes more than a second; return its decoder to RGB (3, H, W)."""
    with _needed("torchvision"):
        from torchvision.io import ImageReadMode

        # The public name warns at every call, from 0.29 on, that TorchCodec takes over.
        return functools.partial(torch.ops.image.decode_jpeg, mode=ImageReadMode.RGB.value)


@functools.cache
def _shrink() -> Callable[..., object]:
    with _needed("OpenCV"):
        import cv2

        return functools.partial(cv2.resize, interpolation=cv2.INTER_AREA)


@contextmanager
def _needed(name: str) -> Iterator[None]:
    """Import what the block imports without side effects. Raises UsageError where that fails."""
    try:
        with left_as_found():
            yield
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # or made for another torch
        raise UsageError(
            f"{name} cannot be used ({one_line(error)}), and images are decoded with it; "
            "`fastbyol doctor` says what to install"
        ) from error


@contextmanager
def _c_stderr_bytes() -> Iterator[Callable[[], int]]:
    """Divert C's standard error into memory; yield a function that counts its bytes.

    One such block runs at a time. Python's standard error and descriptor 2 are not diverted.
    """
    libc, stream, lock, _ = _diversion(os.getpid())
    with lock:
        stderr = ctypes.c_void_p.in_dll(libc, "stderr")
        before, stderr.value = stderr.value, stream.value
        try:
            start = libc.ftell(stream)
            yield lambda: libc.ftell(stream) - start
        finally:
            stderr.value = before


@functools.cache
def _diversion(process: int) -> tuple[Any, ctypes.c_void_p, threading.Lock, Any]:
    """Return C's library, a stream into memory and its lock; a forked ``process`` has its own."""
    libc = ctypes.CDLL(None)
    libc.open_memstream.restype, libc.ftell.restype = ctypes.c_void_p, ctypes.c_long
    ends = (ctypes.c_void_p * 2)()  # the stream stores its buffer and size here as long as it lives
    size = ctypes.byref(ends, ctypes.sizeof(ctypes.c_void_p))
    return libc, ctypes.c_void_p(libc.open_memstream(ends, size)), threading.Lock(), ends
