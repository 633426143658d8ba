"""Decoded images of a beton by sample id: FFCV's reader, compiler and native decoders, without FFCV's Loader.

FFCV 1.0.2's Loader drops the JPEG decoder's return code, so that damaged data trains without a word; overwrites a batch when
the next is taken; where it crops, sets aside room for the largest image times five batches (46 GB for 12-megapixel pictures in
batches of 256; here one picture a thread); compiles anew for every loader (0.5 s and more); and leaks a thread and that room
when an epoch ends early. So the loop over a batch is ours, in the form that FFCV's compiler takes; what it calls is FFCV's.
At 96x96 raw it is as fast as FFCV's Loader, whose batches one must copy to keep: both above 350,000 images/s on a core.
"""

from __future__ import annotations

import functools
import mmap
import os
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.data.beton import BetonInfo
from fastbyol.errors import UsageError

# Where one image's data lies in the file, bytes [start, end), and its size in pixels.
PLACE = np.dtype([("start", "<i8"), ("end", "<i8"), ("height", "<i8"), ("width", "<i8"), ("raw", "<i8")])
Native = Callable[..., None]

_compiling = threading.Lock()


class Decoder:
    """The images of a verified beton, all of one size: as stored, or where sizes differ the centre square scaled to ``size``.

    ``in_memory`` reads the file at once, after which nothing that happens to it matters. Otherwise it stays mapped, and
    ``check_unchanged`` tells whether it is still what was verified. ``workers``: threads per call, 0 for one a core.
    """

    def __init__(self, info: BetonInfo, *, size: int, workers: int, in_memory: bool) -> None:
        numba = import_ffcv()
        self.info = info
        crop = info.uniform_size is None
        self.shape = (size, size, 3) if crop else (*info.uniform_size, 3)  # type: ignore[misc]
        self.num_threads = min(workers or numba.config.NUMBA_NUM_THREADS, numba.config.NUMBA_NUM_THREADS)
        self._set_num_threads = numba.set_num_threads
        self._fd = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)
        self._stamp = self._stat()
        self._bytes = _read(self._fd, self._stamp[0]) if in_memory else _map(self._fd)
        self._places, self._labels = _columns(info)
        self.check_unchanged()
        self._native = _compiled(crop, self.num_threads > 1)
        self.decode(np.empty(0, np.int64), np.empty((0, *self.shape), np.uint8))

    def decode(self, ids: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """Fill ``images`` (n, H, W, 3) with the samples ``ids`` (n,). Thread-safe; releases the interpreter's lock.

        Raises UsageError where a JPEG decoder reports damage, naming the sample; IndexError, ValueError for wrong arguments.
        """
        if images.shape != (len(ids), *self.shape) or not images.flags.c_contiguous:
            raise ValueError(f"{len(ids)} images of {self.shape} need one array of them, got {images.shape}")
        if len(ids) and (ids.min() < 0 or ids.max() >= self.info.num_samples):
            raise IndexError(f"{self.info.path}: sample ids must lie in [0, {self.info.num_samples})")
        self._set_num_threads(self.num_threads)
        status = np.zeros(len(ids), np.int32)
        self._native(ids, images, status, self._bytes, self._places)
        if status.any():
            sample = ids[np.flatnonzero(status)[0]]
            raise UsageError(f"{self.info.path}: the JPEG data of sample {sample} is damaged; make the file again")

    def labels(self) -> NDArray[np.int64] | None:
        """(N,) in file order; None where the file has none."""
        return self._labels

    def check_unchanged(self) -> None:
        """UsageError if the file was written to since it was opened. (Replacing or deleting it does no harm.)"""
        if self._stat() != self._stamp:
            raise UsageError(f"{self.info.path}: the file changed while in use; leave it alone and start again")

    def close(self) -> None:
        """Let go of the file. Closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._bytes = np.empty(0, np.uint8)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns


@functools.cache
def import_ffcv() -> Any:
    """Import FFCV, slow and full of side effects, without these; returns numba. UsageError if something is missing.

    Left to itself the import takes 2.4 s instead of 0.3 (it compiles a typed dict of two entries that only Python reads),
    leaves torch with one thread, and may take numba's ``workqueue``, which aborts the process when two threads decode at once.
    """
    num_threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import numba
            import numba.typed

            if numba.config.THREADING_LAYER == "default":
                numba.config.THREADING_LAYER = "threadsafe"
            typed_dict, numba.typed.Dict = numba.typed.Dict, dict
            try:
                import ffcv.loader  # noqa: F401 (brings in all that is used later)
            finally:
                numba.typed.Dict = typed_dict
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"FFCV cannot be used ({reason}); `fastbyol doctor` says what to install") from error
    finally:
        torch.set_num_threads(num_threads)
    return numba


@functools.cache
def _compiled(crop: bool, parallel: bool) -> Native:
    """The loop over a batch, compiled by FFCV. It stays for the process's life: compiling takes half a second."""
    from ffcv.libffcv import imdecode, memcpy, resize_crop
    from ffcv.pipeline.compiler import Compiler

    with _compiling:
        # What Compiler reads; its set_num_threads would set torch's too.
        Compiler.num_threads = 2 if parallel else 1
        calls = [Compiler.compile(call) for call in (imdecode, memcpy, resize_crop)]
        loop = (_cropping if crop else _whole)(Compiler.get_iterator(), *calls)
        loop.is_parallel = True  # type: ignore[attr-defined]
        return Compiler.compile(loop)  # type: ignore[no-any-return]


def _whole(each: Any, imdecode: Any, memcpy: Any, _resize: Any) -> Native:
    def decode(ids: Any, images: Any, status: Any, data: Any, places: Any) -> None:
        for row in each(len(ids)):
            place = places[ids[row]]
            source, height, width = data[place.start : place.end], place.height, place.width
            if place.raw:
                memcpy(source, images[row])
            else:
                status[row] = imdecode(source, images[row], height, width, height, width, 0, 0, 1, 1, False, False)

    return decode


def _cropping(each: Any, imdecode: Any, _memcpy: Any, resize_crop: Any) -> Native:
    def decode(ids: Any, images: Any, status: Any, data: Any, places: Any) -> None:
        for row in each(len(ids)):
            place = places[ids[row]]
            source, height, width = data[place.start : place.end], place.height, place.width
            if not place.raw:
                scratch = np.empty(height * width * 3, np.uint8)
                status[row] = imdecode(source, scratch, height, width, height, width, 0, 0, 1, 1, False, False)
                source = scratch
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            resize_crop(source.reshape(height, width, 3), top, top + side, left, left + side, images[row])

    return decode


def _columns(info: BetonInfo) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
    """What FFCV reads of the file, proved to be what ``inspect`` verified: places of the images (N,), and the labels."""
    from ffcv.reader import Reader

    reader = Reader(str(info.path))
    rows = reader.metadata[f"f{reader.field_names.index(info.image_field)}"]
    order = np.argsort(reader.alloc_table["ptr"], kind="stable")
    region = reader.alloc_table[order][np.searchsorted(reader.alloc_table["ptr"][order], rows["data_ptr"])]
    places = np.empty(info.num_samples, PLACE)
    places["start"], places["end"] = region["ptr"], region["ptr"] + region["size"]
    places["height"], places["width"], places["raw"] = info.heights, info.widths, info.raw
    same = (rows["height"] == info.heights) & (rows["width"] == info.widths) & (rows["mode"] == info.raw)
    inside = (region["ptr"] == rows["data_ptr"]) & (places["start"] >= 0) & (places["end"] <= info.num_bytes)
    whole = ~info.raw | (region["size"] == 3 * places["height"] * places["width"])
    if not (same & inside & whole).all():
        raise UsageError(f"{info.path}: the file changed while it was opened; leave it alone and start again")
    labels = None if info.label_field is None else reader.metadata[f"f{reader.field_names.index(info.label_field)}"]
    return places, None if labels is None else np.ascontiguousarray(labels)


def _read(fd: int, num_bytes: int) -> NDArray[np.uint8]:
    with open(fd, "rb", closefd=False) as file:
        data = np.fromfile(file, np.uint8, num_bytes)
    data.flags.writeable = False  # so that it has the type of a mapped file, and one compiled loop serves both
    return data


def _map(fd: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8)
