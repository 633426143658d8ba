"""Damaged betons by number, kind and place by seed, and a reader of betons by hand.

Written from the format's description alone. ``Content`` is the oracle: an accepted file must
deliver what its bytes say, and a sealed one what was written.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import turbojpeg

PAGE = 1 << 21
HEADER, DESCRIPTOR, REGION = 24, 1041, 24
Rng = np.random.Generator
# Member sizes and alignments of a row by field type: float, int, image, bytes, array, json, tensor.
MEMBERS = {0: (8, 8), 1: (8, 8), 2: (13, 1), 3: (16, 1), 4: (8, 8), 5: (16, 1), 6: (8, 8)}


@dataclass(frozen=True)
class Base:
    """A good file with the bytes where pages (``start``) and allocation ``table`` begin.

    ``sealed`` files have a manifest.
    """

    name: str
    data: bytes
    sealed: bool

    @property
    def num_fields(self) -> int:
        return int(struct.unpack_from("<H", self.data, 2)[0])

    @property
    def samples(self) -> int:
        return int(struct.unpack_from("<Q", self.data, 8)[0])

    @property
    def table(self) -> int:
        return int(struct.unpack_from("<Q", self.data, 16)[0])

    @property
    def rows(self) -> int:
        return HEADER + self.num_fields * DESCRIPTOR

    @property
    def types(self) -> list[int]:
        return [self.data[HEADER + k * DESCRIPTOR] for k in range(self.num_fields)]

    @property
    def start(self) -> int:
        return -(-(self.rows + self.samples * row_layout(self.types)[1]) // PAGE) * PAGE

    @property
    def regions(self) -> NDArray[np.uint64]:
        """Return (n, 3): sample, pointer, size."""
        return np.frombuffer(self.data[self.table :], "<u8").reshape(-1, 3)

    @property
    def manifest(self) -> int:
        """Return the manifest's offset, or the table's without one."""
        used = int((self.regions[:, 1] + self.regions[:, 2]).max()) - self.start
        return self.start + -(-used // PAGE) * PAGE


def row_layout(types: list[int]) -> tuple[list[int], int]:
    """Return the members' offsets in a row, and its bytes, by C's alignment."""
    offsets, at, widest = [], 0, 1
    for kind in types:
        size, alignment = MEMBERS[kind]
        at = -(-at // alignment) * alignment
        offsets.append(at)
        at, widest = at + size, max(widest, alignment)
    return offsets, -(-at // widest) * widest


def wide(rng: Rng, data: bytes) -> int:
    """Return a number that parsers stumble over."""
    near = [
        0,
        1,
        2,
        3,
        7,
        24,
        255,
        1 << 15,
        (1 << 16) - 1,
        1 << 20,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        2 * PAGE,
        1 << 31,
        (1 << 32) - 1,
    ]
    far = [
        1 << 40,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 1,
        (1 << 64) - 8,
        len(data),
        len(data) - 1,
        len(data) + 1,
    ]
    return int(rng.choice(np.array(near + far, np.uint64)))


def put(data: bytearray, at: int, value: int, size: int) -> None:
    data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def flip_structure(base: Base, data: bytearray, rng: Rng) -> None:
    """Flip one to four bits of header, used descriptor bytes, rows or table."""
    head = [
        k
        for k in range(base.rows + base.samples * row_layout(base.types)[1])
        if k < HEADER or data[k]
    ]
    places = [*head, *range(base.table, len(data))]
    for at in rng.choice(places, int(rng.integers(1, 5))).tolist():
        data[at] ^= 1 << int(rng.integers(8))


def flip_payload(base: Base, data: bytearray, rng: Rng) -> None:
    """Flip one to four bits of samples' regions."""
    for _ in range(int(rng.integers(1, 5))):
        _, start, size = (int(v) for v in base.regions[rng.integers(len(base.regions))])
        data[start + int(rng.integers(size))] ^= 1 << int(rng.integers(8))


def flip_anywhere(base: Base, data: bytearray, rng: Rng) -> None:
    for at in rng.integers(0, len(data), int(rng.integers(1, 9))).tolist():
        data[at] ^= 1 << int(rng.integers(8))


