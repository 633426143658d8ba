"""Everything that lies in a folder: its pictures, and by name and reason whatever is not taken for one."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from fastbyol.data import rgb
from fastbyol.files import refuse_special

_TABLES = (".csv", ".jsonl", ".parquet", ".tsv", ".xlsx")
HIDDEN = "hidden files and folders"
# What archive programs and systems leave beside pictures.
_LITTER = ("#recycle", "$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "__pycache__", "lost+found")


@dataclass
class Found:
    """What a walk came upon, as paths relative to its root.

    ``pictures`` are files with a picture's suffix; ``skipped`` holds those that cannot be opened and folders that cannot be
    read, with the reason; ``ignored`` everything else, with the kind of thing it is; ``folders`` are all that were read.
    """

    pictures: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def walk(root: Path) -> Found:
    """Look at everything below ``root``, sorted by name. Raises OSError where ``root`` itself cannot be read.

    Links to files are files. A link to a folder is followed, but where it leads to one that is read anyway or to one around
    ``root``; on the way from one link every folder is read once. Hidden files and folders are not looked into.
    """
    found, links = Found(), list[str]()
    # The folders around the root: a link to one of them would bring everything beside the root.
    seen = {_identity(folder) for folder in root.resolve().parents}
    with os.scandir(root):
        pass  # what is wrong with the root is the caller's to hear
    _read_below(root, "", found, links, seen)
    for link in links:
        on_the_way, pending = set(seen), [link]
        while pending:
            name = pending.pop()
            if _identity(root / name) in on_the_way:
                found.ignored.append((name, "links to folders that are read anyway or lie around"))
            else:
                _read_below(root, name, found, pending, on_the_way)
    for names in (found.pictures, found.skipped, found.ignored, found.folders):
        names.sort()
    return found


def has_pictures(folder: Path) -> bool:
    """Tell whether a picture lies in ``folder`` or below, links not followed."""
    return any(is_picture(name) for _, _, names in os.walk(folder) for name in names)


def _read_below(root: Path, start: str, found: Found, links: list[str], seen: set[tuple[int, int]]) -> None:
    """Take in the real folders from ``start`` downwards; links to folders are kept in ``links`` for later."""
    pending = [start]
    while pending:
        folder = pending.pop()
        try:
            identity = _identity(root / folder)
            if identity in seen:  # mounted twice
                continue
            seen.add(identity)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            found.skipped.append((f"{folder}/", error.strerror or str(error)))
            continue
        if folder:
            found.folders.append(folder)
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if _take(entry, name, found):
                (links if entry.is_symlink() else pending).append(name)


def _take(entry: os.DirEntry[str], name: str, found: Found) -> bool:
    """File ``entry`` under what it is; tell whether it is a folder to go into."""
    hidden, picture = entry.name.startswith("."), is_picture(entry.name)
    if hidden or entry.name in _LITTER:
        found.ignored.append((name, HIDDEN if hidden else "system folders"))
        return False
    try:
        # Not a look at every regular file: an entry knows that it is one.
        mode = stat.S_IFREG if entry.is_file(follow_symlinks=False) else os.stat(entry.path).st_mode  # noqa: PTH116
        if stat.S_ISDIR(mode):
            return True
        refuse_special(Path(entry.path), mode)
    except OSError as error:
        (found.skipped if picture else found.ignored).append((name, error.strerror or str(error)))
        return False
    if picture:
        found.pictures.append(name)
    else:
        suffix = _suffix(entry.name)
        kind = f"{suffix} files" if suffix else "files without a suffix"
        found.ignored.append((name, f"{suffix} tables, whose labels are not read" if suffix in _TABLES else kind))
    return False


def is_picture(name: str) -> bool:
    """Tell whether a file's name has the suffix of a picture."""
    return _suffix(name) in rgb.suffixes()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - called a million times


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
