"""Beton files written and read by FFCV itself, without fastbyol: the other side of round trips.

Without FFCV, files are read by hand (``mutations.read_by_hand``), and tests that need its writer
are skipped.
"""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from foreign_betons import HAS_FFCV


def write_all(files: dict[Path, tuple[dict[str, str], list[tuple[Any, ...]]]]) -> None:
    """Write each path by FFCV's own writer: fields as name -> kind, and samples."""
    if not HAS_FFCV:
        pytest.skip("needs files of FFCV's own writer, which is not installed")
    process = multiprocessing.get_context("spawn").Process(target=_write_all, args=(files,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DISABLE_JIT", "1")  # writing runs nothing compiled
        process.start()
    process.join()
    assert process.exitcode == 0


def _write_all(files: dict[Path, tuple[dict[str, str], list[tuple[Any, ...]]]]) -> None:
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    multiprocessing.set_start_method("fork", force=True)  # what FFCV's writer is made for
    kinds = {
        "raw": lambda: RGBImageField(write_mode="raw"),
        "jpg": lambda: RGBImageField(write_mode="jpg", jpeg_quality=90),
        "int": IntField,
        "float": FloatField,
        "json": JSONField,
        "bytes": BytesField,
        "array": lambda: NDArrayField(np.dtype("float32"), (2, 3)),
    }
    for path, (fields, samples) in files.items():
        made = {name: kinds[kind]() for name, kind in fields.items()}
        DatasetWriter(str(path), made, page_size=1 << 21, num_workers=1).from_indexed_dataset(
            samples
        )


def _by_hand(path: Path) -> Any:
    from mutations import read_by_hand  # needs OpenCV, which writers of data must not

    return read_by_hand(path.read_bytes())


def loaded(path: Path) -> tuple[NDArray[np.uint8], list[int] | None]:
    """Return images of one size (N, H, W, 3) and labels, in file order, by FFCV's loader."""
    if not HAS_FFCV:
        by_hand = _by_hand(path)
        images = [
            Image.open(io.BytesIO(data))
            if mode == 0
            else np.frombuffer(data, np.uint8).reshape(h, w, 3)
            for mode, h, w, data in by_hand.images
        ]
        return np.stack([np.asarray(image) for image in images]), by_hand.labels
    import torch
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    threads = torch.get_num_threads()
    pipelines: dict[str, list[Any]] = {"image": [SimpleRGBImageDecoder()]}
    if "label" in Reader(str(path)).field_names:
        pipelines["label"] = [IntDecoder()]
    order = OrderOption.SEQUENTIAL
    loader = Loader(
        str(path),
        8,
        num_workers=1,
        os_cache=True,
        order=order,
        drop_last=False,
        pipelines=pipelines,
    )
    batches = [tuple(np.array(part) for part in batch) for batch in loader]
    torch.set_num_threads(threads)
    images = np.concatenate([batch[0] for batch in batches])
    return images, [
        int(k) for batch in batches for k in batch[1][:, 0]
    ] if "label" in pipelines else None


def regions(path: Path) -> tuple[list[NDArray[np.uint8]], list[int] | None]:
    """Return raw images of any sizes, and labels, by FFCV's reader."""
    if not HAS_FFCV:
        by_hand = _by_hand(path)
        return [
            np.frombuffer(data, np.uint8).reshape(h, w, 3) for _, h, w, data in by_hand.images
        ], by_hand.labels
    from ffcv.reader import Reader

    reader = Reader(str(path))
    rows = reader.metadata[f"f{reader.field_names.index('image')}"]
    images = [
        data.reshape(row["height"], row["width"], 3)
        for data, row in zip(raw_regions(path), rows, strict=True)
    ]
    labelled = "label" in reader.field_names
    return images, reader.metadata[
        f"f{reader.field_names.index('label')}"
    ].tolist() if labelled else None


def raw_regions(path: Path) -> list[NDArray[np.uint8]]:
    """Return the bytes that each sample's image row points to."""
    if not HAS_FFCV:
        return [np.frombuffer(data, np.uint8) for *_, data in _by_hand(path).images]
    from ffcv.reader import Reader

    reader = Reader(str(path))
    data = np.fromfile(path, np.uint8)
    sizes = dict(
        zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True)
    )
    pointers = reader.metadata[f"f{reader.field_names.index('image')}"]["data_ptr"].tolist()
    return [data[at : at + sizes[at]] for at in pointers]
