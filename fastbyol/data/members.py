"""The members of archives, listed as a folder's content would be. Nothing is unpacked by name."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterable
from typing import NamedTuple

from fastbyol.data.folder_walk import FOLDER_LINKS, Listing, unseen
from fastbyol.data.pictures import Stretch
from fastbyol.files import refuse_special

# Names beyond these are no file system's, and recursion over folders has to end.
MAX_NAME, MAX_DEPTH = 1024, 100
_MAX_LINKS = 40  # in a row, as Linux follows them


class Member(NamedTuple):
    """A member of an archive: its file type as in ``st_mode``, and where its bytes lie.

    ``link`` is where a symbolic link leads, or the earlier member that a regular one has its bytes
    from. ``reason`` says why the bytes cannot be read.
    """

    name: str
    mode: int = stat.S_IFREG
    stretch: Stretch | None = None
    link: str = ""
    reason: str = ""


def list_members(members: Iterable[Member]) -> tuple[Listing, dict[str, Stretch]]:
    """List what would lie in a folder if it were unpacked there, and the bytes of its files.

    A later member replaces an earlier one of the same name. Links lead to other members only.
    """
    listing, last = Listing(), dict[str, Member]()
    for member in members:
        name = _inside(member.name)
        if name is None:
            listing.add_unreadable(
                member.name[-MAX_NAME:].lstrip("/"), "its name leads out of the archive"
            )
        elif len(name) > MAX_NAME or name.count("/") >= MAX_DEPTH:
            listing.add_unreadable(name[-MAX_NAME:].lstrip("/"), "its name is too long")
        elif name:
            if member.link and stat.S_ISREG(member.mode):
                earlier = last.get(_inside(member.link) or "")
                absent = Member(name, reason=os.strerror(errno.ENOENT))
                member = absent if earlier is None else earlier
            last[name] = member
    hidden: dict[str, bool] = {}
    stretches: dict[str, Stretch] = {}
    # Links come last, when all folders are there.
    for name, member in sorted(last.items(), key=lambda item: stat.S_ISLNK(item[1].mode)):
        is_link = stat.S_ISLNK(member.mode)
        if _is_hidden(name, hidden, listing, is_folder=stat.S_ISDIR(member.mode)):
            continue
        if is_link:
            member = _followed(name, last, hidden)
        if stat.S_ISDIR(member.mode):
            if is_link:
                listing.ignored.append((name, FOLDER_LINKS))
        elif reason := member.reason or _special(member.mode):
            listing.add_unreadable(name, reason)
        else:
            listing.add_file(name)
            if member.stretch is not None:
                stretches[name] = member.stretch
    listing.folders = [name for name, is_hidden in hidden.items() if not is_hidden]
    listing.sort()
    return listing, stretches


def _inside(name: str) -> str | None:
    """Return a path without ``.`` and a leading slash; None where ``..`` is in it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if ".." in parts else "/".join(parts)


def _is_hidden(name: str, hidden: dict[str, bool], listing: Listing, *, is_folder: bool) -> bool:
    """Return whether ``name`` or a folder around it is not looked at.

    The answer for folders is kept in ``hidden``; the outermost hidden ones are added to the
    listing.
    """
    if name in hidden:
        return hidden[name]
    around, _, own = name.rpartition("/")
    answer = bool(around) and _is_hidden(around, hidden, listing, is_folder=True)
    if not answer and (kind := unseen(own)):
        listing.ignored.append((name, kind))
        answer = True
    if is_folder:
        hidden[name] = answer
    return answer


def _followed(name: str, members: dict[str, Member], folders: dict[str, bool]) -> Member:
    """Return the member that a symbolic link leads to, or one that says why there is none."""
    for _ in range(_MAX_LINKS):
        link = members[name].link
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
        if target.startswith(("/", "../")) or target == "..":
            return Member(name, reason="links to what is not in the archive")
        if target == "." or target in folders:
            return Member(target, stat.S_IFDIR)
        if target not in members:
            return Member(name, reason=os.strerror(errno.ENOENT))
        if not stat.S_ISLNK(members[target].mode):
            return members[target]
        name = target
    return Member(name, reason=os.strerror(errno.ELOOP))


def _special(mode: int) -> str:
    """Return why what has the mode cannot be read, or nothing for a regular file."""
    try:
        refuse_special("", mode)
    except OSError as error:
        return error.strerror or str(error)
    return ""
