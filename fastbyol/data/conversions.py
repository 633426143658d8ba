"""Sources that are no betons, converted once each into the cache folder.

A conversion is kept by what it was made of: names and bytes of the source's files, the split, and
the size of its images. Bytes are read again once a file's times or numbers have changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastbyol.data import beton, beton_write, convert, scratch, sources
from fastbyol.data.source_arrays import Source
from fastbyol.errors import UsageError
from fastbyol.files import cache_folder, open_regular
from fastbyol.output import announced

# Counts up when the same files would become other pixels or labels.
VERSION = 1
# Images that share a size of at most so many pixels a side stay as they are.
AS_IS_SIDE = 256
# A file that is written while it is looked at, or within the clock's coarsest step after that, may
# keep its times: FAT's are two seconds.
SETTLED_NS = 2_000_000_000
# In this order, the parts of a source that a run can be scored on.
SCORED_ON = ("test", "val")
_PIECE_BYTES = 1 << 20
# 50,000 files take half a second.
LONG_LOOK_S, LOOK_COUNTS = 0.1, 20
_looks: dict[str, tuple[float, _State]] = {}
_log = logging.getLogger(__name__)


class _State(NamedTuple):
    """The files of a source at one moment: a digest of their names, numbers, sizes and times."""

    digest: str
    files: dict[str, str]
    newest_ns: int


def converted(source: str, *, split: str | None, size: int, scored_on: bool = False) -> Path:
    """Return the beton of ``source``, a path or name, which is converted on the first call.

    ``split`` defaults as in ``sources.open_source``, or, for images that are ``scored_on``, to the
    first of ``SCORED_ON`` that there is. Images stay as they are if they share a size of at most
    ``AS_IS_SIDE`` or ``size`` pixels a side; others are scaled to ``size``, and the middle is cut
    out. Several processes convert once. Raises UsageError as ``open_source`` does, also if the
    source changes meanwhile, and FastbyolError for a full disk.
    """
    folder = writable(cache_folder() / "converted")
    content = _content(source, folder)
    key = [VERSION, content, split, scored_on and split is None]
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name)[:40].strip("-")
    stem = f"{name}-{_digest([json.dumps(key).encode()])}"
    as_is, scaled = folder / f"{stem}.beton", folder / f"{stem}-{size}px.beton"
    with alone(folder / f".{stem}.lock"):
        path = next((path for path in (as_is, scaled) if path.exists()), None)
        if path is None:
            beton_write.remove_leftovers(folder)
            path = _convert(source, split, size, as_is, scaled, scored_on=scored_on)
            _looks.clear()
            if _content(source, folder) != content:
                path.unlink()
                raise UsageError(f"{source}: changed while it was converted; try again")
    return path


def splits_of(path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that a converted beton holds, and the splits that its source has."""
    info = beton.inspect(path, may_lack_labels=True)
    note = {} if info.manifest is None else info.manifest.note
    return note.get("split"), tuple(note.get("splits", ()))


def _convert(
    source: str, split: str | None, size: int, as_is: Path, scaled: Path, *, scored_on: bool
) -> Path:
    with announced(f"{source}: converting it, once") as (progress, conclude):
        # Next to the file that it will be in most cases; both are on one disk.
        with scratch.beside(scaled) as unpacked:
            opened = sources.open_source(source, split=split, scratch=unpacked)
            part = next((part for part in SCORED_ON if part in opened.splits), None)
            if scored_on and split is None and part not in (None, opened.split):
                opened = sources.open_source(source, split=part, scratch=unpacked)
            keeps = _is_small(opened, size)
            report = convert.write(
                opened,
                as_is if keeps else scaled,
                name=source,
                size=None if keeps else size,
                resize="none" if keeps else "centre",
                progress=progress,
                overwrite=True,
            )
        part = f" {report.split}," if report.split else ""
        conclude(f"{source}: converted once,{part} {report.summary()}")
    return report.path


def _is_small(source: Source, size: int) -> bool:
    """Return whether all images have one size, small enough to be kept."""
    sizes = source.image_bytes()
    return bool(sizes.min() == sizes.max() <= 3 * max(AS_IS_SIDE, size) ** 2)


def _content(source: str, folder: Path) -> str:
    """Return a digest of all names and bytes of ``source``, remembered in ``folder``."""
    began_ns = time.time_ns()
    state = _look(source)
    own_name = os.path.realpath(source) if state.files else source
    memory = folder / f"{_digest([os.fsencode(own_name)])}.seen"
    try:
        seen, content = json.loads(memory.read_bytes())
        if seen == state.digest and isinstance(content, str):
            return content
    except (OSError, ValueError):  # not seen yet, or damaged
        pass
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_file_digest, state.files.values())
        rows = (
            os.fsencode(f"{name}\0{digest}\0")
            for name, digest in zip(state.files, digests, strict=True)
        )
        content = _digest([os.fsencode("" if state.files else source), *rows])
    if state.newest_ns < began_ns - SETTLED_NS:
        unfinished = beton_write.temporary(memory)
        try:
            unfinished.write_text(json.dumps([state.digest, content]))
            unfinished.replace(memory)
        except OSError:  # a full disk: the bytes are read again next time
            unfinished.unlink(missing_ok=True)
    return content


def _look(source: str) -> _State:
    """Return the state of a source's files, by stat alone.

    A command asks several times. What took long, with many files or on a slow disk, counts for
    ``LOOK_COUNTS`` times as long.
    """
    began = time.monotonic()
    if source in _looks and began < _looks[source][0]:
        return _looks[source][1]
    files = sources.files_of(source)
    newest, digest = 0, hashlib.blake2b(digest_size=16)
    for name, path in files.items():
        try:
            status = os.stat(path)  # noqa: PTH116 - called a million times
        except OSError as error:
            digest.update(os.fsencode(f"{name}\0{error.strerror}\0"))
            continue
        # The time of change tells of writers that set the other one back.
        times = status.st_mtime_ns, status.st_ctime_ns
        numbers = status.st_dev, status.st_ino, status.st_size, *times
        newest = max(newest, *times)
        digest.update(os.fsencode(f"{name}\0{numbers}\0"))
    state, lasted = _State(digest.hexdigest(), files, newest), time.monotonic() - began
    if lasted > LONG_LOOK_S:
        _looks[source] = time.monotonic() + LOOK_COUNTS * lasted, state
    return state


def _file_digest(path: str) -> str:
    try:
        with open_regular(Path(path)) as file:
            return _digest(iter(lambda: file.read(_PIECE_BYTES), b""))
    except OSError as error:  # converting it says what is wrong
        return error.strerror or str(error)


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def writable(folder: Path) -> Path:
    """Make a folder of the cache. Raises UsageError where that is impossible."""
    with _errors_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{folder}: {error.strerror}: name a folder that can be written with FASTBYOL_CACHE=DIR"
        ) from None


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold the file ``lock``, if the disk has locks; the system releases it when the process dies.

    The lock file stays: otherwise two processes could lock two files of one name. Raises UsageError
    where it cannot be made.
    """
    with _errors_of(lock.parent):
        file = lock.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.info("%s: no lock: %s", lock, error.strerror)
        yield
