"""The writing process behind ``beton_write``: FFCV's writer with every wait watched. Nothing else imports this module.

FFCV's own loop waits for a count that a dead worker never reaches. This one drives the same parts (file head, page
allocator, worker, table) and looks at its workers while it waits. Reports are JSON lines of at most one pipe buffer, written at
once, so that workers may share the pipe: ``begun``, ``unreadable``, ``error``, ``finished``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import multiprocessing
import operator
import os
import pickle
import queue
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import cv2
import ffcv.writer
import numpy as np
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.memory_allocator import MemoryAllocator
from ffcv.writer import DatasetWriter, worker_job_indexed_dataset
from numpy.typing import NDArray

from fastbyol.data.beton_layout import MAX_SIDE
from fastbyol.data.beton_write import CHUNK_ITEMS, Job, UnreadableItemError, die_with

POLL_S = 0.05
BEGUN, LEFT = 1, 2
# With JSON's escapes at six bytes a letter this stays below the 4096 bytes that a pipe takes at once.
MAX_LETTERS = 600
Send = Callable[..., None]


def main() -> None:
    """Read a pickled Job from standard input, write it, report on the pipe ``argv[1]``."""
    pipe = int(sys.argv[1])

    def send(**message: object) -> None:
        os.write(pipe, json.dumps(message).encode() + b"\n")

    try:
        # Fork is what FFCV's workers are made for (shared memory, unpicklable allocator); newer Pythons default to others.
        multiprocessing.set_start_method("fork", force=True)
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        write_job(pickle.load(sys.stdin.buffer), send)
        send(finished=True)
    except Exception as error:  # whatever it is, the parent must hear of it
        send_error(send, error)
        raise SystemExit(1) from error


def send_error(send: Send, error: BaseException) -> None:
    """Report an error, with its number if the system gave one."""
    if isinstance(error, OSError) and error.errno is not None:
        send(error=(error.strerror or str(error))[:MAX_LETTERS], kind="os", errno=error.errno)
    else:
        send(error=f"{type(error).__name__}: {error}"[:MAX_LETTERS], kind="other")


def write_job(job: Job, send: Send) -> None:
    """Write the job's file, reporting ``begun`` on the way; raises what goes wrong outside the workers."""
    items = CheckedItems(job, send)
    items.prime()
    fields = {"image": RGBImageField(write_mode=job.mode, jpeg_quality=job.quality)}
    if job.labelled:
        fields["label"] = IntField()
    Writer(job.path, fields, page_size=job.page_bytes, num_workers=job.workers).write_items(items, send)


def checked_image(image: object, page_bytes: int) -> NDArray[np.uint8]:
    """``image`` as FFCV needs it; ValueError says what is wrong with it."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"is a {type(image).__name__}, not a numpy array")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"is {image.dtype} of shape {image.shape}, not uint8 (height, width, 3)")
    if not 1 <= min(image.shape[:2]) <= max(image.shape[:2]) <= MAX_SIDE:
        raise ValueError(f"has {image.shape[1]} x {image.shape[0]} pixels, a side must be 1 to {MAX_SIDE}")
    if image.nbytes > page_bytes:
        raise ValueError(f"takes {image.nbytes} bytes, more than a page of {page_bytes}")
    return np.ascontiguousarray(image)


class CheckedItems:
    """The job's items, each checked before FFCV sees it. ``marks`` (N,) uint8, shared by the workers, says how far they are."""

    def __init__(self, job: Job, send: Send) -> None:
        self.job, self.send = job, send
        self.marks = np.frombuffer(NamelessMemory(create=True, size=len(job.items)).buf, np.uint8)
        self._previous: int | None = None

    def __len__(self) -> int:
        return len(self.job.items)

    def prime(self) -> None:
        """Read one item, so that what the data set loads on first use is shared by the workers that are forked next."""
        # A fault is met again by a worker, which reports it.
        with contextlib.suppress(Exception):
            self.job.items[0]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if self._previous is not None:
            self.marks[self._previous] = LEFT
        self.marks[index], self._previous = BEGUN, index
        try:
            item = self.job.items[index]
            image = checked_image(item[0], self.job.page_bytes)
            return (image, self._label(item)) if self.job.labelled else (image,)
        except UnreadableItemError as error:
            self.send(unreadable=index, reason=str(error)[:MAX_LETTERS])
            blank = np.zeros((1, 1, 3), np.uint8)
            return (blank, -1) if self.job.labelled else (blank,)
        except Exception as error:  # anything a data set may raise; said here, as FFCV's clean-up may wait for ever
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self.send(error=f"{self.name(index)} {text}"[:MAX_LETTERS], kind="item")
            raise

    def _label(self, item: tuple[Any, ...]) -> int:
        try:
            label = operator.index(item[1])
        except (TypeError, IndexError):
            raise ValueError(f"has no integer label but {item[1:]!r}") from None
        if not -(1 << 63) <= label < 1 << 63:
            raise ValueError(f"has label {label}, which does not fit 64 bits")
        return label

    def name(self, index: int) -> str:
        name = getattr(self.job.items, "name", None)
        return f"item {index} ({name(index)})" if name else f"item {index}"

    def in_work(self) -> list[int]:
        return np.flatnonzero(self.marks == BEGUN).tolist()


