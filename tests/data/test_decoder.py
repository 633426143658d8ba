"""Decoding by sample id, with and without FFCV: pixels, FFCV's own Loader, damaged files."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import foreign_betons as foreign
from fastbyol.data import decode_ffcv
from fastbyol.data import decoder as decoding
from fastbyol.data.beton import inspect
from fastbyol.data.beton_write import write
from fastbyol.data.decoder import Decoder
from fastbyol.errors import UsageError

EVERY = np.arange(foreign.COUNT)
USED = ["auto"]


@pytest.fixture(autouse=True, scope="module", params=foreign.DECODERS)
def by(request: pytest.FixtureRequest) -> str:
    """Run every test by every decoder."""
    USED[0] = request.param
    return USED[0]


def opened(
    path: Path,
    *,
    workers: int = 1,
    in_memory: bool = True,
    size: int = foreign.SIZE,
    by: str | None = None,
) -> Decoder:
    return Decoder(
        inspect(path), size=size, workers=workers, in_memory=in_memory, decoder=by or USED[0]
    )


def decoded(decoder: Decoder, ids: NDArray[np.int64] = EVERY) -> NDArray[np.uint8]:
    images = np.full((len(ids), *decoder.shape), 7, np.uint8)
    decoder.decode(ids, images)
    return images


def jpeg_bytes(path: Path, sample: int) -> tuple[int, bytes]:
    """Return the offset and bytes of a sample's JPEG by the format (fields: image, label)."""
    data = path.read_bytes()
    table = int(np.frombuffer(data, "<u8", 1, 16)[0])
    rows = np.frombuffer(data[table:], "<u8").reshape(-1, 3)
    _, start, size = (int(value) for value in rows[rows[:, 0] == sample][0])
    return start, data[start : start + size]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["raw", "unlabelled"])
def test_raw_pixels_are_those_written(name: str, workers: int, in_memory: bool) -> None:
    with opened(foreign.made() / f"{name}.beton", workers=workers, in_memory=in_memory) as decoder:
        assert decoder.shape == (24, 20, 3)
        expected = np.stack([foreign.pixels(name, i) for i in EVERY])
        np.testing.assert_array_equal(decoded(decoder), expected)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", foreign.DECODED)
@foreign.needs_ffcv
def test_equals_what_ffcvs_loader_decodes(name: str, workers: int, by: str) -> None:
    """Compare bits; JPEG by torchvision's exact transform may differ by 4 levels here."""
    with opened(foreign.made() / f"{name}.beton", workers=workers) as decoder:
        actual, theirs = decoded(decoder), foreign.decoded_by_ffcv()[name]
        differ = np.abs(actual.astype(int) - theirs).max((1, 2, 3))
        assert differ[decoder.info.raw].sum() == 0
        assert differ.max() <= (0 if by == "ffcv" else 4)


class Mixed:
    """Noise with sides from 1 to 400, a third of them near the requested size."""

    def __len__(self) -> int:
        return 150

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8]]:
        rng = np.random.default_rng(index)
        height, width = rng.integers(20, 45, 2) if index % 3 else rng.integers(1, 400, 2)
        return (rng.integers(0, 256, (height, width, 3), dtype=np.uint8),)


@foreign.needs_ffcv
def test_raw_images_have_the_same_pixels_by_every_decoder(tmp_path: Path) -> None:
    write(tmp_path / "set.beton", Mixed(), labelled=False, workers=1)
    ids = np.arange(len(Mixed()))
    for size in (32, 47, 96):
        with (
            opened(tmp_path / "set.beton", size=size) as ours,
            opened(tmp_path / "set.beton", size=size, by="ffcv") as ffcv,
        ):
            np.testing.assert_array_equal(decoded(ours, ids), decoded(ffcv, ids))


@foreign.needs_ffcv
@pytest.mark.parametrize("name", ["raw", "unlabelled", "mixed"])
def test_files_by_hand_are_those_of_ffcvs_writer(name: str) -> None:
    assert foreign.by_hand(name) == (foreign.made() / f"{name}.beton").read_bytes()


def test_jpeg_pixels_are_near_those_written() -> None:
    with opened(foreign.made() / "jpg.beton") as decoder:
        expected = np.stack([foreign.pixels("jpg", i) for i in EVERY]).astype(int)
        # Quality 95 with halved colour resolution, on slopes of up to 6 levels a pixel.
        assert np.abs(decoded(decoder) - expected).max() <= 12


def test_mixed_sizes_take_the_centre_square_and_average_areas() -> None:
    """Expect means of 2 x 2: every third sample is 32 x 48, of which columns 8 to 39 count."""
    with opened(foreign.made() / "mixed.beton") as decoder:
        actual = decoded(decoder, EVERY[::3]).astype(float)
    squares = np.stack([foreign.pixels("mixed", i)[:, 8:40] for i in EVERY[::3]])
    means = squares.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(actual - means).max() <= 0.5  # rounded to the nearest


@settings(max_examples=25)
@given(st.lists(st.integers(0, foreign.COUNT - 1), max_size=40))
def test_any_ids_in_any_order_repeated_too(ids: list[int]) -> None:
    with opened(foreign.made() / "raw.beton", workers=2) as decoder:
        expected = np.array([foreign.pixels("raw", i) for i in ids]).reshape(-1, 24, 20, 3)
        np.testing.assert_array_equal(decoded(decoder, np.array(ids, np.int64)), expected)


