"""JPEG frame headers, against Pillow."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from fastbyol.data import beton_jpeg


def encoded(mode: str, width: int, height: int, **options: object) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 60).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@contextmanager
def joined(path: Path, streams: list[bytes]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Write all streams to one file; return its descriptor, their starts and sizes."""
    sizes = np.array([len(stream) for stream in streams], np.int64)
    path.write_bytes(b"".join(streams))
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd, np.cumsum(sizes) - sizes, sizes
    finally:
        os.close(fd)


def exif_of(num_bytes: int) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "x" * num_bytes
    return exif.tobytes()


def test_every_form_that_decodes_to_rgb(tmp_path: Path) -> None:
    forms: list[dict[str, object]] = [
        {},
        {"progressive": True},
        {"optimize": True},
        {"quality": 100, "subsampling": 0},
        {"restart_marker_blocks": 2},
        {"comment": b"c" * 700},
        {"exif": exif_of(300)},
        {"exif": exif_of(60000)},
        {"icc_profile": b"i" * 200_000},
        *({"comment": b"c" * n} for n in range(300, 360)),
    ]
    streams = [
        encoded(mode, 5 + k, 90 - k, **form)
        for k, form in enumerate(forms)
        for mode in ("RGB", "L")
    ]
    with joined(tmp_path / "all", streams) as (fd, starts, sizes):
        widths, heights = beton_jpeg.frame_sizes(fd, starts, sizes)
    pillows = [Image.open(io.BytesIO(stream)).size for stream in streams]
    assert list(zip(widths.tolist(), heights.tolist(), strict=True)) == pillows


def test_what_is_no_whole_rgb_jpeg_is_zero(tmp_path: Path) -> None:
    whole = encoded("RGB", 20, 30)
    frame = whole.index(b"\xff\xc0")
    streams = [
        b"",
        b"\xff",
        b"\xff\xd8\xff\xd9",
        whole[:-1],
        whole[1:],
        whole + b"\0",
        whole[: frame + 4] + b"\xff\xd9",
        whole[:frame] + b"\xff\xc9" + whole[frame + 2 :],
        whole[: frame + 4] + b"\x0c" + whole[frame + 5 :],
        whole[:2] + (b"\xff\xfe\x03\xe8" + bytes(998)) * beton_jpeg.MAX_WINDOWS + whole[2:],
        encoded("CMYK", 20, 30),
        whole,
    ]
    with joined(tmp_path / "all", streams) as (fd, starts, sizes):
        widths, heights = beton_jpeg.frame_sizes(fd, starts, sizes)
    assert widths.tolist() == [0] * (len(streams) - 1) + [20]
    assert heights.tolist() == [0] * (len(streams) - 1) + [30]
    with joined(tmp_path / "none", []) as (fd, starts, sizes):
        assert beton_jpeg.frame_sizes(fd, starts, sizes)[0].shape == (0,)


def test_flipped_bits_give_nothing_or_what_pillow_sees(tmp_path: Path) -> None:
    whole = encoded("RGB", 20, 30)
    streams = []
    for bit in range(8 * whole.index(b"\xff\xda")):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        streams.append(bytes(flipped))
    with joined(tmp_path / "all", streams) as (fd, starts, sizes):
        widths, heights = beton_jpeg.frame_sizes(fd, starts, sizes)
    refused = 0
    for stream, size in zip(
        streams, zip(widths.tolist(), heights.tolist(), strict=True), strict=True
    ):
        if size == (0, 0):
            refused += 1
            continue
        try:
            assert Image.open(io.BytesIO(stream)).size == size
        except (OSError, SyntaxError):
            continue  # Pillow looks into tables too
    assert 0 < refused < len(streams)
