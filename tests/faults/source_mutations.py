"""Damaged sources by number: a small data set of every kind, with one file damaged by seed.

A base is names and bytes of files; a mutation changes bytes, or what lies under a name.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import source_files

Rng = np.random.Generator


@dataclass(frozen=True)
class Base:
    """A good source: its files by name, the path to open, and options."""

    name: str
    files: dict[str, bytes]
    at: str = "."
    options: dict[str, Any] = field(default_factory=dict)


def bases(folder: Path) -> list[Base]:
    """Return one of every kind and form, written below ``folder``."""
    made = []

    def add(
        name: str, write: Callable[[Path], object], at: str = ".", without: str = "", **options: Any
    ) -> None:
        to = folder / name
        to.mkdir(parents=True)
        write(to)
        paths = [
            path
            for path in sorted(to.rglob("*"))
            if path.is_file() and not (without and re.match(without, path.name))
        ]
        files = {str(path.relative_to(to)): path.read_bytes() for path in paths}
        made.append(Base(name, files, at, options))

    add("npz", lambda to: source_files.npz(to / "a.npz", count=12), "a.npz")
    add("npz of texts", _texts, "a.npz")
    add("npz of splits", _medical, "a.npz", split="test")
    add("npy", _arrays)
    add(
        "npy in Fortran's order",
        lambda to: np.save(to / "x.npy", np.asfortranarray(_images(9))),
        "x.npy",
    )
    add("cifar10", lambda to: source_files.cifar10(to, per_batch=3, test=3))
    add(
        "cifar100",
        lambda to: source_files.cifar100(to, train=5, test=5),
        without="train",
        split="test",
    )
    add("cifar10 binary", lambda to: source_files.cifar_binary(to, count=3))
    add(
        "cifar100 binary",
        lambda to: source_files.cifar_binary(to, classes=100, count=5),
        without="test",
    )
    add(
        "cifar100 matlab",
        lambda to: source_files.cifar_matlab(to, classes=100, count=4),
        without="test",
    )
    add(
        "stl10",
        lambda to: source_files.stl10(to, train=6, test=1, unlabeled=3),
        without="test",
        split="train+unlabeled",
    )
    add(
        "stl10 fold",
        lambda to: source_files.stl10(to, train=7, test=1, unlabeled=1),
        without="test|unlab",
        fold=3,
    )
    stl10 = source_files.stl10_matlab
    add(
        "stl10 matlab",
        lambda to: stl10(to, train=6, test=1, unlabeled=1),
        without="test|unlab",
        fold=2,
    )
    add(
        "stl10 hdf5",
        lambda to: stl10(to, train=5, test=1, unlabeled=3),
        without="test|train",
        split="unlabeled",
    )
    add("svhn", lambda to: source_files.svhn(to, train=5, test=4), without="test")
    add("idx", lambda to: source_files.idx(to, train=6, test=5, packed=False))
    add(
        "idx packed",
        lambda to: source_files.idx(to, train=6, test=5),
        without="train",
        split="test",
    )
    add("classes", lambda to: source_files.class_folders(to, per_class=3))
    add("classes of splits", _splits, split="val")
    add("odd pictures", lambda to: source_files.odd_pictures(to / "odd"), "odd")
    add("pictures of every format", _formats)
    add("tar", lambda to: _archive(to, "a.tar"), "a.tar")
    add("tar of pax headers", lambda to: _archive(to, "a.tar", tarfile.PAX_FORMAT), "a.tar")
    add("tar.gz", lambda to: _archive(to, "a.tar.gz"), "a.tar.gz")
    add("tar.bz2", lambda to: _archive(to, "a.tar.bz2"), "a.tar.bz2")
    add("tar.xz", lambda to: _archive(to, "a.tar.xz"), "a.tar.xz")
    add("zip", lambda to: _archive(to, "a.zip"), "a.zip")
    add("zip, stored", _stored_zip, "a.zip")
    add("webdataset", lambda to: source_files.webdataset(to, shards=2, per_shard=3))
    add(
        "webdataset of braces",
        lambda to: source_files.webdataset(to, shards=2, per_shard=3, labels="json"),
        "shard-{000000..000001}.tar",
    )
    add("parquet", lambda to: source_files.parquet(to, train=6, test=2), without="test")
    add("parquet without packing", _plain_parquet, "a.parquet")
    add("saved set", lambda to: source_files.saved_set(to, train=6, test=3), split="test")
    add("arrow file", _arrow, "a.arrow")
    return made


def _images(count: int) -> source_files.Images:
    return source_files.random_images(count, 14, 12, 1)


def _texts(to: Path) -> None:
    labels = np.array([("cat", "dog", "ünï")[k % 3] for k in range(12)])
    np.savez(to / "a.npz", images=source_files.random_images(12, 16, 16), labels=labels)


def _medical(to: Path) -> None:
    arrays = {}
    for split, count in (("train", 5), ("val", 2), ("test", 4)):
        arrays |= {
            f"{split}_images": _images(count),
            f"{split}_labels": np.arange(count, dtype=np.uint8)[:, None],
        }
    np.savez(to / "a.npz", **arrays)


def _arrays(to: Path) -> None:
    for split, count in (("train", 5), ("test", 4)):
        np.save(to / f"X_{split}.npy", _images(count))
        np.save(to / f"y_{split}.npy", np.arange(count) * 10**6)


def _splits(to: Path) -> None:
    for split in ("train", "val"):
        source_files.class_folders(to / split, per_class=2)


def _archive(to: Path, name: str, form: int = tarfile.GNU_FORMAT) -> None:
    """Write class folders, links and long names as an archive in ``to``."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        source_files.class_folders(folder, classes=("ant", "b" * 150), per_class=2)
        (folder / "ant" / "link.png").symlink_to("picture 0.png")
        (folder / "ant" / "notes.txt").write_text("no picture")
        source_files.packed(folder, to / name, form=form)


