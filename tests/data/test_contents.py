"""Digests of betons: equal for equal images and labels in any file, different otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastbyol.data import beton, beton_write, contents
from fastbyol.data.contents import Contents
from fastbyol.data.convert import convert
from fastbyol.errors import UsageError

COUNT, SIDE = 40, 16


class Pictures:
    """Noise with labels 0 to 3, of which ``change`` alters one thing."""

    def __init__(self, change: tuple[str, int, int] | None = None) -> None:
        draw = np.random.default_rng(0)
        self.images: NDArray[np.uint8] = draw.integers(
            0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8
        )
        self.labels = draw.integers(0, 4, COUNT)
        if change is not None:
            what, at, by = change
            if what == "pixel":
                self.images.reshape(-1)[at % self.images.size] ^= np.uint8(1 + by % 255)
            elif what == "label":
                self.labels[at % COUNT] += 1 + by % 3
            else:
                one, other = at % COUNT, (at + 1 + by % (COUNT - 1)) % COUNT
                self.images[[one, other]] = self.images[[other, one]]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])


def written(path: Path, **changes: object) -> beton.BetonInfo:
    return beton_write.write(
        path, Pictures(changes.pop("change", None)), labelled=True, workers=1, **changes
    )  # type: ignore[arg-type]


def unsealed(path: Path) -> beton.BetonInfo:
    """Cut the manifest out of a file, as if another writer had made it."""
    info = beton.inspect(path)
    data = bytearray(path.read_bytes())
    assert info.manifest is not None
    table = int.from_bytes(data[16:24], "little")
    length = contents.manifest.length(bytes(data[table - 64 : table]), info.page_size)
    assert length is not None
    data[16:24] = (table - length).to_bytes(8, "little")
    path.write_bytes(data[: table - length] + data[table:])
    bare = beton.inspect(path)
    assert bare.manifest is None
    return bare


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> beton.BetonInfo:
    return written(tmp_path_factory.mktemp("whole") / "a.beton")


def test_another_layout_or_place_of_the_same_is_the_same(
    whole: beton.BetonInfo, tmp_path: Path
) -> None:
    copy = tmp_path / "spaced name.beton"
    copy.write_bytes(whole.path.read_bytes())
    for other in (
        written(tmp_path / "pages.beton", page_bytes=1 << 22),
        beton_write.write(
            tmp_path / "workers.beton",
            Pictures(),
            labelled=True,
            workers=2,
            note={"source": "elsewhere"},
        ),
        beton.inspect(copy),
        unsealed(copy),
    ):
        assert Contents.of(whole) == Contents.of(other)
        assert Contents.of(whole).change(Contents.of(other)) is None


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    change=st.tuples(
        st.sampled_from(("pixel", "label", "swap")), st.integers(0, 10**6), st.integers(0, 10**6)
    )
)
def test_any_change_is_another(
    whole: beton.BetonInfo, tmp_path: Path, change: tuple[str, int, int]
) -> None:
    other = written(tmp_path / "changed.beton", change=change, overwrite=True)
    before, now = Contents.of(whole), Contents.of(other)
    assert (before.labels != now.labels) == (change[0] == "label")
    assert (before.images != now.images) == (change[0] != "label")
    words = before.change(now)
    assert words is not None
    assert ("other labels" if change[0] == "label" else "other images") in words


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_of_a_file_without_checksums_is_seen(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "bare.beton"
    if not path.exists():
        written(path)
        unsealed(path)
    before = Contents.of(beton.inspect(path))
    info = beton.inspect(path)
    sample = data.draw(st.integers(0, COUNT - 1))
    at = int(info.starts[sample]) + data.draw(st.integers(0, int(info.sizes[sample]) - 1))
    with path.open("r+b") as file:
        old = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old[0] ^ data.draw(st.integers(1, 255))]), at)
        assert Contents.of(beton.inspect(path)).images != before.images
        os.pwrite(file.fileno(), old, at)
    assert Contents.of(beton.inspect(path)) == before


def test_number_size_and_labels_count(whole: beton.BetonInfo, tmp_path: Path) -> None:
    fewer = convert_textures(tmp_path / "fewer.beton", count=12)
    assert (
        fewer.change(convert_textures(tmp_path / "more.beton", count=20))
        == "12 samples then, 20 now"
    )
    assert fewer.images != convert_textures(tmp_path / "larger.beton", count=12, size=24).images
    bare = Contents.of(
        beton_write.write(tmp_path / "bare.beton", Unlabelled(), labelled=False, workers=1)
    )
    assert bare.images == Contents.of(whole).images
    assert bare.labels == ""


class Unlabelled(Pictures):
    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8]]:  # type: ignore[override]
        return (self.images[index],)


def convert_textures(path: Path, *, count: int, size: int = 16) -> Contents:
    convert("textures", path, count=count, size=size)
    return Contents.of(beton.inspect(path))


def test_of_a_large_foreign_file_a_part_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written(tmp_path / "a.beton")
    info = unsealed(tmp_path / "a.beton")
    monkeypatch.setattr(contents, "READ_BYTES", int(info.sizes.sum()) // 2)
    seen = []
    read = contents.manifest.region_checksums
    monkeypatch.setattr(
        contents.manifest,
        "region_checksums",
        lambda fd, *at: seen.append(len(at[0])) or read(fd, *at),
    )
    Contents.of(info)
    assert seen == [COUNT // 2]


def test_a_file_replaced_since_it_was_inspected_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.beton")
    info = unsealed(tmp_path / "a.beton")
    (tmp_path / "a.beton").write_bytes(b"")
    with pytest.raises(UsageError, match="changed while in use"):
        Contents.of(info)
    (tmp_path / "a.beton").unlink()
    with pytest.raises(UsageError, match="no such file"):
        Contents.of(info)


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        [],
        {},
        {"samples": 1},
        {"samples": "1", "images": "", "labels": ""},
        {"samples": 1, "images": 2, "labels": ""},
    ],
)
def test_what_is_no_digest_reads_as_none(value: object) -> None:
    assert Contents.read(value) is None


def test_read_back_is_the_same(whole: beton.BetonInfo) -> None:
    digests = Contents.of(whole)
    assert Contents.read(digests._asdict()) == digests
