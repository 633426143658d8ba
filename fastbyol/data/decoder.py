"""Decoded images of a beton by sample id: FFCV's compiler and native decoders, without FFCV's Loader and Reader.

FFCV 1.0.2's Loader drops the JPEG decoder's return code, so that damaged data trains without a word; overwrites a batch when
the next is taken; where it crops, sets aside room for the largest image times five batches (46 GB for 12-megapixel pictures in
batches of 256; here one picture a thread); compiles anew for every loader (0.5 s and more); and leaks a thread and that room
when an epoch ends early. So the loop over a batch is ours, in the form that FFCV's compiler takes; what it calls is FFCV's.
At 96x96 raw it is as fast as FFCV's Loader, whose batches one must copy to keep: both above 350,000 images/s on a core.

Where the file has a manifest, a sample's bytes are held against their checksum the first time they are decoded, so nothing is
read twice and no wrong pixel is ever delivered. Without one, JPEG data must bring their tables (``jpeg_tables``). A file that
does not fit into memory is not mapped either: a map of a file that is cut, or whose disk fails, kills the process. Its samples
are read, a batch at a time.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.beton import BetonInfo
from fastbyol.data.beton_layout import stamp_of
from fastbyol.data.jpeg_tables import brings_its_tables
from fastbyol.errors import FastbyolError, UsageError, one_line
from fastbyol.process import left_as_found

# Where one image's data lies in the file, bytes [start, end), and its size in pixels.
PLACE = np.dtype([("start", "<i8"), ("end", "<i8"), ("height", "<i8"), ("width", "<i8"), ("raw", "<i8")])
Native = Callable[..., None]
# Linux reads at most 2 GiB less a page at once.
READ_BYTES = 1 << 30

_compiling = threading.Lock()


class Decoder:
    """The images of a verified beton, all of one size: as stored, or where sizes differ the centre square scaled to ``size``.

    ``in_memory`` reads the file at once, after which nothing that happens to it matters. Otherwise each call reads what it
    decodes, and fails when the file is no longer the one verified. ``workers``: threads per call, 0 for one a core.
    """

    def __init__(self, info: BetonInfo, *, size: int, workers: int, in_memory: bool) -> None:
        import_ffcv()
        self.info = info
        self._crop = info.uniform_size is None
        self.shape = (size, size, 3) if self._crop else (*info.uniform_size, 3)  # type: ignore[misc]
        cores = len(os.sched_getaffinity(0))
        self.num_threads = min(workers or cores, cores)
        self._native = _compiled(self._crop)
        self._places = _places(info)
        self._unproved = np.full(info.num_samples, True) if info.manifest is not None else ~info.raw
        self._fd = _open(info)
        self._release = weakref.finalize(self, os.close, self._fd)
        try:
            self._bytes = _read_all(self._fd, info) if in_memory else None
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def decode(self, ids: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """Fill ``images`` (n, H, W, 3) with the samples ``ids`` (n,). Thread-safe; releases the interpreter's lock.

        Raises UsageError for bytes that are not those written (by the manifest), for JPEG data that its decoder finds damaged,
        naming the sample, and for a file that changed; IndexError, ValueError for wrong arguments.
        """
        if images.shape != (len(ids), *self.shape) or not images.flags.c_contiguous:
            raise ValueError(f"{len(ids)} images of {self.shape} need one array of them, got {images.shape}")
        if len(ids) and (ids.min() < 0 or ids.max() >= self.info.num_samples):
            raise IndexError(f"{self.info.path}: sample ids must lie in [0, {self.info.num_samples})")
        places = self._places[ids]
        data = self._bytes if self._bytes is not None else self._gather(places)
        self._prove(ids, data, places)
        status = np.zeros(len(ids), np.int32)
        self._run(images, status, data, places)
        if status.any():
            raise self._refused(ids[np.flatnonzero(status)[0]], "are damaged")

    def _run(self, images: NDArray[np.uint8], status: NDArray[np.int32], data: NDArray[np.uint8], places: NDArray[Any]) -> None:
        """The native loop over the batch, a part of it in each thread."""
        pool = _pool(os.getpid(), self.num_threads)
        each = max(1, -(-len(places) // self.num_threads))
        parts = [slice(at, at + each) for at in range(0, len(places), each)]
        for part in [pool.submit(self._native, images[p], status[p], data, places[p]) for p in parts]:
            part.result()

    def _gather(self, places: NDArray[Any]) -> NDArray[np.uint8]:
        """Read the regions of ``places`` one behind the other, and make ``places`` speak of them there."""
        starts, sizes = places["start"].tolist(), (places["end"] - places["start"]).tolist()
        for start, size in zip(starts, sizes, strict=True):
            # All at once in the disk's queue, as readers side by side would put them there.
            os.posix_fadvise(self._fd, start, size, os.POSIX_FADV_WILLNEED)
        data = np.empty(sum(sizes), np.uint8)
        at = 0
        for start, size in zip(starts, sizes, strict=True):
            _read(self._fd, data[at : at + size], start, self.info)
            at += size
        self.check_unchanged()
        places["end"] = np.cumsum(sizes)
        places["start"] = places["end"] - sizes
        data.flags.writeable = False
        return data

    def _prove(self, ids: NDArray[np.int64], data: NDArray[np.uint8], places: NDArray[Any]) -> None:
        """UsageError where a sample's bytes do not have the manifest's checksum, or, without one, where JPEG data lack a table.

        Each sample is looked at once.
        """
        new = np.flatnonzero(self._unproved[ids])
        if not len(new):
            return
        checksums = None if self.info.manifest is None else self.info.manifest.checksums
        for row, start, end in zip(new.tolist(), places["start"][new].tolist(), places["end"][new].tolist(), strict=True):
            if checksums is None:
                if not brings_its_tables(data[start:end].tobytes()):
                    raise self._refused(ids[row], "are damaged, or lack a table that they use")
            elif zlib.crc32(data[start:end].data) != checksums[ids[row]]:
                at = int(self.info.starts[ids[row]])
                raise UsageError(
                    f"{self.info.path}: the data of sample {ids[row]}, bytes {at} to {at + end - start}, is not what was "
                    "written (`fastbyol data verify` lists all such); make the file again"
                )
        self._unproved[ids[new]] = False

    def _refused(self, sample: int, what: str) -> UsageError:
        return UsageError(f"{self.info.path}: the JPEG data of sample {sample} {what}; make the file again")

    def labels(self) -> NDArray[np.int64] | None:
        """(N,) in file order; None where the file has none."""
        return self.info.labels

    def check_unchanged(self) -> None:
        """UsageError if the file was written to since it was verified. (Replacing or deleting it does no harm.)"""
        if stamp_of(self._fd) != self.info.stamp:
            raise UsageError(f"{self.info.path}: the file changed while in use; leave it alone and start again")

    def close(self) -> None:
        """Let go of the file. Closing twice is fine, and a dropped decoder does it too."""
        self._release()
        self._fd = -1
        self._bytes = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@functools.cache
def import_ffcv() -> Any:
    """Import FFCV, slow and full of side effects, without these; returns numba. UsageError if something is missing.

    Left to itself the import takes 2.4 s instead of 0.3 (it compiles a typed dict of two entries that only Python reads),
    leaves torch and numba with one thread, and starts numba's pool of threads, which nothing here uses: on a machine of one
    core a process that has forked since then waits at its exit for ever for a thread of it.
    """
    try:
        with left_as_found(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import numba
            import numba.typed

            typed_dict, numba.typed.Dict = numba.typed.Dict, dict
            set_num_threads, numba.set_num_threads = numba.set_num_threads, lambda _: None
            try:
                import ffcv.loader
            finally:
                numba.typed.Dict, numba.set_num_threads = typed_dict, set_num_threads
            ffcv.pipeline.compiler.set_num_threads = set_num_threads  # for FFCV's own Loader, should anybody use it
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"FFCV cannot be used ({one_line(error, None)}); `fastbyol doctor` says what to install") from error
    if numba.config.DISABLE_JIT:
        raise UsageError("NUMBA_DISABLE_JIT is set, and images are decoded by compiled code: unset it")
    return numba


@functools.cache
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    """Threads that decode for as long as ``process`` lives; a forked child, to which none come along, makes its own.

    FFCV keeps two JPEG handles, 10 KB, for every thread that ever decoded: with a thread an epoch, or numba's, whose pool
    changes its threads, memory grew by 10 to 20 MB in 600 short epochs. Numba's threads also die of fork and of each other.
    """
    return ThreadPoolExecutor(num_threads, thread_name_prefix="decode")


@functools.cache
def _compiled(crop: bool) -> Native:
    """The loop over images, compiled by FFCV. It stays for the process's life: compiling takes half a second."""
    from ffcv.libffcv import imdecode, memcpy, resize_crop
    from ffcv.pipeline.compiler import Compiler

    with _compiling:
        # What Compiler reads; its set_num_threads would set torch's too.
        Compiler.num_threads = 1
        calls = [Compiler.compile(call) for call in (imdecode, memcpy, resize_crop)]
        return Compiler.compile((_cropping if crop else _whole)(*calls))  # type: ignore[no-any-return]


