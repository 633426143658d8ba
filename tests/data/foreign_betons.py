"""Betons by FFCV's own writer, decoded by FFCV's own Loader, in a process that is FFCV's alone.

    python foreign_betons.py write FOLDER      writes NAME.beton for all NAMES
    python foreign_betons.py decode FOLDER     writes decoded.npz: uint8 (N, H, W, 3) for DECODED

``made()`` and ``decoded_by_ffcv()`` run these once; without FFCV, ``made()`` writes all but
"foreign" by hand. Sample i has ``pixels(name, i)`` and ``label(i)``.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

HAS_FFCV = importlib.util.find_spec("ffcv") is not None
needs_ffcv = pytest.mark.skipif(not HAS_FFCV, reason="is about FFCV itself, which is not installed")
# What ``data.decoder`` may be here.
DECODERS = [pytest.param("ffcv", marks=needs_ffcv), "torchvision"]
COUNT = 203
SIZE = 16
PAGE_BYTES = 1 << 21
NAMES = ("raw", "jpg", "unlabelled", "mixed", "mixed_jpg", "foreign")
FILES = [pytest.param(name, marks=needs_ffcv) if name == "foreign" else name for name in NAMES]
DECODED = ("jpg", "foreign", "mixed", "mixed_jpg")


@functools.cache
def made() -> Path:
    """Return the folder of the files, which the guard of the tests' processes deletes."""
    from processes import VARIABLE  # not on the path of this file's own commands

    folder = Path(tempfile.mkdtemp(dir=os.environ[VARIABLE]))
    if HAS_FFCV:
        _run("write", folder)
    else:
        for name in NAMES[:-1]:
            (folder / f"{name}.beton").write_bytes(by_hand(name))
    return folder


