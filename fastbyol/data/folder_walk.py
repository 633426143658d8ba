"""A walk through a folder: its pictures, and everything else by name and reason."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from fastbyol.data import rgb
from fastbyol.files import refuse_special

_TABLES = (".csv", ".jsonl", ".parquet", ".tsv", ".xlsx")
HIDDEN, SYSTEM = NOT_LOOKED_AT = ("hidden files and folders", "system folders")
# Archive programs and systems leave these beside pictures.
_LITTER = (
    "#recycle",
    "$RECYCLE.BIN",
    "@eaDir",
    "System Volume Information",
    "__MACOSX",
    "__pycache__",
    "lost+found",
)
FOLDER_LINKS = "links to folders that are read anyway or lie around"


@dataclass
class Listing:
    """The content of a folder, as paths relative to it.

    ``pictures`` have a picture's suffix. ``skipped`` are pictures that cannot be opened and folders
    that cannot be read, each with the reason. ``ignored`` is everything else, with its kind.
    ``folders`` are all that were read.
    """

    pictures: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def add_file(self, name: str) -> None:
        """Add a regular file as a picture or, by its suffix, to what is ignored."""
        if is_picture(name):
            self.pictures.append(name)
            return
        suffix = _suffix(name)
        kind = f"{suffix} files" if suffix else "files without a suffix"
        self.ignored.append(
            (name, f"{suffix} tables, whose labels are not read" if suffix in _TABLES else kind)
        )

    def add_unreadable(self, name: str, reason: str) -> None:
        """Add what cannot be opened: it is skipped if it has a picture's name."""
        (self.skipped if is_picture(name) else self.ignored).append((name, reason))

    def sort(self) -> None:
        """Put each list in the order of names."""
        for names in (self.pictures, self.skipped, self.ignored, self.folders):
            names.sort()


def walk(root: Path) -> Listing:
    """List everything below ``root``, sorted by name. Raises OSError if ``root`` cannot be read.

    A link to a file is a file. A link to a folder is followed unless it leads to a folder that is
    read anyway or to one around ``root``; from one link every folder is read once. Hidden files and
    folders are ignored.
    """
    listing, links = Listing(), list[str]()
    # A link to a folder around the root would bring everything beside the root.
    seen = {_identity(folder) for folder in root.resolve().parents}
    with os.scandir(root):
        pass  # so that an unreadable root raises
    _read_below(root, "", listing, links, seen)
    for link in links:
        on_the_way, pending = set(seen), [link]
        while pending:
            name = pending.pop()
            if _identity(root / name) in on_the_way:
                listing.ignored.append((name, FOLDER_LINKS))
            else:
                _read_below(root, name, listing, pending, on_the_way)
    listing.sort()
    return listing


def files_below(root: Path) -> dict[str, str]:
    """Return the paths of all but hidden files below ``root`` by relative name, as ``walk`` does.

    Folders that are not read may be among them. Raises OSError if ``root`` cannot be read.
    """
    listing = walk(root)
    others = [name for name, kind in listing.ignored if kind not in NOT_LOOKED_AT]
    names = sorted((*listing.pictures, *(name for name, _ in listing.skipped), *others))
    return {name: f"{root}/{name}" for name in names}


def has_pictures(folder: Path) -> bool:
    """Return whether a picture is in ``folder`` or below; links are not followed."""
    return any(is_picture(name) for _, _, names in os.walk(folder) for name in names)


def _read_below(
    root: Path, start: str, listing: Listing, links: list[str], seen: set[tuple[int, int]]
) -> None:
    """Read the real folders from ``start`` downwards; collect links to folders in ``links``."""
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
            listing.skipped.append((f"{folder}/", error.strerror or str(error)))
            continue
        if folder:
            listing.folders.append(folder)
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if _add(entry, name, listing):
                (links if entry.is_symlink() else pending).append(name)


def _add(entry: os.DirEntry[str], name: str, listing: Listing) -> bool:
    """Add ``entry`` to the listing; return whether it is a folder to read."""
    if kind := unseen(entry.name):
        listing.ignored.append((name, kind))
        return False
    try:
        # An entry knows that it is a regular file: this saves a stat for each.
        mode = stat.S_IFREG if entry.is_file(follow_symlinks=False) else os.stat(entry.path).st_mode  # noqa: PTH116
        if stat.S_ISDIR(mode):
            return True
        refuse_special(entry.path, mode)
    except OSError as error:
        listing.add_unreadable(name, error.strerror or str(error))
        return False
    listing.add_file(name)
    return False


def unseen(name: str) -> str | None:
    """Return why a file or folder is not looked at, by the last part of its name, or None."""
    return HIDDEN if name.startswith(".") else SYSTEM if name in _LITTER else None


def is_picture(name: str) -> bool:
    """Return whether a file's name has the suffix of a picture."""
    return _suffix(name) in rgb.suffixes()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - called a million times


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
