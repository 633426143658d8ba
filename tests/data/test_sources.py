"""Sources against small data sets that were written from their formats' descriptions."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import socket
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import hypothesis.extra.numpy
import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import source_files
from fastbyol.data import source_arrays, source_idx, sources
from fastbyol.data.source_arrays import Source
from fastbyol.errors import UsageError

Writer = Callable[..., dict[str, tuple[np.ndarray, list[int]]]]


def read_all(source: Source) -> tuple[list[np.ndarray], list[int] | None]:
    images = [source.image(k) for k in range(len(source))]
    return images, None if source.labels is None else source.labels.tolist()


def demand_equal(source: Source, images: np.ndarray, labels: list[int] | None) -> None:
    actual, actual_labels = read_all(pickle.loads(pickle.dumps(source)))
    assert actual_labels == labels
    assert len(actual) == len(images)
    for one, other in zip(actual, images, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.uint8
    np.testing.assert_array_equal(source.image_bytes(), [image.nbytes for image in images])


def refused(*words: str, **options: object) -> str:
    """Open and read the source; return its UsageError, one line with all ``words``."""
    source = options.pop("source")
    with pytest.raises(UsageError) as caught:
        read_all(sources.open_source(str(source), **options))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("write", [source_files.stl10, source_files.stl10_matlab])
@pytest.mark.parametrize("below", [False, True])
def test_stl10(tmp_path: Path, write: Writer, below: bool) -> None:
    written = write(tmp_path)
    folder = next(tmp_path.iterdir()) if below else tmp_path
    for split in (None, "train", "test", "unlabeled"):
        source, (images, labels) = (
            sources.open_source(str(folder), split=split),
            written[split or "train"],
        )
        assert (source.kind, source.split, source.class_names) == (
            "stl10",
            split or "train",
            source_files.STL10_NAMES,
        )
        demand_equal(source, images, None if split == "unlabeled" else labels)
    both = np.concatenate([written["train"][0], written["unlabeled"][0]])
    source = sources.open_source(str(tmp_path), split="train+unlabeled")
    demand_equal(source, both, written["train"][1] + written["unlabeled"][1])


def test_stl10_is_column_major(tmp_path: Path) -> None:
    source_files.stl10(tmp_path)
    path = tmp_path / "stl10_binary" / "train_X.bin"
    data = bytearray(path.read_bytes())
    data[:3] = (1, 2, 3)  # red of the first column, rows 0, 1, 2
    data[96] = 4  # red of the second column, row 0
    data[96 * 96] = 5  # green
    path.write_bytes(data)
    image = sources.open_source(str(tmp_path)).image(0)
    assert (image[0, 0, 0], image[1, 0, 0], image[2, 0, 0], image[0, 1, 0], image[0, 0, 1]) == (
        1,
        2,
        3,
        4,
        5,
    )


@pytest.mark.parametrize("write", [source_files.stl10, source_files.stl10_matlab])
@pytest.mark.parametrize("fold", [0, 3, 9])
def test_stl10_folds(tmp_path: Path, write: Writer, fold: int) -> None:
    images, labels = write(tmp_path)["train"]
    chosen = source_files.folds(20)[fold]
    demand_equal(
        sources.open_source(str(tmp_path), fold=fold), images[chosen], [labels[k] for k in chosen]
    )


def test_stl10_and_svhn_as_torchvision_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    source_files.stl10(tmp_path)
    source_files.svhn(tmp_path)
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    for theirs, ours in (
        (
            datasets.STL10(str(tmp_path), "train", folds=4),
            sources.open_source(str(tmp_path), fold=4),
        ),
        (
            datasets.STL10(str(tmp_path), "train+unlabeled"),
            sources.open_source(str(tmp_path), split="train+unlabeled"),
        ),
        (
            datasets.SVHN(str(tmp_path), "test"),
            sources.open_source(str(tmp_path), kind="svhn", split="test"),
        ),
    ):
        assert len(theirs) == len(ours)
        for k, (image, label) in enumerate(theirs):
            np.testing.assert_array_equal(ours.image(k), np.asarray(image))
            assert ours.labels[k] == label


def test_stl10_folds_refused(tmp_path: Path) -> None:
    source_files.stl10(tmp_path)
    path = tmp_path / "stl10_binary" / "fold_indices.txt"
    lines = path.read_text().splitlines()
    refused("no fold 10", "0 to 9", source=tmp_path, fold=10)
    refused("test", source=tmp_path, fold=1, split="test")
    refused("train+unlabeled", source=tmp_path, fold=1, split="train+unlabeled")
    for content, word in (
        ("\n".join(lines[:9]), "9 folds"),
        ("\n".join(lines)[:-3], "of one size"),
        ("\n".join(["0 1 2 3 20", *lines[1:]]), "none of 20"),
        ("\n".join(["0 1 2 3 -1", *lines[1:]]), "none of 20"),
        ("\n".join(["0 1 2 3 3", *lines[1:]]), "twice"),
        ("\n".join(["0 1 2 3 x", *lines[1:]]), "whole numbers"),
        ("\n".join(["0 1 2 3 99999999999999999999", *lines[1:]]), "whole numbers"),
        ("", "0 folds"),
    ):
        path.write_text(content)
        refused("fold_indices.txt", word, source=tmp_path, fold=5)
    path.unlink()
    refused("fold_indices.txt", source=tmp_path, fold=5)
    assert len(sources.open_source(str(tmp_path))) == 20
    for other in (source_files.cifar10, source_files.class_folders, source_files.idx):
        other(tmp_path / other.__name__)
        refused("has no folds", source=tmp_path / other.__name__, fold=0)
    refused("has no folds", source="textures", fold=0)


def cifar_python(folder: Path, *, classes: int) -> dict[str, tuple[np.ndarray, list[int]]]:
    return source_files.cifar10(folder) if classes == 10 else source_files.cifar100(folder)


@pytest.mark.parametrize("split", [None, "train", "test"])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    "write", [cifar_python, source_files.cifar_binary, source_files.cifar_matlab]
)
def test_cifar(tmp_path: Path, write: Writer, classes: int, split: str | None) -> None:
    written = write(tmp_path, classes=classes)
    for folder in (tmp_path, next(tmp_path.iterdir())):
        source = sources.open_source(str(folder), split=split)
        assert (source.kind, len(source.class_names)) == (f"cifar{classes}", classes)
        assert source.class_names[6] == ("frog" if classes == 10 else "fine 6")
        demand_equal(source, *written[split or "train"])


def test_cifar_binary_damaged(tmp_path: Path) -> None:
    source_files.cifar_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    whole = path.read_bytes()
    for content, word in (
        (whole[:-1], "whole number"),
        (b"", "whole number"),
        (b"\x0a" + whole[1:], "10 classes"),
    ):
        path.write_bytes(content)
        refused("data_batch_2.bin", word, source=tmp_path)
    path.unlink()
    refused("data_batch_2.bin", source=tmp_path)


def test_svhn(tmp_path: Path) -> None:
    written = source_files.svhn(tmp_path)
    for split, (images, labels) in written.items():
        source = sources.open_source(str(tmp_path), split=split)
        assert (source.kind, source.split, source.class_names[9]) == ("svhn", split, "9")
        demand_equal(source, images, labels)
        demand_equal(sources.open_source(str(tmp_path / f"{split}_32x32.mat")), images, labels)
    refused("extra_32x32.mat", source=tmp_path, split="extra")
    refused("by its name", source=tmp_path / "test_32x32.mat", split="train")


def test_matlab_refused(tmp_path: Path) -> None:
    source_files.stl10_matlab(tmp_path)
    path = tmp_path / "stl10_matlab" / "train.mat"
    rows, y = np.zeros((4, 27648), np.uint8), np.ones((4, 1))

    def saved(compressed: bool = False, **arrays: np.ndarray) -> Path:
        scipy.io.savemat(path, arrays, do_compression=compressed)
        return tmp_path

    assert len(sources.open_source(str(saved(X=rows, y=y)))) == 4
    refused("no array 'X'", "Y", source=saved(Y=rows, y=y))
    refused("(4, 27647)", source=saved(X=rows[:, 1:], y=y))
    refused("'X'", "float64", source=saved(X=rows.astype(float), y=y))
    refused("'y'", "(3, 1)", "4 images", source=saved(X=rows, y=y[:3]))
    refused("whole numbers", source=saved(X=rows, y=y / 2))
    refused("whole numbers", source=saved(X=rows, y=y * np.nan))
    refused("10 classes", source=saved(X=rows, y=y * 11))
    refused("no MATLAB file", source=path.write_bytes(b"\0" * 500) and tmp_path)
    bomb = path.read_bytes() if saved(compressed=True, X=rows, y=y) else b""
    element = struct.pack("<II", 14, 1 << 31) + bytes(1 << 24)
    packed = zlib.compress(element)
    path.write_bytes(bomb + struct.pack("<II", 15, len(packed)) + packed)
    refused("train.mat", source=tmp_path)
    source_files.hdf5_mat(path, X=rows)
    refused("no array 'y'", source=tmp_path)
    with h5py.File(tmp_path / "huge.h5", "w", userblock_size=512) as file:
        file.create_dataset("X", (27648, 10**6), np.uint8, chunks=(27648, 1))
        file.create_dataset("y", (1, 10**6), np.uint8, chunks=(1, 1000))
        file["link"] = h5py.ExternalLink("unlabeled.mat", "X")
    head = (tmp_path / "stl10_matlab" / "unlabeled.mat").read_bytes()[:512]
    path.write_bytes(head + (tmp_path / "huge.h5").read_bytes()[512:])
    refused("cannot hold", source=tmp_path)


def test_matlab_of_version_73_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = source_files.stl10_matlab(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused("pip install h5py", source=tmp_path, split="unlabeled")
    demand_equal(sources.open_source(str(tmp_path)), *written["train"])


def test_stl10_damaged(tmp_path: Path) -> None:
    source_files.stl10(tmp_path)
    folder = tmp_path / "stl10_binary"
    refused("split", "odd", "train+unlabeled", source=tmp_path, split="odd")
    labels = (folder / "train_y.bin").read_bytes()
    (folder / "train_y.bin").write_bytes(labels[:-1])
    refused("train_y.bin", "19 labels", "20 images", source=tmp_path)
    (folder / "train_y.bin").write_bytes(b"\x0b" + labels[1:])
    refused("train_y.bin", "10 classes", source=tmp_path)
    (folder / "train_y.bin").write_bytes(b"\x00" + labels[1:])
    refused("train_y.bin", source=tmp_path)
    (folder / "train_y.bin").unlink()
    refused("train_y.bin", source=tmp_path)
    (folder / "test_X.bin").write_bytes((folder / "test_X.bin").read_bytes()[:-1])
    refused("test_X.bin", "whole number", source=tmp_path, split="test")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_pickled_again(tmp_path: Path, protocol: int) -> None:
    """Read files saved again with today's Python and numpy."""
    images, labels = source_files.cifar100(tmp_path)["train"]
    path = tmp_path / "cifar-100-python" / "train"
    again = {b"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), b"fine_labels": labels}
    path.write_bytes(pickle.dumps(again, protocol))
    demand_equal(sources.open_source(str(tmp_path)), images, labels)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_cifar_runs_no_code(tmp_path: Path) -> None:
    source_files.cifar10(tmp_path)
    mark = tmp_path / "was here"
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(
        pickle.dumps({"data": _Evil(mark)})
    )
    refused("data_batch_3", "not a CIFAR file", source=tmp_path)
    assert not mark.exists()


def test_cifar_damaged(tmp_path: Path) -> None:
    source_files.cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    whole = (folder / "test_batch").read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 1, 2, 100, len(whole) // 2, len(whole) - 1):
        (folder / "test_batch").write_bytes(whole[:cut])
        refused("test_batch", source=tmp_path, split="test")
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[rng.integers(0, 400)] ^= 1 << rng.integers(0, 8)
        (folder / "test_batch").write_bytes(flipped)
        try:
            images, _ = read_all(sources.open_source(str(tmp_path), split="test"))
        except UsageError:
            continue
        assert {image.shape for image in images} == {(32, 32, 3)}
    planes = np.zeros((3, 3072), np.uint8)
    for what, words in (
        ({"labels": [1, 2], "data": planes}, ("2 labels", "3 images")),
        ({"labels": [1, 2, 10], "data": planes}, ("10 classes",)),
        ({"labels": [1, 2, "3"], "data": planes}, ("'labels'",)),
        ({"labels": [1, 2, 3], "data": planes[:, 1:]}, ("'data'",)),
        ({"labels": [1, 2, 3]}, ("'data'",)),
    ):
        (folder / "test_batch").write_bytes(source_files.python2_pickle(what))
        refused("test_batch", *words, source=tmp_path, split="test")
    (folder / "data_batch_4").unlink()
    refused("data_batch_4", source=tmp_path)
    refused("split", source=tmp_path, split="val")


def test_class_folders(tmp_path: Path) -> None:
    images, labels = source_files.class_folders(tmp_path)
    (tmp_path / "bee" / "notes.txt").write_text("no picture")
    (tmp_path / "bee" / ".hidden.png").write_text("no picture")
    (tmp_path / "__MACOSX").mkdir()
    source = sources.open_source(str(tmp_path))
    assert (source.kind, source.split, source.class_names) == (
        "classes",
        None,
        ("ant", "bee", "cow"),
    )
    assert [name for name, _ in source.ignored] == ["__MACOSX", "bee/.hidden.png", "bee/notes.txt"]
    demand_equal(source, images, labels)
    plain = sources.open_source(str(tmp_path), kind="folder")
    assert (plain.kind, len(plain), plain.labelled) == ("folder", len(images), False)


def test_class_folders_with_splits(tmp_path: Path) -> None:
    """Expect equal labels in every split, though one lacks a class."""
    images, labels = source_files.class_folders(tmp_path / "train")
    source_files.class_folders(tmp_path / "val", classes=("cow",))
    demand_equal(sources.open_source(str(tmp_path)), images, labels)
    source = sources.open_source(str(tmp_path), split="val")
    assert source.class_names == ("ant", "bee", "cow")
    assert read_all(source)[1] == [2] * 4
    refused("'test'", "train, val", source=tmp_path, split="test")
    (tmp_path / "unlabeled").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "unlabeled" / "a.png")
    demand_equal(sources.open_source(str(tmp_path), split="unlabeled"), images[:1], None)