def _stored_zip(to: Path) -> None:
    with zipfile.ZipFile(to / "a.zip", "w") as archive:
        for k, image in enumerate(_images(5)):
            archive.writestr(f"{'ab'[k % 2]}/{k}.png", source_files.png(image))


def _tables() -> Any:
    return source_files.table_of(source_files.random_images(7, 8, 9), [k % 3 for k in range(7)])


def _plain_parquet(to: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(_tables(), to / "a.parquet", compression="none", use_dictionary=False)


def _arrow(to: Path) -> None:
    import pyarrow

    table = _tables()
    with pyarrow.ipc.new_file(to / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=3)


def _formats(to: Path) -> None:
    picture = Image.fromarray(source_files.random_images(1, 30, 40, 2)[0])
    for name in (
        "a.png",
        "b.jpg",
        "c.tif",
        "d.gif",
        "e.bmp",
        "f.webp",
        "g.ppm",
        "h.tga",
        "i.jp2",
        "j.avif",
        "k.dib",
        "l.pbm",
    ):
        (picture.convert("1") if name == "l.pbm" else picture).save(to / name)
    for name, how in (
        ("m.tif", "tiff_lzw"),
        ("n.tif", "jpeg"),
        ("o.tif", "tiff_deflate"),
        ("p.tif", "packbits"),
    ):
        picture.save(to / name, compression=how)
    picture.save(to / "q.jpg", progressive=True)
    picture.convert("P").save(
        to / "r.gif", save_all=True, append_images=[picture.convert("P").rotate(90)]
    )


def wide(rng: Rng) -> int:
    """Return a number that parsers stumble over."""
    near = [
        0,
        1,
        2,
        3,
        4,
        255,
        256,
        10_000,
        (1 << 15) - 1,
        1 << 15,
        (1 << 16) - 1,
        1 << 20,
        1 << 24,
        (1 << 31) - 1,
        1 << 31,
    ]
    return int(
        rng.choice(
            np.array(
                [*near, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1],
                np.uint64,
            )
        )
    )


def put(data: bytearray, at: int, rng: Rng) -> None:
    """Put a wide number of 1, 2, 4 or 8 bytes, in either order."""
    size = int(rng.choice([1, 2, 4, 4, 8]))
    number = (wide(rng) & ((1 << 8 * size) - 1)).to_bytes(
        size, "little" if rng.integers(2) else "big"
    )
    data[at : at + size] = number


def flip_head(data: bytearray, rng: Rng) -> None:
    """Flip one to four bits of the first bytes."""
    for _ in range(int(rng.integers(1, 5))):
        data[int(rng.integers(min(len(data), 200)))] ^= 1 << int(rng.integers(8))


def flip_anywhere(data: bytearray, rng: Rng) -> None:
    for at in rng.integers(0, len(data), int(rng.integers(1, 9))).tolist():
        data[at] ^= 1 << int(rng.integers(8))


def enlarge_head(data: bytearray, rng: Rng) -> None:
    put(data, int(rng.integers(min(len(data), 160))), rng)


def enlarge_anywhere(data: bytearray, rng: Rng) -> None:
    put(data, int(rng.integers(len(data))), rng)


def enlarge_marked(data: bytearray, rng: Rng) -> None:
    """Change a number behind a mark of zip, PNG, TIFF, JPEG, pickle, HDF5, arrow or parquet."""
    marks = rb"IHDR|IDAT|\xff\xc0|\xff\xc2|\xff\xda|II\*\0|RIFF|VP8|"
    marks += rb"ihdr|ispe|FRHP|TREE|SNOD|HEAP|[TXBrj]"
    marks += rb"|\xff\xff\xff\xff|PAR1"
    marks += rb"|PK\x01\x02|PK\x03\x04|PK\x05\x06"
    places = [match.end() for match in re.finditer(marks, bytes(data[:100_000]), re.DOTALL)]
    put(data, int(rng.choice(places)) + int(rng.integers(30) if rng.integers(2) else 0), rng)
    if data[12:16] == b"IHDR":  # whose checksum would be found out first
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))


