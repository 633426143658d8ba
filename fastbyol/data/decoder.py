"""Decoded images of a beton by sample id, by FFCV's native decoders or by torchvision.

The loop over a batch is in ``decode_ffcv`` and ``decode_torchvision``; all else is shared. Both
give the same pixels for raw images, but not for JPEG.
"""

from __future__ import annotations

import functools
import os
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import decode_ffcv, decode_torchvision
from fastbyol.data.beton import BetonInfo, open_beton, refuse_changed
from fastbyol.data.jpeg_tables import brings_its_tables
from fastbyol.errors import FastbyolError, UsageError, check_choice

# An image's data in the file, bytes [start, end), and its size in pixels.
REGION = np.dtype(
    [("start", "<i8"), ("end", "<i8"), ("height", "<i8"), ("width", "<i8"), ("raw", "<i8")]
)
# Fills images (n, H, W, 3), and status (n,) with 0 unless a JPEG is damaged, from data and regions
# (n,).
Loop = Callable[[NDArray[np.uint8], NDArray[np.int32], NDArray[np.uint8], NDArray[Any]], None]
DecoderName = Literal["auto", "ffcv", "torchvision"]
# Linux reads at most 2 GiB less a page at once.
READ_BYTES = 1 << 30


def choose(decoder: str) -> str:
    """Return "ffcv" or "torchvision" for ``data.decoder``; "auto" is "ffcv" where it is usable.

    Raises UsageError for "ffcv" where it is not.
    """
    check_choice("data.decoder", decoder, get_args(DecoderName))
    if decoder == "torchvision":
        return decoder
    try:
        decode_ffcv.import_ffcv()
    except UsageError:
        if decoder == "ffcv":
            raise
        return "torchvision"
    return "ffcv"


def choose_again(before: str) -> str:
    """Return ``before``, an earlier result of ``choose``, if it is usable, else "torchvision"."""
    try:
        return choose(before)
    except UsageError:
        return "torchvision"


