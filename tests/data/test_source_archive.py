"""Pictures in archives: the same as in a folder, or a line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import source_files
from fastbyol.data import archives, loader, sources
from fastbyol.data.beton_write import UnreadableItemError
from fastbyol.data.convert import convert
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import Source
from fastbyol.errors import FastbyolError, UsageError
from source_files import packed, png, random_images, tar_of


def opened(path: Path, **options: object) -> Source:
    scratch = Scratch(path.parent / "scratch")
    return sources.open_source(str(path), scratch=scratch, **options)  # type: ignore[arg-type]


def refused(path: Path, *words: str, **options: object) -> None:
    with pytest.raises(FastbyolError) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value)


def demand_same(one: Source, other: Source) -> None:
    one = pickle.loads(pickle.dumps(one))
    for key in ("kind", "split", "class_names", "names", "skipped", "ignored", "notes", "splits"):
        assert getattr(one, key) == getattr(other, key), key
    assert (one.labels is None) == (other.labels is None)
    if one.labels is not None and other.labels is not None:
        np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.image_bytes(), other.image_bytes())
    for k in range(len(one)):
        np.testing.assert_array_equal(one.image(k), other.image(k))


def splits(folder: Path) -> None:
    source_files.class_folders(folder / "top" / "train", per_class=2)
    source_files.class_folders(folder / "top" / "val", classes=("cow",), per_class=2)


def annotated(folder: Path) -> None:
    """Write tiny-imagenet's val."""
    source_files.class_folders(folder / "train", classes=("n1", "n2"), per_class=2)
    (folder / "val" / "images").mkdir(parents=True)
    for k, image in enumerate(random_images(3, 9, 9)):
        Image.fromarray(image).save(folder / "val" / "images" / f"{k}.png")
    rows = "".join(f"{k}.png\tn{k % 2 + 1}\t0\t0\n" for k in range(2))
    (folder / "val" / "val_annotations.txt").write_text(rows)