def other_digits(data: bytearray, rng: Rng) -> None:
    """Change a number in letters: npy's shape, PPM's size, a fold's index."""
    hits = list(re.finditer(rb"\d+", bytes(data[:4000])))
    match = hits[int(rng.integers(len(hits)))]
    data[match.start() : match.end()] = str(wide(rng) - int(rng.integers(2)) * wide(rng)).encode()


def zero(data: bytearray, rng: Rng) -> None:
    at = int(rng.integers(len(data)))
    size = min(int(2 ** rng.uniform(0, 13)), len(data) - at)
    data[at : at + size] = bytes(size)


def noise(data: bytearray, rng: Rng) -> None:
    at = int(rng.integers(len(data)))
    size = min(int(2 ** rng.uniform(0, 13)), len(data) - at)
    data[at : at + size] = rng.bytes(size)


def cut(data: bytearray, rng: Rng) -> None:
    del data[
        int(rng.integers(len(data))) if rng.integers(2) else len(data) - int(rng.integers(1, 40)) :
    ]


def grow(data: bytearray, rng: Rng) -> None:
    size = int(rng.choice([1, 2, 3072, 3073, 27_648, 100_000]))
    data += rng.bytes(size) if rng.integers(2) else bytes(size)


def drop(data: bytearray, rng: Rng) -> None:
    """Drop bytes, so that all behind them moves."""
    at = int(rng.integers(len(data)))
    del data[at : at + int(rng.integers(1, 20))]


BYTES = (
    *(flip_head, flip_anywhere, enlarge_head, enlarge_head, enlarge_anywhere, enlarge_marked),
    *(enlarge_marked, other_digits, zero, noise, cut, grow, drop),
)