class Decoder:
    """The images of a verified beton, all of one size.

    If the file's sizes differ, the centre square of each image is scaled to ``size``. ``in_memory``
    reads the file at once; after that it may change. Otherwise each call reads its samples, and
    fails if the file has changed. ``workers`` is the number of threads a call, 0 for one a core.
    ``decoder`` is a name for ``choose``.
    """

    def __init__(
        self, info: BetonInfo, *, size: int, workers: int, in_memory: bool, decoder: str = "auto"
    ) -> None:
        self.info = info
        self.name = choose(decoder)
        crop = info.uniform_size is None
        self.shape = (size, size, 3) if crop else (*info.uniform_size, 3)  # type: ignore[misc]
        cores = len(os.sched_getaffinity(0))
        self.num_threads = min(workers or cores, cores)
        self._loop: Loop = (
            decode_ffcv.loop(crop)
            if self.name == "ffcv"
            else decode_torchvision.loop(crop, has_jpeg=not info.raw.all())
        )
        self._regions = _regions(info)
        self._unproved = np.full(info.num_samples, True) if info.manifest is not None else ~info.raw
        self._fd = open_beton(info.path)
        self._release = weakref.finalize(self, os.close, self._fd)
        try:
            self._bytes = np.empty(info.num_bytes, np.uint8) if in_memory else None
            if self._bytes is not None:
                _read(self._fd, self._bytes, 0, info)
                self._bytes.flags.writeable = False
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def decode(self, ids: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """Fill ``images`` (n, H, W, 3) with the samples ``ids`` (n,). Thread-safe, without the GIL.

        Raises UsageError for bytes that differ from the manifest's checksum, for damaged JPEG data
        (naming the sample) and for a file that changed, IndexError and ValueError for wrong
        arguments.
        """
        if images.shape != (len(ids), *self.shape) or not images.flags.c_contiguous:
            raise ValueError(
                f"{len(ids)} images of {self.shape} need one array of them, got {images.shape}"
            )
        if len(ids) and (ids.min() < 0 or ids.max() >= self.info.num_samples):
            raise IndexError(
                f"{self.info.path}: sample ids must lie in [0, {self.info.num_samples})"
            )
        regions = self._regions[ids]
        data = self._bytes if self._bytes is not None else self._gather(regions)
        self._prove(ids, data, regions)
        status = np.zeros(len(ids), np.int32)
        self._run(images, status, data, regions)
        if status.any():
            raise self._refused(ids[np.flatnonzero(status)[0]], "are damaged")

    def _run(
        self,
        images: NDArray[np.uint8],
        status: NDArray[np.int32],
        data: NDArray[np.uint8],
        regions: NDArray[Any],
    ) -> None:
        """Run the native loop over the batch, a part of it in each thread."""
        each = max(1, -(-len(regions) // self.num_threads))
        parts = [slice(at, at + each) for at in range(0, len(regions), each)]
        for part in [
            self._threads.submit(self._loop, images[p], status[p], data, regions[p]) for p in parts
        ]:
            part.result()

    @property
    def _threads(self) -> ThreadPoolExecutor:
        return _pool(os.getpid(), self.num_threads)

    def _gather(self, regions: NDArray[Any]) -> NDArray[np.uint8]:
        """Read ``regions`` one behind the other, and set their offsets to those in the result."""
        starts, sizes = regions["start"].tolist(), (regions["end"] - regions["start"]).tolist()
        for start, size in zip(starts, sizes, strict=True):
            # Not mapped: a map of a file that is cut, or whose disk fails, kills the process. All
            # reads enter the disk's queue at once, as those of parallel readers would.
            os.posix_fadvise(self._fd, start, size, os.POSIX_FADV_WILLNEED)
        data = np.empty(sum(sizes), np.uint8)
        at = 0
        for start, size in zip(starts, sizes, strict=True):
            _read(self._fd, data[at : at + size], start, self.info)
            at += size
        self.check_unchanged()
        regions["end"] = np.cumsum(sizes)
        regions["start"] = regions["end"] - sizes
        data.flags.writeable = False
        return data

    def _prove(
        self, ids: NDArray[np.int64], data: NDArray[np.uint8], regions: NDArray[Any]
    ) -> None:
        """Raise UsageError if a new sample fails its checksum, or has none and lacks JPEG tables.

        Each sample is checked on its first use: nothing is read twice, no wrong pixel is delivered.
        """
        new = np.flatnonzero(self._unproved[ids])
        if not len(new):
            return
        checksums = None if self.info.manifest is None else self.info.manifest.checksums
        for row, start, end in zip(
            new.tolist(), regions["start"][new].tolist(), regions["end"][new].tolist(), strict=True
        ):
            if checksums is None:
                if not brings_its_tables(data[start:end].tobytes()):
                    raise self._refused(ids[row], "are damaged, or lack a table that they use")
            elif zlib.crc32(data[start:end].data) != checksums[ids[row]]:
                at = int(self.info.starts[ids[row]])
                raise UsageError(
                    f"{self.info.path}: the data of sample {ids[row]}, bytes {at} to "
                    f"{at + end - start}, is not what was "
                    "written (`fastbyol data verify` lists all such); make the file again"
                )
        if checksums is None and self.name == "torchvision":
            streams = [data[start:end] for start, end in regions[["start", "end"]][new].tolist()]
            damaged = decode_torchvision.first_damaged(streams, self._threads)
            if damaged is not None:
                raise self._refused(ids[new[damaged]], "are damaged")
        self._unproved[ids[new]] = False

    def _refused(self, sample: int, what: str) -> UsageError:
        return UsageError(
            f"{self.info.path}: the JPEG data of sample {sample} {what}; make the file again"
        )

    def check_unchanged(self) -> None:
        """Raise UsageError if the file was written to since it was verified."""
        refuse_changed(self._fd, self.info)

    def close(self) -> None:
        """Close the file. Closing twice is fine, and a dropped decoder closes itself."""
        self._release()
        self._fd = -1
        self._bytes = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    """Return the decoding threads of ``process``. A forked child has none and makes its own.

    FFCV keeps two JPEG handles, 10 KB, for every thread that ever decoded. With a thread an epoch,
    or with numba's changing pool, memory grew by 10 to 20 MB in 600 short epochs. Numba's threads
    also die of fork and of each other.
    """
    return ThreadPoolExecutor(num_threads, thread_name_prefix="decode")


def _regions(info: BetonInfo) -> NDArray[Any]:
    regions = np.empty(info.num_samples, REGION)
    regions["start"], regions["end"] = info.starts, info.starts + info.sizes
    regions["height"], regions["width"], regions["raw"] = info.heights, info.widths, info.raw
    return regions


def _read(fd: int, target: NDArray[np.uint8], offset: int, info: BetonInfo) -> None:
    """Fill ``target`` with the file's bytes from ``offset``."""
    done = 0
    while done < target.nbytes:
        try:
            got = os.preadv(fd, [target[done : done + READ_BYTES].data], offset + done)
        except OSError as error:
            raise FastbyolError(
                f"{info.path}, byte {offset + done}: cannot be read ({error.strerror}); look at "
                "its disk"
            ) from None
        if got == 0:
            raise UsageError(
                f"{info.path}: the file was cut while in use; leave it alone and start again"
            )
        done += got