def test_pictures_of_every_mode(tmp_path: Path) -> None:
    expected = source_files.odd_pictures(tmp_path / "odd")
    source = sources.open_source(str(tmp_path / "odd"))
    assert source.kind == "folder"
    assert [source.name(k) for k in range(len(source))] == sorted(expected)
    for k in range(len(source)):
        name, image = source.name(k), source.image(k)
        # Compositing rounds once more than the formula; JPEG at quality 98 without subsampling
        # moves a smooth picture by 3.
        tolerance = {"alpha.png": 1, "photo.JPG": 4}.get(name, 0)
        assert image.shape == expected[name].shape, name
        assert np.abs(image.astype(int) - expected[name]).max() <= tolerance, name


def test_unreadable_pictures(tmp_path: Path) -> None:
    images, labels = source_files.class_folders(tmp_path)
    (tmp_path / "ant" / "empty.png").touch()
    (tmp_path / "cow" / "page.jpg").write_text("<html>not found</html>")
    source = sources.open_source(str(tmp_path))
    demand_equal(source, images, labels)
    assert [name for name, _ in source.skipped] == ["ant/empty.png", "cow/page.jpg"]
    refused("ant/empty.png", "--strict", source=tmp_path, strict=True)


def test_bombs_and_pixels_without_a_range_are_unreadable(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "int.tiff")
    Image.new("1", (20000, 6000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    source = sources.open_source(str(tmp_path))
    assert [name for name, _ in source.skipped] == ["bomb.png"]
    for k in range(len(source)):
        if source.name(k) != "good.png":
            with pytest.raises(Exception, match=r"range|truncated|broken") as caught:
                source.image(k)
            assert type(caught.value).__name__ == "UnreadableItemError"


@pytest.mark.parametrize("kind", ["folder", "classes"])
def test_links_that_go_round(tmp_path: Path, kind: str) -> None:
    images, _ = source_files.class_folders(tmp_path)
    (tmp_path / "ant" / "round").symlink_to(tmp_path)
    assert len(sources.open_source(str(tmp_path / "ant"), kind="folder")) == 4
    assert len(sources.open_source(str(tmp_path), kind=kind)) == len(images)


FORMS = [
    "nhwc",
    "nchw",
    "nhw",
    "nhw1",
    "n1hw",
    "fortran",
    "keras",
    "medical",
    "dashes",
    "validation",
    "unlabelled",
]
KEYS = {
    "keras": ("x_train", "y_train"),
    "medical": ("train_images", "train_labels"),
    "dashes": ("Train-Data", "labelsTraining"),
    "validation": ("X_valid", "val_targets"),
    "unlabelled": ("imgs", None),
}


def in_form(form: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images as an array of that form, and as RGB."""
    grey = images[..., 0]
    array = {
        "nchw": images.transpose(0, 3, 1, 2),
        "nhw": grey,
        "nhw1": grey[..., None],
        "n1hw": grey[:, None],
        "fortran": np.asfortranarray(images),
    }.get(form, images)
    return array, np.repeat(grey[..., None], 3, 3) if form in ("nhw", "nhw1", "n1hw") else images


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("save", [np.savez_compressed, np.savez, "npy folder", "npy file"])
def test_npz_and_npy(tmp_path: Path, form: str, save: Callable[..., None] | str) -> None:
    images, labels = source_files.npz(tmp_path / "a.npz", count=7, side=12)
    array, expected = in_form(form, images)
    key, label_key = KEYS.get(form, ("X" if isinstance(save, str) else "arr_0", "y"))
    arrays = {key: array} | ({label_key: np.array(labels, ">i2")[:, None]} if label_key else {})
    if isinstance(save, str):
        for name, each in arrays.items():
            np.save(tmp_path / f"{name}.npy", each)
        path, ignored = (
            (tmp_path, (("a.npz", "files that are no arrays"),))
            if "folder" in save
            else (tmp_path / f"{key}.npy", ())
        )
    else:
        path, ignored = tmp_path / "b.npz", (("notes.txt", "files that are no arrays"),)
        save(path, **arrays)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("notes.txt", "no array")
    source = sources.open_source(str(path))
    assert (source.kind, source.ignored) == ("npy" if isinstance(save, str) else "npz", ignored)
    assert source.split == {
        "keras": "train",
        "medical": "train",
        "dashes": "train",
        "validation": "val",
    }.get(form)
    demand_equal(source, expected, labels if label_key else None)


def test_npy_of_any_name_and_splits(tmp_path: Path) -> None:
    images, labels = source_files.random_images(6, 9, 8), [0, 1, 2, 0, 1, 2]
    np.save(tmp_path / "flowers.npy", images)
    demand_equal(sources.open_source(str(tmp_path / "flowers.npy")), images, None)
    np.save(tmp_path / "flowers_labels.npy", labels)
    demand_equal(sources.open_source(str(tmp_path / "flowers.npy")), images, labels)
    refused("no pictures", source=tmp_path)
    for split, part in (("train", slice(4)), ("test", slice(4, 6))):
        np.save(tmp_path / f"X_{split}.npy", images[part])
        np.save(tmp_path / f"y_{split}.npy", labels[part])
    demand_equal(sources.open_source(str(tmp_path)), images[:4], labels[:4])
    demand_equal(sources.open_source(str(tmp_path), split="testing"), images[4:], labels[4:])
    source = sources.open_source(str(tmp_path / "X_test.npy"))
    assert source.class_names == ("0", "1", "2")
    demand_equal(source, images[4:], labels[4:])
    refused("'val'", "train, test", source=tmp_path, split="val")
    refused("by its name", source=tmp_path / "X_test.npy", split="train")
    refused("holds labels", source=tmp_path / "y_test.npy")


def test_npy_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((4, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    for content, word in (
        (whole[:-1], "767 bytes"),
        (whole + b"\0", "769 bytes"),
        (whole[:50], "npy format"),
        (b"", "npy format"),
        (whole.replace(b"(4, 8, 8, 3)", b"(9**9,8, 3) "), "npy format"),
        (
            whole.replace(b"(4, 8, 8, 3), }" + b" " * 11, b"(1000000000,1000000000,3)}"),
            "its head says 3000000000000000000",
        ),
        (whole.replace(b"(4, 8, 8, 3)", b"(-4, 8,-8,3)"), "(-4, 8, -8, 3)"),
        (whole.replace(b"'|u1'", b"'|U0'"), "its head says"),
        (whole[:6] + b"\x02\0" + b"\xff" * 4 + whole[12:], "npy format"),
        (whole[:6] + b"\x09\0" + whole[8:], "version (9, 0)"),
    ):
        path.write_bytes(content)
        refused("x.npy", word, source=path)
    np.save(path, np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "y.npy").write_bytes(b"none")
    refused("y.npy", source=path)


LABELS = {
    "whole floats": ([0.0, 1.0, 3.0, 1.0], [0, 1, 3, 1], ("0", "1", "2", "3")),
    "truth": ([True, False, False, True], [1, 0, 0, 1], ("0", "1")),
    "big-endian": (np.array([2, 0, 1, 1], ">u4"), [2, 0, 1, 1], ("0", "1", "2")),
    "row": (np.array([[2, 0, 1, 1]], np.int8), [2, 0, 1, 1], ("0", "1", "2")),
    "some unlabelled": ([-1, 0, 1, -1], [-1, 0, 1, -1], ("0", "1")),
    "none labelled": ([-1, -1, -1, -1], None, ()),
    "billions": ([3 * 10**9, 7, -1, 7], [1, 0, -1, 0], ("7", "3000000000")),
    "63 bits": (
        np.array([2**63 - 1, 0, 0, 5], np.uint64),
        [2, 0, 0, 1],
        ("0", "5", str(2**63 - 1)),
    ),
    "large floats": ([1e15, 0, 0, 1e15], [1, 0, 0, 1], ("0", str(10**15))),
    "texts": (
        ["dog", "ant", "\u00e9t\u00e9", "ant"],
        [1, 0, 2, 0],
        ("ant", "dog", "\u00e9t\u00e9"),
    ),
    "bytes": (np.array([b"b", b"a", b"a", b"c"]), [1, 0, 0, 2], ("a", "b", "c")),
    "at the bound": ([65_535, 0, 1, 1], [65_535, 0, 1, 1], tuple(map(str, range(65_536)))),
    "above the bound": ([65_536, 0, 1, 1], [2, 0, 1, 1], ("0", "1", "65536")),
}


def save(folder: Path, form: str, **arrays: object) -> Path:
    """Save arrays as one npz file or as npy files in a folder; return its path."""
    if form == "npz":
        np.savez(folder / "a.npz", **arrays)
        return folder / "a.npz"
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_labels_become_classes(tmp_path: Path, case: str, form: str) -> None:
    values, expected, names = LABELS[case]
    images = source_files.random_images(4, 8, 8)
    source = sources.open_source(str(save(tmp_path, form, x=images, y=np.asarray(values))))
    assert source.class_names == names
    demand_equal(source, images, expected)


def test_large_idx_labels_are_mapped_too(tmp_path: Path) -> None:
    images, labels = source_files.idx(tmp_path, packed=False)["train"]
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    rows = np.array([[label * 10**8] for label in labels], ">i4")
    head = struct.pack(">BBBBII", 0, 0, 0x0C, 2, *rows.shape)
    (tmp_path / "train-labels-idx2-int").write_bytes(head + rows.tobytes())
    source = sources.open_source(str(tmp_path))
    assert source.class_names == tuple(str(k * 10**8) for k in range(10))
    assert "900000000 became 0 to 9" in source.notes[-1]  # type: ignore[attr-defined]
    demand_equal(source, images, labels)


ANY_LABELS = hypothesis.extra.numpy.arrays(
    np.int64, st.integers(1, 12), elements=st.integers(-1, 2**62)
)


@given(ANY_LABELS, ANY_LABELS)
def test_names_say_what_the_labels_were(train: np.ndarray, test: np.ndarray) -> None:
    """Expect class names to be the old labels, the same in every split."""
    if {*train.tolist(), *test.tolist()} == {-1, 1}:
        return
    labels, names = source_arrays.class_labels("a", train, [test])
    others, other_names = source_arrays.class_labels("a", test, [train])
    assert names == other_names
    for before, classes in ((train, labels), (test, others)):
        classes = np.full(len(before), -1) if classes is None else classes
        assert [int(names[k]) if k >= 0 else -1 for k in classes] == before.tolist()


def test_labels_mean_the_same_in_every_split(tmp_path: Path) -> None:
    images = source_files.random_images(3, 8, 8)
    train, test = np.array([10**6, 3 * 10**6, 2 * 10**6]), np.array([3 * 10**6] * 3)
    np.savez(
        tmp_path / "a.npz",
        train_images=images,
        train_labels=train,
        test_images=images,
        test_labels=test,
    )
    assert read_all(sources.open_source(str(tmp_path / "a.npz")))[1] == [0, 2, 1]
    source = sources.open_source(str(tmp_path / "a.npz"), split="test")
    assert read_all(source)[1] == [2, 2, 2]
    assert source.class_names == ("1000000", "2000000", "3000000")


def test_labels_refused(tmp_path: Path) -> None:
    images, path = np.zeros((4, 8, 8, 3), np.uint8), tmp_path / "a.npz"
    for labels, word in (
        (np.eye(4, dtype=np.uint8), "argmax(1)"),
        (np.array([0, 1, 2, np.nan]), "whole numbers"),
        (np.array([0, 1, 2, np.inf]), "whole numbers"),
        (np.array([0, 1, 2, 1e300]), "64 bits"),
        (np.array([0, 1, 2, -1e300]), "64 bits"),
        (np.array([0, 1, 2, 0.5]), "whole numbers"),
        (np.array([-2, 0, 1, 2]), "negative"),
        (np.array([-1, 1, 1, -1]), "(labels > 0)"),
        (np.array([0, 1, 2]), "(3,)"),
        (np.array(5), "()"),
        (np.zeros(4, [("a", "u1"), ("b", "u1")]), "integer label"),
        (np.array(["a", "b", 3, None], object), "integer label"),
        (np.zeros(4, complex), "integer label"),
        (np.zeros(4, "datetime64[s]"), "integer label"),
        (np.array(["a", "b", "c", "\ud800"]), "no Unicode"),
        (np.array([97, 98, 99, 0x7FFFFFFF], "<u4").view("<U1"), "no Unicode"),
    ):
        np.savez(path, images=images, labels=labels)
        refused("'labels'", word, source=path)
    many = np.arange(70_000) * 10**6
    np.savez_compressed(path, images=np.zeros((70_000, 1, 1, 3), np.uint8), labels=many)
    with pytest.raises(UsageError, match="70,000 distinct"):
        sources.open_source(str(path))


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_one_image_is_not_taken_for_many(tmp_path: Path, form: str) -> None:
    def saved(images: np.ndarray, labels: object = None) -> Path:
        for old in tmp_path.iterdir():
            old.unlink()
        return save(tmp_path, form, images=images, **({} if labels is None else {"labels": labels}))

    one = source_files.random_images(1, 12, 16)[0]
    for image in (
        one,
        one[..., :1],
        one.transpose(2, 0, 1),
        np.concatenate([one, one[..., :1]], 2),
    ):
        refused("looks like one image", "images[None]", source=saved(image))
    refused("looks like one image", source=saved(one, [3]))
    refused("images[None]", source=saved(one[..., 0]))
    refused("reshape", source=saved(np.zeros((5, 784), np.uint8)))
    refused("fourth channel", source=saved(np.zeros((5, 8, 9, 4), np.uint8)))
    refused("fourth channel", source=saved(np.zeros((5, 4, 9, 8), np.uint8)))
    refused("second or the last", source=saved(np.zeros((5, 3, 9, 1), np.uint8)))
    refused("()", source=saved(np.array(3, np.uint8)))
    demand_equal(sources.open_source(str(saved(one[None]))), one[None], None)
    # As many labels as rows: narrow grey images after all.
    labels = [k % 3 for k in range(12)]
    demand_equal(
        sources.open_source(str(saved(one, labels))), np.repeat(one[..., None], 3, 3), labels
    )


def test_npz_splits(tmp_path: Path) -> None:
    """Read MedMNIST's keys."""
    images, path = source_files.random_images(6, 28, 28), tmp_path / "pathmnist.npz"
    arrays = {}
    for split, part in (("train", slice(0, 3)), ("val", slice(3, 5)), ("test", slice(5, 6))):
        arrays |= {
            f"{split}_images": images[part],
            f"{split}_labels": np.arange(6, dtype=np.uint8)[part, None],
        }
    np.savez_compressed(path, **arrays)
    demand_equal(sources.open_source(str(path)), images[:3], [0, 1, 2])
    demand_equal(sources.open_source(str(path), split="validation"), images[3:5], [3, 4])
    source = sources.open_source(str(path), split="test")
    assert (source.split, len(source.class_names)) == ("test", 6)
    demand_equal(source, images[5:], [5])
    assert sources.open_source(str(path)).notes == (
        "took the split train; --split takes val or test",
    )  # type: ignore[attr-defined]
    refused("'odd'", "train, val, test", source=path, split="odd")
    np.savez(path, images=images)
    refused("'test'", "its splits are none", source=path, split="test")
    np.savez(path, images=images, train_images=images[:2], x=images[:1])
    assert len(sources.open_source(str(path))) == 6
    assert len(sources.open_source(str(path), split="train")) == 2
    source = sources.open_source(str(path), split="train")
    assert [name for name, _ in source.ignored] == ["images", "x"]  # type: ignore[attr-defined]
    np.savez(
        path,
        images=images,
        masks=images,
        data=images,
        labels=np.arange(6),
        y=np.arange(6),
        test_images=images,
    )
    source = sources.open_source(str(path))
    assert [name for name, _ in source.ignored] == ["masks", "data", "y"]  # type: ignore[attr-defined]
    np.savez(path, x=images, X=images)
    refused("x, X", source=path)


def test_npz_that_says_more_than_it_holds(tmp_path: Path) -> None:
    """Refuse wrong heads, wrong sizes in the archive and bombs before memory is allocated."""
    path = tmp_path / "a.npz"

    def saved(
        shape: tuple[int, ...],
        body: bytes,
        size: int | None = None,
        kind: int = zipfile.ZIP_DEFLATED,
    ) -> Path:
        start = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            start, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("images.npy", start.getvalue() + body)
        if size is not None:  # in the archive's directory, which is what counts
            data = bytearray(path.read_bytes())
            struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, size)
            path.write_bytes(data)
        return path

    def refused_at_once(word: str, source: Path) -> None:
        tracemalloc.start()
        try:
            refused(word, source=source)
            assert tracemalloc.get_traced_memory()[1] < 1 << 25
        finally:
            tracemalloc.stop()

    refused_at_once("its head says 3000000000000000000", saved((10**9, 10**9, 3), bytes(100)))
    refused_at_once("its head says", saved((2, 4, 4, 3), bytes(1 << 26)))
    refused_at_once("cannot hold", saved((50000, 100, 200, 3), bytes(3000), size=128 + 3 * 10**9))
    refused_at_once("cannot hold", saved((50, 1000, 2000, 3), bytes(3000), size=128 + 3 * 10**8))
    refused_at_once("a.npz", saved((5, 100, 200, 3), bytes(3000), size=128 + 3 * 10**5))
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused_at_once("compressed in a way", saved((2, 4, 4, 3), bytes(1 << 26), kind=kind))


def test_npz_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)

    def saved(**arrays: np.ndarray) -> Path:
        np.savez(path, **arrays)
        return path

    refused("float32", "255 * images", source=saved(images=images.astype(np.float32) / 255))
    refused("uint16", source=saved(images=images.astype(np.uint16)))
    refused("(4, 8, 8, 5)", source=saved(images=np.zeros((4, 8, 8, 5), np.uint8)))
    refused("(0, 8, 8, 3)", source=saved(images=images[:0]))
    refused("pictures", "images", source=saved(pictures=images))
    refused("images", "labels", source=saved(labels=labels), split="test")
    refused("(3,)", "4 images", source=saved(images=images, labels=labels[:3]))
    refused("float64", "whole", source=saved(images=images, labels=labels / 2.0))
    refused(
        "64 bits", source=saved(images=images, labels=labels.astype(np.uint64) << np.uint64(62))
    )
    refused("object", source=saved(images=np.array([images[0], None], object)))
    whole = saved(images=images, labels=labels).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused("a.npz", source=path)
    damaged = bytearray(whole)
    damaged[300] ^= 1  # a pixel: the archive's checksum finds it
    path.write_bytes(damaged)
    refused("a.npz", "CRC", source=path)
    np.save(tmp_path / "a.npy", images)
    refused("single array", ".npy", source=(tmp_path / "a.npy").rename(path))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("inner", "sets"),
    [("", ""), ("FashionMNIST/raw", ""), ("gzip", "emnist-letters-"), ("raw", "")],
)
def test_idx(tmp_path: Path, packed: bool, inner: str, sets: str) -> None:
    written = source_files.idx(tmp_path / inner, packed=packed, sets=sets)
    for split in (None, "train", "test"):
        source = sources.open_source(str(tmp_path), split=split)
        assert (source.kind, source.split) == ("idx", split or "train")
        demand_equal(source, *written[split or "train"])
    named = next((tmp_path / inner).glob("*t10k-images*"))
    demand_equal(sources.open_source(str(named)), *written["test"])
    assert sources.open_source(str(tmp_path), kind="fashion-mnist").class_names[9] == "Ankle boot"


