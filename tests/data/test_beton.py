"""Verification of structure: FFCV's own files pass, and files that break FFCV do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ffcv_files
import source_files
from fastbyol.data import beton
from fastbyol.data.beton import DESCRIPTOR, HEADER, REGION
from fastbyol.errors import UsageError

PAGE = 1 << 21
COUNT = 12
# Row layouts by hand from the format's description: f0, f1, ... aligned, an image is 13 packed
# bytes.
IMAGE_ROW = {
    "names": ["mode", "w", "h", "ptr"],
    "offsets": [0, 1, 3, 5],
    "formats": ["u1", "<u2", "<u2", "<u8"],
}
ROWS: dict[str, np.dtype[Any]] = {
    "plain": np.dtype({**IMAGE_ROW, "itemsize": 24}),  # its label is at byte 16
    "jpg": np.dtype({**IMAGE_ROW, "itemsize": 13}),
}
FIELDS = {
    "plain": {"image": "raw", "label": "int"},
    "jpg": {"picture": "jpg"},
    "foreign": {
        "meta": "json",
        "id": "int",
        "weight": "float",
        "blob": "bytes",
        "photo": "jpg",
        "vector": "array",
    }
    | {"label": "int", "mask": "raw"},
}

# Chosen where a file has several.
IMAGE = {"plain": None, "jpg": None, "foreign": "photo"}
# Files without labels, or with ambiguous ones, and the error where labels are needed.
UNLABELLED = {
    "bare": ({"image": "raw"}, "has no int field for labels, its fields are image (image);"),
    "float": (
        {"img": "raw", "y": "float"},
        "has no int field for labels, its fields are img (image), y (float);",
    ),
    "two": (
        {"img": "raw", "y": "int", "target": "int"},
        "does not say which int field is the label, its fields are img (image), y (int), target "
        "(int);",
    ),
    # An index or a time is no label for being the only number.
    "index": ({"img": "raw", "index": "int"}, "does not say which int field is the label"),
    "array": (
        {"meta": "json", "x": "raw", "classes": "array"},
        "meta (json), x (image), classes (ndarray);",
    ),
}


def sides(k: int) -> tuple[int, int]:
    return 20 + k % 5, 16 + 3 * k


def sample(fields: dict[str, str], k: int) -> tuple[Any, ...]:
    image = source_files.random_images(1, *sides(k), k)[0]
    values = {"raw": image, "jpg": image, "json": {"k": k}, "int": k % 4, "float": k / 3}
    values |= {"bytes": np.arange(k + 1, dtype=np.uint8), "array": np.full((2, 3), k, np.float32)}
    return tuple(values[kind] for kind in fields.values())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    fields = FIELDS | {name: made for name, (made, _) in UNLABELLED.items()}
    files = {name: folder / f"{name}.beton" for name in fields}
    ffcv_files.write_all(
        {
            files[name]: (made, [sample(made, k) for k in range(COUNT)])
            for name, made in fields.items()
        }
    )
    return files


@pytest.fixture
def copied(good: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        path = tmp_path / f"{name}.beton"
        path.write_bytes(good[name].read_bytes())
        return path

    return copy


def refused(path: Path, *words: str, image_field: str | None = None) -> None:
    with pytest.raises(UsageError) as caught:
        beton.inspect(path, image_field=image_field)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", FIELDS)
def test_files_of_ffcvs_writer(good: dict[str, Path], name: str) -> None:
    info = beton.inspect(good[name], image_field=IMAGE[name])
    assert (info.num_samples, info.page_size, info.num_bytes) == (
        COUNT,
        PAGE,
        good[name].stat().st_size,
    )
    image = IMAGE[name] or next(iter(FIELDS[name]))
    assert (info.image_field, info.label_field) == (image, None if name == "jpg" else "label")
    assert info.heights.tolist() == [sides(k)[0] for k in range(COUNT)]
    assert info.widths.tolist() == [sides(k)[1] for k in range(COUNT)]
    assert info.raw.tolist() == [name == "plain"] * COUNT
    names = {"raw": "image", "jpg": "image", "array": "ndarray"}
    assert [(f.name, f.type_name) for f in info.fields] == [
        (k, names.get(v, v)) for k, v in FIELDS[name].items()
    ]
    assert info.uniform_size is None
    described = beton.info_dict(info)
    assert described["largest"] == [24, 49]
    assert described["num_jpeg"] == (0 if name == "plain" else COUNT)


def test_fields_can_be_chosen(good: dict[str, Path]) -> None:
    info = beton.inspect(good["foreign"], image_field="mask", label_field="id")
    assert (info.image_field, info.label_field) == ("mask", "id")
    assert info.raw.all()
    for wrong in ({"image_field": "label"}, {"image_field": "none"}, {"label_field": "weight"}):
        with pytest.raises(UsageError, match=r"photo \(image\)"):
            beton.inspect(good["foreign"], **wrong)
    with pytest.raises(UsageError, match="no RGB image field 'x'"):
        beton.inspect(good["plain"], image_field="x")


def test_several_image_fields_and_no_choice(good: dict[str, Path]) -> None:
    refused(
        good["foreign"],
        "2 image fields",
        "photo (image)",
        "mask (image)",
        "weight (float)",
        "--image-field",
    )


@pytest.mark.parametrize("name", ["y", "target", "Class", "fine_label"])
def test_the_only_int_field_of_a_usual_name_is_the_label(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.beton"
    fields = {"x": "raw", name: "int", "index": "int"}
    ffcv_files.write_all({path: (fields, [sample(fields, k) for k in range(COUNT)])})
    assert beton.inspect(path).label_field == (None if name == "fine_label" else name)


@pytest.mark.parametrize("name", UNLABELLED)
def test_labels_are_demanded_where_they_are_needed(good: dict[str, Path], name: str) -> None:
    path, (fields, says) = good[name], UNLABELLED[name]
    info = beton.inspect(path)
    assert info.labels is None
    with pytest.raises(UsageError) as caught:
        beton.demand_labels(info)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    # An unlabelled file may stand beside a labelled one, for which the field is named; one with
    # other int fields may not.
    if "int" in fields.values():
        first = next(field for field, kind in fields.items() if kind == "int")
        assert beton.inspect(path, label_field=first).labels.tolist() == [
            k % 4 for k in range(COUNT)
        ]
        with pytest.raises(UsageError, match="has no int field 'id'"):
            beton.inspect(path, label_field="id", may_lack_labels=True)
    else:
        assert beton.inspect(path, label_field="id", may_lack_labels=True).labels is None
        with pytest.raises(UsageError, match="has no int field 'id'"):
            beton.inspect(path, label_field="id")


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file")
    refused(tmp_path, "not a file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a file")
    for name, data in (
        ("empty", b""),
        ("text", b"hello " * 10000),
        ("zeros", bytes(10000)),
        ("short", b"\x02\x00"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "beton")


@pytest.mark.parametrize("name", FIELDS)
def test_cut_or_continued_anywhere_structural(copied: Callable[[str], Path], name: str) -> None:
    path = copied(name)
    whole = path.read_bytes()
    header = np.frombuffer(whole, HEADER, 1)[0]
    rows_start = HEADER.itemsize + len(FIELDS[name]) * DESCRIPTOR.itemsize
    table = int(header["table"])
    edges = {
        0,
        1,
        rows_start,
        rows_start + 13,
        PAGE,
        2 * PAGE,
        table,
        table + 24,
        (table + len(whole)) // 2,
        len(whole),
    }
    edges |= {HEADER.itemsize + k * DESCRIPTOR.itemsize for k in range(len(FIELDS[name]))}
    for cut in sorted({min(max(at + d, 0), len(whole) - 1) for at in edges for d in (-1, 0, 1)}):
        os.truncate(path, cut)
        refused(path, image_field=IMAGE[name])
        path.write_bytes(whole)
    path.write_bytes(whole + bytes(24))
    refused(path, "allocation", image_field=IMAGE[name])


def may_change(name: str, whole: bytes) -> tuple[np.ndarray, int]:
    """Mark bytes whose change leaves a sound structure; return the mask and the rows' end.

    These are names, data, padding, an array's element type, and a type byte, as two types may share
    a layout.
    """
    out = np.zeros(len(whole), bool)
    for k, kind in enumerate(FIELDS[name].values()):
        at = HEADER.itemsize + k * DESCRIPTOR.itemsize
        out[at : at + 17] = True
        out[at + 17 : at + DESCRIPTOR.itemsize] = kind == "array"
    rows_start = HEADER.itemsize + len(FIELDS[name]) * DESCRIPTOR.itemsize
    sizes = {"raw": 13, "jpg": 13, "json": 16, "bytes": 16, "int": 8, "float": 8, "array": 8}
    alone = {"int": 8, "float": 8, "array": 8}
    row, spans = 0, []
    for kind in FIELDS[name].values():
        row = -(-row // alone.get(kind, 1)) * alone.get(kind, 1)
        spans.append((row, row + sizes[kind], kind in ("int", "float")))
        row += sizes[kind]
    row = -(-row // 8) * 8 if set(FIELDS[name].values()) & set(alone) else row
    one = np.ones(row, bool)
    for start, stop, free in spans:
        one[start:stop] = free
    rows_end = rows_start + COUNT * row
    out[rows_start:rows_end] = np.tile(one, COUNT)
    return out, rows_end


@pytest.mark.parametrize("name", FIELDS)
def test_flipped_bits_are_refused_or_harmless(copied: Callable[[str], Path], name: str) -> None:
    """Flip single bits: never another exception, never another geometry."""
    path = copied(name)
    whole = path.read_bytes()
    reference, (free, rows_end) = (
        beton.inspect(path, image_field=IMAGE[name]),
        may_change(name, whole),
    )
    structural = np.r_[0:rows_end, int(np.frombuffer(whole, HEADER, 1)[0]["table"]) : len(whole)]
    rng = np.random.default_rng(1)
    # Half of them where no change is allowed: descriptors are mostly zeros that few flips should be
    # spent on.
    busy = np.flatnonzero(np.frombuffer(whole, np.uint8)[structural])
    picks = np.concatenate(
        [rng.choice(structural, 150), structural[rng.choice(busy, 150)], np.arange(HEADER.itemsize)]
    )
    accepted = 0
    with path.open("r+b") as file:
        for at in picks.tolist():
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << int(rng.integers(8))]))
            file.flush()
            try:
                info = beton.inspect(path, image_field=IMAGE[name])
            except UsageError as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:
                accepted += 1
                assert free[at], at
                np.testing.assert_array_equal(info.widths, reference.widths)
                np.testing.assert_array_equal(info.heights, reference.heights)
                np.testing.assert_array_equal(info.raw, reference.raw)
                assert (info.num_samples, info.page_size) == (COUNT, PAGE)
            file.seek(at)
            file.write(whole[at : at + 1])
    assert accepted < len(picks) // 2


def edited(
    path: Path, name: str, edit: Callable[[np.ndarray, np.ndarray, np.ndarray], None]
) -> None:
    """Change header, rows or table, as record arrays, of a ``plain`` or ``jpg`` file."""
    data = np.memmap(path, np.uint8, "r+")
    header = data[: HEADER.itemsize].view(HEADER)
    start, dtype = HEADER.itemsize + len(FIELDS[name]) * DESCRIPTOR.itemsize, ROWS[name]
    rows = data[start : start + COUNT * dtype.itemsize].view(dtype)
    edit(header, rows, data[int(header["table"][0]) :].view(REGION))
    data.flush()


def _overlap(_: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    rows["ptr"][5] = table["ptr"][5] = table["ptr"][4] + 1


def _share(_: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    rows["ptr"][5] = rows["ptr"][4]


def _cross(_: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    rows["ptr"][11] = table["ptr"][11] = 2 * PAGE - 5


def _swap(_: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    rows["ptr"][[1, 2]] = rows["ptr"][[2, 1]]


def _set(part: int, field: str, value: int, at: int = 0) -> Callable[..., None]:
    def edit(*parts: np.ndarray) -> None:
        parts[part][field][at] = value

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("plain", _set(0, "version", 3), "version 3"),
        ("plain", _set(0, "fields", 0), "0 fields"),
        ("plain", _set(0, "fields", 65), "65 fields"),
        ("plain", _set(0, "page", PAGE + 1), "page size"),
        ("plain", _set(0, "page", PAGE // 2), "page size"),
        ("plain", _set(0, "page", 0), "page size"),
        ("plain", _set(0, "samples", 0), "0 samples"),
        ("plain", _set(0, "samples", 2**63), "samples"),
        ("plain", _set(0, "samples", COUNT - 1), "allocation table of 288 bytes where 264"),
        ("plain", _set(0, "table", 0), "interrupted"),
        ("plain", _set(0, "table", PAGE + 8), "no page's end"),
        ("plain", _set(0, "table", 2**63), "no page's end"),
        ("plain", _set(1, "w", 0, 3), "sample 3"),
        ("plain", _set(1, "h", 40000, 3), "16384"),
        ("plain", _set(1, "w", 18, 3), "width x height x 3"),
        ("plain", _set(1, "mode", 2, 3), "neither raw nor JPEG"),
        ("plain", _set(1, "mode", 0, 3), "not a whole JPEG"),
        ("jpg", _set(1, "mode", 1, 3), "width x height x 3"),
        ("jpg", _set(1, "w", 18, 3), "not a whole JPEG"),
        ("plain", _set(1, "ptr", 2**64 - 1, 3), "no region of this sample"),
        ("plain", _set(2, "ptr", 2**64 - 1, 3), "allocation 3 points outside"),
        ("plain", _set(2, "ptr", 0, 3), "allocation 3 points outside"),
        ("plain", _set(2, "size", 2**64 - 1, 3), "allocation 3 points outside"),
        ("plain", _set(2, "size", 2**40, 3), "allocation 3 points outside"),
        ("plain", _set(2, "sample", COUNT, 3), "allocation 3 belongs to no sample"),
        ("plain", _set(2, "sample", 4, 3), "no region of this sample"),
        ("plain", _overlap, "overlaps"),
        ("plain", _share, "no region of this sample"),
        ("plain", _cross, "crosses the end"),
        ("plain", _set(2, "size", 0, 3), "empty"),
        ("plain", _swap, "no region of this sample"),
    ],
)
def test_each_rule(
    copied: Callable[[str], Path], name: str, edit: Callable[..., None], words: str
) -> None:
    path = copied(name)
    edited(path, name, edit)
    refused(path, words)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        *[(0, value, f"type {value}") for value in (255, 7)],
        *[(at, value, "plain ASCII") for at, value in ((1, 0), (1, 0xE9), (3, 10), (12, 65))],
        (500, 1, "arguments"),
        (1 + DESCRIPTOR.itemsize, b"image".ljust(16, b"\0"), "same name"),
    ],
)
def test_field_descriptors(
    copied: Callable[[str], Path], at: int, value: int | bytes, words: str
) -> None:
    path, written = copied("plain"), value if isinstance(value, bytes) else bytes([value])
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), written, HEADER.itemsize + at)
    refused(path, words)


def test_damaged_jpeg_heads_and_tails(copied: Callable[[str], Path]) -> None:
    path = copied("jpg")
    whole = path.read_bytes()
    start, dtype = HEADER.itemsize + DESCRIPTOR.itemsize, ROWS["jpg"]
    ptr = int(np.frombuffer(whole, dtype, COUNT, start)["ptr"][7])
    region = next(
        r for r in np.frombuffer(whole, REGION, COUNT, len(whole) - 24 * COUNT) if r["ptr"] == ptr
    )
    frame = whole.index(b"\xff\xc0", ptr)
    for at in (ptr, ptr + 1, frame + 6, frame + 8, ptr + int(region["size"]) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        refused(path, "sample 7, field 'picture'")


def test_a_file_that_shrinks_while_it_is_read(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reach the end of a file that was longer when its size was measured."""
    path = copied("plain")
    size = path.stat().st_size
    os.truncate(path, size - 100)
    monkeypatch.setattr(
        os, "fstat", lambda _: os.stat_result((0o100644, 0, 0, 0, 0, 0, size, 0, 0, 0))
    )
    refused(path, "ended while it was read")