class Chunks:
    """FFCV's work queue without a queue: ``get`` hands out runs of (sample, item), then None."""

    def __init__(self, total: int) -> None:
        self.total, self.next = total, multiprocessing.Value(ctypes.c_uint64, 0)

    def get(self) -> list[tuple[int, int]] | None:
        with self.next.get_lock():
            start = self.next.value
            self.next.value = start + CHUNK_ITEMS
        return [(i, i) for i in range(start, min(start + CHUNK_ITEMS, self.total))] or None


class WholeWrites:
    """A raw file whose ``write`` writes everything or raises: on a full disk a raw write may end half way in silence."""

    def __init__(self, file: Any) -> None:
        self._file, self.seek, self.close = file, file.seek, file.close

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


class Allocator(MemoryAllocator):  # type: ignore[misc]
    """FFCV's pages, written whole, and dropped where an error ends a worker."""

    fp: Any

    def __enter__(self) -> None:
        super().__enter__()
        self.fp = WholeWrites(self.fp)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # FFCV's flush after an error waits for the turn of a page that never comes.
        if kind is None:
            super().__exit__(kind, error, trace)
        else:
            self.fp.close()


class NamelessMemory:
    """Shared with the workers that are forked next, as FFCV takes it; where a process is killed, no name stays in /dev/shm."""

    def __init__(self, *, create: bool, size: int) -> None:
        assert create
        self.buf = memoryview(mmap.mmap(-1, size))


class Writer(DatasetWriter):  # type: ignore[misc]
    """FFCV's writer with a loop that ends when a worker does."""

    def write_items(self, items: CheckedItems, send: Send) -> None:
        self.num_samples = len(items)
        ffcv.writer.shared_memory = SimpleNamespace(SharedMemory=NamelessMemory)
        self.prepare()
        results: multiprocessing.Queue[list[Any]] = multiprocessing.Queue()
        allocator = Allocator(self.fname, self.data_region_start, self.page_size)
        done = multiprocessing.Value(ctypes.c_uint64, 0)
        arguments = (Chunks(len(items)), self.metadata_sm, self.metadata_type, self.fields, allocator, done, results, items)
        workers = [multiprocessing.Process(target=_work, args=(os.getpid(), send, arguments)) for _ in range(self.num_workers)]
        for worker in workers:
            worker.start()
        self.finalize(_gather(workers, results, items, send))


def _work(parent: int, send: Send, arguments: tuple[Any, ...]) -> None:
    die_with(parent)
    try:
        worker_job_indexed_dataset(*arguments)
    except BaseException as error:  # SystemExit of a data set's code too: nobody else would say it
        send_error(send, error)
        os._exit(1)


def _gather(workers: list[Any], results: Any, items: CheckedItems, send: Send) -> list[Any]:
    """All workers' allocations; raises when a worker ends without giving its own."""
    allocations: list[Any] = []
    given, begun = 0, 0
    while given < len(workers):
        # A worker's result is in the pipe before it ends, so counting the ended ones first misses none.
        ended = sum(worker.exitcode is not None for worker in workers)
        try:
            allocations.extend(results.get(timeout=POLL_S))
            given += 1
        except queue.Empty:
            if ended > given:
                _report_dead(workers, items)
        if any(worker.exitcode not in (None, 0) for worker in workers):
            _report_dead(workers, items)
        now = int(np.count_nonzero(items.marks))
        if now != begun:
            begun = now
            send(begun=begun)
    return allocations


def _report_dead(workers: list[Any], items: CheckedItems) -> NoReturn:
    codes = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
    how = f"by signal {-codes[0]}" if codes and codes[0] < 0 else f"with status {codes[0] if codes else 0}"
    names = ", ".join(items.name(index) for index in items.in_work()[:4])
    raise RuntimeError(f"a worker process ended {how} while these were in work: {names}")
