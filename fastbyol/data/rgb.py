"""From any picture file or array to uint8 RGB, and to the wanted size.

What becomes of what is not RGB: the EXIF rotation is applied; transparent pixels are shown on white, as a page would; palettes,
CMYK, YCbCr and grey are converted by Pillow; 16-bit grey is divided by 257; of an animation the first frame counts; colour
profiles are ignored. Floating-point and 32-bit grey have no agreed range and are refused.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastbyol.data.beton import UnreadableItemError

Resize = Literal["resize", "centre", "none"]
# A decompression bomb's limit; a 100 megapixel picture takes 300 MB.
MAX_PIXELS = 100_000_000
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def probe(path: Path) -> tuple[int, int]:
    """(height, width) in pixels from the file's head, before any rotation; UnreadableItemError if it is no picture."""
    try:
        with _opened(path) as image:
            return image.height, image.width
    except UnreadableItemError:
        raise
    except Exception as error:  # Pillow's decoders meet untrusted bytes with any exception there is
        raise UnreadableItemError(_reason(error)) from None


def read(path: Path) -> NDArray[np.uint8]:
    """The picture as (H, W, 3); UnreadableItemError if it is damaged, too large or of a kind that has no RGB meaning."""
    try:
        with _opened(path) as image:
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except UnreadableItemError:
        raise
    except Exception as error:  # as above
        raise UnreadableItemError(_reason(error)) from None


def resized(image: NDArray[np.uint8], resize: Resize, size: int | None) -> NDArray[np.uint8]:
    """(H, W, 3) -> (size, size, 3), by Pillow's antialiased bilinear filter; ``none`` returns ``image``.

    ``resize`` stretches. ``centre`` takes the short side to ``size`` and cuts out the middle, rounding as torchvision does.
    """
    height, width = image.shape[:2]
    if resize == "none" or size is None or (height, width) == (size, size):
        return image
    if resize == "resize":
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    short = min(height, width)
    new_width, new_height = int(size * width / short), int(size * height / short)
    whole = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    return np.asarray(whole.crop((left, top, left + size, top + size)))


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # The limit below is stricter than the one that Pillow warns of.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(path)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise UnreadableItemError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP:
        return _from_deep(image)
    if image.mode == "F":
        raise UnreadableItemError("floating-point pixels, which have no agreed range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableItemError("32-bit grey pixels, which have no agreed range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
