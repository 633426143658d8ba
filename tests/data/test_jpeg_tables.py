"""Streams with their tables, against libturbojpeg: pixels must not depend on earlier images."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import foreign_betons as foreign
import turbojpeg
from fastbyol.data.beton import inspect
from fastbyol.data.decoder import Decoder
from fastbyol.data.jpeg_tables import brings_its_tables
from fastbyol.errors import UsageError

HEIGHT, WIDTH = 30, 40
PILLOW: list[dict[str, object]] = [
    {},
    {"progressive": True},
    {"optimize": True},
    {"subsampling": 0},
    {"quality": 3},
    {"restart_marker_blocks": 2},
    {"exif": b"Exif\0\0" + bytes(3000)},
]
OPENCV = [
    [],
    [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    [cv2.IMWRITE_JPEG_OPTIMIZE, 1],
    [cv2.IMWRITE_JPEG_RST_INTERVAL, 1],
    [cv2.IMWRITE_JPEG_QUALITY, 100],
]


def picture(mode: str = "RGB") -> Image.Image:
    return Image.merge(
        "RGB", [Image.effect_noise((WIDTH, HEIGHT), sigma) for sigma in (20, 40, 60)]
    ).convert(mode)


def by_pillow(mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    picture(mode).save(file, "JPEG", **options)
    return file.getvalue()


def segments(stream: bytes) -> list[tuple[int, int, int]]:
    """Return (marker, start, end) of every segment up to the first scan's."""
    actual, at = [], 2
    while not actual or actual[-1][0] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4])
        actual.append((stream[at + 1], at, end))
        at = end
    return actual


def experienced() -> turbojpeg.Decompressor:
    """Return a decoder that has every possible table, none of them a usual one."""
    stream = by_pillow(quality=7, optimize=True)
    extra = b"".join(b"\xff\xdb\0\x43" + bytes([number]) + bytes(range(9, 73)) for number in (2, 3))
    for marker, start, end in segments(stream):
        if marker == 0xC4:
            extra += b"".join(
                stream[start : start + 4] + bytes([stream[start + 4] | n]) + stream[start + 5 : end]
                for n in (2, 3)
            )
    decompressor = turbojpeg.Decompressor()
    assert not decompressor.decode(stream[:2] + extra + stream[2:], HEIGHT, WIDTH)[0]
    return decompressor


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", PILLOW, ids=str)
def test_whole_images_of_pillow(mode: str, options: dict[str, object]) -> None:
    assert brings_its_tables(by_pillow(mode, **options))


@pytest.mark.parametrize("options", OPENCV, ids=str)
def test_whole_images_of_opencv(options: list[int]) -> None:
    image = np.asarray(picture())
    for pixels in (image, image[..., 0]):
        assert brings_its_tables(cv2.imencode(".jpg", pixels, options)[1].tobytes())


def test_fill_bytes_before_markers() -> None:
    whole = by_pillow(progressive=True)
    filled = whole
    for _, start, _ in reversed(segments(whole)):
        filled = filled[:start] + b"\xff\xff\xff" + filled[start:]
    assert not turbojpeg.Decompressor().decode(filled, HEIGHT, WIDTH)[0]
    assert brings_its_tables(filled)


@pytest.mark.parametrize("options", PILLOW[:4], ids=str)
def test_an_image_without_one_of_its_tables(options: dict[str, object]) -> None:
    """Leave out or renumber any one."""
    whole = by_pillow(**options)
    tables = [(start, end) for marker, start, end in segments(whole) if marker in (0xC4, 0xDB)]
    assert len(tables) >= 3
    for start, end in tables:
        assert not brings_its_tables(whole[:start] + whole[end:])
        assert not brings_its_tables(
            whole[: start + 4] + bytes([whole[start + 4] ^ 2]) + whole[start + 5 :]
        )


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str
)
def test_what_passes_decodes_alike_whatever_was_decoded_before(
    mode: str, options: dict[str, object]
) -> None:
    """Flip every bit of the head and of the first data bytes."""
    whole = by_pillow(mode, **options)
    primed, passed, differed = experienced(), 0, 0
    for bit in range(16, 8 * min(len(whole), segments(whole)[-1][2] + 100)):
        stream = bytearray(whole)
        stream[bit // 8] ^= 1 << bit % 8
        if bit % 97 == 0:
            primed = experienced()
        alone, later = (
            decoder.decode(bytes(stream), HEIGHT, WIDTH)
            for decoder in (turbojpeg.Decompressor(), primed)
        )
        same = alone[0] == later[0] and (alone[0] or np.array_equal(alone[1], later[1]))
        assert same or not brings_its_tables(bytes(stream)), bit
        passed += brings_its_tables(bytes(stream)) and not alone[0]
        differed += not same
    assert passed > 0
    assert differed > 0


@pytest.mark.parametrize("end", [0, 1, 2, 3, 4, 20, 100, 300, 700])
def test_a_part_of_an_image(end: int) -> None:
    assert not brings_its_tables(by_pillow(progressive=True)[:end])


def test_a_foreign_sample_without_its_tables_is_refused_by_number(tmp_path: Path) -> None:
    """Renumber a table, which libturbojpeg misses and FFCV's decoder takes from the last image."""
    data = bytearray((foreign.made() / "jpg.beton").read_bytes())
    at, tables = -1, []
    while (at := data.find(b"\xff\xdb\0\x43\1", at + 1)) >= 0:
        tables.append(at)
    assert len(tables) == foreign.COUNT
    data[tables[100] + 4] = 0
    path = tmp_path / "abbreviated.beton"
    path.write_bytes(data)
    for workers in (1, 2):
        with Decoder(inspect(path), size=foreign.SIZE, workers=workers, in_memory=True) as decoder:
            images = np.empty((foreign.COUNT, *decoder.shape), np.uint8)
            for _ in range(2):
                with pytest.raises(
                    UsageError,
                    match=r"abbreviated.beton: the JPEG data of sample 100 are damaged, or lack a "
                    r"table",
                ) as caught:
                    decoder.decode(np.arange(foreign.COUNT), images)
                assert "\n" not in str(caught.value)
            decoder.decode(np.delete(np.arange(foreign.COUNT), 100), images[1:])
