"""The writer of beton files: a file appears under its name whole, or not at all.

Separate processes (``beton_worker``) decode and write, since a decoder may hang or die. The file
grows under a temporary name, is inspected and synced, then named. Format: ``beton``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import pickle
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import manifest
from fastbyol.data.beton import (
    DESCRIPTOR,
    HEADER,
    IMAGE,
    MIN_PAGE_BYTES,
    REGION,
    VERSION,
    BetonInfo,
    inspect,
)
from fastbyol.data.manifest import Manifest
from fastbyol.errors import FastbyolError, UsageError, check_choice
from fastbyol.files import refuse_special

Mode = Literal["raw", "jpg"]
Progress = Callable[[int, int], None]
# Items per turn of a worker; a data set may work ahead in aligned blocks of this many.
CHUNK_ITEMS = 64
# FFCV's own default page.
PAGE_BYTES = 1 << 23
# If no item is begun for this long, the writer counts as stuck: a network disk may hiccup for
# minutes, and a busy machine may keep a process of low priority waiting as long.
STALL_S = 300.0
# Seconds between two checks of the workers' progress.
POLL_S = 0.2
# Bytes of the output's name in the temporary file's.
MAX_NAME_BYTES = 120
# The workers' results, in memory shared with the caller. ``state`` is 0 before an item is begun.
RESULT = np.dtype(
    {
        "names": ["state", "mode", "width", "height", "ptr", "size", "checksum", "label"],
        "formats": ["u1", "u1", "<u2", "<u2", "<u8", "<u8", "<u4", "<i8"],
    }
)
BEGUN, DONE = 1, 2
# By whether items are labelled: each field's name and FFCV's number of its type.
FIELDS = (((b"image", 2),), ((b"image", 2), (b"label", 1)))
ROWS = (
    np.dtype([("image", IMAGE)], align=True),
    np.dtype([("image", IMAGE), ("label", "<i8")], align=True),
)


class Items(Protocol):
    """A picklable data set, which describes its images instead of holding them.

    An item is ``(image, label)`` or ``(image,)``: uint8 (H, W, 3), int. An optional method
    ``name(index)`` returns a name for messages.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Any, ...]: ...


class UnreadableItemError(Exception):
    """An error of a data set's ``__getitem__``: this item is damaged, others are still tried."""


class UnreadableItemsError(UsageError):
    """A refusal to write because of ``items``: (index, reason) of every unreadable item."""

    def __init__(self, message: str, items: tuple[tuple[int, str], ...]) -> None:
        super().__init__(message)
        self.items = items


@dataclass(frozen=True)
class Job:
    """The task that is handed to the workers, with the open files that they share."""

    items: Items
    labelled: bool
    mode: Mode
    quality: int
    workers: int
    page_bytes: int
    out: int
    results: int

    def name(self, index: int) -> str:
        """Return an item's name for messages."""
        name = getattr(self.items, "name", None)
        return f"item {index} ({name(index)})" if name else f"item {index}"


