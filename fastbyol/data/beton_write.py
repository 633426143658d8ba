"""Writing a beton file so that it always ends: whole under its name, or not there.

FFCV's writer waits for ever on a bad item, a dead worker or a full disk, and truncates the old file first. Here it runs in a
child process (``beton_child``) with its own process group, which reports through a pipe and is killed when it reports a
fault or nothing. The file is written under a temporary name, given its checksums, verified, synced and given its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pickle
import platform
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from fastbyol.data.beton_layout import MIN_PAGE_BYTES, BetonInfo, inspect, seal
from fastbyol.errors import FastbyolError, UsageError

Mode = Literal["raw", "jpg"]
Progress = Callable[[int, int], None]
# Items that a worker takes at a time; a data set may work ahead in aligned blocks of this many.
CHUNK_ITEMS = 64
# FFCV's own default page.
PAGE_BYTES = 1 << 23
# Without an item begun for so long the writer is taken for stuck. Importing FFCV takes 2 to 10 s of it; a disk on the network
# may hiccup for minutes, and so long may a busy machine keep a process of low priority waiting.
STALL_S = 300.0
# So much of the output's name goes into the temporary file's.
MAX_NAME_BYTES = 120


class Items(Protocol):
    """What can be written: picklable, so that it describes the images rather than holds them.

    An item is ``(image, label)`` or ``(image,)``: uint8 (H, W, 3), int. An optional ``name(index)`` serves messages.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Any, ...]: ...


class UnreadableItemError(Exception):
    """Raised by a data set's ``__getitem__``: this item is damaged, look for more of the kind before giving up."""


class UnreadableItemsError(UsageError):
    """Nothing was written: ``items`` holds (index, reason) of every item that could not be read."""

    def __init__(self, message: str, items: tuple[tuple[int, str], ...]) -> None:
        super().__init__(message)
        self.items = items


@dataclass(frozen=True)
class Job:
    """What the child needs to know."""

    path: str
    items: Items
    labelled: bool
    mode: Mode
    quality: int
    workers: int
    page_bytes: int


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
    stall_s: float = STALL_S,
    note: Mapping[str, Any] | None = None,
) -> BetonInfo:
    """Write ``dataset`` as fields ``image`` and, if ``labelled``, ``label``; item i becomes sample i.

    ``workers`` 0 takes the cores. ``progress(items begun, items)`` is called a few times a second. Raises UsageError for a
    bad argument or item; UnreadableItemsError if items raised UnreadableItemError (all are tried, unless
    ``stop_at_unreadable``); FastbyolError for a full disk, a dead worker or a stall. Nothing lies at
    ``path`` before the whole file does, but for an instant on disks that know no links. ``note``, JSON values, says in the
    file's manifest where the items came from.
    """
    path, num_items = followed(Path(path)), len(dataset)
    check_output(path, overwrite=overwrite)
    _check_arguments(num_items, mode, quality, workers, page_bytes)
    workers = min(workers or len(os.sched_getaffinity(0)), -(-num_items // CHUNK_ITEMS))
    remove_leftovers(path)
    temporary = path.with_name(f"{_temporary_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    job = Job(str(temporary), dataset, labelled, mode, quality, workers, page_bytes)
    try:
        _run(job, path, num_items, progress, stop_at_unreadable, stall_s)
        info = _sealed(temporary, path, num_items, labelled, note or {})
        _publish(temporary, path, overwrite=overwrite)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(info, path=path)


def followed(path: Path) -> Path:
    """Return where ``path`` leads: what a link leads to is written, not the link."""
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError):  # a link to itself
        return path


def check_output(path: Path, *, overwrite: bool) -> None:
    """UsageError unless a file can be made at ``path``: cheap, so ask before any work."""
    folder = path.parent
    try:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; give the name of a file to write")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: is a device or a pipe; give the name of a file to write")
        if path.exists() and not overwrite:
            raise UsageError(f"{path}: exists already; choose another name or pass --overwrite")
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; make it first (mkdir -p)")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."[:64]):
            pass
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def remove_leftovers(path: Path) -> None:
    """Delete temporary files that killed writers of the same output left on this machine."""
    pattern = re.compile(re.escape(_temporary_prefix(path)) + r"(\d+)-[0-9a-f]{8}\.tmp")
    for entry in list(os.scandir(path.parent)):
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            Path(entry.path).unlink(missing_ok=True)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _temporary_prefix(path: Path) -> str:
    # The machine's name, since a process number says nothing about another machine's on a shared disk.
    # Names may have 255 bytes, and this one needs some more.
    name = os.fsdecode(os.fsencode(path.name)[:MAX_NAME_BYTES])
    return f".{name}.{platform.node()}-"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_arguments(num_items: int, mode: str, quality: int, workers: int, page_bytes: int) -> None:
    if num_items < 1:
        raise UsageError("nothing to write: the data set is empty")
    if mode not in ("raw", "jpg"):
        raise UsageError(f"mode {mode!r}: must be 'raw' or 'jpg'")
    if not 1 <= quality <= 100:
        raise UsageError(f"quality {quality}: must be 1 to 100")
    if not 0 <= workers <= 1024:
        raise UsageError(f"workers {workers}: must be 0 (all cores) to 1024")
    if not MIN_PAGE_BYTES <= page_bytes < 1 << 32 or page_bytes & (page_bytes - 1):
        raise UsageError(f"page of {page_bytes} bytes: must be a power of two from {MIN_PAGE_BYTES} to 2**31")


