"""The members of tars against tarfile's own reading of them."""

from __future__ import annotations

import io
import stat
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbyol.data import tar
from fastbyol.errors import UsageError

texts = st.text("ab/é漢. ", min_size=1, max_size=20).map(lambda text: text.strip("/ .") or "x")
sizes = st.sampled_from((0, 1, 511, 512, 513, 3000))
forms = st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
kinds = st.sampled_from((tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE))


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, st.integers(1, 12), sizes, kinds), max_size=6), forms)
def test_members_as_tarfile_reads_them(rows: list[tuple[str, int, int, bytes]], form: int) -> None:
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", format=form) as out:
            for text, repeats, size, kind in rows:
                info = tarfile.TarInfo("/".join([text] * repeats))
                info.type, info.mtime = kind, 1.5
                info.linkname = text if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
                info.size = size if kind == tarfile.REGTYPE else 0
                try:
                    out.addfile(info, io.BytesIO(bytes(info.size)))
                except ValueError:  # too long for ustar
                    continue
        file.seek(0)
        with tarfile.open(fileobj=file) as theirs:
            expected = [
                (info.name, info.isdir(), info.issym(), info.linkname, info.offset_data, info.size)
                for info in theirs
            ]
        actual = [
            (
                member.name.rstrip("/"),
                stat.S_ISDIR(member.mode),
                stat.S_ISLNK(member.mode),
                member.link,
                member.stretch.offset,
                member.stretch.size,
            )
            for member in tar.members(file, Path("a.tar"))
            if member.stretch is not None
        ]
    assert actual == expected


def test_sizes_of_pax_and_old_checksums(tmp_path: Path) -> None:
    """Read a size that only pax's record says, and a checksum of signed bytes."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo("x")
        info.pax_headers, info.size = {"size": "600"}, 600
        out.addfile(info, io.BytesIO(b"y" * 600))
        info = tarfile.TarInfo("é")
        info.pax_headers = {"path": "a/" + "é" * 300}
        out.addfile(info)
    data = bytearray(path.read_bytes())
    at = data.index(b"x\0\0", 1024)
    data[at + 124 : at + 136] = b"00000000000\0"
    data[at + 265] = 0xE9  # in the owner's name
    head = data[at : at + 512]
    head[148:156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(head) - 256)
    path.write_bytes(data)
    with path.open("rb") as file:
        one, two = tar.members(file, path)
    assert one.stretch is not None
    assert (one.name, one.stretch.size) == ("x", 600)
    assert data[one.stretch.offset : one.stretch.offset + 600] == b"y" * 600
    assert two.name == "a/" + "é" * 300


@pytest.mark.parametrize("size", ["-1", "1e3", "99999999999999999999", "1000"])
def test_wrong_sizes_of_pax_are_refused(tmp_path: Path, size: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo("x")
        info.pax_headers = {"size": size}
        out.addfile(info)
    path.write_bytes(path.read_bytes()[:2048])
    with path.open("rb") as file, pytest.raises(UsageError, match="ends within 'x'"):
        list(tar.members(file, path))
