"""Common layouts of folders: their labels, and the refusal of ambiguous ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.data import splits
from fastbyol.data.folder_layout import lay_out
from fastbyol.data.folder_walk import Listing, walk
from fastbyol.data.pictures import Folder
from fastbyol.data.source_arrays import Source
from fastbyol.errors import UsageError


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def laid(root: Path, kind: str | None = None, split: str | None = None) -> Source:
    return lay_out(root, walk(root), Folder(root), kind=kind, split=split)


def classes(layout: Source) -> dict[str, str]:
    """Return the class of each file by name."""
    assert layout.labels is not None
    return {
        file: layout.class_names[label]
        for file, label in zip(layout.names, layout.labels, strict=True)
    }


def refused(root: Path, *words: str, kind: str | None = None, split: str | None = None) -> None:
    with pytest.raises(UsageError) as caught:
        laid(root, kind, split)
    assert "\n" not in str(caught.value)
    for word in (str(root), *words):
        assert word in str(caught.value)


SPELLINGS = {
    "train": "train Train TRAIN training Training_set train2017 train_images images_train trn "
    "01_train trainA",
    "val": "val valid Validation val2017 Val validation-set dev val_images",
    "test": "test Testing test_set TEST testB images-test tst",
    "unlabeled": "unlabeled unlabelled Unlabeled_images",
}


@pytest.mark.parametrize(
    ("of", "name"), [(of, name) for of, names in SPELLINGS.items() for name in names.split()]
)
def test_usual_spellings_of_splits(of: str, name: str) -> None:
    assert splits.canonical(name) == of


@pytest.mark.parametrize(
    "name",
    [
        "cat",
        "trainer",
        "latest",
        "valley",
        "contest",
        "trains",
        "n02084071",
        "testudo",
        "device",
        "images",
        "2017",
        "",
    ],
)
def test_words_that_are_no_splits(name: str) -> None:
    assert splits.canonical(name) is None


@pytest.mark.parametrize("train", SPELLINGS["train"].split())
@pytest.mark.parametrize("val", ["val", "Validation", "test_set"])
def test_splits_in_any_spelling(tmp_path: Path, train: str, val: str) -> None:
    put(tmp_path, *(f"{part}/{name}/1.png" for part in (train, val) for name in ("cat", "dog")))
    layout = laid(tmp_path)
    assert (layout.kind, layout.split) == ("classes", train)
    assert classes(layout) == {f"{train}/cat/1.png": "cat", f"{train}/dog/1.png": "dog"}
    assert val in layout.notes[0]
    wanted = splits.canonical(val)
    assert classes(laid(tmp_path, split=wanted)) == {
        f"{val}/cat/1.png": "cat",
        f"{val}/dog/1.png": "dog",
    }


AMBIGUOUS: dict[str, tuple[tuple[str, ...], str]] = {
    "a third folder": (("train/cat/1.png", "val/cat/1.png", "sample/cat/1.png"), "--split train"),
    "other spellings": (
        ("Training/cat/1.png", "Validation/cat/1.png", "extra/1.png"),
        "--split Training",
    ),
    "flat splits": (("train/1.png", "val/1.png", "extra/1.png"), "--split train"),
    "a test set beside classes": (("cat/1.png", "dog/1.png", "test/1.png"), "--split test"),
    "one split": (("train/cat/1.png", "train/dog/1.png", "samples/1.png"), "--split train"),
    "pictures beside splits": (("train/cat/1.png", "val/cat/1.png", "logo.png"), "--split train"),
    "two of one kind": (("trainA/1.png", "trainB/1.png", "testA/1.png"), "trainA, trainB"),
    "parts without names": (
        ("set1/cat/1.png", "set1/dog/1.png", "set2/cat/1.png", "set2/dog/1.png"),
        "--kind classes",
    ),
    "folds": (
        tuple(f"fold{k}/{name}/1.png" for k in range(3) for name in ("cat", "dog", "owl")),
        "cat, dog, owl",
    ),
    "intel": (
        (
            "seg_train/seg_train/a/1.png",
            "seg_train/seg_train/b/1.png",
            "seg_test/seg_test/a/1.png",
            "seg_pred/seg_pred/1.png",
        ),
        "--split seg_train",
    ),
    "imagenet's archives": (
        ("ILSVRC2012_img_train/n1/1.JPEG", "ILSVRC2012_img_val/1.JPEG", "devkit/1.png"),
        "--split ILSVRC2012_img_train",
    ),
    "omniglot": (
        (
            "images_background/Greek/c1/1.png",
            "images_background/Latin/c1/1.png",
            "images_evaluation/Angelic/c1/1.png",
        ),
        "images_evaluation",
    ),
    "domains": (
        tuple(
            f"{domain}/images/{name}/1.png"
            for domain in ("amazon", "dslr")
            for name in ("bike", "mug")
        ),
        "bike, mug",
    ),
    "uneven domains": (
        ("photo/cat/1.png", "photo/dog/1.png", "sketch/dog/1.png", "art/cat/1.png"),
        "--kind classes",
    ),
    "a hidden level": (
        ("animals/cat/1.png", "animals/dog/1.png", "vehicles/car/1.png"),
        "car, cat, dog",
    ),
    "a split in each class": (
        tuple(f"{name}/{part}/1.png" for name in ("cat", "dog") for part in ("train", "test")),
        "--kind classes",
    ),
    "splits of each class": (
        tuple(f"{name}_{part}/1.png" for name in ("cat", "dog") for part in ("train", "test")),
        "cat_train, dog_train",
    ),
    "masks": (("images/1.png", "masks/1.png"), "images is no class"),
    "voc": (("JPEGImages/1.jpg", "SegmentationClass/1.png"), "JPEGImages is no class"),
    "pictures beside classes": (("cat/1.png", "2.png"), "--kind"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_splits_are_never_taken_for_classes(tmp_path: Path, kind: str) -> None:
    names, words = AMBIGUOUS[kind]
    put(tmp_path, *names)
    refused(tmp_path, words)


def test_a_refusals_remedies_work(tmp_path: Path) -> None:
    names, _ = AMBIGUOUS["a third folder"]
    put(tmp_path, *names)
    assert classes(laid(tmp_path, split="train")) == {"train/cat/1.png": "cat"}
    assert classes(laid(tmp_path, split="sample")) == {"sample/cat/1.png": "cat"}
    assert set(laid(tmp_path, kind="classes").class_names) == {"train", "val", "sample"}
    assert (laid(tmp_path, kind="folder").labels, len(laid(tmp_path, kind="folder").names)) == (
        None,
        3,
    )
    refused(tmp_path, "no subfolder 'test'", "train, val, sample", split="test")
    refused(tmp_path, "no subfolder '../x'", split="../x")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, "car/1.png", "train/2.png", "bus/3.png")
    assert classes(laid(tmp_path)) == {
        "bus/3.png": "bus",
        "car/1.png": "car",
        "train/2.png": "train",
    }


@pytest.mark.parametrize("start", ["", "dataset/", "archive/dataset/"])
def test_folders_around_classes(tmp_path: Path, start: str) -> None:
    put(tmp_path, f"{start}cat/1.png", f"{start}dog/2.png", f"{start}dog/3.png")
    layout = laid(tmp_path)
    assert list(classes(layout).values()) == ["cat", "dog", "dog"]
    assert layout.notes == ((f"taken from {start}, which holds all the rest",) if start else ())


@pytest.mark.parametrize("start", ["", "dataset/"])
@pytest.mark.parametrize("wrapper", ["", "images/"])
def test_folders_around_and_within_splits(tmp_path: Path, start: str, wrapper: str) -> None:
    put(
        tmp_path,
        *(
            f"{start}{part}/{wrapper}{name}/1.png"
            for part in ("train", "test")
            for name in ("cat", "dog")
        ),
    )
    layout = laid(tmp_path, split="test")
    assert classes(layout) == {
        f"{start}test/{wrapper}{name}/1.png": name for name in ("cat", "dog")
    }


def tiny_imagenet(root: Path) -> None:
    put(
        root,
        *(
            f"train/{name}/images/{name}_{k}.JPEG"
            for name in ("n01", "n02", "n03")
            for k in range(2)
        ),
    )
    put(root, *(f"train/{name}/{name}_boxes.txt" for name in ("n01", "n02", "n03")))
    put(
        root,
        *(f"val/images/val_{k}.JPEG" for k in range(4)),
        *(f"test/images/test_{k}.JPEG" for k in range(2)),
    )
    rows = [
        ("val_0.JPEG", "n03"),
        ("val_1.JPEG", "n01"),
        ("val_2.JPEG", "n03"),
        ("gone.JPEG", "n02"),
    ]
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"{file}\t{name}\t0\t32\t44\t62\n" for file, name in rows)
    )
    put(root, "wnids.txt", "words.txt")


def test_tiny_imagenet(tmp_path: Path) -> None:
    """Read classes that hold a folder of images, val's labels from a file, and none for test."""
    tiny_imagenet(tmp_path)
    train = laid(tmp_path)
    assert (train.split, train.class_names) == ("train", ("n01", "n02", "n03"))
    assert all(name in file for file, name in classes(train).items())
    assert len(train.names) == 6
    val = laid(tmp_path, split="val")
    assert val.class_names == train.class_names
    assert classes(val) == {
        "val/images/val_0.JPEG": "n03",
        "val/images/val_1.JPEG": "n01",
        "val/images/val_2.JPEG": "n03",
    }
    assert val.skipped == (("val/images/val_3.JPEG", "not named in the annotations"),)
    test = laid(tmp_path, split="test")
    assert (test.kind, test.labels, len(test.names)) == ("folder", None, 2)
    assert classes(laid(tmp_path / "val")).keys() == {
        name.removeprefix("val/") for name in val.names
    }