def _run(job: Job, path: Path, total: int, progress: Progress | None, stop_at_unreadable: bool, stall_s: float) -> None:
    """Run the child to its end, or raise what it reports."""
    unreadable: dict[int, str] = {}
    with _child(job) as child:
        for message in _messages(child, path, stall_s):
            match message:
                case {"begun": int(begun)}:
                    if progress is not None:
                        progress(begun, total)
                case {"unreadable": int(index), "reason": str(reason)}:
                    unreadable[index] = reason
                    if stop_at_unreadable:
                        break
                case {"finished": True}:
                    break
                case _:
                    raise _reported(message, path)
    if unreadable:
        items = tuple(sorted(unreadable.items()))
        what = f"{len(items)} of {total} items cannot be read; first, item {items[0][0]}: {items[0][1]}"
        raise UnreadableItemsError(f"{path}: not written, {what}", items)


@dataclass(frozen=True)
class _Child:
    pipe: int
    errors: IO[bytes]

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "without a word"


@contextlib.contextmanager
def _child(job: Job) -> Iterator[_Child]:
    """The child with its job handed over. Whatever happens inside, no process of its group outlives this."""
    payload = pickle.dumps(job)
    pipe, child_end = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, pipe)
        errors = stack.enter_context(tempfile.TemporaryFile())
        try:
            process = _start(child_end, errors)
        finally:
            os.close(child_end)
        stack.callback(_kill_group, process)
        assert process.stdin is not None
        # A child that died already is found out by its messages ending.
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(payload)
        yield _Child(pipe, errors)


def _start(pipe: int, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    # Not multiprocessing's spawn, which imports the caller's main module again and needs its guard.
    # The link to this process comes before the seconds that importing FFCV takes.
    program = (
        "import sys; from fastbyol.data.beton_write import die_with; die_with(int(sys.argv[2])); "
        "from fastbyol.data.beton_child import main; main()"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        # The workers are forked, which threads of numpy's and OpenMP's do not survive.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # Writing runs nothing compiled, and importing FFCV takes 2 s instead of 5 without.
        "NUMBA_DISABLE_JIT": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(pipe), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=errors,
        stderr=errors,
        env=environment,
        pass_fds=(pipe,),
        start_new_session=True,
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # The child is not waited for before this, so its number and its group's still belong to it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _messages(child: _Child, path: Path, stall_s: float) -> Iterator[dict[str, Any]]:
    """The child's messages as they come; FastbyolError when they end or none comes for ``stall_s``."""
    poll = select.poll()
    poll.register(child.pipe, select.POLLIN)
    held = b""
    while True:
        if not poll.poll(stall_s * 1000.0):
            raise FastbyolError(f"{path}: not written, no item was read for {stall_s:g} s; look at the disks and try again")
        data = os.read(child.pipe, 1 << 16)
        if not data:
            raise FastbyolError(f"{path}: not written, the writing process died ({child.last_words()}); try `fastbyol doctor`")
        *lines, held = (held + data).split(b"\n")
        yield from map(json.loads, lines)


def _reported(message: dict[str, Any], path: Path) -> FastbyolError:
    text = f"{path}: not written, {message['error']}"
    if message["kind"] == "item":
        return UsageError(f"{text}; correct or remove it")
    if message.get("errno") in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FastbyolError(f"{text}; make room on that disk and try again")
    if message.get("errno") == errno.EROFS:  # not of the output, which `check_output` tried
        return FastbyolError(f"{text}: its processes share memory in /dev/shm, which has to be writable")
    return FastbyolError(f"{text}; try again, with fewer workers if memory is short")


def _sealed(temporary: Path, path: Path, num_items: int, labelled: bool, note: Mapping[str, Any]) -> BetonInfo:
    """Add the manifest and verify the whole."""
    try:
        seal(temporary, note)
        info = inspect(temporary)
    except UsageError as error:
        raise FastbyolError(f"{path}: not written, FFCV's writer left a damaged file ({error})") from None
    except OSError as error:
        raise _reported({"error": error.strerror, "kind": "os", "errno": error.errno}, path) from None
    if info.num_samples != num_items or (info.label_field is not None) != labelled:
        raise FastbyolError(f"{path}: not written, FFCV's writer left {info.num_samples} of {num_items} samples; try again")
    return info


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    """Give the file its name, with both on the disk before this returns; without ``overwrite`` nothing is ever replaced."""
    try:
        _sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _place(temporary, path)
        _sync(path.parent)
    except FileExistsError:
        raise UsageError(f"{path}: was written by somebody else meanwhile; choose another name or pass --overwrite") from None
    except OSError as error:
        raise FastbyolError(f"{path}: cannot be put in place ({error.strerror}); look at its disk and try again") from None


def _place(temporary: Path, path: Path) -> None:
    """Give ``temporary`` a name that nothing has, in one step; FileExistsError otherwise. The caller removes the old name."""
    try:
        path.hardlink_to(temporary)
        return
    except FileExistsError:
        raise
    except OSError:  # a file system without links: an empty file keeps the name for us until the rename
        path.touch(exist_ok=False)
    try:
        temporary.replace(path)
    except BaseException:
        path.unlink()
        raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
