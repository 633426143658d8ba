"""A picture file of every mode, depth and format, and its pixels by the formats' definitions.

Kinds that Pillow cannot write are written by OpenCV or byte by byte.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

Pixels = NDArray[np.uint8]
HEIGHT, WIDTH = 24, 32
EXIF_ORIENTATION = 0x0112
# The error of lossy formats on a smooth picture, at the qualities below.
LOSSY = 8
# The error with colour for every second pixel only.
HALVED = 32


@dataclass(frozen=True)
class Picture:
    """A file to write with its pixels (H, W, 3) within ``tolerance``, or the refusal's words.

    ``before_13``: those of Pillow 12 and older, which do not read it.
    """

    mode: str
    depth: str
    format: str
    what: str
    write: Callable[[Path], object]
    expected: Pixels | str
    tolerance: int = 0
    before_13: str = ""

    @property
    def suffix(self) -> str:
        return self.format.split(",")[0].lower()


def smooth(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    grid = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


COLOUR, SQUARE = smooth(1), smooth(2, 32, 32)
GREY = np.asarray(Image.fromarray(COLOUR).convert("L"))
GREY_RGB = np.repeat(GREY[..., None], 3, 2)
ALPHA = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
DEEP = np.random.default_rng(4).integers(0, 65536, (HEIGHT, WIDTH), np.uint16)
PALETTE = np.random.default_rng(5).integers(0, 256, (16, 3), np.uint8)
INDEX = np.random.default_rng(6).integers(0, 16, (HEIGHT, WIDTH), np.uint8)
BITS = np.random.default_rng(7).integers(0, 2, (HEIGHT, WIDTH)).astype(bool)


def rgb_of(grey: NDArray[Any]) -> Pixels:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, 2)


def on_white(colour: Pixels, alpha: NDArray[np.uint8]) -> Pixels:
    share = alpha / 255.0
    return np.round(colour * share + 255.0 * (1.0 - share)).astype(np.uint8)


def saved(image: Image.Image, **options: Any) -> Callable[[Path], object]:
    return lambda path: image.save(path, **options)


def paletted(palette: Pixels = PALETTE) -> Image.Image:
    image = Image.frombytes("P", (WIDTH, HEIGHT), INDEX.tobytes())
    image.putpalette(palette.tobytes())
    return image


def png_chunk(kind: bytes, content: bytes, *, checksum: bool = True) -> bytes:
    crc = zlib.crc32(kind + content) ^ (not checksum)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(samples: NDArray[Any], colour_type: int, *extra: bytes) -> bytes:
    """Return a PNG of (H, W, C) samples of 8 or 16 bits (PNG 1.2), with ``extra`` chunks."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1).astype(f">u{samples.itemsize}")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, colour_type, 0, 0, 0)
    chunks = (
        png_chunk(b"IHDR", head),
        *extra,
        png_chunk(b"IDAT", zlib.compress(data)),
        png_chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(samples: bytes, order: str = "<", **tags: int | tuple[int, ...]) -> bytes:
    """Return an uncompressed TIFF (6.0) of WIDTH x HEIGHT; ``tags`` as t258=8, all SHORT."""
    start = 8
    entries_by_tag: dict[int, tuple[int, ...]] = {
        256: (WIDTH,),
        257: (HEIGHT,),
        259: (1,),
        278: (HEIGHT,),
    }
    entries_by_tag |= {
        int(key[1:]): value if isinstance(value, tuple) else (value,) for key, value in tags.items()
    }
    entries_by_tag |= {273: (0,), 279: (len(samples),)}
    values_at = start + 2 + 12 * len(entries_by_tag) + 4
    entries, values = b"", b""
    pixels_at = values_at + sum(
        2 * len(v) for k, v in entries_by_tag.items() if len(v) > 2 and k != 279
    )
    entries_by_tag[273] = (pixels_at,)
    for tag, value in sorted(entries_by_tag.items()):
        long = tag in (273, 279)
        packed = struct.pack(f"{order}{len(value)}{'I' if long else 'H'}", *value)
        if len(packed) > 4:
            entries += struct.pack(f"{order}HHII", tag, 3, len(value), values_at + len(values))
            values += packed
        else:
            entries += struct.pack(f"{order}HHI", tag, 4 if long else 3, len(value)) + packed.ljust(
                4, b"\0"
            )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return (
        head + struct.pack(f"{order}H", len(entries_by_tag)) + entries + bytes(4) + values + samples
    )


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def by_opencv(samples: NDArray[Any]) -> Callable[[Path], object]:
    """Write the picture by OpenCV, which stores B, G, R (, A)."""
    order = [2, 1, 0, 3][: samples.shape[2]]
    return lambda path: cv2.imwrite(str(path), samples[..., order])


def bits_and_greys() -> Iterator[Picture]:
    one = Image.fromarray(BITS)
    for suffix in ("png", "tiff", "bmp", "pbm", "gif", "pcx", "xbm"):
        yield Picture("1", "1", suffix.upper(), "black and white", saved(one), rgb_of(255 * BITS))
    grey = Image.fromarray(GREY)
    for suffix in ("png", "tiff", "bmp", "gif", "pgm", "tga", "pcx", "sgi", "jp2"):
        yield Picture("L", "8", suffix.upper(), "grey", saved(grey), GREY_RGB)
    for suffix, options in (
        ("jpg", {"quality": 98}),
        ("webp", {"quality": 98}),
        ("avif", {"quality": 95}),
        ("heic", {}),
    ):
        yield Picture("L", "8", suffix.upper(), "grey", saved(grey, **options), GREY_RGB, LOSSY)
    yield Picture(
        "L",
        "8",
        "TIFF",
        "grey, white is zero",
        written(tiff((255 - GREY).tobytes(), t258=8, t262=0)),
        GREY_RGB,
    )
    half = (GREY >> 4).reshape(HEIGHT, -1, 2)
    packed = (half[..., 0] << 4 | half[..., 1]).astype(np.uint8).tobytes()
    yield Picture(
        "L", "4", "TIFF", "grey", written(tiff(packed, t258=4, t262=1)), rgb_of((GREY >> 4) * 17)
    )
    with_alpha = Image.fromarray(np.concatenate([GREY[..., None], ALPHA], 2))
    for suffix in ("png", "tiff", "tga", "jp2"):
        yield Picture(
            "LA", "8", suffix.upper(), "on white", saved(with_alpha), on_white(GREY_RGB, ALPHA), 1
        )
    premultiplied = np.stack(
        [np.round(GREY * (ALPHA[..., 0] / 255.0)).astype(np.uint8), ALPHA[..., 0]], 2
    )
    yield Picture(
        "La", "8", "TIFF", "premultiplied grey, on white; refused by Pillow 12",
        written(tiff(premultiplied.tobytes(), t258=(8, 8), t262=1, t277=2, t338=1)),
        on_white(GREY_RGB, ALPHA), 2, "not a picture that Pillow knows",
    )  # fmt: skip
    one = png(GREY[..., None], 0, png_chunk(b"tRNS", struct.pack(">H", int(GREY[0, 0]))))
    shown = np.where((GREY[0, 0] == GREY)[..., None], np.uint8(255), GREY_RGB)
    yield Picture("L", "8", "PNG, tRNS", "one grey on white", written(one), shown)


def deep_greys() -> Iterator[Picture]:
    eighth = rgb_of(np.round(DEEP / 257.0))
    yield Picture("I;16", "16", "PNG", "divided by 257", written(png(DEEP[..., None], 0)), eighth)
    yield Picture("I;16", "16", "TIFF", "divided by 257", saved(Image.fromarray(DEEP)), eighth)
    content = tiff(DEEP.astype(">u2").tobytes(), ">", t258=16, t262=1)
    yield Picture("I;16B", "16", "TIFF, big-endian", "divided by 257", written(content), eighth)
    content = tiff((65535 - DEEP).tobytes(), t258=16, t262=0)
    yield Picture(
        "I;16", "16", "TIFF, white is zero", "turned and divided by 257", written(content), eighth
    )
    content = b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP.astype(">u2").tobytes()
    yield Picture("I", "16", "PGM", "divided by 257", written(content), eighth)
    yield Picture("I;16", "16", "JP2", "divided by 257", saved(Image.fromarray(DEEP)), eighth)
    twelve = DEEP >> 4
    of_twelve = rgb_of(np.round(twelve / 4095.0 * 255.0))
    content = b"P5 %d %d 4095\n" % (WIDTH, HEIGHT) + twelve.astype(">u2").tobytes()
    yield Picture("I", "12", "PGM", "of its largest value, 4095", written(content), of_twelve, 1)
    pairs = twelve.reshape(HEIGHT, -1, 2).astype(np.uint16)
    packed = np.stack(
        [pairs[..., 0] >> 4, (pairs[..., 0] & 15) << 4 | pairs[..., 1] >> 8, pairs[..., 1] & 255],
        -1,
    ).astype(np.uint8)
    yield Picture(
        "I;16", "12", "TIFF", "of 4095", written(tiff(packed.tobytes(), t258=12, t262=1)), of_twelve
    )
    content = tiff(twelve.tobytes(), t258=16, t262=1, t281=4095)
    yield Picture(
        "I;16",
        "12 in 16",
        "TIFF, MaxSampleValue",
        "of what the file says",
        written(content),
        of_twelve,
    )
    for suffix, content in (
        ("TIFF", tiff(twelve.tobytes(), t258=16, t262=1)),
        ("PNG", png(twelve[..., None], 0)),
    ):
        yield Picture("I;16", "12 in 16", suffix, "refused", written(content), "nearly black")
    transparent = png(DEEP[..., None], 0, png_chunk(b"tRNS", struct.pack(">H", int(DEEP[0, 0]))))
    expected = np.where((DEEP[0, 0] == DEEP)[..., None], np.uint8(255), eighth)
    yield Picture("I;16", "16", "PNG, tRNS", "one grey on white", written(transparent), expected)
    yield Picture(
        "I;16",
        "16",
        "PNG",
        "black stays black",
        written(png(np.zeros_like(DEEP)[..., None], 0)),
        np.zeros_like(COLOUR),
    )
    no_range = "no agreed range"
    small, signed = DEEP.astype(np.int32) % 256, (DEEP >> 1).astype(np.int16)
    yield Picture("I", "32", "TIFF", "refused", saved(Image.fromarray(small)), no_range)
    yield Picture(
        "I",
        "16 signed",
        "TIFF",
        "refused",
        written(tiff(signed.tobytes(), t258=16, t262=1, t339=2)),
        no_range,
    )
    yield Picture(
        "L",
        "8 signed",
        "TIFF",
        "refused",
        written(tiff(GREY.tobytes(), t258=8, t262=1, t339=2)),
        no_range,
    )
    yield Picture(
        "F",
        "32 float",
        "TIFF",
        "refused",
        saved(Image.fromarray((GREY / 255.0).astype(np.float32))),
        no_range,
    )
    yield Picture(
        "F",
        "32 float",
        "PFM",
        "refused",
        saved(Image.fromarray((GREY / 255.0).astype(np.float32))),
        no_range,
    )


def palettes() -> Iterator[Picture]:
    expected = PALETTE[INDEX]
    for suffix in ("png", "gif", "tiff", "bmp", "tga", "pcx"):
        yield Picture("P", "8", suffix.upper(), "its colours", saved(paletted()), expected)
    shown = np.where((INDEX == 5)[..., None], np.uint8(255), expected)
    for suffix in ("png", "gif"):
        yield Picture(
            "P",
            "8",
            f"{suffix.upper()}, one index",
            "that index on white",
            saved(paletted(), transparency=5),
            shown,
        )
    alphas = np.random.default_rng(8).integers(0, 256, 16, np.uint8)
    shown = on_white(expected, alphas[INDEX][..., None])
    yield Picture(
        "P",
        "8",
        "PNG, tRNS bytes",
        "on white",
        saved(paletted(), transparency=alphas.tobytes()),
        shown,
        1,
    )
    small = tuple(int(v) for v in np.pad(PALETTE, ((0, 240), (0, 0))).T.reshape(-1))
    old = tiff(INDEX.tobytes(), t258=8, t262=3, t320=small)
    yield Picture("P", "8", "TIFF, its map of 8 bits", "its colours", written(old), expected)
    part = Image.new("RGB", (WIDTH, HEIGHT), "white")
    part.paste(Image.fromarray(expected).crop((0, 0, 9, 7)), (5, 6))
    yield Picture(
        "P", "8", "GIF, a frame of a part", "the rest is white", part_of_gif, np.asarray(part)
    )
    table = tuple(int(v) * 257 for v in np.pad(PALETTE, ((0, 240), (0, 0))).T.reshape(-1))
    yield Picture(
        "PA", "8", "TIFF", "on white",
        written(tiff(np.stack([INDEX, ALPHA[..., 0]], 2).tobytes(), t258=(8, 8), t262=3, t277=2,
        t320=table, t338=2)),
        on_white(expected, ALPHA), 1,
    )  # fmt: skip


def colours() -> Iterator[Picture]:
    image = Image.fromarray(COLOUR)
    exact = ("png", "tiff", "bmp", "ppm", "tga", "pcx", "sgi", "jp2", "dds", "qoi", "dib")
    for suffix in exact:
        yield Picture("RGB", "8", suffix.upper(), "as it is", saved(image), COLOUR)
    yield Picture("RGB", "8", "WEBP, lossless", "as it is", saved(image, lossless=True), COLOUR)
    lossy: tuple[tuple[str, dict[str, Any]], ...] = (
        ("jpg", {"quality": 98, "subsampling": 0}),
        ("webp", {"quality": 99}),
        ("avif", {"quality": 95, "subsampling": "4:4:4"}),
        ("heic", {"quality": 95}),
    )
    for suffix, options in lossy:
        tolerance = HALVED if suffix in ("webp", "heic") else LOSSY
        yield Picture(
            "RGB", "8", suffix.upper(), "as it is", saved(image, **options), COLOUR, tolerance
        )
    yield Picture(
        "RGB", "8", "ICO", "the largest of its sizes", saved(Image.fromarray(SQUARE)), SQUARE
    )
    large = Image.fromarray(SQUARE).resize((1024, 1024))
    yield Picture("RGB", "8", "ICNS", "the largest of its sizes", saved(large), np.asarray(large))
    four = Image.fromarray(np.concatenate([COLOUR, ALPHA], 2))
    for suffix in ("png", "tiff", "tga", "dds", "qoi", "jp2", "sgi"):
        yield Picture(
            "RGBA", "8", suffix.upper(), "on white", saved(four), on_white(COLOUR, ALPHA), 1
        )
    yield Picture(
        "RGBA",
        "8",
        "WEBP, lossless",
        "on white",
        saved(four, lossless=True, exact=True),
        on_white(COLOUR, ALPHA),
        1,
    )
    unseen = Image.fromarray(np.concatenate([COLOUR, np.zeros_like(ALPHA)], 2))
    yield Picture(
        "RGBA", "8", "PNG, alpha 0 everywhere", "white", saved(unseen), np.full_like(COLOUR, 255)
    )
    yield Picture("RGBA", "8", "TGA, alpha 0 everywhere", "its colours", saved(unseen), COLOUR)
    premultiplied = np.concatenate([np.round(COLOUR * (ALPHA / 255.0)).astype(np.uint8), ALPHA], 2)
    yield Picture(
        "RGBa", "8", "TIFF", "premultiplied, on white",
        written(tiff(premultiplied.tobytes(), t258=(8,) * 4, t262=2, t277=4, t338=1)),
        on_white(COLOUR, ALPHA), 2,
    )  # fmt: skip
    first = COLOUR[0, 0]
    transparent = png(COLOUR, 2, png_chunk(b"tRNS", struct.pack(">HHH", *map(int, first))))
    expected = np.where((first == COLOUR).all(2)[..., None], np.uint8(255), COLOUR)
    yield Picture("RGB", "8", "PNG, tRNS", "one colour on white", written(transparent), expected)
    wide = COLOUR.astype(np.uint16) * 257
    transparent = png(
        wide, 2, png_chunk(b"tRNS", struct.pack(">HHH", *(int(value) * 257 for value in first)))
    )
    shown = np.where((first == COLOUR).all(2)[..., None], np.uint8(255), COLOUR)
    yield Picture("RGB", "16", "PNG, tRNS", "one colour on white", written(transparent), shown)
    for suffix in ("png", "tiff"):
        yield Picture("RGB", "16", suffix.upper(), "the upper 8 bits", by_opencv(wide), COLOUR)
        yield Picture(
            "RGB",
            "8 in 16",
            suffix.upper(),
            "refused",
            by_opencv(COLOUR.astype(np.uint16)),
            "nearly black",
        )
        dark = (wide >> 4).astype(np.uint16)
        yield Picture("RGB", "12 in 16", suffix.upper(), "refused", by_opencv(dark), "nearly black")
    deep_four = np.concatenate([wide, ALPHA.astype(np.uint16) * 257], 2)
    yield Picture(
        "RGBA",
        "16",
        "PNG",
        "the upper 8 bits, on white",
        by_opencv(deep_four),
        on_white(COLOUR, ALPHA),
        1,
    )
    deep_two = np.concatenate([GREY[..., None], ALPHA], 2).astype(np.uint16) * 257
    yield Picture(
        "LA",
        "16",
        "PNG",
        "the upper 8 bits, on white",
        written(png(deep_two, 4)),
        on_white(GREY_RGB, ALPHA),
        1,
    )
    dark_four = np.concatenate([COLOUR, ALPHA], 2).astype(np.uint16)
    yield Picture("RGBA", "8 in 16", "PNG", "refused", by_opencv(dark_four), "nearly black")
    dark_grey = np.concatenate([GREY[..., None], ALPHA], 2).astype(np.uint16)
    yield Picture("LA", "8 in 16", "PNG", "refused", written(png(dark_grey, 4)), "nearly black")
    head = b"P6 %d %d 65535\n" % (WIDTH, HEIGHT)
    yield Picture(
        "RGB",
        "16",
        "PPM",
        "divided by 257",
        written(head + wide.astype(">u2").tobytes()),
        COLOUR,
        1,
    )
    yield Picture(
        "RGB",
        "8 in 16",
        "PPM",
        "refused",
        written(head + COLOUR.astype(">u2").tobytes()),
        "nearly black",
    )
    # Colours of print as their complements, the definition without profiles.
    inks = Image.fromarray(COLOUR).convert("CMYK")
    yield Picture("CMYK", "8", "TIFF", "complements", saved(inks), COLOUR)
    yield Picture("CMYK", "8", "JPG, Adobe", "complements", saved(inks, quality=98), COLOUR, LOSSY)
    yield Picture(
        "YCCK",
        "8",
        "JPG, Adobe",
        "by Pillow",
        ycck,
        np.asarray(Image.open(io.BytesIO(ycck_bytes())).convert("RGB")),
    )
    yield Picture(
        "YCbCr", "8", "TIFF", "Rec. 601; refused by Pillow 12",
        saved(Image.fromarray(COLOUR).convert("YCbCr")), COLOUR, 3, "image file is truncated",
    )  # fmt: skip
    lab = np.stack([np.linspace(10, 245, WIDTH), np.full(WIDTH, 6), np.full(WIDTH, 250)], 1).astype(
        np.uint8
    )
    lab = np.broadcast_to(lab, (HEIGHT, WIDTH, 3)).copy()
    yield Picture(
        "LAB",
        "8",
        "TIFF",
        "sRGB of D50",
        written(tiff(lab.tobytes(), t258=(8,) * 3, t262=8, t277=3)),
        rgb_of_lab(lab),
        3,
    )


def ycck_bytes() -> bytes:
    """Return a CMYK JPEG whose Adobe marker says that three inks are coded as YCbCr."""
    file = io.BytesIO()
    Image.fromarray(COLOUR).convert("CMYK").save(file, "JPEG", quality=98)
    content = bytearray(file.getvalue())
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def ycck(path: Path) -> None:
    path.write_bytes(ycck_bytes())


def rgb_of_lab(lab: Pixels) -> Pixels:
    """Return sRGB (IEC 61966-2-1) of CIELAB bytes (signed a*, b*), D50, by Bradford's matrix."""
    lightness = lab[..., 0] / 255.0 * 100.0
    a, b = (lab[..., k].astype(np.int8).astype(np.float64) for k in (1, 2))
    y = (lightness + 16.0) / 116.0
    f = np.stack([y + a / 500.0, y, y - b / 200.0], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1.0, 0.8249)
    matrix = np.array(
        [
            [3.1338561, -1.6168667, -0.4906146],
            [-0.9787684, 1.9161415, 0.0334540],
            [0.0719453, -0.2289914, 1.4052427],
        ]
    )
    linear = np.clip(xyz @ matrix.T, 0, 1)
    return np.round(
        255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    ).astype(np.uint8)


def part_of_gif(path: Path) -> None:
    """Return a GIF whose only frame is 9 x 7 pixels of a larger screen (GIF89a, 20)."""
    file = io.BytesIO()
    paletted().crop((0, 0, 9, 7)).save(file, "GIF")
    content = bytearray(file.getvalue())
    content[6:10] = struct.pack("<HH", WIDTH, HEIGHT)
    at = content.index(b"," + struct.pack("<HHHH", 0, 0, 9, 7))
    content[at + 1 : at + 5] = struct.pack("<HH", 5, 6)
    path.write_bytes(content)


def several() -> Iterator[Picture]:
    """Yield files of several pictures, of which the first counts."""
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    together: dict[str, Any] = {"save_all": True, "append_images": [second]}
    yield Picture("RGB", "8", "TIFF, pages", "the first", saved(first, **together), COLOUR)
    yield Picture("RGB", "8", "PNG, animated", "the first", saved(first, **together), COLOUR)
    yield Picture(
        "RGB", "8", "WEBP, animated", "the first", saved(first, lossless=True, **together), COLOUR
    )
    yield Picture(
        "RGB",
        "8",
        "MPO",
        "the first",
        saved(first, quality=98, subsampling=0, **together),
        COLOUR,
        LOSSY,
    )
    yield Picture(
        "RGB",
        "8",
        "AVIF, animated",
        "the first",
        saved(first, quality=95, subsampling="4:4:4", **together),
        COLOUR,
        LOSSY,
    )
    write = saved(paletted(), save_all=True, append_images=[paletted(255 - PALETTE)])
    yield Picture("P", "8", "GIF, animated", "the first", write, PALETTE[INDEX])
    yield Picture("RGB", "8", "PSD", "flattened", written(psd()), COLOUR)


def psd() -> bytes:
    """Return an 8-bit RGB document without layers (Adobe Photoshop File Formats, 2019)."""
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, HEIGHT, WIDTH, 8, 3)
    return head + bytes(12) + struct.pack(">H", 0) + COLOUR.transpose(2, 0, 1).tobytes()