def test_annotations_that_contradict_themselves_are_refused_and_a_byte_order_mark_is_none(
    tmp_path: Path,
) -> None:
    put(tmp_path, "val/images/1.png", "val/images/2.png")
    path = tmp_path / "val" / "val_annotations.txt"
    path.write_text("\ufeff1.png\tn1\n2.png\tn2\n")
    assert classes(laid(tmp_path / "val")) == {"images/1.png": "n1", "images/2.png": "n2"}
    path.write_text("1.png\tn1\n2.png\tn2\n1.png\tn2\n")
    refused(tmp_path, "1.png", "several classes")


def test_a_flat_validation_set_has_no_labels(tmp_path: Path) -> None:
    """Lay out ImageNet as it is unpacked."""
    put(tmp_path, "train/n01/1.JPEG", "train/n02/1.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    assert (laid(tmp_path, split="val").kind, laid(tmp_path, split="val").labels) == (
        "folder",
        None,
    )
    refused(tmp_path, "no class folders", kind="classes", split="val")


@pytest.mark.parametrize("name", ["images", "Images", "img", "data", "JPEGImages"])
def test_one_folder_of_no_meaning_is_no_class(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"{name}/1.png", f"{name}/2.png")
    layout = laid(tmp_path)
    assert (layout.kind, layout.labels, layout.names) == (
        "folder",
        None,
        (f"{name}/1.png", f"{name}/2.png"),
    )
    assert laid(tmp_path, kind="classes").class_names == (name,)


