"""Sources against small data sets that were written from their formats' descriptions."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import source_files
from fastbyol.data import source_idx, sources
from fastbyol.errors import UsageError


def held(source: sources.Source) -> tuple[list[np.ndarray], list[int] | None]:
    images = [source.image(k) for k in range(len(source))]
    return images, [source.label(k) for k in range(len(source))] if source.labelled else None


def demand_equal(source: sources.Source, images: np.ndarray, labels: list[int] | None) -> None:
    found, found_labels = held(pickle.loads(pickle.dumps(source)))
    assert found_labels == labels
    assert len(found) == len(images)
    for one, other in zip(found, images, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.uint8
    np.testing.assert_array_equal(source.image_bytes(), [image.nbytes for image in images])


def refused(*words: str, **options: object) -> str:
    """The message of the UsageError that opening and reading the source must raise: one line with all ``words``."""
    source = options.pop("source")
    with pytest.raises(UsageError) as caught:
        held(sources.open_source(str(source), **options))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("split", [None, "train", "test"])
@pytest.mark.parametrize("inner", ["", "stl10_binary"])
def test_stl10(tmp_path: Path, split: str | None, inner: str) -> None:
    written = source_files.stl10(tmp_path)
    source = sources.open_source(str(tmp_path / inner), split=split)
    assert (source.kind, source.split, source.class_names) == ("stl10", split or "train", source_files.STL10_NAMES)
    demand_equal(source, *written[split or "train"])


def test_stl10_is_column_major(tmp_path: Path) -> None:
    source_files.stl10(tmp_path)
    path = tmp_path / "stl10_binary" / "train_X.bin"
    data = bytearray(path.read_bytes())
    data[:3] = (1, 2, 3)  # red of the first column, rows 0, 1, 2
    data[96] = 4  # red of the second column, row 0
    data[96 * 96] = 5  # green
    path.write_bytes(data)
    image = sources.open_source(str(tmp_path)).image(0)
    assert (image[0, 0, 0], image[1, 0, 0], image[2, 0, 0], image[0, 1, 0], image[0, 0, 1]) == (1, 2, 3, 4, 5)


def test_stl10_unlabeled(tmp_path: Path) -> None:
    written = source_files.stl10(tmp_path)
    demand_equal(sources.open_source(str(tmp_path), split="unlabeled"), written["unlabeled"][0], None)
    both = np.concatenate([written["train"][0], written["unlabeled"][0]])
    labels = written["train"][1] + [-1] * len(written["unlabeled"][0])
    demand_equal(sources.open_source(str(tmp_path), split="train+unlabeled"), both, labels)


def test_stl10_damaged(tmp_path: Path) -> None:
    source_files.stl10(tmp_path)
    folder = tmp_path / "stl10_binary"
    refused("split", "valid", "train+unlabeled", source=tmp_path, split="valid")
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


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar(tmp_path: Path, split: str) -> None:
    ten, hundred = source_files.cifar10(tmp_path / "a"), source_files.cifar100(tmp_path / "b")
    source = sources.open_source(str(tmp_path / "a"), split=split)
    assert (source.kind, source.class_names[6]) == ("cifar10", "frog")
    demand_equal(source, *ten[split])
    source = sources.open_source(str(tmp_path / "b" / "cifar-100-python"), split=split)
    assert (source.kind, source.class_names[99]) == ("cifar100", "fine 99")
    demand_equal(source, *hundred[split])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_pickled_again(tmp_path: Path, protocol: int) -> None:
    """Files that someone loaded and saved with today's Python and numpy."""
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
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": _Evil(mark)}))
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
            images, _ = held(sources.open_source(str(tmp_path), split="test"))
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
    assert (source.kind, source.split, source.class_names) == ("classes", None, ("ant", "bee", "cow"))
    assert [name for name, _ in source.ignored] == ["__MACOSX", "bee/.hidden.png", "bee/notes.txt"]
    demand_equal(source, images, labels)
    plain = sources.open_source(str(tmp_path), kind="folder")
    assert (plain.kind, len(plain), plain.labelled) == ("folder", len(images), False)


def test_class_folders_with_splits(tmp_path: Path) -> None:
    """Labels mean the same in every split, though a class is absent from one."""
    images, labels = source_files.class_folders(tmp_path / "train")
    source_files.class_folders(tmp_path / "val", classes=("cow",))
    demand_equal(sources.open_source(str(tmp_path)), images, labels)
    source = sources.open_source(str(tmp_path), split="val")
    assert source.class_names == ("ant", "bee", "cow")
    assert held(source)[1] == [2] * 4
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
        # Compositing rounds once more than the formula; JPEG at quality 98 without subsampling moves a smooth picture by 3.
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


