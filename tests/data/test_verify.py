"""Verification of samples: damage is counted and named by checksums and decoders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import foreign_betons as foreign
from fastbyol.data import beton, manifest
from fastbyol.data.beton_write import write
from fastbyol.data.verify import verify
from fastbyol.errors import UsageError


class Pictures:
    """Smooth pictures of two sizes, labels 0 to 3."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> tuple[object, ...]:
        slope = np.arange(20 + index % 2, dtype=np.uint8)[:, None, None]
        return np.broadcast_to(slope * 5 + index % 100, (20 + index % 2, 24, 3)).astype(
            np.uint8
        ), index % 4


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jpegs") / "set.beton"
    write(
        path,
        Pictures(),
        labelled=True,
        mode="jpg",
        workers=1,
        page_bytes=1 << 21,
        note={"class_names": list("abcd")},
    )
    return path


def damage(path: Path, samples: list[int]) -> None:
    """Damage a Huffman table in each of the samples."""
    info = beton.inspect(path)
    with path.open("r+b") as file:
        for sample in samples:
            start, size = int(info.starts[sample]), int(info.sizes[sample])
            table = os.pread(file.fileno(), size, start).index(b"\xff\xc4")
            os.pwrite(file.fileno(), b"\xff" * 16, start + table + 5)


@pytest.mark.parametrize("deep", [False, True])
def test_whole_files(jpegs: Path, deep: bool) -> None:
    seen: list[int] = []
    verdict = verify(jpegs, deep=deep, progress=lambda done, total: seen.append(done))
    assert (verdict.sealed, verdict.damaged, seen) == (True, (), [256, 300])
    verdict.demand_whole()


@pytest.mark.parametrize("name", foreign.FILES)
def test_whole_foreign_files(name: str) -> None:
    verdict = verify(foreign.made() / f"{name}.beton", deep=True)
    assert (verdict.sealed, verdict.damaged) == (False, ())


@pytest.mark.parametrize("deep", [False, True])
def test_checksums_name_every_damaged_sample(jpegs: Path, tmp_path: Path, deep: bool) -> None:
    path = Path(shutil.copy(jpegs, tmp_path))
    damage(path, [7, 255, 256, 299])
    verdict = verify(path, deep=deep)
    assert [sample for sample, _ in verdict.damaged] == [7, 255, 256, 299]
    with pytest.raises(
        UsageError, match=r"4 of 300 samples are damaged, first sample 7: bytes \d+ to \d+ are not"
    ):
        verdict.demand_whole()


def test_decoding_finds_what_a_foreign_file_hides(tmp_path: Path) -> None:
    path = Path(shutil.copy(foreign.made() / "jpg.beton", tmp_path))
    damage(path, [0, 202])
    assert verify(path).damaged == ()
    assert verify(path, deep=True).damaged == (
        (0, "the JPEG data of sample 0 are damaged"),
        (202, "the JPEG data of sample 202 are damaged"),
    )


def test_labels_outside_the_named_classes(tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    write(
        path,
        Pictures(),
        labelled=True,
        workers=1,
        page_bytes=1 << 21,
        note={"class_names": list("abc")},
    )
    assert verify(path).damaged == ()
    damaged = verify(path, deep=True).damaged
    assert damaged[0] == (3, "label 3, of 3 classes")
    assert len(damaged) == 75


def test_a_manifest_of_other_images_in_the_same_room(jpegs: Path, tmp_path: Path) -> None:
    """Exchange the manifests of files that differ in pixels only."""
    path = Path(shutil.copy(jpegs, tmp_path))
    info = beton.inspect(path)
    assert info.manifest is not None
    other = manifest.Manifest(info.num_bytes, info.manifest.structure, ~info.manifest.checksums)
    with path.open("r+b") as file:
        table = int(np.fromfile(path, beton.HEADER, 1)["table"][0])
        os.pwrite(file.fileno(), other.pack(info.page_size), table - info.page_size)
    with pytest.raises(
        UsageError, match="its manifest belongs to other data: all 300 samples are damaged"
    ):
        verify(path).demand_whole()
