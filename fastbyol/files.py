"""Open a user's files, regular ones only, so that no pipe or device blocks.

Name the cache folder.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from fastbyol.errors import UsageError

# A file system that is full, cannot be written or fails: no fault of what was to be written.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
}


def open_regular(path: Path, *, follow_links: bool = True) -> BinaryIO:
    """Open ``path`` to read its bytes, without ever blocking.

    Raises OSError. If ``path`` is not a regular file, ``strerror`` says what it is; without
    ``follow_links`` a link is none.
    """
    refuse_special(path, (path.stat() if follow_links else path.lstat()).st_mode)
    # Without O_NONBLOCK a pipe that replaces the file after the check would block.
    added = os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | added))  # noqa: SIM115 - returned
    try:
        refuse_special(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def refuse_special(path: Path | str, mode: int) -> None:
    """Raise OSError unless ``mode``, the ``st_mode`` of ``path``, is a regular file's."""
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))


def cache_folder() -> Path:
    """Return the folder of files that can be made again: ``$FASTBYOL_CACHE``, or the user's.

    The user's is ``$XDG_CACHE_HOME/fastbyol`` or ``~/.cache/fastbyol``. Raises UsageError for a
    user without a home folder.
    """
    own = os.environ.get("FASTBYOL_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fastbyol"
    except RuntimeError:  # no HOME, and the system has no entry for the user
        raise UsageError(
            "no home folder: name one for what can be made again with FASTBYOL_CACHE=DIR"
        ) from None
