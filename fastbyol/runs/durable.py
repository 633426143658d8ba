"""Files that are whole or absent, whatever instant the process or the machine dies at."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastbyol.errors import FastbyolError
from fastbyol.files import open_regular, refuse_special

_SUFFIX = ".tmp"


class Written(NamedTuple):
    """The first ``num_bytes`` bytes of an append-only file and their BLAKE2b digest.

    A checkpoint records it, so that damage to earlier content is noticed when the run goes on.
    """

    num_bytes: int
    digest: str

    @staticmethod
    def of(content: bytes) -> Written:
        """Return the record of a whole content."""
        digest = new_digest()
        digest.update(content)
        return Written(len(content), digest.hexdigest())

    def matches(self, content: Iterable[bytes]) -> bool:
        """Return whether ``content``, in pieces, begins with exactly those bytes."""
        digest, left = new_digest(), self.num_bytes
        for piece in content:
            digest.update(piece[:left])
            left -= min(left, len(piece))
        return left == 0 and digest.hexdigest() == self.digest


def new_digest() -> hashlib.blake2b:
    """Return the digest of ``Written``, empty: 128 bits, never equal by chance in practice."""
    return hashlib.blake2b(digest_size=16)


def pieces(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """Yield a file's bytes in pieces of ``size``; nothing where there is no file."""
    if path.exists():
        with open_regular(path) as file:
            while piece := file.read(size):
                yield piece


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file, force it to disk and rename it to ``path``.

    A reader sees the old content or the new one. A kill leaves at most a temporary file, see
    ``remove_temporaries``. An OSError leaves nothing behind.
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
    """Write UTF-8 text by ``write_atomically``."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_output(path: Path, content: bytes) -> None:
    """Write ``content`` to the file that a user named; a link stays one.

    Raises FastbyolError where that fails, or where ``path`` is no regular file.
    """
    with writing(path):
        if path.exists():
            refuse_special(path, path.stat().st_mode)
        write_atomically(path.resolve(), lambda file: file.write(content))


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed writers. Only for the process with the run's lock."""
    for path in folder.glob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Turn an OSError within into a FastbyolError of one line that names the file."""
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