def overwrite(base: Base, data: bytearray, rng: Rng) -> None:
    """Overwrite a run with noise, half of the time where samples lie."""
    at = int(rng.integers(len(data)))
    if rng.integers(2):
        at = int(base.regions[rng.integers(len(base.regions)), 1])
    size = min(int(2 ** rng.uniform(0, 14)), len(data) - at)
    data[at : at + size] = rng.bytes(size)


def lose_blocks(base: Base, data: bytearray, rng: Rng) -> None:
    """Zero blocks of 4 KiB, as if they never reached the disk."""
    block = int(rng.integers(-(-len(data) // 4096)))
    if rng.integers(2):
        block = int(base.regions[rng.integers(len(base.regions)), 1]) // 4096
    stop = min(len(data), (block + int(rng.integers(1, 5))) * 4096)
    data[block * 4096 : stop] = bytes(stop - block * 4096)


def cut(base: Base, data: bytearray, rng: Rng) -> None:
    edges = [
        1,
        23,
        24,
        base.rows - 1,
        base.rows,
        base.start,
        base.table - 1,
        base.table,
        base.table + 1,
        base.table + 24,
    ]
    edges += [len(data) - 1, len(data) - 24, len(data) - 25, base.manifest, base.table - 64]
    del data[int(rng.integers(len(data))) if rng.integers(2) else int(rng.choice(edges)) :]


def grow(base: Base, data: bytearray, rng: Rng) -> None:
    size = int(rng.choice([1, 7, 24, 48, 24 * base.samples, 4096, PAGE]))
    data += rng.bytes(size) if rng.integers(2) else bytes(size)


def header_value(base: Base, data: bytearray, rng: Rng) -> None:
    at, size = ((0, 2), (2, 2), (4, 4), (8, 8), (16, 8))[rng.integers(5)]
    value = wide(rng, bytes(data))
    if rng.integers(3) == 0:
        value = int.from_bytes(data[at : at + size], "little") + int(
            rng.choice([-PAGE, -24, -1, 1, 24, PAGE])
        )
    put(data, at, value, size)


def row_value(base: Base, data: bytearray, rng: Rng) -> None:
    """Put a huge or odd number into a member of a sample's row."""
    offsets, row = row_layout(base.types)
    k = int(rng.integers(base.num_fields))
    parts = {2: ((0, 1), (1, 2), (3, 2), (5, 8)), 3: ((0, 8), (8, 8)), 5: ((0, 8), (8, 8))}.get(
        base.types[k], ((0, 8),)
    )
    at, size = parts[rng.integers(len(parts))]
    at += base.rows + int(rng.integers(base.samples)) * row + offsets[k]
    step = int(rng.choice([-PAGE, -8, -1, 1, 8, PAGE]))
    put(
        data,
        at,
        wide(rng, bytes(data))
        if rng.integers(2)
        else int.from_bytes(data[at : at + size], "little") + step,
        size,
    )


def table_value(base: Base, data: bytearray, rng: Rng) -> None:
    at = base.table + REGION * int(rng.integers(len(base.regions))) + 8 * int(rng.integers(3))
    step = int(rng.choice([-PAGE, -8, -1, 1, 8, PAGE]))
    put(
        data,
        at,
        wide(rng, bytes(data))
        if rng.integers(2)
        else int.from_bytes(data[at : at + 8], "little") + step,
        8,
    )


def _move(base: Base, data: bytearray, region: int, to: int) -> None:
    """Point a region and the row that owns it elsewhere, in agreement."""
    old = base.data[base.table + REGION * region + 8 :][:8]
    put(data, base.table + REGION * region + 8, to, 8)
    end = base.rows + base.samples * row_layout(base.types)[1]
    where = base.data.find(old, base.rows, end)
    if where >= 0:
        put(data, where, to, 8)


def overlap(base: Base, data: bytearray, rng: Rng) -> None:
    """Let two samples share bytes; row and table agree on it."""
    one, other = (int(v) for v in rng.integers(len(base.regions), size=2))
    _move(
        base,
        data,
        one,
        int(base.regions[other, 1])
        + int(rng.choice([0, 0, 1, 3, int(base.regions[other, 2]) - 1])),
    )


def point_at_manifest(base: Base, data: bytearray, rng: Rng) -> None:
    """Put a region into the manifest, the head, the table or behind the end."""
    to = (
        base.manifest,
        base.table - 100,
        base.table,
        0,
        base.rows,
        len(data) - 10,
        len(data) + PAGE,
    )[rng.integers(7)]
    _move(base, data, int(rng.integers(len(base.regions))), int(to))


def swap_samples(base: Base, data: bytearray, rng: Rng) -> None:
    """Exchange rows, table entries or data of two samples."""
    kind, row = int(rng.integers(3)), row_layout(base.types)[1]
    i, j = (int(v) for v in rng.choice(base.samples, 2, replace=False))
    if kind == 0:
        a, b, size = base.rows + i * row, base.rows + j * row, row
    elif kind == 1:
        a, b, size = base.table + REGION * i, base.table + REGION * j, REGION
    else:
        (_, a, one), (_, b, two) = ((int(v) for v in base.regions[k]) for k in (i, j))
        size = min(one, two)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def layout(base: Base, data: bytearray, rng: Rng) -> None:
    """Change descriptors: another type, name or arguments, two exchanged, one more or less."""
    k = HEADER + DESCRIPTOR * int(rng.integers(base.num_fields))
    match int(rng.integers(5)):
        case 0:
            data[k] = int(rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 255]))
        case 1:
            data[k + 1 : k + 17] = rng.choice(
                np.frombuffer(b"label image\0\0\0x\xff\n", np.uint8), 16
            ).tobytes()
        case 2:
            data[k + 17 + int(rng.integers(1024))] = int(rng.integers(1, 256))
        case 3:
            other = HEADER + DESCRIPTOR * int(rng.integers(base.num_fields))
            data[k : k + DESCRIPTOR], data[other : other + DESCRIPTOR] = (
                data[other : other + DESCRIPTOR],
                data[k : k + DESCRIPTOR],
            )
        case _:
            put(data, 2, max(0, base.num_fields + int(rng.choice([-1, 1, 2]))), 2)


def replace_whole(base: Base, data: bytearray, rng: Rng) -> None:
    """Replace the file by something that is no beton."""
    size = int(2 ** rng.uniform(0, 20))
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    contents = (
        b"",
        b"\0",
        bytes(size),
        b"hello beton\n" * size,
        rng.bytes(size),
        picture.getvalue(),
        b"PK\3\4" + bytes(size),
    )
    contents += (struct.pack("<HHIQQ", 2, 2, PAGE, base.samples, 0) + bytes(size), b"\2\0" * size)
    data[:] = contents[rng.integers(len(contents))]


KINDS: tuple[Callable[[Base, bytearray, Rng], None], ...] = (
    flip_structure,
    flip_payload,
    flip_anywhere,
    overwrite,
    lose_blocks,
    cut,
    grow,
    header_value,
    row_value,
    table_value,
    overlap,
    point_at_manifest,
    swap_samples,
    layout,
    replace_whole,
)


def splice(base: Base, other: Base, data: bytearray, rng: Rng) -> None:
    """Insert a part of another file: header, head, rows, a page, end or table."""
    match int(rng.integers(5)):
        case 0:
            data[:HEADER] = other.data[:HEADER]
        case 1:
            data[: other.rows] = other.data[: other.rows]
        case 2:
            data[: other.start] = other.data[: other.start]
        case 3:
            page = PAGE * int(rng.integers(1, len(other.data) // PAGE))
            data[page : page + PAGE] = other.data[page : page + PAGE]
        case _:
            data[base.table :] = other.data[other.table :]


def mutated(bases: list[Base], seed: int) -> tuple[Base, str, bytes]:
    """Return mutation ``seed``: base, kinds of damage, bytes. Every ninth is damaged twice."""
    rng = np.random.default_rng([6, seed])
    base = bases[seed % len(bases)]
    data, names = bytearray(base.data), []
    for _ in range(2 if rng.integers(9) == 0 else 1):
        kind = int(rng.integers(len(KINDS) + 1))
        if kind == len(KINDS):
            splice(base, bases[rng.integers(len(bases))], data, rng)
            names.append("splice")
        else:
            # A second damage may aim behind the end that the first one left.
            before = bytes(data)
            try:
                KINDS[kind](base, data, rng)
            except (IndexError, ValueError, OverflowError):
                data = bytearray(before)
            names.append(KINDS[kind].__name__)
    return base, "+".join(names), bytes(data)


def mutated_manifest(bases: list[Base], seed: int) -> tuple[Base, str, bytes]:
    """Return mutation ``seed`` of the manifest's pages alone; ``bases`` are sealed."""
    rng = np.random.default_rng([7, seed])
    base = bases[seed % len(bases)]
    data = bytearray(base.data)
    at, tail = base.manifest, base.table - 64
    used = [*range(at, at + 4 * base.samples + 2), *range(tail, base.table)]
    match int(rng.integers(6)):
        case 0:
            for _ in range(int(rng.integers(1, 5))):
                data[int(rng.choice(used))] ^= 1 << int(rng.integers(8))
            name = "flipped"
        case 1:
            offset, size = ((0, 8), (16, 4), (20, 4), (24, 8), (32, 8), (40, 4), (48, 8), (-4, 4))[
                rng.integers(8)
            ]
            put(data, tail + offset, wide(rng, base.data), size)
            name = "huge numbers"
        case 2:
            size = int(2 ** rng.uniform(0, 21))
            start = int(rng.integers(PAGE - size + 1))
            data[at + start : at + start + size] = rng.bytes(size)
            name = "noise"
        case 3:
            data[at + int(rng.integers(PAGE)) : base.table] = b""
            name = "cut"
        case 4:
            other = bases[rng.integers(len(bases))]
            data[at : base.table] = other.data[other.manifest : other.table]
            name = "of another file"
        case _:
            first = int(rng.integers(PAGE // 4096)) * 4096
            data[at + first : base.table] = bytes(base.table - at - first)
            name = "lost blocks"
    return base, name, bytes(data)


@dataclass(frozen=True)
class Content:
    """A file's content by its bytes: (mode, height, width, bytes) a sample, and labels or None."""

    images: list[tuple[int, int, int, bytes]]
    labels: list[int] | None

    def decoded(self, size: int, *, exact: bool = False) -> NDArray[np.uint8]:
        """Return uint8 (N, H, W, 3), stored or as the centre square scaled to ``size``.

        ``exact``: JPEG by torchvision's slow transform instead of FFCV's fast one.
        """
        same = len({(height, width) for _, height, width, _ in self.images}) == 1
        pictures = [_pixels(*image, exact) for image in self.images]
        return np.stack(pictures if same else [_square(picture, size) for picture in pictures])


def read_by_hand(data: bytes) -> Content:
    """Read a file that keeps to the format. Any exception may come of one that does not."""
    _, num_fields, _, samples, table = struct.unpack_from("<HHIQQ", data)
    types = [data[HEADER + k * DESCRIPTOR] for k in range(num_fields)]
    names = [data[HEADER + k * DESCRIPTOR + 1 :][:16].rstrip(b"\0") for k in range(num_fields)]
    offsets, row = row_layout(types)
    sizes = {ptr: size for _, ptr, size in struct.iter_unpack("<QQQ", data[table:])}
    images, image = [], offsets[types.index(2)]
    ints = [k for k, kind in enumerate(types) if kind == 1]
    chosen = next((k for k in ints if names[k] == b"label"), ints[0] if len(ints) == 1 else None)
    labels: list[int] | None = None if chosen is None else []
    for sample in range(samples):
        at = HEADER + num_fields * DESCRIPTOR + sample * row
        mode, width, height, ptr = struct.unpack_from("<BHHQ", data, at + image)
        images.append((mode, height, width, data[ptr : ptr + sizes[ptr]]))
        if labels is not None and chosen is not None:
            labels.append(struct.unpack_from("<q", data, at + offsets[chosen])[0])
    return Content(images, labels)


def _pixels(mode: int, height: int, width: int, data: bytes, exact: bool) -> NDArray[np.uint8]:
    if mode == 1:
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    failed, pixels = turbojpeg.Decompressor().decode(data, height, width, exact=exact)
    if failed:
        raise ValueError("libturbojpeg reports damage")
    return pixels


def _square(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(picture[top : top + side, left : left + side])
    return np.asarray(cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA), np.uint8)
