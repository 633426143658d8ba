"""A worker's right to one run in a folder that several hosts share.

A claim is the folder ``NAME.claim.N`` beside the run's ledger file. It is made under a name of its
own and then renamed, which only one process can where a folder with something in it has the name;
so a claim says whose it is from the start, wherever its maker is killed. Locks do not reach other
hosts on common mounts. N counts the claims of a run for ever, since the ledger keeps the last, so
whoever sees a higher number than its own was given up for dead, and stops before it writes
(M. Kleppmann, "How to do distributed locking", 2016: a fencing token).

The file sign.json in it says who has the run, and its owner touches it. No clock is trusted: who
wants the run watches by its own monotonic clock whether the sign changes at all. On the owner's
own machine the lock on the sign tells at once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbyol.errors import FastbyolError
from fastbyol.files import open_regular
from fastbyol.fleet import fields
from fastbyol.fleet.fields import NUMBER, TEXT, WHOLE

SIGN = "sign.json"
# What follows a run's name: in a claim's, and in that of a folder which becomes one.
_CLAIM, _DRAFT = re.compile(r"\.claim\.(\d+)"), re.compile(r"\.claiming\.(\d+)\.\w+")
# Without a sign for so long a worker counts as dead. It gives ten in this time.
STALE_S, BEATS = 300.0, 10
# Room for what a sign will say later, so that it can be said on a full disk.
SIGN_BYTES = 4096
_NEEDED: fields.Types = {"host": TEXT, "pid": WHOLE, "boot": TEXT, "stale_s": NUMBER}
_MORE: fields.Types = {
    "job": TEXT, "on": TEXT, "step": WHOLE, "epoch": WHOLE, "state": TEXT, "neg_cos": NUMBER,
    "accuracy": NUMBER, "num_scored": WHOLE, "img_s": NUMBER, "left_s": NUMBER, "ended": TEXT,
}  # fmt: skip
# A rename onto another's claim, or of a folder that whoever was faster has removed.
_TOO_LATE = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.ENOENT)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LostClaimError(FastbyolError):
    """A run that another worker has, because this one gave no sign for too long."""


def boot() -> str:
    """Return what distinguishes this machine since it started from all others; "" if unknown."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


@dataclass(frozen=True)
class Owner:
    """Who claims: a process of a host, under a name of its own; ``job`` is a scheduler's.

    After ``stale_s`` seconds without a sign it may be taken for dead.
    ``gpus`` are those that its process may use.
    """

    stale_s: float = STALE_S
    job: str = ""
    gpus: str = field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    host: str = field(default_factory=socket.gethostname)
    boot: str = field(default_factory=boot)
    pid: int = field(default_factory=os.getpid)
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @property
    def name(self) -> str:
        """``HOST:PID``, as people know it."""
        return f"{self.host}:{self.pid}"


