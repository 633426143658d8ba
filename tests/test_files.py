"""Only regular files are opened, and nothing waits for the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbyol.files import open_regular


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".target"))
    path.symlink_to(path.with_suffix(".target"))


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe, not a regular file"),
    "socket": (_socket, "is a socket, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "folder": (Path.mkdir, "is a folder, not a regular file"),
    "link to a pipe": (_link_to_pipe, "is a named pipe, not a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_named_at_once(tmp_path: Path, kind: str) -> None:
    make, words = SPECIAL[kind]
    path = tmp_path / "x"
    make(path)
    with pytest.raises(OSError, match=words):
        open_regular(path)


def test_a_file_is_opened_as_it_is_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content\r\n")
    (tmp_path / "link").symlink_to("x")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content\r\n"


def test_a_pipe_that_takes_the_files_place_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"content")
    looked_at = path.stat()
    path.unlink()
    os.mkfifo(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda _: looked_at)
        with pytest.raises(OSError, match="is a named pipe"):
            open_regular(path)