def littered(folder: Path) -> None:
    """Write what lies beside pictures, and names of every kind."""
    source_files.class_folders(folder, per_class=1, classes=("é" * 60, "b" * 120))
    for name in ("__MACOSX/a/x.png", ".git/deep/x.png", "b/.x.png", "b/labels.csv", "b/noname"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no picture")
    (folder / "empty" / "deep").mkdir(parents=True)
    (folder / "b" / "x.png").write_text("<html>")
    (folder / "b" / ("long " * 40 + ".png")).write_bytes(png(random_images(1, 8, 8)[0]))


LAYOUTS: dict[str, tuple[Callable[[Path], object], dict[str, object]]] = {
    "classes": (source_files.class_folders, {}),
    "plain": (source_files.odd_pictures, {}),
    "splits": (splits, {}),
    "another split": (splits, {"split": "validation"}),
    "classes without labels": (source_files.class_folders, {"kind": "folder"}),
    "annotations": (annotated, {"split": "val"}),
    "litter": (littered, {}),
}
FORMS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_is_as_a_folder(tmp_path: Path, layout: str) -> None:
    write, options = LAYOUTS[layout]
    folder = tmp_path / "folder"
    write(folder)
    expected = sources.open_source(str(folder), **options)  # type: ignore[arg-type]
    for name in ("a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.zip"):
        demand_same(opened(packed(folder, tmp_path / name), **options), expected)
    for form, number in FORMS.items():
        if layout == "litter" and form == "ustar":
            continue  # which has no long names
        demand_same(
            opened(packed(folder, tmp_path / f"{form}.tar", form=number), **options), expected
        )


def test_every_member_is_read_or_named(tmp_path: Path) -> None:
    """Links, devices, names from elsewhere, holes and unknown types, as tar would unpack them."""
    one, two = (png(image) for image in random_images(2, 9, 9))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:

        def add(
            name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, to: str = ""
        ) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, to
            tar.addfile(info, io.BytesIO(content))

        add("./a/replaced.png", b"old")
        add("a/hard of old.png", kind=tarfile.LNKTYPE, to="a/replaced.png")
        add("a/replaced.png", one)
        add("/a/rooted.png", two)
        add("a/hard.png", kind=tarfile.LNKTYPE, to="./a/rooted.png")
        add("b/link.png", kind=tarfile.SYMTYPE, to="../a/hard.png")
        add("b/link to link.png", kind=tarfile.SYMTYPE, to="link.png")
        add("b/away.png", kind=tarfile.SYMTYPE, to="/etc/passwd")
        add("b/up.png", kind=tarfile.SYMTYPE, to="../../x.png")
        add("b/dangling.png", kind=tarfile.SYMTYPE, to="nowhere.png")
        add("b/loop.png", kind=tarfile.SYMTYPE, to="loop.png")
        add("b/hard to none.png", kind=tarfile.LNKTYPE, to="nowhere.png")
        add("b/folder", kind=tarfile.SYMTYPE, to="../a")
        add("b/folder.png", kind=tarfile.SYMTYPE, to="../later")
        add("later", kind=tarfile.DIRTYPE)
        add("../out.png", one)
        add("a/../../out.png", one)
        add("a/pipe.png", kind=tarfile.FIFOTYPE)
        add("a/device.png", kind=tarfile.CHRTYPE)
        add("a/disk", kind=tarfile.BLKTYPE)
        add("a/odd.png", one, kind=b"V")
        add("/".join(["deep"] * 200) + "/x.png", one)
        add("n" * 2000 + ".png", one)
    source = opened(path)
    images = random_images(2, 9, 9)
    names = ["a/hard.png", "a/replaced.png", "a/rooted.png", "b/link to link.png", "b/link.png"]
    assert list(source.names) == names
    for k, expected in enumerate((1, 0, 1, 1, 1)):
        np.testing.assert_array_equal(source.image(k), images[expected])
    assert [(name[:20], reason) for name, reason in source.skipped if "old" not in name] == [
        ("../out.png", "its name leads out of the archive"),
        ("a/../../out.png", "its name leads out of the archive"),
        ("a/device.png", "is a device, not a regular file"),
        ("a/odd.png", "of the unknown type b'V'"),
        ("a/pipe.png", "is a named pipe, not a regular file"),
        ("b/away.png", "links to what is not in the archive"),
        ("b/dangling.png", "No such file or directory"),
        ("b/hard to none.png", "No such file or directory"),
        ("b/loop.png", "Too many levels of symbolic links"),
        ("b/up.png", "links to what is not in the archive"),
        ("deep/deep/deep/deep/", "its name is too long"),
        ("n" * 20, "its name is too long"),
    ]
    assert "a/hard of old.png" in dict(source.skipped)  # whose bytes are no picture
    assert dict(source.ignored) == {
        "a/disk": "is a device, not a regular file",
        "b/folder": "links to folders that are read anyway or lie around",
        "b/folder.png": "links to folders that are read anyway or lie around",
        "later/": "folders without pictures",
    }
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.tar"]  # nothing is unpacked


def test_tars_of_other_programs(tmp_path: Path) -> None:
    """Read what GNU tar writes, with holes, long names, links, and one tar after another."""
    folder = tmp_path / "folder"
    source_files.class_folders(folder)
    (folder / "ant" / ("x" * 150 + ".png")).hardlink_to(folder / "ant" / "picture 0.png")
    (folder / "ant" / "soft.png").symlink_to("../bee/picture 1.png")
    expected = sources.open_source(str(folder))
    for form in ("gnu", "oldgnu", "pax", "posix"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "-cf", path, f"--format={form}", "-C", folder, "."], check=True)
        demand_same(opened(path), expected)
    with (folder / "bee" / "holes.png").open("wb") as file:
        for k in range(40):  # more than fit into the first map
            file.seek(k << 16)
            file.write(b"x")
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form} holes.tar"
        subprocess.run(["tar", "-Scf", path, f"--format={form}", "-C", folder, "."], check=True)
        source = opened(path)
        assert source.names == expected.names
        (row,) = source.skipped
        assert row[0] == "bee/holes.png"
        assert "sparse" in row[1]
    folders = [tmp_path / name for name in ("one", "two")]
    tars = []
    for part, name in zip(folders, ("ant", "bee"), strict=True):
        source_files.class_folders(part, classes=(name,))
        tars.append(packed(part, tmp_path / f"{name}.tar").read_bytes())
    (tmp_path / "both.tar").write_bytes(b"".join(tars))
    assert opened(tmp_path / "both.tar").class_names == ("ant", "bee")


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    source_files.class_folders(folder)
    (folder / "ant" / ("x" * 150 + ".png")).write_bytes(png(random_images(1, 9, 9)[0]))
    whole = packed(folder, tmp_path / "whole.tar", form=tarfile.GNU_FORMAT).read_bytes()
    path = tmp_path / "a.tar"
    with tarfile.open(tmp_path / "whole.tar") as tar:
        end = max(info.offset_data + info.size for info in tar.getmembers())
        headers = [info.offset for info in tar.getmembers()]
    for stop in range(1, end, 777):
        if not any(header - 512 < stop <= header for header in headers):
            path.write_bytes(whole[:stop])
            refused(path, "get it again")
    path.write_bytes(whole[:end])  # some programs write no end
    assert len(opened(path)) == 13
    path.write_bytes(whole + b"garbage" * 100)
    refused(path, "damaged")
    path.write_bytes(b"")
    refused(path, "no pictures")
    path.write_bytes(b"<html>" * 1000)
    refused(path, "no tar")
    for number in (b"77777777777", b"\x80" + b"\xff" * 11, b"\xff" * 12):  # the second below zero
        head = bytearray(whole[512:1024])
        assert head.startswith(b"ant/")
        head[124:136] = number.ljust(12, b"\0")
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        path.write_bytes(whole[:512] + head + whole[1024:])
        refused(path, "get it again")


