"""JPEG without FFCV: Pillow's pixels, and all damage that libjpeg sees but torchvision hides."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import turbojpeg
from fastbyol.data import decode_torchvision
from fastbyol.data.decoder import REGION
from fastbyol.errors import UsageError

SIDES = st.integers(1, 70)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return slopes with noise on them."""
    y, x = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    return ((y * [1, 3, 2] + x * [2, 1, 5] + noise) % 256).astype(np.uint8)


def jpeg(image: NDArray[np.uint8], mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def by_pillow(stream: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(stream)).convert("RGB"))


def decoded(stream: bytes, height: int, width: int) -> tuple[int, NDArray[np.uint8]]:
    """Return status and pixels by the loop, without crops."""
    images, status = np.zeros((1, height, width, 3), np.uint8), np.zeros(1, np.int32)
    places = np.array([(0, len(stream), height, width, 0)], REGION)
    decode_torchvision.loop(False, has_jpeg=True)(
        images, status, np.frombuffer(stream, np.uint8), places
    )
    return int(status[0]), images[0]


@given(
    height=SIDES,
    width=SIDES,
    mode=st.sampled_from(["RGB", "L"]),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    quality=st.integers(1, 100),
    restarts=st.integers(0, 3),
)
def test_pixels_are_pillows(
    height: int,
    width: int,
    mode: str,
    subsampling: int,
    progressive: bool,
    quality: int,
    restarts: int,
) -> None:
    options = {"subsampling": subsampling, "progressive": progressive, "quality": quality}
    stream = jpeg(picture(height, width), mode, restart_marker_blocks=restarts, **options)
    status, actual = decoded(stream, height, width)
    assert status == 0
    np.testing.assert_array_equal(actual, by_pillow(stream))


def test_another_size_than_the_file_says_is_damage() -> None:
    for height, width in ((20, 31), (30, 21), (40, 15)):
        assert decoded(jpeg(picture(20, 30)), height, width)[0] != 0


@pytest.mark.parametrize(("package", "use"), [("torchvision", "_decode_jpeg"), ("cv2", "_shrink")])
def test_a_missing_package_is_one_line(
    package: str, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.io", raising=False)
    with pytest.raises(
        UsageError,
        match=r"cannot be used \(.*\), and images are decoded with it; `fastbyol doctor`",
    ):
        getattr(decode_torchvision, use).__wrapped__()


def first_damaged(streams: list[bytes]) -> int | None:
    with ThreadPoolExecutor(3) as threads:
        return decode_torchvision.first_damaged(
            [np.frombuffer(stream, np.uint8) for stream in streams], threads
        )


def halved(stream: bytes) -> bytes:
    """Drop half of the picture's data."""
    return stream[: len(stream) // 2] + b"\xff\xd9"


def cut(stream: bytes) -> bytes:
    return stream[: len(stream) // 2]


def unreadable(stream: bytes) -> bytes:
    """Damage a Huffman table."""
    at = stream.index(b"\xff\xc4") + 5
    return stream[:at] + b"\xff" * 16 + stream[at + 16 :]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("damage", [halved, cut, unreadable])
def test_damage_is_found_and_placed(
    damage: Callable[[bytes], bytes], progressive: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    streams = [jpeg(picture(48, 64, seed), progressive=progressive) for seed in range(40)]
    assert first_damaged(streams) is None
    for at in (0, 23, 39):
        assert first_damaged([*streams[:at], damage(streams[at]), *streams[at + 1 :]]) == at
    assert first_damaged(streams) is None
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(find_library("turbojpeg") is None, reason="libturbojpeg is not installed")
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": 0}],
    ids=str,
)
def test_what_libturbojpeg_finds_damaged_is_damaged(options: dict[str, object]) -> None:
    """Change one to three bytes; compare libturbojpeg 2.1 or 3 with torchvision's."""
    whole, verdicts = jpeg(picture(48, 64), **options), [0, 0]
    first = whole.index(b"\xff\xda") + 14
    for seed in range(300):
        rng, stream = np.random.default_rng(seed), bytearray(whole)
        for at in rng.integers(first, len(whole) - 2, rng.integers(1, 4)):
            stream[at] = rng.integers(256)
        failed, _ = turbojpeg.Decompressor().decode(bytes(stream), 48, 64)
        assert (first_damaged([bytes(stream)]) == 0) == failed, seed
        verdicts[failed] += 1
    assert min(verdicts) > 20


def test_standard_error_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
import ctypes, sys
from fastbyol.data import decode_torchvision
libc = ctypes.CDLL(None)
with decode_torchvision._c_stderr_bytes() as written:
    libc.perror(b"within")
    print("Python within", file=sys.stderr)
    assert written() > 0
libc.perror(b"after")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
    stated = capfd.readouterr().err
    assert "Python within" in stated
    assert "after: " in stated
    assert "within: " not in stated


def test_what_others_write_there_meanwhile_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    libc, _, _, _ = decode_torchvision._diversion(os.getpid())
    streams, decode = (
        [jpeg(picture(16, 16, seed)) for seed in range(5)],
        decode_torchvision._can_decode,
    )
    once = iter([lambda: libc.perror(b"another")])
    monkeypatch.setattr(
        decode_torchvision,
        "_can_decode",
        lambda stream: (next(once, lambda: None)(), decode(stream))[1],
    )
    assert first_damaged(streams) is None
