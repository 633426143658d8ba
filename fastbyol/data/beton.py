"""The beton format, version 2, and the proof that a file keeps to it.

FFCV maps a file and follows its pointers unchecked: a damaged file means wrong pixels, a hang or a
dead process. ``inspect`` proves first all that FFCV relies on.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastbyol.data import beton_jpeg, manifest
from fastbyol.data.manifest import Manifest
from fastbyol.errors import UsageError

VERSION = 2
MAX_FIELDS = 64
MIN_PAGE_BYTES = 1 << 21
# FFCV allocates whole batches of the largest image; a larger side is likelier damage than a
# picture.
MAX_SIDE = 16384
LABEL_FIELD = "label"
# Other int fields, such as an index or a time, are labels only if asked for by name.
LABEL_NAMES = frozenset(
    ("category", "class", "class_id", "classes", "cls", "label", "labels", "target", "targets", "y")
)
JPG, RAW = 0, 1

# Little-endian:
#   0             header, 24 B
#   24            F descriptors of 1041 B; only those of array fields have arguments
#   24 + 1041 F   N rows of an aligned struct with one member a field
#   D             that end rounded up to P: whole pages, no region (a sample's data) crosses one
#                 (of fastbyol's files the last pages hold the manifest, ``data.manifest``)
#   A             one REGION a pointer, in any order, to the end
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")]
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
REGION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
SPAN = np.dtype([("ptr", "<u8"), ("size", "<u8")])
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("description_bytes", "<u8")])
# json.dumps of a plain numpy type's description.
ELEMENT = re.compile(rb'\[\["", "[<>|=]([biufcSUV])(\d{1,4})"\]\]')
TYPES: dict[int, tuple[str, np.dtype[Any]]] = {
    0: ("float", np.dtype("<f8")),
    1: ("int", np.dtype("<i8")),
    2: ("image", IMAGE),
    3: ("bytes", SPAN),
    4: ("ndarray", np.dtype("<u8")),
    5: ("json", SPAN),
    6: ("tensor", np.dtype("<u8")),
}
Demand = Callable[[NDArray[np.bool_], str], None]
AGAIN = "make the file again"
NOT_ONE = "name a beton file or make one with `fastbyol convert`"


@dataclass(frozen=True)
class Field:
    """One column: ``type_name`` is float, int, image, bytes, ndarray, json or tensor."""

    name: str
    type_name: str


@dataclass(frozen=True, eq=False)
class BetonInfo:
    """The content of a verified file.

    Of ``image_field``, in file order: ``widths``, ``heights`` (N,) uint16 pixels, ``raw`` (N,)
    bool, and the image data's ``starts``, ``sizes`` (N,) int64 bytes. ``labels`` (N,) int64 are
    those of ``label_field``. ``stamp`` (``stamp_of``) detects later changes.
    """

    path: Path
    num_samples: int
    page_size: int
    fields: tuple[Field, ...]
    image_field: str
    label_field: str | None
    widths: NDArray[np.uint16]
    heights: NDArray[np.uint16]
    raw: NDArray[np.bool_]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    num_bytes: int
    manifest: Manifest | None
    stamp: tuple[int, ...]

    @property
    def has_ints(self) -> bool:
        """True if some field could hold labels."""
        return any(field.type_name == "int" for field in self.fields)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of labels 0, 1 and so on; empty unless the manifest has them."""
        names = self.manifest.note.get("class_names") if self.manifest is not None else None
        return (
            tuple(map(str, names))
            if isinstance(names, list) and self.label_field == LABEL_FIELD
            else ()
        )

    @property
    def uniform_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels if all images share it, else None."""
        same = (self.widths == self.widths[0]).all() and (self.heights == self.heights[0]).all()
        return (int(self.heights[0]), int(self.widths[0])) if same else None


def stamp_of(fd: int) -> tuple[int, ...]:
    """Return a file's device, inode, bytes and time of the last write in ns."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class _File:
    path: Path
    fd: int
    num_bytes: int

    def fail(self, offset: int, what: str, remedy: str = AGAIN) -> NoReturn:
        raise UsageError(f"{self.path}, byte {offset}: {what}; {remedy}")

    def read(self, offset: int, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """Read ``count`` records, which the caller has proved to lie inside the file."""
        out = np.empty(count, dtype)
        view, done = out.view(np.uint8).data, 0
        while done < out.nbytes:
            got = os.preadv(self.fd, [view[done : done + (1 << 30)]], offset + done)
            if got == 0:
                self.fail(
                    offset + done,
                    "the file ended while it was read",
                    "leave it alone while it is in use",
                )
            done += got
        return out


@dataclass(frozen=True)
class _Layout:
    page: int
    samples: int
    fields: tuple[Field, ...]
    array_bytes: tuple[int, ...]
    rows: NDArray[Any]
    rows_start: int
    data_start: int
    table_start: int

    @property
    def rows_end(self) -> int:
        return self.row_byte(self.samples)

    def row_byte(self, sample: int) -> int:
        return self.rows_start + sample * self.rows.dtype.itemsize

    def pointer_fields(self) -> list[int]:
        return [k for k, field in enumerate(self.fields) if field.type_name not in ("float", "int")]


def inspect(
    path: str | Path,
    *,
    image_field: str | None = None,
    label_field: str | None = None,
    may_lack_labels: bool = False,
) -> BetonInfo:
    """Verify the structure of a beton file, without FFCV and without decoding.

    ``image_field`` defaults to the only RGB image field, ``label_field`` to the int field
    ``label``, else to the only one with a name in ``LABEL_NAMES``. With ``may_lack_labels``, a file
    without int fields is accepted, too. Raises UsageError for a missing, unreadable or damaged
    file, for a missing field, and for several image fields without a choice.
    """
    with _opened(Path(path)) as file:
        stamp = stamp_of(file.fd)
        layout = _read_layout(file)
        image = _chosen(file, layout.fields, image_field)
        label = _chosen_label(file, layout.fields, label_field, may_lack_labels)
        table = _read_table(file, layout)
        sizes = _verify_regions(file, layout, table)[image]
        rows = layout.rows[f"f{image}"]
        info = BetonInfo(
            path=file.path,
            num_samples=layout.samples,
            page_size=layout.page,
            fields=layout.fields,
            image_field=layout.fields[image].name,
            label_field=None if label is None else layout.fields[label].name,
            widths=rows["width"].copy(),
            heights=rows["height"].copy(),
            raw=rows["mode"] == RAW,
            starts=rows["ptr"].astype(np.int64),
            sizes=sizes,
            labels=None if label is None else layout.rows[f"f{label}"].astype(np.int64),
            num_bytes=file.num_bytes,
            manifest=None,
            stamp=stamp,
        )
        return replace(info, manifest=_verified_manifest(file, layout, table, info))


def demand_labels(info: BetonInfo) -> None:
    """Raise UsageError, which lists the fields, unless one of them holds the labels."""
    if info.labels is None:
        what, remedy = ("has no int field for labels", "name a file with one")
        if info.has_ints:
            what, remedy = (
                "does not say which int field is the label",
                "choose it with --label-field",
            )
        raise UsageError(f"{info.path}: {what}, its fields are {_listed(info.fields)}; {remedy}")


def info_dict(info: BetonInfo) -> dict[str, object]:
    """Return ``info`` as JSON values. Image sizes are [height, width]."""
    return {
        "path": str(info.path),
        "num_bytes": info.num_bytes,
        "num_samples": info.num_samples,
        "page_bytes": info.page_size,
        "fields": {field.name: field.type_name for field in info.fields},
        "image_field": info.image_field,
        "label_field": info.label_field,
        "smallest": [int(info.heights.min()), int(info.widths.min())],
        "largest": [int(info.heights.max()), int(info.widths.max())],
        "num_raw": int(info.raw.sum()),
        "num_jpeg": int((~info.raw).sum()),
        "labels": None
        if info.labels is None
        else {str(k): n for k, n in sorted(Counter(info.labels.tolist()).items())},
        "sealed": info.manifest is not None,
        "source": None if info.manifest is None else dict(info.manifest.note),
    }


def open_beton(path: Path) -> int:
    """Open a beton file and return its descriptor. Raises UsageError if that fails."""
    try:
        # Opening a pipe would block, and a device may yield anything.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path}: not a file; {NOT_ONE}")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; make it with `fastbyol convert`") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path}: cannot be opened ({reason}); check its name and rights"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    fd = open_beton(path)
    try:
        yield _File(path, fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def refuse_changed(fd: int, info: BetonInfo) -> None:
    """Raise UsageError if the open file was written to after ``inspect`` made ``info``."""
    if stamp_of(fd) != info.stamp:
        raise UsageError(
            f"{info.path}: the file changed while in use; leave it alone and start again"
        )


@contextmanager
def reopened(info: BetonInfo) -> Iterator[int]:
    """Open the inspected file again. Raises UsageError if it is unreadable or has changed."""
    with _opened(info.path) as file:
        try:
            yield file.fd
        except OSError as error:
            raise UsageError(
                f"{info.path}: cannot be read ({error.strerror}); look at its disk"
            ) from None
        refuse_changed(file.fd, info)


def _read_layout(file: _File) -> _Layout:
    if file.num_bytes < HEADER.itemsize:
        file.fail(file.num_bytes, "too short for a beton file", NOT_ONE)
    header = file.read(0, HEADER, 1)[0]
    num_fields, page, samples, table = (
        int(header[name]) for name in ("fields", "page", "samples", "table")
    )
    if header["version"] != VERSION:
        file.fail(0, f"version {header['version']} where a beton file has 2", NOT_ONE)
    if not 1 <= num_fields <= MAX_FIELDS:
        file.fail(2, f"{num_fields} fields, expected 1 to {MAX_FIELDS}")
    if page < MIN_PAGE_BYTES or page & (page - 1):
        file.fail(4, f"page size {page}, expected a power of two from {MIN_PAGE_BYTES} up")
    rows_start = HEADER.itemsize + num_fields * DESCRIPTOR.itemsize
    if rows_start > file.num_bytes:
        file.fail(file.num_bytes, "ends inside the field descriptors")
    fields, array_bytes = _read_fields(file, num_fields)
    members = dict(TYPES.values())
    row = np.dtype([("", members[field.type_name]) for field in fields], align=True)
    rows_end = rows_start + samples * row.itemsize
    if samples < 1 or rows_end > file.num_bytes:
        file.fail(8, f"{samples} samples in a file of {file.num_bytes} bytes")
    data_start = -(-rows_end // page) * page
    if table == 0:
        file.fail(16, "no allocation table: its writing was interrupted")
    if not data_start <= table <= file.num_bytes or (table - data_start) % page:
        file.fail(16, f"allocation table at byte {table}, which is no page's end of this file")
    rows = file.read(rows_start, row, samples)
    return _Layout(page, samples, fields, array_bytes, rows, rows_start, data_start, table)


def _read_fields(file: _File, count: int) -> tuple[tuple[Field, ...], tuple[int, ...]]:
    """Read the fields, and the bytes of one array for each array field (0 for the others)."""
    fields, array_bytes = [], []
    for k, record in enumerate(file.read(HEADER.itemsize, DESCRIPTOR, count)):
        at = HEADER.itemsize + k * DESCRIPTOR.itemsize
        if int(record["type"]) not in TYPES:
            file.fail(
                at,
                f"field {k} has type {record['type']}, which fastbyol cannot read",
                "write it without custom fields",
            )
        type_name = TYPES[int(record["type"])][0]
        fields.append(Field(_field_name(file, at + 1, record["name"].tobytes()), type_name))
        array_bytes.append(_array_bytes(file, at + 17, type_name, record["arguments"]))
    if len({field.name for field in fields}) < count:
        file.fail(
            HEADER.itemsize,
            "two fields of the same name",
            "write it with distinct names of at most 16 letters",
        )
    return tuple(fields), tuple(array_bytes)


def _field_name(file: _File, at: int, record: bytes) -> str:
    name, _, rest = record.partition(b"\0")
    if (
        not name
        or rest.strip(b"\0")
        or not all(32 < byte < 127 for byte in name.replace(b" ", b"_"))
    ):
        file.fail(at, f"field name {record.rstrip(bytes(1))!r} is not plain ASCII")
    return name.decode("ascii")


def _array_bytes(file: _File, at: int, type_name: str, arguments: NDArray[np.uint8]) -> int:
    if type_name not in ("ndarray", "tensor"):
        if arguments.any():
            file.fail(at, f"arguments on a field of type {type_name}, which takes none")
        return 0
    head = arguments[: ARRAY_ARGUMENTS.itemsize].view(ARRAY_ARGUMENTS)[0]
    text = arguments[ARRAY_ARGUMENTS.itemsize :][: int(head["description_bytes"])].tobytes()
    element = ELEMENT.fullmatch(text)
    shape = np.trim_zeros(head["shape"], "b").tolist()
    if element is None or not shape or 0 in shape:
        file.fail(
            at, f"array field of shape {shape} and element type {text!r}, which cannot be read"
        )
    # numpy counts letters of four bytes each.
    element_bytes = int(element[2]) * (4 if element[1] == b"U" else 1)
    return element_bytes * math.prod(int(side) for side in shape)


def _chosen(file: _File, fields: tuple[Field, ...], name: str | None) -> int:
    images = [
        k
        for k, field in enumerate(fields)
        if field.type_name == "image" and name in (None, field.name)
    ]
    if not images:
        what = "has no RGB image field" if name is None else f"has no RGB image field {name!r}"
        raise UsageError(
            f"{file.path}: {what}, its fields are {_listed(fields)}; name one that it has"
        )
    if len(images) > 1:
        raise UsageError(
            f"{file.path}: has {len(images)} image fields, its fields are {_listed(fields)}; "
            "choose one with --image-field"
        )
    return images[0]


def _chosen_label(
    file: _File, fields: tuple[Field, ...], name: str | None, may_lack: bool
) -> int | None:
    ints = [k for k, field in enumerate(fields) if field.type_name == "int"]
    named = [k for k in ints if fields[k].name == (name or LABEL_FIELD)]
    if name is not None and not named and (ints or not may_lack):
        raise UsageError(
            f"{file.path}: has no int field {name!r}, its fields are {_listed(fields)}; name one "
            "that it has"
        )
    if named:
        return named[0]
    usual = [k for k in ints if fields[k].name.lower() in LABEL_NAMES]
    return usual[0] if len(usual) == 1 else None


def _listed(fields: tuple[Field, ...]) -> str:
    return ", ".join(f"{field.name} ({field.type_name})" for field in fields)


def _read_table(file: _File, layout: _Layout) -> NDArray[Any]:
    """Read the allocation table, in file order, after a check of its length."""
    num_regions = layout.samples * len(layout.pointer_fields())
    size, due = file.num_bytes - layout.table_start, num_regions * REGION.itemsize
    if size != due:
        file.fail(layout.table_start, f"allocation table of {size} bytes where {due} are due")
    return file.read(layout.table_start, REGION, num_regions)


def _verify_regions(
    file: _File, layout: _Layout, table: NDArray[Any]
) -> dict[int, NDArray[np.int64]]:
    """Prove that regions fit into pages, do not overlap and have one pointer each.

    Return their sizes in bytes, by field.
    """
    order = np.argsort(table["ptr"], kind="stable")
    table = table[order]
    start, end, page = layout.data_start, layout.table_start, layout.page

    def demand(good: NDArray[np.bool_], what: str) -> None:
        if not good.all():
            k = int(order[np.flatnonzero(~good)[0]])
            file.fail(layout.table_start + k * REGION.itemsize, f"allocation {k} {what}")

    ptr, size = table["ptr"], table["size"]
    demand((ptr >= start) & (ptr < end) & (size <= page), "points outside the data pages")
    # FFCV finds a region by its pointer alone, and an empty one shares its pointer with the next.
    demand(size > 0, "is empty, which FFCV misreads")
    demand((ptr - start) % page + size <= page, "crosses the end of its page")
    demand(np.append(ptr[:-1] + size[:-1] <= ptr[1:], True), "overlaps another")
    demand(table["sample"] < layout.samples, "belongs to no sample")
    claimed = np.zeros(len(table), bool)
    return {k: _verify_field(file, layout, k, table, claimed) for k in layout.pointer_fields()}


def _verify_field(
    file: _File, layout: _Layout, k: int, table: NDArray[Any], claimed: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the sizes (N,) of the field's regions, bytes."""
    field, rows = layout.fields[k], layout.rows[f"f{k}"]

    def demand(good: NDArray[np.bool_], what: str) -> None:
        if not good.all():
            sample = int(np.flatnonzero(~good)[0])
            file.fail(layout.row_byte(sample), f"sample {sample}, field {field.name!r}: {what}")

    ptr = rows["ptr"] if rows.dtype.names else rows
    at = np.minimum(np.searchsorted(table["ptr"], ptr), len(table) - 1)
    demand(
        (table["ptr"][at] == ptr) & (table["sample"][at] == np.arange(len(rows))),
        "its pointer is no region of this sample",
    )
    demand(~claimed[at], "shares its region with another field")
    claimed[at] = True
    size: NDArray[np.int64] = table["size"][at].astype(np.int64)
    if field.type_name == "image":
        _verify_images(file, rows, size, demand)
    elif field.type_name in ("bytes", "json"):
        demand(size == rows["size"], "its size differs from its region's")
    else:
        demand(size == layout.array_bytes[k], "its size differs from its array type's")
    return size


def _verify_images(
    file: _File, rows: NDArray[Any], size: NDArray[np.int64], demand: Demand
) -> None:
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    raw = rows["mode"] == RAW
    demand(rows["mode"] <= RAW, "neither raw nor JPEG")
    sides = (np.minimum(width, height) >= 1) & (np.maximum(width, height) <= MAX_SIDE)
    demand(sides, f"a side is not 1 to {MAX_SIDE} pixels")
    demand(~raw | (size == 3 * width * height), "its size is not width x height x 3 bytes")
    jpeg = np.flatnonzero(~raw)
    sides_read = beton_jpeg.frame_sizes(file.fd, rows["ptr"][jpeg].astype(np.int64), size[jpeg])
    same = np.ones(len(rows), bool)
    same[jpeg] = (sides_read[0] == width[jpeg]) & (sides_read[1] == height[jpeg])
    demand(same, "not a whole JPEG image of the size that its row gives")


def _verified_manifest(
    file: _File, layout: _Layout, table: NDArray[Any], info: BetonInfo
) -> Manifest | None:
    """Return the manifest after proof that it is the file's; return None for a foreign file."""
    end = layout.table_start
    # A damaged table may place a sample in the manifest's pages, so look for the tail in any case.
    tail = file.read(end - manifest.TAIL.itemsize, np.dtype("u1"), manifest.TAIL.itemsize).tobytes()
    length = manifest.length(tail, layout.page)
    used = int((table["ptr"] + table["size"]).max()) - layout.data_start
    if length is None and end - used - layout.data_start < layout.page:
        return None  # foreign files have no page without a sample
    if length is None or length > end - layout.data_start:
        file.fail(end - manifest.TAIL.itemsize, "its manifest is damaged")
    start = end - length
    try:
        sealed = manifest.parse(file.read(start, np.dtype("u1"), length).tobytes())
    except manifest.DamagedError as error:
        file.fail(start, str(error), "update fastbyol" if "version" in str(error) else AGAIN)
    if (sealed.num_bytes, len(sealed.checksums)) != (file.num_bytes, layout.samples):
        content = f"{len(sealed.checksums)} samples in {sealed.num_bytes} bytes"
        file.fail(start, f"its manifest belongs to another file, of {content}")
    if sealed.structure != manifest.structure_checksum(
        file.fd, layout.rows_end, layout.table_start, file.num_bytes
    ):
        # If the first samples match, labels are damaged; otherwise the manifest describes other
        # images.
        some = slice(0, 8)
        same = (
            manifest.region_checksums(file.fd, info.starts[some], info.sizes[some])
            == sealed.checksums[some]
        )
        what = (
            "labels or image sizes are not those that were written"
            if same.any()
            else "its manifest belongs to another file"
        )
        file.fail(layout.rows_start, what)
    return sealed