METHODS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("method", METHODS)
def test_damaged_compressed_tars_are_refused(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "folder"
    source_files.class_folders(folder, per_class=2)
    plain = packed(folder, tmp_path / "plain.tar").read_bytes()
    whole, path = METHODS[method](plain), tmp_path / f"a.tar.{method}"
    for stop in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:stop])
        refused(path, "damaged or cut off")
    path.write_bytes(whole[:100] + b"\0" * 20 + whole[120:])
    refused(path)
    half = len(plain) // 2
    path.write_bytes(METHODS[method](plain[:half]) + METHODS[method](plain[half:]))
    demand_same(opened(path), sources.open_source(str(folder)))
    path.rename(tmp_path / "b.tar")  # its first bytes say what it is
    demand_same(opened(tmp_path / "b.tar"), sources.open_source(str(folder)))
    with pytest.raises(UsageError, match="is packed"):
        sources.open_source(str(tmp_path / "b.tar"))


def test_a_tar_is_not_unpacked_onto_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(8):
            file.write(bytes(1 << 20))
    free = archives.RESERVE_BYTES + (3 << 20)

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=free - sum(each.stat().st_size for each in folder.iterdir()))

    monkeypatch.setattr(archives.shutil, "disk_usage", usage)
    refused(path, "make room")
    assert (tmp_path / "scratch" / "0.tar").stat().st_size <= 3 << 20


def test_zips_of_other_programs(tmp_path: Path) -> None:
    """Read what Info-ZIP writes, with links, and names as programs write them."""
    folder = tmp_path / "folder"
    source_files.class_folders(folder, classes=("ant", "bée"))
    (folder / "ant" / "soft.png").symlink_to("../bée/picture 1.png")
    expected = sources.open_source(str(folder))
    for level in ("-0", "-9"):
        path = tmp_path / f"{level}.zip"
        subprocess.run(["zip", "-qry", level, path, "."], cwd=folder, check=True)
        demand_same(opened(path), expected)
    picture = png(random_images(1, 9, 9)[0])
    path = tmp_path / "names.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for system, name in ((0, "dos\\back.png"), (3, "ü/x.png"), (3, "t/twice.png")):
            info = zipfile.ZipInfo(name)
            info.create_system = system
            archive.writestr(info, picture)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("t/twice.png", b"the last one counts")
    source = opened(path)
    assert source.class_names == ("dos", "t", "ü")
    assert [name for name, _ in source.skipped] == ["t/twice.png"]


