"""Walks through folders: everything is a picture, skipped or ignored, and nothing blocks."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.data.folder_walk import Listing, walk


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe, not a regular file"),
    "socket": (_socket, "is a socket, not a regular file"),
    "link to a device": (
        lambda path: path.symlink_to("/dev/zero"),
        "is a device, not a regular file",
    ),
    "broken link": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "link to itself": (
        lambda path: path.symlink_to(path.name),
        "Too many levels of symbolic links",
    ),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_cannot_be_opened_is_skipped_if_it_is_called_a_picture_and_else_ignored(
    tmp_path: Path, kind: str
) -> None:
    make, reason = SPECIAL[kind]
    put(tmp_path, "a/x.png")
    make(tmp_path / "a" / "odd.jpg")
    make(tmp_path / "a" / "odd.txt")
    listing = walk(tmp_path)
    assert listing.pictures == ["a/x.png"]
    assert listing.skipped == [("a/odd.jpg", reason)]
    assert listing.ignored == [("a/odd.txt", reason)]


def test_everything_is_accounted_for(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a/x.PNG",
        "a/y.JPeG",
        "a/m.mpo",
        "a/i.ico",
        "a/h.HEIC",
        "a/n.txt",
        "a/labels.csv",
        "a/noname",
        "readme.md",
    )
    put(
        tmp_path,
        "a/.x.png.swp",
        "a/.hidden.png",
        ".git/x.png",
        "__MACOSX/a/._x.png",
        "a/clip.mp4",
        "a/scan.eps",
    )
    listing = walk(tmp_path)
    assert listing.pictures == ["a/h.HEIC", "a/i.ico", "a/m.mpo", "a/x.PNG", "a/y.JPeG"]
    assert dict(listing.ignored) == {
        ".git": "hidden files and folders",
        "__MACOSX": "system folders",
        "a/.hidden.png": "hidden files and folders",
        "a/.x.png.swp": "hidden files and folders",
        "a/clip.mp4": ".mp4 files",
        "a/labels.csv": ".csv tables, whose labels are not read",
        "a/n.txt": ".txt files",
        "a/scan.eps": ".eps files",
        "a/noname": "files without a suffix",
        "readme.md": ".md files",
    }
    assert not listing.skipped
    assert listing.folders == ["a"]


def test_an_error_of_the_system_within_a_folder_costs_that_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/x.png", "b/x.png")
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "b":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = walk(tmp_path)
    assert (listing.pictures, listing.skipped) == (["a/x.png"], [("b/", "Input/output error")])


LINKS: dict[str, tuple[str, str]] = {
    "to its parent": ("a/back", ".."),
    "to itself's folder": ("a/back", "."),
    "to a sibling": ("a/back", "../b"),
    "above the root": ("a/back", "../.."),
    "to the root of all": ("a/back", "/"),
    "by its full name": ("b/back", "{root}"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_to_what_is_read_anyway_are_not_followed(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    put(root, "a/z/1.png", "b/2.png")
    name, target = LINKS[kind]
    (root / name).symlink_to(target.format(root=root))
    listing = walk(root)
    assert listing.pictures == ["a/z/1.png", "b/2.png"]
    assert listing.ignored == [(name, "links to folders that are read anyway or lie around")]


def test_links_to_elsewhere_are_followed_each_and_links_to_files_are_files(tmp_path: Path) -> None:
    put(tmp_path, "away/deep/1.png", "away/2.png", "root/a/3.png")
    root = tmp_path / "root"
    (root / "a" / "more").symlink_to(tmp_path / "away")
    (root / "b").symlink_to(tmp_path / "away")
    (root / "a" / "again.png").symlink_to("3.png")
    (tmp_path / "away" / "round").symlink_to(root)
    listing = walk(root)
    assert listing.pictures == [
        "a/3.png",
        "a/again.png",
        "a/more/2.png",
        "a/more/deep/1.png",
        "b/2.png",
        "b/deep/1.png",
    ]
    assert {name for name, _ in listing.ignored} == {"a/more/round", "b/round"}


def test_links_among_folders_elsewhere_do_not_multiply(tmp_path: Path) -> None:
    """Follow two links at each of twelve levels: 4,096 ways, each folder read once."""
    for level in range(12):
        put(tmp_path, f"{level}/x.png")
        for name in ("left", "right"):
            (tmp_path / str(level) / name).symlink_to(tmp_path / str(level + 1))
    put(tmp_path, "12/x.png", "root/a/y.png")
    (tmp_path / "root" / "a" / "in").symlink_to(tmp_path / "0")
    assert len(walk(tmp_path / "root").pictures) == 1 + 13


names = st.sampled_from(("a", "b", "x.png", "y.txt", "z.jpg", "noname", ".h"))


@given(
    st.lists(
        st.tuples(
            st.lists(names, min_size=1, max_size=4),
            st.sampled_from(("file", "folder", "pipe", "link", "up")),
        ),
        max_size=12,
    )
)
def test_every_entry_is_in_one_list(entries: list[tuple[list[str], str]]) -> None:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made).resolve()
        for parts, kind in entries:
            path = root.joinpath(*parts)
            if (
                path.is_symlink()
                or path.exists()
                or any((root / Path(*parts[:k])).is_file() for k in range(1, len(parts)))
            ):
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                {
                    "file": lambda path=path: path.touch(),
                    "folder": lambda path=path: path.mkdir(),
                    "pipe": lambda path=path: os.mkfifo(path),
                    "link": lambda path=path: path.symlink_to(root / "a"),
                    "up": lambda path=path: path.symlink_to(".."),
                }[kind]()
            except (FileExistsError, NotADirectoryError, OSError):
                continue
        listing: Listing = walk(root)
        listed = [*listing.pictures, *(name for name, _ in (*listing.skipped, *listing.ignored))]
        assert len(listed) == len(set(listed))
        real = {
            str((Path(folder) / name).relative_to(root))
            for folder, folders, files in os.walk(root)
            for name in files
            if not any(
                part.startswith(".") for part in (Path(folder) / name).relative_to(root).parts
            )
        }
        assert real <= set(listed)