def by_hand(name: str) -> bytes:
    """Return a beton as FFCV writes it: header, fields, rows, pages of samples, table."""
    labelled = name != "unlabelled"
    row = np.dtype(
        [("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")]
        + [("pad", "u1", 3), ("label", "<i8")] * labelled
    )
    fields = np.zeros(1 + labelled, [("type", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
    fields["type"], fields["name"] = [2, 1][: len(fields)], ["image", "label"][: len(fields)]
    rows, table = np.zeros(COUNT, row), np.zeros((COUNT, 3), "<u8")
    pages = bytearray()
    first = -(-(24 + fields.nbytes + rows.nbytes) // PAGE_BYTES) * PAGE_BYTES
    for i in range(COUNT):
        image, is_jpeg = pixels(name, i), name == "jpg" or (name == "mixed_jpg" and i % 2 == 0)
        file = io.BytesIO(b"" if is_jpeg else image.tobytes())
        if is_jpeg:
            Image.fromarray(image).save(file, "JPEG", quality=95)
        stored = file.getvalue()
        if len(pages) % PAGE_BYTES + len(stored) > PAGE_BYTES:
            pages += bytes(-len(pages) % PAGE_BYTES)
        table[i] = i, first + len(pages), len(stored)
        rows[["mode", "width", "height", "at"]][i] = (
            not is_jpeg,
            image.shape[1],
            image.shape[0],
            table[i, 1],
        )
        if labelled:
            rows["label"][i] = label(i)
        pages += stored
    pages += bytes(-len(pages) % PAGE_BYTES)
    head = (
        struct.pack("<HHIQQ", 2, len(fields), PAGE_BYTES, COUNT, first + len(pages))
        + fields.tobytes()
        + rows.tobytes()
    )
    return head.ljust(first, b"\0") + bytes(pages) + table.tobytes()


@functools.cache
def decoded_by_ffcv() -> dict[str, NDArray[np.uint8]]:
    """Return the files as FFCV's Loader decodes them, for tests marked ``needs_ffcv``."""
    _run("decode", made())
    with np.load(made() / "decoded.npz") as arrays:
        return dict(arrays)


def _run(*arguments: str | Path) -> None:
    # Five seconds of imports and writing; the limit is for a machine whose cores others hold, where
    # it took minutes.
    subprocess.run(
        [sys.executable, __file__, *arguments], check=True, timeout=900, stderr=subprocess.DEVNULL
    )


def label(i: int) -> int:
    """Return a label; some are negative."""
    return (7 * i) % 10 - 3


def shape(name: str, i: int) -> tuple[int, int]:
    """Return (height, width). In mixed sets sides are around ``SIZE``; every third is 32 x 48."""
    if not name.startswith("mixed"):
        return 24, 20
    return (32, 48) if i % 3 == 0 else (10 + i % 23, 12 + i % 31)


def pixels(name: str, i: int) -> NDArray[np.uint8]:
    """Return noise for raw files, a smooth picture for JPEG."""
    height, width = shape(name, i)
    rng = np.random.default_rng([NAMES.index(name), i])
    if "jpg" not in name and name != "foreign":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    slope = rng.uniform(-3, 3, (2, 3))
    return np.clip(rng.integers(60, 190, 3) + y * slope[0] + x * slope[1], 0, 255).astype(np.uint8)


def rows(name: str, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Return all samples beforehand: FFCV's writer waits for ever on an item that fails."""

    def row(i: int) -> tuple[Any, ...]:
        values = {"image": pixels(name, i), "label": label(i), "float": i / 7, "json": {"index": i}}
        values |= {
            "bytes": np.arange(i % 9 + 1, dtype=np.uint8),
            "array": np.full((2, 3), i, np.float32),
        }
        return tuple(values[column] for column in columns)

    return [row(i) for i in range(COUNT)]


def _write(folder: Path) -> None:
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    def plain(**options: Any) -> dict[str, tuple[str, Any]]:
        return {"image": ("image", RGBImageField(**options)), "label": ("label", IntField())}

    files = {
        "raw": plain(write_mode="raw"),
        "jpg": plain(write_mode="jpg", jpeg_quality=95),
        "foreign": {
            "meta": ("json", JSONField()),
            "target": ("label", IntField()),
            "weight": ("float", FloatField()),
            "blob": ("bytes", BytesField()),
            "picture": ("image", RGBImageField(write_mode="jpg", jpeg_quality=90)),
            "vector": ("array", NDArrayField(np.dtype("float32"), (2, 3))),
        },
        "unlabelled": {"image": ("image", RGBImageField(write_mode="raw"))},
        "mixed": plain(write_mode="raw"),
        "mixed_jpg": plain(write_mode="proportion", compress_probability=0.5),
    }
    for name, fields in files.items():
        columns = tuple(column for column, _ in fields.values())
        typed = {key: field for key, (_, field) in fields.items()}
        writer = DatasetWriter(
            str(folder / f"{name}.beton"), typed, page_size=PAGE_BYTES, num_workers=1
        )
        writer.from_indexed_dataset(rows(name, columns))


def _decode(path: Path, image: str, others: list[str], crop: bool) -> NDArray[np.uint8]:
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    decoder = CenterCropRGBImageDecoder((SIZE, SIZE), 1.0) if crop else SimpleRGBImageDecoder()
    pipelines = {image: [decoder, ToTensor()], **dict.fromkeys(others)}
    batches = Loader(
        str(path), batch_size=64, num_workers=1, os_cache=True, pipelines=pipelines, drop_last=False
    )
    return np.concatenate([batch[0].numpy().copy() for batch in batches])


def _decode_all(folder: Path) -> None:
    decoded = {}
    for name in DECODED:
        image, others = (
            ("picture", ["meta", "target", "weight", "blob", "vector"])
            if name == "foreign"
            else ("image", ["label"])
        )
        decoded[name] = _decode(folder / f"{name}.beton", image, others, name.startswith("mixed"))
    np.savez(folder / "decoded.npz", allow_pickle=False, **decoded)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork")  # what FFCV's writer is made for
    {"write": _write, "decode": _decode_all}[sys.argv[1]](Path(sys.argv[2]))
