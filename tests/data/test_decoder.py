"""Decoding by sample id: against the pixels written, against FFCV's own Loader, and with files that are damaged or change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import foreign_betons as foreign
from fastbyol.data import decoder as decoding
from fastbyol.data.beton import inspect
from fastbyol.data.decoder import Decoder, import_ffcv
from fastbyol.errors import UsageError

EVERY = np.arange(foreign.COUNT)


def opened(path: Path, *, workers: int = 1, in_memory: bool = True, size: int = foreign.SIZE) -> Decoder:
    return Decoder(inspect(path), size=size, workers=workers, in_memory=in_memory)


def decoded(decoder: Decoder, ids: NDArray[np.int64] = EVERY) -> NDArray[np.uint8]:
    images = np.full((len(ids), *decoder.shape), 7, np.uint8)
    decoder.decode(ids, images)
    return images


def jpeg_bytes(path: Path, sample: int) -> tuple[int, bytes]:
    """Where the JPEG of a sample starts in the file, and its bytes, by the format's description (fields: image, label)."""
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
def test_equals_what_ffcvs_loader_decodes(name: str, workers: int) -> None:
    with opened(foreign.made() / f"{name}.beton", workers=workers) as decoder:
        np.testing.assert_array_equal(decoded(decoder), foreign.decoded_by_ffcv()[name])


def test_jpeg_pixels_are_near_those_written() -> None:
    with opened(foreign.made() / "jpg.beton") as decoder:
        expected = np.stack([foreign.pixels("jpg", i) for i in EVERY]).astype(int)
        # Quality 95 with halved colour resolution, on slopes of up to 6 levels a pixel.
        assert np.abs(decoded(decoder) - expected).max() <= 12


def test_mixed_sizes_take_the_centre_square_and_average_areas() -> None:
    """Every third sample is 32 high, 48 wide: columns 8 to 39, each output pixel the mean of 2x2."""
    with opened(foreign.made() / "mixed.beton") as decoder:
        found = decoded(decoder, EVERY[::3]).astype(float)
    squares = np.stack([foreign.pixels("mixed", i)[:, 8:40] for i in EVERY[::3]])
    means = squares.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(found - means).max() <= 0.5  # rounded to the nearest


@settings(max_examples=25)
@given(st.lists(st.integers(0, foreign.COUNT - 1), max_size=40))
def test_any_ids_in_any_order_repeated_too(ids: list[int]) -> None:
    with opened(foreign.made() / "raw.beton", workers=2) as decoder:
        expected = np.array([foreign.pixels("raw", i) for i in ids]).reshape(-1, 24, 20, 3)
        np.testing.assert_array_equal(decoded(decoder, np.array(ids, np.int64)), expected)


@pytest.mark.parametrize(("name", "has_labels"), [("raw", True), ("foreign", True), ("unlabelled", False), ("mixed_jpg", True)])
def test_labels(name: str, has_labels: bool) -> None:
    with opened(foreign.made() / f"{name}.beton") as decoder:
        labels = decoder.labels()
    assert (labels is None) != has_labels
    if labels is not None:
        assert labels.dtype == np.int64
        assert labels.tolist() == [foreign.label(i) for i in EVERY]


@pytest.mark.parametrize("ids", [[-1], [0, foreign.COUNT], [2**40], [-(2**60), 3]])
def test_ids_out_of_range_never_reach_native_code(ids: list[int]) -> None:
    with opened(foreign.made() / "raw.beton") as decoder, pytest.raises(IndexError, match="sample ids"):
        decoded(decoder, np.array(ids))


@pytest.mark.parametrize("images", [np.empty((2, 24, 20, 3), np.uint8), np.empty((3, 24, 40, 3), np.uint8)[:, :, ::2]])
def test_wrong_room_never_reaches_native_code(images: NDArray[np.uint8]) -> None:
    with opened(foreign.made() / "raw.beton") as decoder, pytest.raises(ValueError, match="need one array"):
        decoder.decode(np.arange(3), images)


def test_threads_share_one_decoder() -> None:
    with opened(foreign.made() / "jpg.beton", workers=2) as decoder, ThreadPoolExecutor(4) as pool:
        expected = decoded(decoder)
        for found in pool.map(lambda _: decoded(decoder), range(24)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("workers", [0, 10_000])
def test_workers_are_at_most_the_cores(workers: int) -> None:
    with opened(foreign.made() / "raw.beton", workers=workers) as decoder:
        assert decoder.num_threads == len(os.sched_getaffinity(0))
        assert decoded(decoder, np.arange(5)).any()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["jpg", "mixed_jpg"])
def test_damaged_jpeg_is_named(name: str, workers: int, tmp_path: Path) -> None:
    """A Huffman table of nonsense: the container, the frame and both ends of the image are still right."""
    path = tmp_path / "damaged.beton"
    shutil.copy(foreign.made() / f"{name}.beton", path)
    sample = next(i for i in range(50, foreign.COUNT) if not inspect(path).raw[i])
    start, jpeg = jpeg_bytes(path, sample)
    with path.open("r+b") as file:
        file.seek(start + jpeg.index(b"\xff\xc4") + 5)
        file.write(b"\xff" * 16)
    with opened(path, workers=workers) as decoder:
        decoded(decoder, np.arange(50))
        with pytest.raises(UsageError, match=rf"damaged\.beton: the JPEG data of sample {sample} are damaged"):
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


IMPORT = """
import warnings, torch
torch.set_num_threads({threads})
from fastbyol.data.decoder import import_ffcv
numba = import_ffcv()
import numba.typed
from ffcv.fields.rgb_image import IMAGE_MODES
assert torch.get_num_threads() == {threads}, torch.get_num_threads()
assert numba.typed.Dict.__module__.startswith("numba"), numba.typed.Dict
assert dict(IMAGE_MODES) == dict(jpg=0, raw=1)
"""


def test_import_leaves_no_side_effects() -> None:
    """In a process of its own where every warning is an error."""
    subprocess.run([sys.executable, "-W", "error", "-c", IMPORT.format(threads=2)], check=True, timeout=600)


FORKED = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from fastbyol.data.decoder import Decoder
from fastbyol.data.beton_layout import inspect
with Decoder(inspect(%r), size=16, workers=2, in_memory=True):
    pass
child = os.fork()
if not child:
    os._exit(0)
os.waitpid(child, 0)
"""


def test_on_one_core_a_process_that_forks_after_the_import_ends() -> None:
    """With the layer that numba takes by itself: TBB's pool, once begun, waits for ever here."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_THREADING_LAYER"}
    code = FORKED % str(foreign.made() / "raw.beton")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env=environment)


def test_missing_ffcv_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads = torch.get_num_threads()
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(UsageError, match=r"FFCV cannot be used \(.*ffcv.*\); `fastbyol doctor`") as caught:
        import_ffcv.__wrapped__()
    assert "\n" not in str(caught.value)
    assert torch.get_num_threads() == num_threads


def test_one_compilation_serves_all_loaders() -> None:
    for name in ("raw", "jpg", "unlabelled"):
        for in_memory in (True, False):
            with opened(foreign.made() / f"{name}.beton", in_memory=in_memory) as decoder:
                decoded(decoder)
    loop = decoding._compiled(False)
    assert len(loop.signatures) == 1  # type: ignore[attr-defined]


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(UsageError, match="NUMBA_DISABLE_JIT is set"):
        import_ffcv.__wrapped__()