def inside(name: str, data: bytes, change: Callable[[bytearray, Rng], None], rng: Rng) -> bytes:
    """Change compressed or checked content and pack it again with right checksums."""
    if name.endswith(".gz"):
        return gzip.compress(_changed(gzip.decompress(data), change, rng))
    if name.endswith(".bz2"):
        return bz2.compress(_changed(bz2.decompress(data), change, rng))
    if name.endswith(".xz"):
        return lzma.compress(_changed(lzma.decompress(data), change, rng))
    if name.endswith(".tar"):
        return _with_checksums(_changed(data, change, rng))
    if name.endswith((".npz", ".zip")):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        chosen = str(rng.choice(list(members)))
        members[chosen] = _changed(members[chosen], change, rng)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return packed.getvalue()
    if name.endswith(".mat") and data[:10] == b"MATLAB 5.0":
        elements, at = [], 128
        while at < len(data):
            kind, size = struct.unpack_from("<II", data, at)
            elements.append((kind, data[at + 8 : at + 8 + size]))
            at += 8 + size
        chosen_at = int(rng.integers(len(elements)))
        kind, content = elements[chosen_at]
        changed = _changed(zlib.decompress(content) if kind == 15 else content, change, rng)
        elements[chosen_at] = (kind, zlib.compress(changed) if kind == 15 else changed)
        return data[:128] + b"".join(
            struct.pack("<II", kind, len(content)) + content for kind, content in elements
        )
    return _changed(data, change, rng)


def _with_checksums(data: bytes) -> bytes:
    """Return a tar with right checksums in its headers."""
    new = bytearray(data)
    for at in range(0, len(new) - 511, 512):
        if new[at + 257 : at + 262] == b"ustar":
            new[at + 148 : at + 156] = b" " * 8
            new[at + 148 : at + 156] = b"%06o\0 " % sum(new[at : at + 512])
    return bytes(new)


def _changed(data: bytes, change: Callable[[bytearray, Rng], None], rng: Rng) -> bytes:
    """Return ``data`` after ``change``, or unchanged where there is nothing to change."""
    new = bytearray(data)
    try:
        change(new, rng)
    except (IndexError, ValueError, OverflowError):
        return data
    return bytes(new)


def put_special(path: Path, rng: Rng) -> str:
    """Put something else under the file's name; return its kind."""
    kind = str(
        rng.choice(
            ["pipe", "folder", "loop", "dangling", "device", "parent", "absent", "empty", "renamed"]
        )
    )
    content = path.read_bytes()
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to("nowhere")
        case "device":
            path.symlink_to(str(rng.choice(["/dev/zero", "/dev/null"])))
        case "parent":
            path.symlink_to("..")
        case "empty":
            path.touch()
        case "renamed":
            ending = str(
                rng.choice(
                    [
                        ".png",
                        ".npy",
                        ".npz",
                        ".gz",
                        ".tar",
                        ".zip",
                        ".tgz",
                        ".jpg",
                        ".mat",
                        ".bin",
                        ".tif",
                        "",
                        "\udcff",
                        "\n",
                    ]
                )
            )
            path.with_name(path.name.partition(".")[0] + ending).write_bytes(content)
    return kind


def mutate(stated: list[Base], number: int, folder: Path) -> tuple[Base, str]:
    """Write mutation ``number`` below the empty ``folder``; return its base and the change."""
    rng = np.random.default_rng([9, number])
    base = stated[number % len(stated)]
    for name, content in base.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    done = []
    for _ in range(2 if rng.integers(6) == 0 else 1):
        name = str(rng.choice(list(base.files)))
        path = folder / name
        if not path.is_file() or not path.stat().st_size:
            continue
        match int(rng.integers(12)):
            case 0:
                done.append(put_special(path, rng))
            case 1:
                other = stated[int(rng.integers(len(stated)))] if rng.integers(2) else base
                content = other.files[str(rng.choice(list(other.files)))]
                at = int(rng.integers(len(content)))
                path.write_bytes(
                    content if rng.integers(2) else path.read_bytes()[:at] + content[at:]
                )
                done.append("splice")
            case _:
                change = BYTES[int(rng.integers(len(BYTES)))]
                content = path.read_bytes()
                with contextlib.suppress(Exception):  # what is damaged already need not unpack
                    content = (inside if rng.integers(2) else _outside)(name, content, change, rng)
                path.write_bytes(content)
                done.append(change.__name__)
    return base, "+".join(done)


def _outside(_: str, data: bytes, change: Callable[[bytearray, Rng], None], rng: Rng) -> bytes:
    return _changed(data, change, rng)