class Claim:
    """The right to a run until ``release``. ``number`` is its fencing token.

    Made by ``acquire``. ``say`` and ``beat`` may be called in another thread than the rest.
    """

    def __init__(self, path: Path, number: int, owner: Owner) -> None:
        self.path, self.number, self.owner = path, number, owner
        self._fields: dict[str, Any] = {**vars(owner), "number": number}
        self._writing = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._sign = os.open(path / SIGN, flags, 0o666)
        with suppress(OSError):
            # Locked before it says anything: unlocked, it would seem to be a dead process's.
            fcntl.flock(self._sign, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            self.say()
        except OSError:
            self.close()
            raise

    def say(self, **fields: Any) -> None:
        """Add ``fields`` to the sign, which others read, and so give a sign of life.

        Raises OSError where the file cannot be written.
        """
        with self._writing:
            self._fields |= fields
            text = json.dumps(self._fields).encode()
            # Overwritten in the room that it has, by one call, which readers see whole.
            os.pwrite(self._sign, text.ljust(SIGN_BYTES), 0)

    def beat(self) -> None:
        """Give a sign of life, for which a full disk has room. Raises OSError."""
        os.utime(self._sign)

    def check(self) -> None:
        """Raise LostClaimError unless the run is still this claim's."""
        numbers = _numbers(_stem(self.path))
        if self.number not in numbers or max(numbers) > self.number:
            by = newest(_stem(self.path))
            who = f"{by.owner_name} has it" if by is not None else "its claim is gone"
            raise LostClaimError(
                f"{self.path}: this worker gave no sign for too long, and {who}: nothing more is "
                "written here"
            )

    def release(self) -> None:
        """Give the run back. Say first in the ledger what became of it. May be called twice."""
        with suppress(OSError):
            remove(self.path)
        self.close()

    def close(self) -> None:
        """Stop giving signs, and leave the claim to whoever takes it over."""
        with self._writing:
            if self._sign >= 0:
                os.close(self._sign)
            self._sign = -1


@dataclass(frozen=True)
class Seen:
    """A claim as others see it: its sign, empty if not readable, and when that was touched."""

    path: Path
    number: int
    sign: Mapping[str, Any]
    touched_ns: int

    @property
    def owner_name(self) -> str:
        """``HOST:PID`` of the owner."""
        return f"{self.sign['host']}:{self.sign['pid']}" if self.sign else "an unknown worker"

    @property
    def has_ended(self) -> bool:
        """Whether its owner said that it gives up, and could not say so in the ledger."""
        return bool(self.sign.get("ended"))

    @property
    def is_here(self) -> bool:
        """Whether the owner is, or was, on this machine."""
        return bool(self.sign) and self.sign["boot"] == boot() != ""

    def process_lives(self) -> bool | None:
        """Return whether the owner's process lives; None where that cannot be told."""
        if not self.is_here:
            return None
        try:
            with (self.path / SIGN).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except OSError as error:
            return None if error.errno in _NO_LOCKS else True
        return False


class Watch:
    """What one process has seen of others' claims, by its own monotonic clock."""

    def __init__(self) -> None:
        self._since: dict[Path, tuple[int, float]] = {}
        self._moved: set[Path] = set()

    def is_dead(self, seen: Seen, stale_s: float = STALE_S) -> bool:
        """Return whether the run may be taken over.

        That is so if the owner's process is gone from this machine, if the owner said that it
        gives up, or if its sign did not change for as long as it says (``stale_s`` if it says
        nothing) while this process looked. A process that is here and lives keeps its run, however
        silent it is: it may write at any moment.
        """
        before, since = self._since.get(seen.path, (None, 0.0))
        if before != seen.touched_ns:
            if before is not None:
                self._moved.add(seen.path)
            since = time.monotonic()
            self._since[seen.path] = (seen.touched_ns, since)
        lives = seen.process_lives()
        if lives is not None:
            return not lives
        return seen.has_ended or time.monotonic() - since >= seen.sign.get("stale_s", stale_s)

    def has_seen_alive(self, seen: Seen) -> bool:
        """Return whether its owner gave a sign while this process looked, or lives here."""
        return seen.path in self._moved or bool(seen.process_lives())


def claims_below(folder: Path) -> dict[Path, int]:
    """Return the number of the newest claim of each run in ``folder/*`` that has one, by stem."""
    claims: dict[Path, int] = {}
    for path in folder.glob("*/*.claim.*"):
        stem, number = _stem(path), path.name.rpartition(".")[2]
        if number.isdecimal():
            claims[stem] = max(int(number), claims.get(stem, 0))
    return claims


def newest(stem: Path) -> Seen | None:
    """Return the newest claim on the run whose ledger file is ``stem`` and .json, or None."""
    numbers = _numbers(stem)
    return look(stem, max(numbers)) if numbers else None


def look(stem: Path, number: int) -> Seen:
    """Return the claim of that number as it is now, without a sign if it has none."""
    path = _path(stem, number)
    sign: Mapping[str, Any] = {}
    touched_ns = 0
    with suppress(OSError, ValueError, RecursionError):
        touched_ns = path.stat().st_mtime_ns
        touched_ns = (path / SIGN).stat().st_mtime_ns
        with open_regular(path / SIGN) as file:
            content = json.load(file)
        # Compared, not converted to a float, which a number of many digits would not survive.
        seconds = (content.get(name, 0.0) for name in ("stale_s", "left_s"))
        if fields.fit(content, _NEEDED, _MORE) and all(abs(s) < math.inf for s in seconds):
            sign = content
    return Seen(path, number, sign, touched_ns)


def acquire(stem: Path, last: int, owner: Owner) -> Claim | None:
    """Claim the run whose ledger file is ``stem`` and .json; None if another was faster.

    ``last`` is the highest number that was ever claimed, as far as the caller knows. Earlier
    claims, whose owners are dead, are removed. Raises OSError where the folder cannot be written.
    """
    number = last + 1
    if max(_numbers(stem), default=0) >= number:
        return None
    draft = stem.with_name(f"{stem.name}.claiming.{number}.{owner.nonce}")
    draft.mkdir()
    claim: Claim | None = None
    try:
        claim = Claim(draft, number, owner)
        claim.path = draft.rename(_path(stem, number))
    except OSError as error:
        remove(draft)
        if claim is not None:
            claim.close()
        if error.errno in _TOO_LATE:
            return None
        raise
    if max(_numbers(stem), default=0) > number:
        claim.release()
        return None
    for path, other in (_beside(stem, _CLAIM) | _beside(stem, _DRAFT)).items():
        if other <= number and path != claim.path:
            remove(path)
    return claim


def remove(path: Path) -> None:
    """Remove a claim's folder."""
    shutil.rmtree(path, ignore_errors=True)


def _numbers(stem: Path) -> list[int]:
    """Return the numbers of the claims that lie beside ``stem``."""
    return list(_beside(stem, _CLAIM).values())


def _beside(stem: Path, kind: re.Pattern[str]) -> dict[Path, int]:
    """Return what lies beside ``stem`` under its name and a ``kind``, each with its number."""
    claims: dict[Path, int] = {}
    with suppress(OSError):
        for path in stem.parent.iterdir():
            is_own = path.name.startswith(stem.name)
            if is_own and (rest := kind.fullmatch(path.name.removeprefix(stem.name))):
                claims[path] = int(rest[1])
    return claims


def _path(stem: Path, number: int) -> Path:
    return stem.with_name(f"{stem.name}.claim.{number}")


def _stem(path: Path) -> Path:
    return path.with_name(path.name.partition(".claim.")[0])