def write(
    path: str | Path,
    dataset: Items,
    *,
    labelled: bool,
    mode: Mode = "raw",
    quality: int = 90,
    workers: int = 0,
    progress: Progress | None = None,
    overwrite: bool = False,
    page_bytes: int = PAGE_BYTES,
    stop_at_unreadable: bool = False,
    note: Mapping[str, Any] | None = None,
) -> BetonInfo:
    """Write ``dataset`` as a beton with the fields ``image`` and, if ``labelled``, ``label``.

    Item i becomes sample i. ``workers`` is 0 for one a core; ``progress(items begun, items)`` is
    called a few times a second; ``note``, JSON values, is stored in the manifest. ``path`` holds
    nothing, or what it held, until the whole file is there (except for an instant on disks without
    links). Raises UsageError for a bad argument or item, UnreadableItemsError after all items were
    tried, or with ``stop_at_unreadable`` at the first, and FastbyolError for a full disk, a dead
    worker or a stall.
    """
    path, num_items = followed(Path(path)), len(dataset)
    check_output(path, overwrite=overwrite)
    _check_arguments(num_items, mode, quality, workers, page_bytes)
    workers = min(workers or len(os.sched_getaffinity(0)), -(-num_items // CHUNK_ITEMS))
    remove_leftovers(path)
    unfinished = temporary(path)
    with contextlib.ExitStack() as stack:
        stack.callback(unfinished.unlink, missing_ok=True)
        try:
            with disk_errors():
                out = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                stack.callback(os.close, out)
                os.lseek(out, _data_start(num_items, labelled, page_bytes), os.SEEK_SET)
                shared = stack.enter_context(memory("results"))
                shared.truncate(num_items * RESULT.itemsize)
            results = np.frombuffer(mmap.mmap(shared.fileno(), 0), RESULT)
            job = Job(dataset, labelled, mode, quality, workers, page_bytes, out, shared.fileno())
            _run(job, results, progress, stop_at_unreadable)
            with disk_errors():
                _finish(out, results, labelled, page_bytes, note or {})
                os.fsync(out)
                info = inspect(unfinished)
        except FastbyolError as error:
            error.args = (f"{path}: not written, {error}",)
            raise
        publish(unfinished, path, overwrite=overwrite)
    return replace(info, path=path)


def followed(path: Path) -> Path:
    """Return the file that ``path`` links to, or ``path``: links themselves are never replaced."""
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError):  # a link to itself
        return path


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless a file can be made at ``path``, as a cheap check before any work."""
    folder = path.parent
    try:
        if path.exists():
            refuse_special(path, path.stat().st_mode)
            if not overwrite:
                raise UsageError(f"{path}: exists already; choose another name or pass --overwrite")
        if not folder.is_dir():
            is_file = folder.exists()
            advice = (
                "is no folder; choose another place"
                if is_file
                else "no such folder; make it first (mkdir -p)"
            )
            raise UsageError(f"{folder}: {advice}")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."[:64]):
            pass
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from None


def temporary(path: Path) -> Path:
    """Return an unused name beside ``path`` that ``remove_leftovers`` knows."""
    return path.with_name(f"{_temporary_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_leftovers(path: Path) -> None:
    """Delete what killed writers of the output, or of any in a folder, left on this machine."""
    is_folder = path.is_dir()
    begins = (
        rf"\..*\.{re.escape(platform.node())}-" if is_folder else re.escape(_temporary_prefix(path))
    )
    pattern = re.compile(begins + r"(\d+)-[0-9a-f]{8}\.tmp", re.DOTALL)
    for entry in list(os.scandir(path if is_folder else path.parent)):
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)


def die_with(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _temporary_prefix(path: Path) -> str:
    # A process number says nothing about another machine's on a shared disk, hence the machine's
    # name. Names may have 255 bytes.
    name = os.fsdecode(os.fsencode(path.name)[:MAX_NAME_BYTES])
    return f".{name}.{platform.node()}-"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def _check_arguments(
    num_items: int, mode: str, quality: int, workers: int, page_bytes: int
) -> None:
    if num_items < 1:
        raise UsageError("nothing to write: the data set is empty")
    check_choice("mode", mode, ("raw", "jpg"))
    if not 1 <= quality <= 100:
        raise UsageError(f"quality {quality}: must be 1 to 100")
    if not 0 <= workers <= 1024:
        raise UsageError(f"workers {workers}: must be 0 (all cores) to 1024")
    if not MIN_PAGE_BYTES <= page_bytes < 1 << 32 or page_bytes & (page_bytes - 1):
        raise UsageError(
            f"page of {page_bytes} bytes: must be a power of two from {MIN_PAGE_BYTES} to 2**31"
        )


def _data_start(num_items: int, labelled: bool, page_bytes: int) -> int:
    head = (
        HEADER.itemsize
        + len(FIELDS[labelled]) * DESCRIPTOR.itemsize
        + num_items * ROWS[labelled].itemsize
    )
    return -(-head // page_bytes) * page_bytes


def _run(
    job: Job, results: NDArray[Any], progress: Progress | None, stop_at_unreadable: bool
) -> None:
    """Have all items written and ``results`` filled in, or raise what went wrong."""
    unreadable: dict[int, str] = {}
    begun, moved, is_finished = 0, time.monotonic(), False
    with _workers(job) as reports:
        while not is_finished and not (unreadable and stop_at_unreadable):
            if reports.poll(POLL_S):
                match reports.recv():
                    case FastbyolError() as error:
                        raise error
                    case (index, reason):
                        unreadable[index] = reason
                    case None:
                        is_finished = True
            if (now := int(np.count_nonzero(results["state"]))) > begun:
                begun, moved = now, time.monotonic()
                if progress is not None:
                    progress(begun, len(results))
            elif time.monotonic() - moved > STALL_S:
                raise FastbyolError(
                    f"no item was read for {STALL_S:g} s; look at the disks and try again"
                )
    if unreadable:
        (first, reason), *_ = items = tuple(sorted(unreadable.items()))
        what = f"{len(items)} of {len(results)} items cannot be read; first, item {first}: {reason}"
        raise UnreadableItemsError(what, items)


@contextlib.contextmanager
def _workers(job: Job) -> Iterator[Connection]:
    """Start the workers and yield the pipe of their reports; kill them all afterwards."""
    reports, end = multiprocessing.Pipe(duplex=False)
    with (
        reports,
        memory("job") as payload,
        memory("errors") as errors,
        contextlib.ExitStack() as stack,
    ):
        with end, disk_errors():
            write_at(payload.fileno(), pickle.dumps(job), 0)
            process = _start(payload, errors, (job.out, job.results, end.fileno()))
        stack.callback(_kill_group, process)
        try:
            yield reports
        except EOFError:
            errors.seek(0)
            last = (errors.read().decode(errors="replace").splitlines() or ["without a word"])[-1][
                :300
            ]
            raise FastbyolError(
                f"the writing process died ({last}); try `fastbyol doctor`"
            ) from None


def _start(
    payload: IO[bytes], errors: IO[bytes], files: tuple[int, int, int]
) -> subprocess.Popen[bytes]:
    # multiprocessing's spawn would import the caller's main module again, which then needs a guard.
    program = "from fastbyol.data.beton_worker import main; main()"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        # The workers are forked, and the threads of numpy and OpenMP do not survive that.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # glibc would map and unmap each image anew, and the kernel clear its pages: a fifth of a
        # texture's time.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(files[-1]), str(os.getpid())],
        stdin=payload,
        stdout=errors,
        stderr=errors,
        env=environment,
        pass_fds=files,
        start_new_session=True,
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Before ``wait`` the process keeps its number and its group's, so no other can be killed.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def memory(name: str) -> IO[bytes]:
    """Open a file in memory, of which a killed process leaves nothing on a disk."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _finish(
    out: int, results: NDArray[Any], labelled: bool, page_bytes: int, note: Mapping[str, Any]
) -> None:
    """Write manifest and table behind the items, then header, descriptors and rows before them."""
    rows, regions = np.zeros(len(results), ROWS[labelled]), np.zeros(len(results), REGION)
    for name in IMAGE.names or ():
        rows["image"][name] = results[name]
    if labelled:
        rows["label"] = results["label"]
    regions["sample"], regions["ptr"], regions["size"] = (
        np.arange(len(results)),
        results["ptr"],
        results["size"],
    )
    descriptors = np.zeros(len(FIELDS[labelled]), DESCRIPTOR)
    for descriptor, (field, kind) in zip(descriptors, FIELDS[labelled], strict=True):
        descriptor["type"] = kind
        descriptor["name"][: len(field)] = np.frombuffer(field, np.uint8)
    # The workers left the position at the end of the last page.
    data_end = os.lseek(out, 0, os.SEEK_CUR)
    table_start = data_end + manifest.num_bytes(
        len(results), len(json.dumps(dict(note))), page_bytes
    )
    header = np.array([(VERSION, len(descriptors), page_bytes, len(results), table_start)], HEADER)
    head, table = header.tobytes() + descriptors.tobytes() + rows.tobytes(), regions.tobytes()
    structure = zlib.crc32(table, zlib.crc32(head))
    sealed = Manifest(table_start + len(table), structure, results["checksum"], note)
    write_at(out, sealed.pack(page_bytes) + table, data_end)
    # The head comes last: an unfinished file has no allocation table and is refused.
    write_at(out, head, 0)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data``, since a write on a full disk may stop half way without an error."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def disk_error(error: OSError) -> FastbyolError:
    """Return a FastbyolError with the disk's error and its remedy."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = (
        "make room on that disk and try again"
        if is_full
        else "try again, with fewer workers if memory is short"
    )
    return FastbyolError(f"{error.strerror}; {remedy}")


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn an OSError of the body into what ``disk_error`` returns."""
    try:
        yield
    except OSError as error:
        raise disk_error(error) from None


def publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    """Give the synced file its name. Without ``overwrite`` nothing is ever replaced."""
    try:
        if overwrite:
            temporary.replace(path)
        else:
            _link(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise UsageError(
            f"{path}: was written by somebody else meanwhile; choose another name or pass "
            "--overwrite"
        ) from None
    except OSError as error:
        raise FastbyolError(
            f"{path}: cannot be put in place ({error.strerror}); look at its disk and try again"
        ) from None


def _link(temporary: Path, path: Path) -> None:
    """Give ``temporary`` an unused name in one step. Raises FileExistsError if it is in use."""
    try:
        path.hardlink_to(temporary)
        return
    except FileExistsError:
        raise
    except OSError:  # a file system without links: an empty file reserves the name until the rename
        path.touch(exist_ok=False)
    try:
        temporary.replace(path)
    except BaseException:
        path.unlink()
        raise