def test_one_folder_of_a_name_is_a_class(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "cat/z/2.png")
    assert laid(tmp_path).class_names == ("cat",)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "dog/2.png", "labels.csv", "docs/readme.txt")
    (tmp_path / "empty").mkdir()
    layout = laid(tmp_path)
    assert layout.class_names == ("cat", "dog")
    assert dict(layout.ignored) == {
        "labels.csv": ".csv tables, whose labels are not read",
        "docs/readme.txt": ".txt files",
        "docs/": "folders without pictures",
        "empty/": "folders without pictures",
    }
    put(tmp_path, "beside.png")
    assert ("beside.png", "pictures beside the class folders") in laid(
        tmp_path, kind="classes"
    ).ignored


@pytest.mark.parametrize("names", [(), ("a/notes.txt",), ("x.mp4", "y.mp4")])
def test_no_pictures(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, *names)
    refused(tmp_path, "no pictures in it", *{f"{Path(name).suffix} files" for name in names})


parts = st.sampled_from(
    ("train", "val", "Test", "cat", "dog", "images", "1.png", "2.jpg", "notes.txt")
)


@given(
    st.sets(st.lists(parts, min_size=1, max_size=4).map(tuple), min_size=1, max_size=10),
    st.sampled_from((None, "classes", "folder")),
)
def test_any_layout_is_refused_in_a_line_or_every_picture_has_a_place(
    names: set[tuple[str, ...]], kind: str | None
) -> None:
    pictures = sorted("/".join(name) for name in names if name[-1][-3:] in ("png", "jpg"))
    try:
        layout = lay_out(
            Path("x"), Listing(pictures=pictures), Folder(Path("x")), kind=kind, split=None
        )
    except UsageError as error:
        message = str(error)
        assert "\n" not in message
        return
    taken = layout.names[0].split("/")
    start = "" if layout.split is None else "/".join((*taken[: taken.index(layout.split) + 1], ""))
    inside = [name for name in pictures if name.startswith(start)]
    assert sorted({*layout.names, *(name for name, _ in layout.ignored)}) == inside
    if layout.labels is not None:
        assert all(f"/{name}/" in f"/{file}" for file, name in classes(layout).items())
        assert kind == "classes" or not any(
            splits.canonical(name) in ("val", "test") for name in layout.class_names
        )


def test_annotations_and_explicit_classes(tmp_path: Path) -> None:
    """Expect the annotated classes, not the name of the pictures' folder."""
    tiny_imagenet(tmp_path)
    val = laid(tmp_path, kind="classes", split="val")
    assert val.class_names == ("n01", "n02", "n03")
    assert laid(tmp_path / "val", kind="classes").class_names == ("n01", "n02", "n03")
    assert laid(tmp_path, kind="folder", split="val").labels is None
    assert not any("annotations" in name for name, _ in val.ignored)


def test_a_hidden_companion_is_not_taken_for_the_annotations(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    (tmp_path / "val" / "._val_annotations.txt").write_bytes(b"\0\5\x16\7")
    assert laid(tmp_path, split="val").class_names == ("n01", "n02", "n03")


@pytest.mark.parametrize("kind", ["classes", "folder"])
def test_what_is_left_out_below_a_folder_called_like_a_split_is_named_where_it_is_taken(
    tmp_path: Path, kind: str
) -> None:
    put(tmp_path, "car/1.png", "train/2.png", "train/notes.txt")
    assert ("train/notes.txt", ".txt files") in laid(tmp_path, kind=kind).ignored