def _whole(imdecode: Any, memcpy: Any, _resize: Any) -> Native:
    def decode(images: Any, status: Any, data: Any, places: Any) -> None:
        for row in range(len(places)):
            place = places[row]
            source, height, width = data[place.start : place.end], place.height, place.width
            if place.raw:
                memcpy(source, images[row])
            else:
                status[row] = imdecode(source, images[row], height, width, height, width, 0, 0, 1, 1, False, False)

    return decode


def _cropping(imdecode: Any, _memcpy: Any, resize_crop: Any) -> Native:
    def decode(images: Any, status: Any, data: Any, places: Any) -> None:
        for row in range(len(places)):
            place = places[row]
            source, height, width = data[place.start : place.end], place.height, place.width
            if not place.raw:
                scratch = np.empty(height * width * 3, np.uint8)
                status[row] = imdecode(source, scratch, height, width, height, width, 0, 0, 1, 1, False, False)
                source = scratch
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            resize_crop(source.reshape(height, width, 3), top, top + side, left, left + side, images[row])

    return decode


def _places(info: BetonInfo) -> NDArray[Any]:
    places = np.empty(info.num_samples, PLACE)
    places["start"], places["end"] = info.starts, info.starts + info.sizes
    places["height"], places["width"], places["raw"] = info.heights, info.widths, info.raw
    return places


def _open(info: BetonInfo) -> int:
    try:
        return os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{info.path}: cannot be opened ({error.strerror}); check its name and rights") from None


def _read_all(fd: int, info: BetonInfo) -> NDArray[np.uint8]:
    data = np.empty(info.num_bytes, np.uint8)
    _read(fd, data, 0, info)
    data.flags.writeable = False
    return data


def _read(fd: int, room: NDArray[np.uint8], offset: int, info: BetonInfo) -> None:
    """Fill ``room`` with the file's bytes from ``offset``."""
    done = 0
    while done < room.nbytes:
        try:
            got = os.preadv(fd, [room[done : done + READ_BYTES].data], offset + done)
        except OSError as error:
            raise FastbyolError(
                f"{info.path}, byte {offset + done}: cannot be read ({error.strerror}); look at its disk"
            ) from None
        if got == 0:
            raise UsageError(f"{info.path}: the file was cut while in use; leave it alone and start again")
        done += got
