"""Conversion of any picture file to uint8 RGB, and to the wanted size.

tests/data/PICTURES.md, which its test writes, lists the result for each kind of pixels. Pixels
without an agreed range (floating-point, signed, 32-bit) are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError

from fastbyol.data.beton_write import UnreadableItemError
from fastbyol.data.picture_metadata import without_metadata
from fastbyol.errors import one_line
from fastbyol.files import open_regular

Resize = Literal["resize", "centre", "none"]
# The limit for decompression bombs; a 100 megapixel picture takes 300 MB.
MAX_PIXELS = 100_000_000
# Pillow's plugins that call other programs or decode nothing.
_NOT_OPENED = frozenset(
    ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "IMT", "IPTC", "MCIDAS", "MPEG", "WMF")
)
_COMMON = ("JPEG", "PNG")
# Also pictures, even if this Pillow cannot open them.
_ALSO_PICTURES = frozenset((".avif", ".heic", ".heif", ".hif", ".jp2", ".jxl", ".webp"))
# EXIF 2.32, tag 0x0112: the rotation from a stored picture to the one to be seen.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# Formats whose mode I holds 16 bits.
_FORMATS_OF_16 = ("PNG", "PPM")
_MAX_SAMPLE_VALUE = 281  # a tag that Pillow has no name for
# Values that end here leave 4 bits or fewer of 8: a 12-bit picture in a 16-bit file, say.
_DARK_16 = 1 << 12
# ISO/IEC 23008-12: brands of pictures coded by HEVC.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
T = TypeVar("T")


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of picture files, in lower case."""
    formats = (*_formats(), "MPO")  # opened as JPEG
    return _ALSO_PICTURES | {
        suffix for suffix, name in Image.registered_extensions().items() if name in formats
    }


def probe(picture: Path | BinaryIO) -> tuple[int, int]:
    """Return (height, width) in pixels by the file's head. Raises UnreadableItemError."""
    return _read(picture, lambda image: (image.height, image.width))


def read(picture: Path | BinaryIO) -> NDArray[np.uint8]:
    """Return a picture as (H, W, 3). Raises UnreadableItemError if it is damaged or too large."""
    return _read(picture, lambda image: np.asarray(_decoded(image)))


def of_image(image: Image.Image) -> NDArray[np.uint8]:
    """Return an open image of Pillow's as (H, W, 3). Raises UnreadableItemError."""
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableItemError(
            f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
        )
    return np.asarray(_decoded(image))


def resized(image: NDArray[np.uint8], resize: Resize, size: int | None) -> NDArray[np.uint8]:
    """Return (H, W, 3) as (size, size, 3), by Pillow's antialiased bilinear filter.

    "none" returns ``image``, "resize" stretches it, "centre" scales its short side to ``size`` and
    cuts out the middle, rounding as torchvision does. Raises UnreadableItemError if that needs more
    than MAX_PIXELS on the way.
    """
    height, width = image.shape[:2]
    if resize == "none" or size is None or (height, width) == (size, size):
        return image
    if resize == "resize":
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    short = min(height, width)
    new_width, new_height = int(size * width / short), int(size * height / short)
    if new_width * new_height > MAX_PIXELS:
        raise UnreadableItemError(
            f"{width} x {height} pixels are too thin for a short side of {size}"
        )
    whole = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    return np.asarray(whole.crop((left, top, left + size, top + size)))


@cache
def _formats() -> tuple[str, ...]:
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass  # optional; `_reason` names it where a picture needs it
    Image.init()
    # The commonest first: they are recognised by their first bytes, others by parsing, for 40 us a
    # picture.
    others = (name for name in Image.OPEN if name not in _NOT_OPENED and name not in _COMMON)
    return (*_COMMON, *others)


def _read(picture: Path | BinaryIO, convert: Callable[[ImageFile.ImageFile], T]) -> T:
    """Return ``convert`` of the picture, or of the picture without metadata if that fails."""
    reason = ""
    try:
        opened = open_regular(picture) if isinstance(picture, Path) else nullcontext(picture)
        with warnings.catch_warnings(), opened as file:
            # Pillow warns of what it repairs, and of sizes below our own limit.
            warnings.simplefilter("ignore")
            for attempt in _attempts(file):
                try:
                    with Image.open(attempt, formats=_formats()) as image:
                        if image.width * image.height > MAX_PIXELS:
                            raise UnreadableItemError(
                                f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
                            )
                        return convert(image)
                except UnreadableItemError:
                    raise
                except Exception as error:  # Pillow's decoders raise anything on untrusted bytes
                    reason = reason or _reason(error, file)
    except OSError as error:
        reason = error.strerror or str(error)
    raise UnreadableItemError(reason)


