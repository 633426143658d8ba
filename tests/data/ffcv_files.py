"""Beton files made and read by FFCV itself, without fastbyol: the other side of every round trip.

A test that asks for one is skipped where FFCV is not installed.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


def write_all(files: dict[Path, tuple[dict[str, str], list[tuple[Any, ...]]]]) -> None:
    """FFCV's own writer for each path: fields as name -> kind (see ``_write_all``), and the samples; pages of 2 MiB."""
    pytest.importorskip("ffcv")
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
        DatasetWriter(str(path), made, page_size=1 << 21, num_workers=1).from_indexed_dataset(samples)


def loaded(path: Path) -> tuple[NDArray[np.uint8], list[int] | None]:
    """Images of one size (N, H, W, 3) and labels, in file order, through FFCV's loader."""
    pytest.importorskip("ffcv")
    import torch
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    threads = torch.get_num_threads()
    pipelines: dict[str, list[Any]] = {"image": [SimpleRGBImageDecoder()]}
    if "label" in Reader(str(path)).field_names:
        pipelines["label"] = [IntDecoder()]
    order = OrderOption.SEQUENTIAL
    loader = Loader(str(path), 8, num_workers=1, os_cache=True, order=order, drop_last=False, pipelines=pipelines)
    batches = [tuple(np.array(part) for part in batch) for batch in loader]
    torch.set_num_threads(threads)
    images = np.concatenate([batch[0] for batch in batches])
    return images, [int(k) for batch in batches for k in batch[1][:, 0]] if "label" in pipelines else None


def regions(path: Path) -> tuple[list[NDArray[np.uint8]], list[int] | None]:
    """Raw images of any sizes, and labels, as FFCV's reader finds them."""
    pytest.importorskip("ffcv")
    from ffcv.reader import Reader

    reader = Reader(str(path))
    rows = reader.metadata[f"f{reader.field_names.index('image')}"]
    images = [data.reshape(row["height"], row["width"], 3) for data, row in zip(raw_regions(path), rows, strict=True)]
    labelled = "label" in reader.field_names
    return images, reader.metadata[f"f{reader.field_names.index('label')}"].tolist() if labelled else None


def raw_regions(path: Path) -> list[NDArray[np.uint8]]:
    """The bytes that each sample's image row points to."""
    pytest.importorskip("ffcv")
    from ffcv.reader import Reader

    reader = Reader(str(path))
    data = np.fromfile(path, np.uint8)
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    pointers = reader.metadata[f"f{reader.field_names.index('image')}"]["data_ptr"].tolist()
    return [data[at : at + sizes[at]] for at in pointers]
