"""The writing processes behind ``beton_write``: they read, check, encode and write items.

One started process loads the data set and forks the workers, which share its memory.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import operator
import os
import pickle
import sys
import zlib
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastbyol.data import beton_write
from fastbyol.data.beton import JPG, MAX_SIDE, RAW
from fastbyol.data.beton_write import Job, UnreadableItemError
from fastbyol.errors import FastbyolError, UsageError, one_line

# A pipe takes messages of up to 4096 bytes at once, so that workers may share it; a letter has up
# to four bytes.
MAX_LETTERS = 600
# The exit status of a worker that is done: a data set's own code may exit with 0.
FINISHED = 77


def main() -> None:
    """Write the items of the pickled ``Job`` in standard input.

    ``argv`` has the descriptor of a pipe for reports and the parent's process id. A report is
    (index, reason) for an unreadable item, a FastbyolError that ends the writing, or None at the
    end.
    """
    beton_write.die_with(int(sys.argv[2]))
    # This frame owns the pipe before anything can fail, so that the pipe closes only after the
    # error was written to standard error.
    reports = Connection(int(sys.argv[1]), readable=False)
    job = pickle.load(sys.stdin.buffer)
    results = np.frombuffer(mmap.mmap(job.results, 0), beton_write.RESULT)
    # Whatever the data set loads on first use is now shared by the workers. A worker meets an error
    # again and reports it.
    with contextlib.suppress(Exception):
        job.items[0]
    me = os.getpid()
    workers = {os.fork() or _work(me, job, results, reports) for _ in range(job.workers)}
    while workers:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        if pid in workers and code != FINISHED:
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            names = ", ".join(
                job.name(index)
                for index in np.flatnonzero(results["state"] == beton_write.BEGUN)[:4].tolist()
            )
            text = f"a worker process ended {how} while these were in work: {names}"[:MAX_LETTERS]
            reports.send(FastbyolError(f"{text}; try again, with fewer workers if memory is short"))
        workers.discard(pid)
    reports.send(None)


def _work(parent: int, job: Job, results: NDArray[Any], reports: Connection) -> int:
    """Write items until none is left, and end the process."""
    code = 1
    try:
        beton_write.die_with(parent)
        _write_items(job, results, reports)
        code = FINISHED
    except FastbyolError as error:
        reports.send(error)
    except OSError as error:
        reports.send(beton_write.disk_error(error))
    except BaseException as error:  # a data set's SystemExit, too, must be reported
        reports.send(
            FastbyolError(f"{type(error).__name__}: {one_line(error)}; look at the data set's code")
        )
    finally:
        os._exit(code)


def _write_items(job: Job, results: NDArray[Any], reports: Connection) -> None:
    total, page, used = len(job.items), 0, job.page_bytes
    mode = RAW if job.mode == "raw" else JPG
    # The workers share the positions of two open files, which the kernel moves atomically: they
    # count the items and the pages in use. So a killed worker leaves no lock behind.
    while (
        first := os.lseek(job.results, beton_write.CHUNK_ITEMS, os.SEEK_CUR)
        - beton_write.CHUNK_ITEMS
    ) < total:
        for index in range(first, min(first + beton_write.CHUNK_ITEMS, total)):
            results["state"][index] = beton_write.BEGUN
            try:
                height, width, data, label = _encoded(job, job.items[index])
            except UnreadableItemError as error:
                reports.send((index, str(error)[:MAX_LETTERS]))
                results["state"][index] = beton_write.DONE
                continue
            except Exception as error:  # anything that a data set may raise
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                text = f"{job.name(index)} {kind}{one_line(error)}"[:MAX_LETTERS]
                raise UsageError(f"{text}; correct or remove it") from None
            if used + len(data) > job.page_bytes:
                page, used = os.lseek(job.out, job.page_bytes, os.SEEK_CUR) - job.page_bytes, 0
            beton_write.write_at(job.out, data, page + used)
            results[index] = (
                beton_write.DONE,
                mode,
                width,
                height,
                page + used,
                len(data),
                zlib.crc32(data),
                label,
            )
            used += len(data)


def _encoded(job: Job, item: tuple[Any, ...]) -> tuple[int, int, memoryview | bytes, int]:
    """Return height, width, bytes and label (0 for none) of an item. Raises ValueError."""
    image, label = (
        checked_image(item[0], job.page_bytes),
        checked_label(item) if job.labelled else 0,
    )
    height, width = image.shape[:2]
    if job.mode == "raw":
        return height, width, image.reshape(-1).data, label
    file = io.BytesIO()
    # libjpeg halves the resolution of chrominance by default, as FFCV's writer does.
    Image.fromarray(image).save(file, "JPEG", quality=job.quality)
    if file.tell() > job.page_bytes:
        raise ValueError(f"takes {file.tell()} bytes as JPEG, more than a page of {job.page_bytes}")
    return height, width, file.getvalue(), label


def checked_image(image: object, page_bytes: int) -> NDArray[np.uint8]:
    """Return ``image``, contiguous. Raises ValueError if it cannot be written."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"is a {type(image).__name__}, not a numpy array")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"is {image.dtype} of shape {image.shape}, not uint8 (height, width, 3)")
    if not 1 <= min(image.shape[:2]) <= max(image.shape[:2]) <= MAX_SIDE:
        raise ValueError(
            f"has {image.shape[1]} x {image.shape[0]} pixels, a side must be 1 to {MAX_SIDE}"
        )
    if image.nbytes > page_bytes:
        raise ValueError(f"takes {image.nbytes} bytes, more than a page of {page_bytes}")
    return np.ascontiguousarray(image)


def checked_label(item: tuple[Any, ...]) -> int:
    """Return the label of an item. Raises ValueError unless it is an integer of 64 bits."""
    try:
        label = operator.index(item[1])
    except (TypeError, IndexError):
        raise ValueError(f"has no integer label but {item[1:]!r}") from None
    if not -(1 << 63) <= label < 1 << 63:
        raise ValueError(f"has label {label}, which does not fit 64 bits")
    return label