@pytest.mark.parametrize("form", ["nhwc", "nchw", "nhw", "nhw1", "keras", "medical", "unlabelled"])
def test_npz(tmp_path: Path, form: str) -> None:
    images, labels = source_files.npz(tmp_path / "a.npz", count=7, side=12)
    grey = images[..., 0]
    array = {"nchw": images.transpose(0, 3, 1, 2), "nhw": grey, "nhw1": grey[..., None]}.get(form, images)
    expected = np.repeat(grey[..., None], 3, 3) if form in ("nhw", "nhw1") else images
    keys = {"keras": ("x_train", "y_train"), "medical": ("train_images", "train_labels")}.get(form, ("arr_0", "y"))
    path = tmp_path / "b.npz"
    column = np.array(labels, np.uint8)[:, None]
    np.savez(path, **({keys[0]: array} if form == "unlabelled" else {keys[0]: array, keys[1]: column}))
    split = "train" if form in ("keras", "medical") else None
    demand_equal(sources.open_source(str(path), split=split), expected, None if form == "unlabelled" else labels)


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
    refused("float64", source=saved(images=images, labels=labels / 1.0))
    refused("64 bits", source=saved(images=images, labels=labels.astype(np.uint64) << np.uint64(62)))
    refused("object", source=saved(images=np.array([images[0], None], object)))
    whole = saved(images=images, labels=labels).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused("a.npz", source=path)
    damaged = bytearray(whole)
    damaged[300] ^= 1  # a pixel: the archive's checksum finds it
    path.write_bytes(damaged)
    refused("a.npz", "CRC", source=path)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("inner", "sets"), [("", ""), ("FashionMNIST/raw", ""), ("gzip", "emnist-letters-"), ("raw", "")])
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
    """Small ones are padded to 32, large ones are left as they are."""
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
def test_idx_finds_labels_however_both_are_written(tmp_path: Path, images: str, labels: str) -> None:
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
        assert ours.label(k) == label
    assert not ours.image(0)[:2].any()


def test_idx_refused(tmp_path: Path) -> None:
    source_files.idx(tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()

    def holds(content: bytes) -> Path:
        path.write_bytes(content)
        return tmp_path

    refused("split", "valid", source=tmp_path, split="valid")
    refused("begins 00000d03", source=holds(b"\0\0\x0d\x03" + whole[4:]))
    refused("begins nowhere", source=holds(b""))
    refused("ends within its head", source=holds(whole[:9]))
    refused("1 dimensions", source=holds((tmp_path / "train-labels-idx1-ubyte").read_bytes()))
    refused("28 x 0 pixels", source=holds(whole[:8] + bytes(4) + whole[12:]))
    refused("shape (-1, 28, 28)", source=holds(whole[:4] + b"\xff" * 4 + whole[8:]))
    refused("for 21 images", source=holds(whole[:7] + b"\x15" + whole[8:]))
    refused("15679 bytes", source=holds(whole[:-1]))
    refused("cannot hold", source=holds(whole[:1000]))
    refused("is of the split train by its name, not test", source=holds(whole) / path.name, split="test")
    labels = tmp_path / "train-labels-idx1-ubyte"
    named = labels.read_bytes()
    labels.write_bytes(struct.pack(">BBBBII", 0, 0, 8, 2, 20, 0))
    refused("shape (20, 0) for 20 images", source=tmp_path)
    labels.write_bytes(named)
    refused("its head says 15680", source=holds(whole + b"\0"))
    path.unlink()
    packed = gzip.compress(whole)
    for content, says in ((packed[:-9], "cannot be read"), (b"no gzip", "cannot be read"), (packed[:20], "cannot be read")):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        refused(says, "train-images-idx3-ubyte.gz", source=tmp_path)
    bomb = gzip.compress(struct.pack(">BBBBIII", 0, 0, 8, 3, 20, 4096, 4096))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    refused("cannot hold the 335544320", source=tmp_path)
    source_files.idx(tmp_path, sets="emnist-digits-")
    source_files.idx(tmp_path, sets="emnist-letters-")
    refused("several sets", "emnist-letters-train", source=tmp_path)
    refused("Fashion-MNIST's ten", source=labelled_eleven(tmp_path / "eleven"), kind="fashion-mnist")
    refused("no train-images", source=tmp_path / "absent", kind="idx")


def labelled_eleven(folder: Path) -> Path:
    source_files.idx(folder, packed=False)
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    return folder


def test_fashion_mnist_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the system's folder; else from where it was downloaded to; else the error says what to do, at once."""
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
    refused("fashion-mnist", "dataset-fashion-mnist", "Error downloading", "textures", source="fashion-mnist")

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
    refused("unknown kind", "cifar100", source=tmp_path, kind="imagenet")
    for name, word in (("a.tar.gz", "tar -xf"), ("a.zip", "unzip"), ("a.beton", "--data"), ("a.mat", "npz")):
        (tmp_path / name).touch()
        refused(word, source=tmp_path / name)
    refused("no such folder", source=tmp_path / "a.zip", kind="stl10")
    source_files.class_folders(tmp_path / "mixed")
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "a.png")
    refused("--kind", source=tmp_path / "mixed")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    refused("no readable pictures", "a.png", source=tmp_path / "bad")