def test_zip64_and_members_that_cannot_be_read(tmp_path: Path) -> None:
    pictures = [png(image) for image in random_images(4, 12, 12)]
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k, picture in enumerate(pictures):
            with archive.open(f"{k}.png", "w", force_zip64=True) as member:
                member.write(picture)
        archive.writestr("lzma.png", pictures[0], zipfile.ZIP_LZMA)
    assert [name for name, _ in opened(path).skipped] == ["lzma.png"]
    assert len(opened(path)) == 4
    data = bytearray(path.read_bytes())
    data[data.index(pictures[2]) + 60] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableItemError, match="checksum"):
        opened(path).image(2)
    at = data.index(b"PK\1\2")
    data[at + 8] |= 1
    path.write_bytes(data)
    assert dict(opened(path).skipped)["0.png"].startswith("is encrypted")
    for stop in (10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:stop])
        refused(path, "damaged zip")


def test_deflated_bombs_are_not_unpacked_to_look_at_their_heads(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.png", png(random_images(1, 9, 9)[0]))
        with archive.open("bomb.png", "w") as member:
            for _ in range(24):
                member.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        source = opened(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert [name for name, _ in source.skipped] == ["bomb.png"]


def test_archives_without_pictures(tmp_path: Path) -> None:
    source_files.cifar10(tmp_path / "cifar")
    path = packed(tmp_path / "cifar", tmp_path / "cifar-10-python.tar.gz")
    refused(path, "files without a suffix", "unpack it (`tar -xf")
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    refused(tmp_path / "a.tar.zst", "unzstd")
    refused(tmp_path / "none.tar", "no such file")


def imagenet(folder: Path) -> tuple[list[bytes], list[int]]:
    """Write an archive of each class; return pictures and labels."""
    folder.mkdir()
    pictures = [png(image) for image in random_images(6, 9, 9)]
    for k, name in enumerate(("n01", "n02")):
        own = pictures[3 * k : 3 * k + 3]
        tar_of(folder / f"{name}.tar", {f"{name}_{j}.JPEG": one for j, one in enumerate(own)})
    return pictures, [0, 0, 0, 1, 1, 1]


def test_archives_of_classes(tmp_path: Path) -> None:
    """ImageNet's: a tar of tars, or a folder of tars, which may be shards as well."""
    folder = tmp_path / "train"
    pictures, labels = imagenet(folder)
    refused(folder, "--kind classes", "webdataset")
    for source in (
        opened(folder, kind="classes"),
        opened(packed(folder, tmp_path / "ILSVRC2012_img_train.tar")),
        opened(packed(folder, tmp_path / "ILSVRC2012_img_train.tar.gz")),
    ):
        assert source.class_names == ("n01", "n02")
        assert source.labels is not None
        assert source.labels.tolist() == labels
        for k, picture in enumerate(pictures):
            np.testing.assert_array_equal(
                source.image(k), np.asarray(Image.open(io.BytesIO(picture)))
            )
    assert not opened(folder, kind="folder").labelled
    assert opened(folder, kind="webdataset").kind == "webdataset"


def test_a_compressed_tar_is_converted_and_nothing_is_left(tmp_path: Path) -> None:
    images, labels = source_files.class_folders(tmp_path / "folder")
    path = packed(tmp_path / "folder", tmp_path / "a.tar.gz")
    report = convert(str(path), tmp_path / "a.beton", workers=1)
    assert (report.num_written, report.class_names) == (12, ("ant", "bee", "cow"))
    read = loader.read_all(tmp_path / "a.beton", workers=1, size=24)
    assert read.labels is not None
    assert read.labels.tolist() == labels
    np.testing.assert_array_equal(read.images.numpy(), images)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.beton", "a.tar.gz", "folder"]


def test_sources_of_archives_are_found_by_their_names(tmp_path: Path) -> None:
    source_files.class_folders(tmp_path / "folder")
    path = packed(tmp_path / "folder", tmp_path / "a.zip")
    assert sources.is_source(str(path))
    assert list(sources.files_of(str(path)).values()) == [str(path)]
    assert sources.detect(path) == "archive"
    packed(tmp_path / "folder", tmp_path / "a.tar")
    assert sources.detect(tmp_path) is None  # pictures with archives beside them
    shutil.rmtree(tmp_path / "folder")
    assert sources.detect(tmp_path) == "archive"
    np.save(tmp_path / "images.npy", random_images(2, 8, 8))
    assert sources.detect(tmp_path) == "npy"