def turned() -> Iterator[Picture]:
    """Yield EXIF's eight orientations in every container, compared with Pillow's own."""
    containers: tuple[tuple[str, dict[str, Any]], ...] = (
        ("png", {}), ("tiff", {}), ("jpg", {"quality": 98, "subsampling": 0}), ("webp",
        {"lossless": True}),
        ("avif", {"quality": 95, "subsampling": "4:4:4"}), ("mpo", {"quality": 98,
        "subsampling": 0}),
    )  # fmt: skip
    for suffix, options in containers:
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[EXIF_ORIENTATION] = orientation
            write = saved(Image.fromarray(COLOUR), exif=exif, **options)
            tolerance = 0 if suffix in ("png", "tiff", "webp") else LOSSY
            yield Picture(
                "RGB",
                "8",
                f"{suffix.upper()}, EXIF {orientation}",
                "turned",
                write,
                upright(orientation),
                tolerance,
            )
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    write = saved(Image.fromarray(COLOUR), xmp=xmp, quality=98, subsampling=0)
    yield Picture("RGB", "8", "JPG, XMP 6", "turned", write, upright(6), LOSSY)


def upright(orientation: int) -> Pixels:
    image = Image.fromarray(COLOUR)
    image.getexif()[EXIF_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def damaged_metadata() -> Iterator[Picture]:
    """Yield sound pixels beside damaged metadata."""
    before = lambda *chunks: written(png(COLOUR, 2, *chunks))  # noqa: E731
    kinds = {
        "eXIf": png_chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
        "eXIf, empty": png_chunk(b"eXIf", b""),
        "a text's checksum": png_chunk(b"tEXt", b"a\0b", checksum=False),
        "a private chunk's checksum": png_chunk(b"prVt", b"abc", checksum=False),
        "gAMA cut": png_chunk(b"gAMA", b"a"),
        "pHYs cut": png_chunk(b"pHYs", b"abc"),
        "cHRM cut": png_chunk(b"cHRM", b"abc"),
        "iCCP": png_chunk(b"iCCP", b"a\0\0junk"),
        "acTL cut": png_chunk(b"acTL", b"ab"),
        "a text that unpacks to 8 MB": png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 23))),
        "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfetiff:Orientation"),
        "EXIF as text": png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 10\nzzzz"),
    }
    for what, chunk in kinds.items():
        yield Picture("RGB", "8", f"PNG, damaged: {what}", "as it is", before(chunk), COLOUR)
    segments = {
        "EXIF": (0xE1, b"Exif\0\0junk"),
        "ICC cut": (0xE2, b"ICC_PROFILE\0"),
        "ICC of nine parts": (0xE2, b"ICC_PROFILE\0\x05\x09ab"),
        "JFIF cut": (0xE0, b"JFIF\0"),
        "Photoshop": (0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff\0\0"),
        "MPF": (0xE2, b"MPF\0II*\0\xff\xff\0\0ab"),
        "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<"),
    }
    for what, (marker, content) in segments.items():
        yield Picture(
            "RGB",
            "8",
            f"JPG, damaged: {what}",
            "as it is",
            with_segment(marker, content),
            COLOUR,
            LOSSY,
        )
    for suffix, options in (
        ("webp", {"lossless": True}),
        ("avif", {"quality": 95, "subsampling": "4:4:4"}),
    ):
        write, tolerance = with_spoilt_exif(options), LOSSY if suffix == "avif" else 0
        yield Picture(
            "RGB", "8", f"{suffix.upper()}, damaged: EXIF", "as it is", write, COLOUR, tolerance
        )
    yield Picture(
        "RGB", "8", "WEBP, damaged: EXIF's length", "as it is", webp_with_long_exif, COLOUR
    )
    for what, tag in (("a maker's name", 271), ("EXIF", 34665), ("XMP", 700)):
        far = tiff(COLOUR.tobytes(), t258=(8,) * 3, t262=2, t277=3, **{f"t{tag}": (1,) * 40})
        yield Picture(
            "RGB", "8", f"TIFF, damaged: {what}", "as it is", written(point_away(far, tag)), COLOUR
        )
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for suffix in ("png", "tiff"):
        yield Picture(
            "RGB",
            "8",
            f"{suffix.upper()}, a profile",
            "kept out",
            saved(Image.fromarray(COLOUR), icc_profile=swapped),
            COLOUR,
        )


