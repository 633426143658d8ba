"""Checksums in betons: damage is found and named, and is not confused with a foreign manifest."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

import ffcv_files
import foreign_betons as foreign
from fastbyol.data import beton, convert, manifest
from fastbyol.data.decoder import Decoder
from fastbyol.data.loader import read_all
from fastbyol.errors import UsageError

COUNT, SIDE = 90, 16


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "set.beton"
    convert.convert("textures", path, count=COUNT, size=SIDE, seed=4)
    return path


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sealed, tmp_path / "copy.beton"))


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)


def start_of_manifest(path: Path) -> int:
    table = int(np.fromfile(path, beton.HEADER, 1)["table"][0])
    return table - beton.inspect(path).page_size


def test_ffcv_reads_a_sealed_file_as_before(sealed: Path) -> None:
    from fastbyol.data import textures

    images, labels = textures.make(COUNT, SIDE, 4)
    parsed, found_labels = ffcv_files.regions(sealed)
    np.testing.assert_array_equal(parsed, images)
    assert found_labels == labels.tolist()


def test_checksums_are_zlibs_of_the_pixels_that_were_made(sealed: Path) -> None:
    from fastbyol.data import textures

    parsed = beton.inspect(sealed).manifest
    assert parsed is not None
    assert parsed.checksums.tolist() == [
        zlib.crc32(image.tobytes()) for image in textures.make(COUNT, SIDE, 4)[0]
    ]
    assert (parsed.note["source"], parsed.note["seed"], parsed.note["class_names"][0]) == (
        "textures",
        4,
        "stripes",
    )


def test_a_foreign_file_has_none() -> None:
    info = beton.inspect(foreign.made() / "raw.beton")
    assert info.manifest is None
    assert beton.info_dict(info)["sealed"] is False


@pytest.mark.parametrize("in_memory", [True, False])
def test_every_flipped_pixel_bit_is_found_before_it_is_delivered(
    copy: Path, in_memory: bool
) -> None:
    info = beton.inspect(copy)
    rng = np.random.default_rng(0)
    for sample in rng.choice(COUNT, 12, replace=False).tolist():
        at = int(info.starts[sample] + rng.integers(info.sizes[sample]))
        bit = int(rng.integers(8))
        flip(copy, at, bit)
        with Decoder(beton.inspect(copy), size=SIDE, workers=1, in_memory=in_memory) as decoder:
            others = np.delete(np.arange(COUNT), sample)
            decoder.decode(others, np.empty((COUNT - 1, SIDE, SIDE, 3), np.uint8))
            for _ in range(2):
                with pytest.raises(
                    UsageError,
                    match=rf"the data of sample {sample}, bytes {info.starts[sample]} to",
                ):
                    decoder.decode(np.array([3, sample]), np.empty((2, SIDE, SIDE, 3), np.uint8))
        flip(copy, at, bit)
    read_all(copy, workers=1, size=SIDE)


def test_a_flipped_label_is_found_when_the_file_is_opened(copy: Path) -> None:
    row = np.dtype([("", beton.IMAGE), ("", "<i8")], align=True)
    flip(copy, beton.HEADER.itemsize + 2 * beton.DESCRIPTOR.itemsize + 7 * row.itemsize + 16)
    with pytest.raises(
        UsageError,
        match="labels or image sizes are not those that were written; make the file again",
    ):
        beton.inspect(copy)


def test_every_part_of_a_damaged_manifest_is_noticed(copy: Path) -> None:
    start, page = start_of_manifest(copy), beton.inspect(copy).page_size
    for offset in (
        0,
        4 * COUNT - 1,
        4 * COUNT,
        4 * COUNT + 50,
        page // 2,
        *range(page - 64, page, 3),
        page - 1,
    ):
        flip(copy, start + offset)
        with pytest.raises(UsageError, match="its manifest is damaged"):
            beton.inspect(copy)
        flip(copy, start + offset)
    assert beton.inspect(copy).manifest is not None


def replace_manifest(path: Path, pages: bytes) -> None:
    start = start_of_manifest(path)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), pages, start)


@pytest.mark.parametrize("seed", [4, 5])
def test_a_manifest_of_another_file_is_told_from_damage(
    copy: Path, tmp_path: Path, seed: int
) -> None:
    """Insert the manifest of a file with more samples, or with other images in the same layout."""
    other = tmp_path / "other.beton"
    convert.convert("textures", other, count=COUNT + (seed == 4), size=SIDE, seed=seed)
    start = start_of_manifest(other)
    replace_manifest(copy, other.read_bytes()[start : start + beton.inspect(other).page_size])
    with pytest.raises(UsageError, match="its manifest belongs to another file"):
        beton.inspect(copy)


def test_a_later_version_asks_for_an_update(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = beton.inspect(copy).manifest
    assert parsed is not None
    monkeypatch.setattr(manifest, "VERSION", 2)
    pages = parsed.pack(beton.MIN_PAGE_BYTES)
    monkeypatch.undo()
    replace_manifest(copy, pages)
    with pytest.raises(UsageError, match=r"version 2, this fastbyol knows 1; update fastbyol"):
        beton.inspect(copy)


def test_pages_that_belong_to_nothing_are_refused(copy: Path) -> None:
    replace_manifest(copy, bytes(beton.MIN_PAGE_BYTES))
    with pytest.raises(UsageError, match="its manifest is damaged"):
        beton.inspect(copy)


def test_packed_and_parsed_over_several_pages() -> None:
    checksums = np.random.default_rng(1).integers(0, 1 << 32, 3000, np.uint32)
    note = {"kind": "é" * 500}
    made = manifest.Manifest(12345, 99, checksums, note)
    pages = made.pack(4096)
    assert len(pages) % 4096 == 0
    parsed = manifest.parse(pages)
    np.testing.assert_array_equal(parsed.checksums, checksums)
    assert (parsed.num_bytes, parsed.structure, parsed.note) == (12345, 99, note)
