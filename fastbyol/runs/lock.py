"""One process per run."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from pathlib import Path

from fastbyol.errors import UsageError
from fastbyol.files import open_regular

LOCK = ".lock"
_log = logging.getLogger(__name__)


class InUseError(UsageError):
    """A run that another process of this machine works on."""


class Lock:
    """An advisory lock on a run's folder, which the system drops when the process dies.

    It depends neither on process numbers, which are reused, nor on the file's existence. On NFS
    the server keeps it (Linux turns flock into a lock of bytes, which needs the file open for
    writing). Where there are no locks a warning is logged.
    """

    def __init__(self, path: Path) -> None:
        while not self._took(path / LOCK):
            pass

    def _took(self, name: Path) -> bool:
        """Return whether the file is still the folder's: its last owner may have removed it."""
        # With O_NONBLOCK the system refuses a pipe of this name instead of waiting for it.
        self._file = open(  # noqa: SIM115
            name, "ab", opener=lambda file, flags: os.open(file, flags | os.O_NONBLOCK, 0o666)
        )
        try:
            if not _try_lock(self._file.fileno()):
                raise InUseError(
                    f"{name.parent}: another process works on this run; wait for it or stop it"
                )
            try:
                same = os.path.samestat(os.fstat(self._file.fileno()), name.stat())
            except FileNotFoundError:
                same = False
        except BaseException:
            self._file.close()
            raise
        if not same:
            self._file.close()
        return same

    def release(self) -> None:
        """Release. The file stays: removing it would let two processes lock files of one name."""
        self._file.close()


def is_locked(path: Path) -> bool:
    """Return whether some process has locked the run in ``path``."""
    try:
        with open_regular(path / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    return False


def _try_lock(descriptor: int) -> bool:
    """Return whether the lock could be taken. ``is_locked`` elsewhere takes it for an instant."""
    for pause_s in (0.01, 0.05, 0.1, 0.2, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                _log.warning(
                    "this file system has no locks (%s): run one process per run folder",
                    error.strerror,
                )
                return True
            if pause_s is not None:
                time.sleep(pause_s)
        else:
            return True
    return False
