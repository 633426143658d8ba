"""Faults on which FFCV's reader crashes, hangs or gives wrong pixels: here a line, or the data.

Test names are the faults. ``OURS`` has checksums; ``FOREIGN`` is by FFCV's own writer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import run_rig as rig
import torch
from data_rig import Delivered
from mutations import DESCRIPTOR, HEADER, PAGE, REGION, Base, put, read_by_hand, row_layout

import foreign_betons as foreign
from fastbyol.data import beton, loader
from fastbyol.data import decoder as decoding
from fastbyol.data.beton_write import write
from fastbyol.errors import FastbyolError, UsageError

SIZE = 16
Edit = Callable[[Base, bytearray], object]


@pytest.fixture(autouse=True, params=foreign.DECODERS)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test by every decoder."""
    monkeypatch.setattr(decoding, "choose", lambda _: request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Base:
    path = tmp_path_factory.mktemp("ours") / "set.beton"
    write(
        path,
        [(foreign.pixels("raw", i), i % 5) for i in range(40)],
        labelled=True,
        workers=1,
        page_bytes=PAGE,
    )
    return Base("ours", path.read_bytes(), True)


def base_of(name: str) -> Base:
    return Base(name, (foreign.made() / f"{name}.beton").read_bytes(), False)


def read(path: Path) -> Delivered:
    """Read by every way, which must agree."""
    images, labels, _ = loader.read_all(path, workers=2, size=SIZE)
    with open_loader(path) as batches:
        for batch in batches.epoch(0):
            assert torch.equal(batch.images, images[batch.ids])
    return images.numpy(), None if labels is None else labels.tolist()


def open_loader(path: Path, batch_size: int = 4, **options: object) -> loader.Loader:
    plain = {"seed": 0, "device": "cpu", "cache": "none", "workers": 2, "size": SIZE} | options
    return loader.open_loader(path, batch_size=batch_size, **plain)  # type: ignore[arg-type]


def refused(path: Path, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def damaged(base: Base, edit: Edit, folder: Path) -> Path:
    data = bytearray(base.data)
    edit(base, data)
    path = folder / "damaged.beton"
    path.write_bytes(data)
    return path


def _header(at: int, size: int, value: int) -> Edit:
    return lambda base, data: put(data, at, value, size)


def _cut(end: Callable[[Base], int]) -> Edit:
    def edit(base: Base, data: bytearray) -> None:
        del data[end(base) :]

    return edit


def _image_row(sample: int, at: int, size: int, value: int) -> Edit:
    """Change the image's 13 packed bytes: 0 mode, 1 width, 3 height, 5 pointer."""
    return lambda base, data: put(
        data, base.rows + sample * row_layout(base.types)[1] + at, value, size
    )


def _region(at: int, size: int) -> Edit:
    return lambda base, data: put(data, base.table + 3 * REGION + at, size, 8)


def _float_label(base: Base, data: bytearray) -> None:
    data[HEADER + DESCRIPTOR] = 0


EDITS: dict[str, tuple[str, Edit, str]] = {
    "empty": ("raw", _cut(lambda base: 0), "too short"),
    "text": (
        "raw",
        lambda base, data: data.__setitem__(slice(None), b"hello " * 9999),
        "version 25960",
    ),
    "cut before the table": ("raw", _cut(lambda base: base.table - 1), "no page's end"),
    "wrong version": ("raw", _header(0, 2, 3), "version 3"),
    "cut at the table": (
        "raw",
        _cut(lambda base: base.table),
        "allocation table of 0 bytes where 4872 are",
    ),
    "table pointer at the end of the file": (
        "raw",
        lambda base, data: put(data, 16, len(data), 8),
        "no page's end",
    ),
    "cut inside the table": (
        "raw",
        _cut(lambda base: base.table + 50 * REGION),
        "table of 1200 bytes where 4872 are",
    ),
    "one byte short": (
        "raw",
        _cut(lambda base: len(base.data) - 1),
        "allocation table of 4871 bytes where 4872 are",
    ),
    "table pointer 0": ("raw", _header(16, 8, 0), "interrupted"),
    "wrong page size": ("raw", _header(4, 4, PAGE * 2), "outside the data pages"),
    "wrong number of samples": (
        "raw",
        _header(8, 8, 202),
        "allocation table of 4872 bytes where 4848",
    ),
    "raw image of wrong size": ("raw", _image_row(7, 1, 2, 19), "sample 7.*width x height x 3"),
    "raw image with wrong pointer": (
        "raw",
        _image_row(7, 5, 8, PAGE + 1),
        "sample 7.*no region of this sample",
    ),
    "JPEG of 0 x 0": ("jpg", _image_row(7, 1, 4, 0), "sample 7.*a side is not 1"),
    "region of 2**20 bytes": ("raw", _region(16, 1 << 20), "overlaps another"),
    "region of 2**40 bytes": ("raw", _region(16, 1 << 40), "points outside the data pages"),
}


@pytest.mark.parametrize("fault", EDITS)
def test_structure(fault: str, tmp_path: Path) -> None:
    name, edit, words = EDITS[fault]
    refused(damaged(base_of(name), edit, tmp_path), words)


def test_missing_file_or_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent.beton", "no such file")
    refused(tmp_path, "not a file")


def _as_nobody(path: Path) -> None:
    os.setuid(65534)
    try:
        beton.inspect(path)
    except UsageError as error:
        raise SystemExit(0 if "cannot be opened (Permission denied)" in str(error) else 3) from None


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become nobody")
def test_no_permission(ours: Base, tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    path.write_bytes(ours.data)
    path.chmod(0)
    child = rig.PROCESSES.Process(target=_as_nobody, args=(path,))
    child.start()
    child.join(processes.PATIENCE_S)
    assert child.exitcode == 0


def test_int_field_marked_float(ours: Base, tmp_path: Path) -> None:
    """Expect no label in a foreign file, and an error in ours."""
    images, labels = read(damaged(base_of("raw"), _float_label, tmp_path))
    assert labels is None
    np.testing.assert_array_equal(images[5], foreign.pixels("raw", 5))
    refused(damaged(ours, _float_label, tmp_path), "not those that were written")


@pytest.mark.parametrize("offset", ["pixel", "label"])
def test_flipped_bytes_of_ours(ours: Base, tmp_path: Path, offset: str) -> None:
    label = ours.rows + 9 * row_layout(ours.types)[1] + 16
    at = label if offset == "label" else int(ours.regions[9, 1]) + 100
    words = (
        "not those that were written"
        if offset == "label"
        else r"the data of sample 9, bytes \d+ to \d+, is not what was"
    )
    refused(damaged(ours, lambda base, data: data.__setitem__(at, data[at] ^ 16), tmp_path), words)


def test_flipped_bytes_of_a_foreign_file_are_delivered_as_they_are(tmp_path: Path) -> None:
    """Expect only that byte to change, since a foreign file has no checksum."""
    base = base_of("raw")
    at = int(base.regions[9, 1]) + 100
    path = damaged(base, lambda base, data: data.__setitem__(at, data[at] ^ 16), tmp_path)
    images, labels = read(path)
    np.testing.assert_array_equal(images, read_by_hand(path.read_bytes()).decoded(SIZE))
    assert labels == [foreign.label(i) for i in range(foreign.COUNT)]


def test_flipped_jpeg_bytes_that_cannot_be_decoded(tmp_path: Path) -> None:
    base = base_of("jpg")

    def edit(base: Base, data: bytearray) -> None:
        at = data.index(b"\xff\xc4", int(base.regions[9, 1])) + 5
        data[at : at + 16] = b"\xff" * 16

    refused(damaged(base, edit, tmp_path), "the JPEG data of sample 9 are damaged")


def test_truncated_or_rewritten_while_in_use(
    ours: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expect an error at the next batch where streamed, and nothing where in memory."""
    path = tmp_path / "set.beton"
    for in_memory in (False, True):
        monkeypatch.setattr(loader, "_fits_in_memory", lambda info, size, answer=in_memory: answer)
        for fate in ("cut", "rewritten"):
            path.write_bytes(ours.data)
            with open_loader(path, 2) as batches:
                running = batches.epoch(0)
                next(running)
                if fate == "cut":
                    os.truncate(path, PAGE)
                else:
                    path.write_bytes(ours.data[::-1])
                if in_memory:
                    assert len(list(running)) == 19
                    continue
                with pytest.raises(UsageError, match=r"the file (was cut|changed) while in use"):
                    list(running)


def test_deleted_or_replaced_between_epochs(
    ours: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_fits_in_memory", lambda info, size: False)
    path = tmp_path / "set.beton"
    path.write_bytes(ours.data)
    with open_loader(path, 40) as batches:
        (first,) = batches.epoch(0)
        path.unlink()
        path.write_bytes(b"another")
        (again,) = batches.epoch(0)
    assert torch.equal(first.images, again.images)


def test_no_batch() -> None:
    for batch_size in (0, -1):
        with pytest.raises(UsageError, match=f"batch_size = {batch_size}"):
            open_loader(foreign.made() / "raw.beton", batch_size)
    with pytest.raises(UsageError, match="less than one batch"):
        open_loader(foreign.made() / "raw.beton", foreign.COUNT + 1)


def test_two_loaders_decode_at_once() -> None:
    actual: list[int] = []

    def use(name: str) -> None:
        with open_loader(foreign.made() / f"{name}.beton") as batches:
            actual.extend(len(list(batches.epoch(epoch))) for epoch in range(20))

    threads = [threading.Thread(target=use, args=(name,)) for name in ("raw", "jpg")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert actual == [foreign.COUNT // 4] * 40


def test_an_error_in_the_decoding_thread_surfaces(ours: Base, tmp_path: Path) -> None:
    at = int(ours.regions[9, 1]) + 100
    path = damaged(ours, lambda base, data: data.__setitem__(at, data[at] ^ 16), tmp_path)

    def taken() -> Iterator[int]:
        with open_loader(path, 1) as batches:
            for batch in batches.epoch(0):
                yield int(batch.ids)

    seen: list[int] = []
    with pytest.raises(FastbyolError, match="sample 9"):
        seen.extend(taken())
    assert 9 not in seen
