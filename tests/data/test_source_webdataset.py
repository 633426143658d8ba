"""WebDataset's shards: samples, labels and splits, against what was written."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastbyol.data import sources
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import Source
from fastbyol.data.source_webdataset import expanded
from fastbyol.errors import UsageError
from source_files import png, random_images, tar_of, webdataset


def opened(path: Path | str, **options: object) -> Source:
    scratch = Scratch(Path(path).parent / "scratch")
    return sources.open_source(str(path), scratch=scratch, **options)  # type: ignore[arg-type]


def refused(path: Path | str, *words: str, **options: object) -> None:
    with pytest.raises(UsageError) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def demand(source: Source, images: np.ndarray, labels: list[int] | None) -> None:
    assert source.kind == "webdataset"
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert len(source) == len(images)
    for k, image in enumerate(images):
        np.testing.assert_array_equal(source.image(k), image)


@pytest.mark.parametrize("labels", ["cls", "json"])
def test_shards(tmp_path: Path, labels: str) -> None:
    images, numbers = webdataset(tmp_path / "set", labels=labels)
    for path in (tmp_path / "set", tmp_path / "set" / "shard-{000000..000002}.tar"):
        source = opened(path)
        demand(source, images, numbers)
        assert source.class_names == tuple("0123456")
        assert source.names[4] == "shard-000001.tar/00000004.png"
        assert not source.skipped
        assert {kind for _, kind in source.ignored} == {".txt files"}
    demand(opened(tmp_path / "set" / "shard-000001.tar"), images[4:8], numbers[4:8])
    demand(
        opened(tmp_path / "set" / "shard-{000002..000001}.tar"),
        np.concatenate([images[8:], images[4:8]]),
        numbers[8:] + numbers[4:8],
    )
    assert not opened(tmp_path / "set" / "shard-000000.tar", kind="folder").labelled


def test_compressed_shards(tmp_path: Path) -> None:
    images, numbers = webdataset(tmp_path / "set")
    for number, path in enumerate(sorted((tmp_path / "set").iterdir())):
        with tarfile.open(path) as old, tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz") as new:
            for info in old:
                new.addfile(info, old.extractfile(info))
    demand(opened(tmp_path / "{0..2}.tar.gz"), images, numbers)


def test_splits(tmp_path: Path) -> None:
    train, train_labels = webdataset(tmp_path / "set", name="imagenet-train")
    val, val_labels = webdataset(tmp_path / "set", name="imagenet-val", shards=1)
    source = opened(tmp_path / "set")
    demand(source, train, train_labels)
    assert (source.split, source.splits) == ("train", ("train", "val"))
    assert source.notes == ("split train; there are also val",)
    demand(opened(tmp_path / "set", split="validation"), val, val_labels)
    demand(opened(tmp_path / "set" / "imagenet-val-{0..0}00000.tar"), val, val_labels)
    refused(tmp_path / "set", "'test'", "train, val", split="test")
    webdataset(tmp_path / "set", name="more", shards=1)
    refused(tmp_path / "set", "more-000000.tar", "--split train")
    for split in ("train", "val"):
        webdataset(tmp_path / "folders" / split, shards=1 + (split == "train"))
    assert opened(tmp_path / "folders").splits == ("train", "val")
    assert len(opened(tmp_path / "folders" / "{train,val}" / "shard-000000.tar", split="val")) == 4


def test_missing_shards_and_braces(tmp_path: Path) -> None:
    webdataset(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    refused(
        tmp_path / "shard-{000000..000002}.tar", "shard-000001.tar: no such file", "of 3 shards"
    )
    refused(tmp_path / "shard-{000000..}.tar", "{000000..} is no range")
    refused(tmp_path / "shard-{0..999999999}.tar", "more than 100,000")
    refused(tmp_path / "{0..9999}-{0..9999}.tar", "100,000,000 shards")
    refused(tmp_path / "shard-{a}.tar", "no such file")
    refused(tmp_path / "{0..9}.png", "no such file")


@pytest.mark.parametrize(
    ("braces", "names"),
    [
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{2..0}.tar", ["2.tar", "1.tar", "0.tar"]),
        ("{a,b,}x.tar", ["ax.tar", "bx.tar", "x.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
    ],
)
def test_braces_as_a_shell_expands_them(braces: str, names: list[str]) -> None:
    assert [str(path) for path in expanded(braces)] == names
    shell = subprocess.run(
        ["bash", "-c", f"echo {braces}"], capture_output=True, text=True, check=True
    )
    assert shell.stdout.split() == names


LABELS: dict[str, tuple[list[dict[str, bytes]], list[int] | None, tuple[str, ...], list[str]]] = {
    "some without": ([{"cls": b"1"}, {}, {"cls": b" 0\n"}], [1, -1, 0], ("0", "1"), []),
    "texts": ([{"cls": b"dog"}, {"cls": b"ant"}, {}], [1, 0, -1], ("ant", "dog"), []),
    "a text among numbers": ([{"cls": b"dog"}, {"cls": b"1"}], [1], ("0", "1"), ["0.png"]),
    "not UTF-8": ([{"cls": b"\xff"}, {"cls": b"1"}], [1], ("0", "1"), ["0.png"]),
    "long": ([{"cls": b"1" * 300}, {"cls": b"1"}], [1], ("0", "1"), ["0.png"]),
    "large": ([{"cls": b"9999999999999999999"}, {"cls": b"1"}], [1], ("0", "1"), ["0.png"]),
    "billions": ([{"cls": b"3000000000"}, {"cls": b"7"}], [1, 0], ("7", "3000000000"), []),
    "cls before json": ([{"cls": b"1", "json": b'{"label": 0}'}], [1], ("0", "1"), []),
    "json of any key": (
        [{"json": json.dumps({key: 2.0}).encode()} for key in ("label", "cls", "class")],
        [2, 2, 2],
        ("0", "1", "2"),
        [],
    ),
    "json without one": ([{"json": b'{"width": 3}'}, {"json": b'{"cls": 0}'}], [-1, 0], ("0",), []),
    "no JSON": ([{"json": b"{"}, {"json": b'{"cls": 0}'}], [0], ("0",), ["0.png"]),
    "deep JSON": ([{"json": b"[" * 10**5}, {"json": b'{"cls": 0}'}], [0], ("0",), ["0.png"]),
    "fractions": ([{"json": b'{"cls": 0.5}'}, {"json": b'{"cls": 0}'}], [0], ("0",), ["0.png"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(tmp_path: Path, case: str) -> None:
    rows, labels, class_names, skipped = LABELS[case]
    members: dict[str, bytes] = {}
    for k, (row, image) in enumerate(zip(rows, random_images(len(rows), 9, 9), strict=True)):
        members |= {f"{k}.{suffix}": content for suffix, content in row.items()}
        members[f"{k}.png"] = png(image)
    source = opened(tar_of(tmp_path / "a.tar", members))
    assert (source.kind, source.class_names) == ("webdataset", class_names)
    assert source.labels is not None
    assert source.labels.tolist() == labels
    assert [name for name, _ in source.skipped] == skipped
    missing = sum(label < 0 for label in labels or ())
    assert any(
        f"{missing} of {len(source)} samples have no label" in note for note in source.notes
    ) == (missing > 0)


def test_samples_of_several_pictures(tmp_path: Path) -> None:
    one, two, three = (png(image) for image in random_images(3, 9, 9))
    path = tar_of(
        tmp_path / "a.tar",
        {
            "b.c/1.seg.png": one, "b.c/1.jpg": two, "b.c/1.png": three, "b.c/1.cls": b"4",
            "b.c/2.seg.png": one, "b.c/2.cls": b"3", "d/1.JPEG": three, "d/1.cls": b"2",
            "e.cls": b"1", "noname": b"",
        },
    )  # fmt: skip
    source = opened(path)
    assert source.names == ("b.c/1.jpg", "d/1.JPEG")
    assert source.labels is not None
    assert source.labels.tolist() == [4, 2]
    assert dict(source.ignored) == {
        "b.c/1.png": "further pictures of samples",
        "b.c/1.seg.png": "further pictures of samples",
        "b.c/2.seg.png": "further pictures of samples",
        "e.cls": ".cls files",
        "noname": "files without a suffix",
    }
    only = tar_of(tmp_path / "b.tar", {"1.a.png": one, "1.b.png": two, "1.cls": b"0"})
    assert opened(only).names == ("1.a.png",)


def test_shards_without_labels(tmp_path: Path) -> None:
    """Captions show that they are shards; else the tars may be classes."""
    images = random_images(4, 9, 9)
    for k in range(2):
        own = {f"{j}.png": png(images[2 * k + j]) for j in range(2)}
        tar_of(tmp_path / "bare" / f"{k}.tar", own)
        tar_of(tmp_path / "captions" / f"{k}.tar", own | {"0.txt": b"a bee", "1.txt": b"a cow"})
    demand(opened(tmp_path / "captions"), images, None)
    demand(opened(tmp_path / "bare" / "{0..1}.tar"), images, None)
    demand(opened(tmp_path / "bare", kind="webdataset"), images, None)
    refused(tmp_path / "bare", "--kind classes")
    assert opened(tmp_path / "bare" / "0.tar").kind == "folder"


def test_shards_of_other_writers(tmp_path: Path) -> None:
    """Read the format of webdataset's own reader: members with ``__`` around are of no sample."""
    images, numbers = webdataset(tmp_path, shards=1)
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("__meta__"))
    assert dict(opened(path).ignored)["__meta__"] == "files without a suffix"
    demand(opened(path), images, numbers)


def test_files_of_shards(tmp_path: Path) -> None:
    webdataset(tmp_path)
    braces = str(tmp_path / "shard-{000000..000002}.tar")
    assert sources.is_source(braces)
    assert list(sources.files_of(braces).values()) == sorted(map(str, tmp_path.iterdir()))
    assert sources.detect(tmp_path) == "archive"