@pytest.mark.parametrize("side", [20, 31, 32, 40])
def test_idx_of_other_sides(tmp_path: Path, side: int) -> None:
    written = source_files.idx(tmp_path, side=side)
    demand_equal(sources.open_source(str(tmp_path)), *written["train"])


def test_idx_with_qmnists_labels_with_dots_and_without_labels(tmp_path: Path) -> None:
    images, labels = source_files.idx(tmp_path, packed=False)["train"]
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "train-images.idx3-ubyte")
    demand_equal(sources.open_source(str(tmp_path)), images, None)
    rows = np.array([[label, 7, 1000, 3, 4, 5, 6, 70000] for label in labels], ">i4")
    head = struct.pack(">BBBBII", 0, 0, 0x0C, 2, *rows.shape)
    (tmp_path / "train-labels.idx2-int").write_bytes(head + rows.tobytes())
    demand_equal(sources.open_source(str(tmp_path)), images, labels)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("TRAIN-IMAGES-IDX3-UBYTE", "TRAIN-LABELS-IDX1-UBYTE"),
        ("train-images.idx3-ubyte", "train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte", "train-labels.idx1.ubyte"),
        ("EMNIST-Letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte"),
    ],
)
def test_idx_finds_labels_however_both_are_written(
    tmp_path: Path, images: str, labels: str
) -> None:
    written = source_files.idx(tmp_path, packed=False)["train"]
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / images)
    (tmp_path / "train-labels-idx1-ubyte").rename(tmp_path / labels)
    demand_equal(sources.open_source(str(tmp_path / images)), *written)