def with_segment(marker: int, content: bytes) -> Callable[[Path], object]:
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, "JPEG", quality=98, subsampling=0)
    whole = file.getvalue()
    segment = bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content
    return written(whole[:2] + segment + whole[2:])


def with_spoilt_exif(options: dict[str, Any]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        exif = Image.Exif()
        exif[271] = "a maker"
        Image.fromarray(COLOUR).save(path, exif=exif, **options)
        content = path.read_bytes()
        head = content.rindex(b"MM\0*")
        path.write_bytes(content[:head] + b"\0\x08\0\x02" + content[head + 4 :])

    return write


def webp_with_long_exif(path: Path) -> None:
    with_spoilt_exif({"lossless": True})(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"EXIF") + 4
    content[at : at + 4] = struct.pack("<I", 0xFFFF)
    path.write_bytes(content)


def point_away(content: bytes, tag: int) -> bytes:
    """Return the TIFF with the values of ``tag`` beyond its end."""
    at = content.index(struct.pack("<HHI", tag, 3, 40)) + 8
    return content[:at] + b"\xff\xff\xff\x7f" + content[at + 4 :]


def no_pictures() -> Iterator[Picture]:
    """Yield files that are not decoded, whatever their names."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) show\n"
    yield Picture("", "", "PNG, PostScript inside", "refused", written(postscript), "not a picture")
    yield Picture(
        "", "", "JPG, HTML inside", "refused", written(b"<html>not found</html>"), "not a picture"
    )
    yield Picture("", "", "PNG, empty", "refused", written(b""), "not a picture")
    whole = png(COLOUR, 2)
    yield Picture("RGB", "8", "PNG, cut", "refused", written(whole[: len(whole) // 2]), "truncated")
    spoilt, at = whole, whole.index(b"IDAT") + 20
    content = spoilt[:at] + b"\xff" + spoilt[at + 1 :]
    yield Picture(
        "RGB",
        "8",
        "PNG, a pixel chunk's checksum",
        "refused",
        written(content),
        "broken|incorrect|Error",
    )
    wide = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", wide)
        + png_chunk(b"IDAT", zlib.compress(b""))
        + png_chunk(b"IEND", b"")
    )
    yield Picture("RGB", "8", "PNG, 3.6 gigapixels", "refused", written(bomb), "pixels")


def all_pictures() -> list[Picture]:
    pillow_heif.register_heif_opener()
    groups = (
        bits_and_greys,
        deep_greys,
        palettes,
        colours,
        several,
        turned,
        damaged_metadata,
        no_pictures,
    )
    return [picture for group in groups for picture in group()]