@pytest.mark.parametrize(
    ("name", "has_labels"),
    [
        ("raw", True),
        pytest.param("foreign", True, marks=foreign.needs_ffcv),
        ("unlabelled", False),
        ("mixed_jpg", True),
    ],
)
def test_labels(name: str, has_labels: bool) -> None:
    with opened(foreign.made() / f"{name}.beton") as decoder:
        labels = decoder.info.labels
    assert (labels is None) != has_labels
    if labels is not None:
        assert labels.dtype == np.int64
        assert labels.tolist() == [foreign.label(i) for i in EVERY]


@pytest.mark.parametrize("ids", [[-1], [0, foreign.COUNT], [2**40], [-(2**60), 3]])
def test_ids_out_of_range_never_reach_native_code(ids: list[int]) -> None:
    with (
        opened(foreign.made() / "raw.beton") as decoder,
        pytest.raises(IndexError, match="sample ids"),
    ):
        decoded(decoder, np.array(ids))


@pytest.mark.parametrize(
    "images", [np.empty((2, 24, 20, 3), np.uint8), np.empty((3, 24, 40, 3), np.uint8)[:, :, ::2]]
)
def test_wrong_room_never_reaches_native_code(images: NDArray[np.uint8]) -> None:
    with (
        opened(foreign.made() / "raw.beton") as decoder,
        pytest.raises(ValueError, match="need one array"),
    ):
        decoder.decode(np.arange(3), images)


def test_threads_share_one_decoder() -> None:
    with opened(foreign.made() / "jpg.beton", workers=2) as decoder, ThreadPoolExecutor(4) as pool:
        expected = decoded(decoder)
        for actual in pool.map(lambda _: decoded(decoder), range(24)):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("workers", [0, 10_000])
def test_workers_are_at_most_the_cores(workers: int) -> None:
    with opened(foreign.made() / "raw.beton", workers=workers) as decoder:
        assert decoder.num_threads == len(os.sched_getaffinity(0))
        assert decoded(decoder, np.arange(5)).any()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["jpg", "mixed_jpg"])
def test_damaged_jpeg_is_named(name: str, workers: int, tmp_path: Path) -> None:
    """Damage a Huffman table only: container, frame and both ends of the image stay right."""
    path = tmp_path / "damaged.beton"
    shutil.copy(foreign.made() / f"{name}.beton", path)
    sample = next(i for i in range(50, foreign.COUNT) if not inspect(path).raw[i])
    start, jpeg = jpeg_bytes(path, sample)
    with path.open("r+b") as file:
        file.seek(start + jpeg.index(b"\xff\xc4") + 5)
        file.write(b"\xff" * 16)
    with opened(path, workers=workers) as decoder:
        decoded(decoder, np.arange(50))
        with pytest.raises(
            UsageError, match=rf"damaged\.beton: the JPEG data of sample {sample} are damaged"
        ):
            decoded(decoder)


@pytest.mark.parametrize("fate", ["truncated", "rewritten", "deleted"])
def test_a_file_in_memory_may_change(fate: str, tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    shutil.copy(foreign.made() / "raw.beton", path)
    with opened(path) as decoder:
        expected = decoded(decoder)
        if fate == "deleted":
            path.unlink()
        else:
            os.truncate(path, 4096 if fate == "truncated" else 0)
        np.testing.assert_array_equal(decoded(decoder), expected)


def test_a_mapped_file_may_be_replaced_but_not_written_to(tmp_path: Path) -> None:
    path, other = tmp_path / "set.beton", tmp_path / "other.beton"
    shutil.copy(foreign.made() / "raw.beton", path)
    shutil.copy(foreign.made() / "unlabelled.beton", other)
    with opened(path, in_memory=False) as decoder:
        expected = decoded(decoder)
        os.link(path, tmp_path / "same.beton")
        other.replace(path)
        decoder.check_unchanged()
        np.testing.assert_array_equal(decoded(decoder), expected)
        with (tmp_path / "same.beton").open("r+b") as file:
            file.write(b"\x02")
        with pytest.raises(UsageError, match="the file changed while in use"):
            decoder.check_unchanged()


def test_a_file_that_changed_after_its_verification_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    shutil.copy(foreign.made() / "mixed.beton", path)
    info = inspect(path)
    for name in ("raw", "jpg", "mixed_jpg"):
        shutil.copy(foreign.made() / f"{name}.beton", path)
        with pytest.raises(UsageError, match="the file changed"):
            Decoder(info, size=16, workers=1, in_memory=True)


def test_closing_twice() -> None:
    decoder = opened(foreign.made() / "raw.beton", in_memory=False)
    decoder.close()
    decoder.close()


def test_what_auto_is(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Expect FFCV where it can be imported, and an earlier choice to be kept."""
    assert decoding.choose("auto") == ("ffcv" if foreign.HAS_FFCV else "torchvision")
    assert decoding.choose(by) == decoding.choose_again(by) == by
    with pytest.raises(
        UsageError,
        match=r"data.decoder: 'ffvc' is none of auto, ffcv, torchvision; the nearest is ffcv",
    ):
        decoding.choose("ffvc")
    monkeypatch.setattr(decode_ffcv, "import_ffcv", decode_ffcv.import_ffcv.__wrapped__)
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    assert {decoding.choose(word) for word in ("auto", "torchvision")} == {"torchvision"}
    assert decoding.choose_again(by) == "torchvision"
    with pytest.raises(
        UsageError,
        match=r"FFCV cannot be used .*; `fastbyol doctor` says .*, or take data.decoder = 'torch",
    ):
        decoding.choose("ffcv")