def test_idx_as_torchvision_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    source_files.idx(tmp_path / "FashionMNIST" / "raw", packed=False)
    theirs = datasets.FashionMNIST(str(tmp_path), train=False, download=False)
    ours = sources.open_source(str(tmp_path), split="test")
    for k in range(len(theirs)):
        image, label = theirs[k]
        np.testing.assert_array_equal(ours.image(k)[2:30, 2:30, 1], np.asarray(image))
        assert ours.labels[k] == label
    assert not ours.image(0)[:2].any()


def test_idx_refused(tmp_path: Path) -> None:
    source_files.idx(tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()

    def holds(content: bytes) -> Path:
        path.write_bytes(content)
        return tmp_path

    refused("split", "odd", source=tmp_path, split="odd")
    refused("begins 00000d03", source=holds(b"\0\0\x0d\x03" + whole[4:]))
    refused("begins nowhere", source=holds(b""))
    refused("ends within its head", source=holds(whole[:9]))
    refused("1 dimensions", source=holds((tmp_path / "train-labels-idx1-ubyte").read_bytes()))
    refused("28 x 0 pixels", source=holds(whole[:8] + bytes(4) + whole[12:]))
    refused("shape (-1, 28, 28)", source=holds(whole[:4] + b"\xff" * 4 + whole[8:]))
    refused("for 21 images", source=holds(whole[:7] + b"\x15" + whole[8:]))
    refused("15679 bytes", source=holds(whole[:-1]))
    refused("cannot hold", source=holds(whole[:1000]))
    refused(
        "is of the split train by its name, not test", source=holds(whole) / path.name, split="test"
    )
    labels = tmp_path / "train-labels-idx1-ubyte"
    named = labels.read_bytes()
    labels.write_bytes(struct.pack(">BBBBII", 0, 0, 8, 2, 20, 0))
    refused("shape (20, 0) for 20 images", source=tmp_path)
    labels.write_bytes(named)
    refused("its head says 15680", source=holds(whole + b"\0"))
    path.unlink()
    packed = gzip.compress(whole)
    for content, says in (
        (packed[:-9], "cannot be read"),
        (b"no gzip", "cannot be read"),
        (packed[:20], "cannot be read"),
    ):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        refused(says, "train-images-idx3-ubyte.gz", source=tmp_path)
    bomb = gzip.compress(struct.pack(">BBBBIII", 0, 0, 8, 3, 20, 4096, 4096))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    refused("cannot hold the 335544320", source=tmp_path)
    source_files.idx(tmp_path, sets="emnist-digits-")
    source_files.idx(tmp_path, sets="emnist-letters-")
    refused("several sets", "emnist-letters-train", source=tmp_path)
    source_files.idx(tmp_path / "eleven", packed=False)
    path = tmp_path / "eleven" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    refused("Fashion-MNIST's ten", source=tmp_path / "eleven", kind="fashion-mnist")
    refused("no train-images", source=tmp_path / "absent", kind="idx")


def test_fashion_mnist_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the system's folder, then the download, then an error with a remedy."""
    written = source_files.idx(tmp_path / "debian")
    monkeypatch.setattr(source_idx, "DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    source = sources.open_source("fashion-mnist", split="test")
    assert source.class_names == source_idx.FASHION_CLASSES
    demand_equal(source, *written["test"])
    monkeypatch.setattr(source_idx, "DEBIAN", tmp_path / "none")
    datasets = pytest.importorskip("torchvision.datasets")

    def offline(root: str, **_: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(datasets, "FashionMNIST", offline)
    refused(
        "fashion-mnist",
        "dataset-fashion-mnist",
        "Error downloading",
        "textures",
        source="fashion-mnist",
    )

    cut = tmp_path / "cache" / "FashionMNIST" / "raw"
    source_files.idx(cut)
    (cut / "t10k-labels-idx1-ubyte.gz").unlink()
    refused("fashion-mnist", "Error downloading", source="fashion-mnist", split="test")

    def online(root: str, **_: object) -> None:
        source_files.idx(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(datasets, "FashionMNIST", online)
    demand_equal(sources.open_source("fashion-mnist"), *written["train"])
    monkeypatch.setattr(datasets, "FashionMNIST", offline)
    demand_equal(sources.open_source("fashion-mnist"), *written["train"])


def test_kinds_that_are_none(tmp_path: Path) -> None:
    refused("absent", "no such", source=tmp_path / "absent")
    refused("no pictures", source=tmp_path)
    refused("kind: 'imagenet' is none of", "cifar100", source=tmp_path, kind="imagenet")
    for name, word in (
        ("a.tar.gz", "tar -xf"),
        ("a.zip", "damaged zip"),
        ("a.beton", "--data"),
        ("a.mat", "npz"),
    ):
        (tmp_path / name).touch()
        refused(word, source=tmp_path / name)
    refused("no such folder", source=tmp_path / "a.zip", kind="stl10")
    source_files.class_folders(tmp_path / "mixed")
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "a.png")
    refused("--kind", source=tmp_path / "mixed")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    refused("no readable pictures", "a.png", source=tmp_path / "bad")


SPECIAL = {
    "stl10": (source_files.stl10, "train", ("train_X.bin", "train_y.bin", "class_names.txt")),
    "stl10_matlab": (source_files.stl10_matlab, "unlabeled", ("unlabeled.mat",)),
    "cifar10": (source_files.cifar10, "train", ("data_batch_1", "data_batch_4", "batches.meta")),
    "cifar100": (source_files.cifar100, "test", ("test",)),
    "cifar_binary": (source_files.cifar_binary, "test", ("test_batch.bin", "batches.meta.txt")),
    "cifar_matlab": (source_files.cifar_matlab, "test", ("test_batch.mat", "batches.meta.mat")),
    "svhn": (source_files.svhn, "train", ("train_32x32.mat",)),
    "idx": (
        source_files.idx,
        "train",
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    ),
}


@pytest.mark.parametrize("special", ["pipe", "socket", "folder", "device"])
@pytest.mark.parametrize("case", SPECIAL)
def test_only_regular_files_are_opened(tmp_path: Path, case: str, special: str) -> None:
    """Put something else in the place of each of a source's files."""
    write, split, names = SPECIAL[case]
    write(tmp_path)
    for name in names:
        path = next(tmp_path.rglob(name))
        path.rename(path.with_name("aside"))
        _put(path, special)
        message = refused(source=tmp_path, split=split)
        assert name in message or special == "folder", message
        path.rmdir() if special == "folder" else path.unlink()
        path.with_name("aside").rename(path)


@pytest.mark.parametrize("special", ["pipe", "socket", "device"])
@pytest.mark.parametrize(
    "name",
    ["a.npz", "x.npy", "train-images-idx3-ubyte", "train_32x32.mat", "a.tar", "thing", "a.png"],
)
def test_a_source_that_is_no_regular_file(tmp_path: Path, name: str, special: str) -> None:
    _put(tmp_path / name, special)
    says = {"pipe": "named pipe", "socket": "socket", "device": "device"}[special]
    refused(name, says, source=tmp_path / name)
    for kind in ("npz", "npy", "idx", "svhn", "stl10", "cifar10"):
        refused(name, source=tmp_path / name, kind=kind)


def _put(path: Path, special: str) -> None:
    if special == "pipe":
        os.mkfifo(path)
    elif special == "folder":
        path.mkdir()
    elif special == "device":
        path.symlink_to("/dev/zero")
    else:
        with (
            socket.socket(socket.AF_UNIX) as opened,
            contextlib.chdir(path.parent),
        ):  # a path of a socket is limited
            opened.bind(path.name)


@pytest.mark.parametrize("kind", ["idx", "cifar10", "stl10"])
def test_what_lies_beside_arrays_is_told(tmp_path: Path, kind: str) -> None:
    {"idx": source_files.idx, "cifar10": source_files.cifar10, "stl10": source_files.stl10}[kind](
        tmp_path
    )
    inner = {
        "idx": tmp_path,
        "cifar10": tmp_path / "cifar-10-batches-py",
        "stl10": tmp_path / "stl10_binary",
    }[kind]
    for path in (inner / "mine.png", tmp_path / "cat" / "1.png", tmp_path / "notes.txt"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    source = sources.open_source(str(tmp_path))
    wanted = {(inner / "mine.png").relative_to(tmp_path).as_posix(), "cat", "notes.txt"}
    assert {name for name, _ in source.ignored} == wanted
    assert source.notes[0] == "took the split train; --split takes another"
    assert not sources.open_source(str(tmp_path), split="test").notes


def test_arrays_beside_folders_of_pictures_are_not_the_source(tmp_path: Path) -> None:
    images, labels = source_files.class_folders(tmp_path / "train")
    np.save(tmp_path / "data.npy", source_files.random_images(3, 8, 8))
    source = sources.open_source(str(tmp_path))
    demand_equal(source, images, labels)
    assert ("data.npy", ".npy files") in source.ignored


def test_an_npy_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    for seed in (1, 2):
        images = np.asfortranarray(source_files.random_images(5, 8, 8, seed))
        np.save(tmp_path / "images.npy", images)
        demand_equal(sources.open_source(str(tmp_path / "images.npy")), images, None)


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_a_split_that_nobody_asked_for_refuses_none(tmp_path: Path, form: str) -> None:
    images = source_files.random_images(6, 8, 8)
    arrays = {
        "train_images": images,
        "train_labels": np.arange(6),
        "test_images": images,
        "test_labels": np.eye(6, dtype=int),
    }
    path = save(tmp_path, form, **arrays)
    demand_equal(sources.open_source(str(path), split="train"), images, list(range(6)))
    refused("argmax", source=path, split="test")
