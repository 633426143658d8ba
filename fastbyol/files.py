"""Opening what a user named: regular files only, so that nobody waits for a pipe, a device or a socket."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path) -> BinaryIO:
    """Open ``path`` to read its bytes, at once whatever lies there.

    Raises OSError, also where ``path`` is no regular file: ``strerror`` then says what it is.
    """
    refuse_special(path, path.stat().st_mode)
    # Without O_NONBLOCK a pipe that takes the file's place after the look would be waited for.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 - returned
    try:
        refuse_special(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def refuse_special(path: Path, mode: int) -> None:
    """Raise OSError unless ``mode``, the ``st_mode`` of ``path``, is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))