def _attempts(file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield ``file``, then, if that was not enough, its picture without metadata."""
    yield file
    file.seek(0)
    bare = without_metadata(file)
    if bare is not None:
        yield bare


def _decoded(image: Image.Image) -> Image.Image:
    """Return the picture as RGB; of an animation or stack the first frame."""
    # The raw mode, such as RGB;16B, is known only before the pixels are read. Pillow drops the
    # lower 8 bits.
    tiles = getattr(image, "tile", ())  # of files only
    _, drawn, _, arguments, *_ = tiles[0] if tiles else (None, None, None, "")
    raw_mode, maximum = (*arguments, 0)[:2] if isinstance(arguments, tuple) else (arguments, 0)
    is_deep = "16" in str(raw_mode) or (image.format == "PPM" and maximum > 255)
    if is_deep and isinstance(transparent := image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)  # as pixels will be
    stored = _upright(image)
    if is_deep and image.mode not in _DEEP:
        largest = max(high for _, high in stored.convert("RGB").getextrema())  # type: ignore[misc]
        if largest < _DARK_16 >> 8:  # black, too: the dropped 8 bits may hold a picture
            raise UnreadableItemError(
                f"16-bit colours of at most {largest} of 255, nearly black; save them with 8 bits"
            )
    made = _to_rgb(stored)
    if image.format == "GIF" and drawn is not None and drawn != (0, 0, *image.size):
        whole = Image.new("RGB", image.size, "white")  # the first frame does not cover all
        whole.paste(made.crop(drawn), drawn[:2])
        made = whole
    return made


def _upright(image: Image.Image) -> Image.Image:
    """Apply the rotation of EXIF or XMP."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF or XMP, so without a rotation
        return image
    # ImageOps.exif_transpose would rewrite the other tags, and fail where one is damaged.
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert palettes, CMYK, YCbCr, Lab and grey by Pillow; colour profiles are ignored."""
    if _tag(image, TiffImagePlugin.SAMPLEFORMAT) == 2:
        raise UnreadableItemError("signed pixels, which have no agreed range")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode == "P":
        colours = image.tag_v2.get(TiffImagePlugin.COLORMAP)
        if colours and max(colours) < 256:  # 8 bits instead of 16, as libtiff reads them, too
            image.putpalette(bytes(np.reshape(colours, (3, -1)).T.astype(np.uint8).tobytes()))
    if image.mode in _DEEP:
        return _from_deep(image)
    if image.mode == "F":
        raise UnreadableItemError("floating-point pixels, which have no agreed range")
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return converted
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Show transparent pixels on white, as a page would."""
    if image.mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
    layer = image.convert("RGBA")
    if image.format == "TGA" and layer.getchannel("A").getextrema() == (0, 0):
        return layer.convert("RGB")  # an alpha channel that was never filled in
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Scale grey of 9 to 16 bits so that its largest value, by file or format, is white."""
    if image.mode == "I" and image.format not in _FORMATS_OF_16:
        raise UnreadableItemError("32-bit grey pixels, which have no agreed range")
    values = np.asarray(image).astype(np.int64)
    largest = (1 << (_tag(image, TiffImagePlugin.BITSPERSAMPLE) or 16)) - 1  # white
    stated = _tag(image, _MAX_SAMPLE_VALUE)
    if stated is not None and 255 < stated < largest:
        largest = stated
    if values.min() < 0 or values.max() > largest:
        raise UnreadableItemError(
            f"grey pixels beyond {largest}, the largest value that the file allows"
        )
    if largest == 65535 and 0 < values.max() < _DARK_16:
        raise UnreadableItemError(
            f"16-bit grey pixels of at most {values.max()}, nearly black; save them with 8 bits"
        )
    if _tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        values = largest - values  # white is zero; Pillow inverts that for up to 8 bits only
    grey = (2 * 255 * values + largest) // (2 * largest)  # rounded to the nearest
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _tag(image: Image.Image, number: int) -> int | None:
    """Return the first value of a TIFF's tag of whole numbers, or None without one."""
    value = image.tag_v2.get(number) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) else None


def _reason(error: Exception, file: BinaryIO) -> str:
    if isinstance(error, UnidentifiedImageError):
        file.seek(4)
        box = file.read(8)
        if box[:4] == b"ftyp" and box[4:] in _HEIC_BRANDS:
            return (
                "a damaged HEIC picture, or one that needs the package pillow-heif (pip "
                "install pillow-heif)"
            )
        if box[:4] == b"ftyp" and box[4:] in (b"avif", b"avis"):
            return (
                "a damaged AVIF picture, or this Pillow was built without AVIF (pip install "
                "--upgrade Pillow)"
            )
        return "not a picture that Pillow knows"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error, None)
