"""Files that are whole or absent, whatever instant the process or the machine dies at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastbyol.errors import FastbyolError

_SUFFIX = ".tmp"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, force it to disk and rename it to ``path``.

    A reader sees the old content or the new one. A kill leaves at most a temporary file, see ``remove_temporaries``.
    Raises OSError, with nothing left behind.
    """
    temporary = path.with_name(f".{path.name}{_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """``write_atomically`` of UTF-8 text."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left in ``folder``. Only for the process that holds the run's lock."""
    for path in folder.glob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Turn an OSError within into a FastbyolError that says on one line which file cannot be written."""
    try:
        yield
    except OSError as error:
        raise FastbyolError(f"{path}: cannot write: {error.strerror}{advice}") from None


def append(file: BinaryIO, data: bytes) -> None:
    """Write all of ``data`` to an unbuffered file, in one call where the system lets it."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk: without it a rename may be undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
