"""Opening what a user named: regular files only, so that nobody waits for a pipe, a device or a socket.

And the folder of what fastbyol keeps for itself.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from fastbyol.errors import UsageError

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


def cache_folder() -> Path:
    """Return where is kept what can be made again: ``$FASTBYOL_CACHE``, else a folder in the user's.

    That is ``$XDG_CACHE_HOME/fastbyol`` or ``~/.cache/fastbyol``. Raises UsageError for a user without a home.
    """
    own = os.environ.get("FASTBYOL_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fastbyol"
    except RuntimeError:  # a user without HOME of whom the system knows no other
        raise UsageError("no home folder: name one for what can be made again with FASTBYOL_CACHE=DIR") from None
