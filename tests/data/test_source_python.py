"""Datasets in Python, against the images and labels that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset

import fastbyol
import source_files
from fastbyol.data import beton, source_python
from fastbyol.data.scratch import Scratch
from fastbyol.errors import FastbyolError, UsageError
from test_sources import demand_equal

IMAGES = source_files.random_images(6, 12, 10)
LABELS = [2, 0, 1, 2, 0, 1]
PLANES = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)


class Items:
    """A dataset of any items; an exception among them is raised."""

    def __init__(self, *items: Any, **attributes: Any) -> None:
        self.items = items
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def opened(dataset: Any, tmp_path: Path, **options: Any) -> source_python.Source:
    return source_python.open_dataset(
        dataset, "Items", scratch=Scratch(tmp_path / "scratch"), **options
    )


FORMS: dict[str, Callable[[int], Any]] = {
    "Pillow's": lambda k: (Image.fromarray(IMAGES[k]), LABELS[k]),
    "arrays": lambda k: (IMAGES[k], np.int32(LABELS[k])),
    "arrays of planes": lambda k: (PLANES[k].numpy(), np.array(LABELS[k])),
    "arrays of labels": lambda k: (IMAGES[k], np.array([LABELS[k]])),
    "tensors": lambda k: (PLANES[k], torch.tensor(LABELS[k])),
    # As torchvision's ToTensor makes them.
    "floats": lambda k: [PLANES[k].float() / 255, LABELS[k]],
    "rows": lambda k: {"img": Image.fromarray(IMAGES[k]), "label": LABELS[k], "id": k},
    "encoded": lambda k: {
        "image": {"bytes": source_files.encoded(IMAGES[k]), "path": None},
        "fine_label": LABELS[k],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_items(tmp_path: Path, form: str) -> None:
    source = opened([FORMS[form](k) for k in range(6)], tmp_path)
    demand_equal(source, IMAGES, LABELS)
    assert source.class_names == ("0", "1", "2")


def test_containers(tmp_path: Path) -> None:
    tensors = TensorDataset(PLANES, torch.tensor(LABELS))
    for dataset in (tensors, (IMAGES, np.array(LABELS)), (PLANES, torch.tensor(LABELS))):
        demand_equal(opened(dataset, tmp_path), IMAGES, LABELS)
    demand_equal(opened(Subset(tensors, [4, 1]), tmp_path), IMAGES[[4, 1]], [0, 0])
    demand_equal(opened(IMAGES, tmp_path), IMAGES, None)


def test_grey_images_of_any_size(tmp_path: Path) -> None:
    grey = [np.full((4 + k, 9), k, np.uint8) for k in range(3)]
    source = opened([grey[0], Image.fromarray(grey[1]), torch.from_numpy(grey[2])[None]], tmp_path)
    expected = [np.repeat(image[..., None], 3, 2) for image in grey]
    demand_equal(source, expected, None)  # type: ignore[arg-type]


def test_labels_and_names(tmp_path: Path) -> None:
    def labels(*values: Any, **attributes: Any) -> tuple[list[int] | None, tuple[str, ...]]:
        items = Items(*((IMAGES[k], value) for k, value in enumerate(values)), **attributes)
        source = opened(items, tmp_path)
        return None if source.labels is None else source.labels.tolist(), source.class_names

    assert labels(1, None, -1, classes=["ant", "bee"]) == ([1, -1, -1], ("ant", "bee"))
    assert labels(None, None) == (None, ())
    assert labels("dog", "ant", None) == ([1, 0, -1], ("ant", "dog"))
    assert labels(0, 1, classes=[("tench", "Tinca"), "eel"])[1] == ("tench, Tinca", "eel")
    feature = SimpleNamespace(names=["ant", "bee"])
    assert labels(0, 1, features={"label": feature})[1] == ("ant", "bee")
    assert labels(0, 5, classes=["ant"])[1] == tuple("012345")
    inner = Items((IMAGES[0], 0), classes=["ant", "bee"])
    assert opened(Subset(inner, [0]), tmp_path).class_names == ("ant", "bee")  # type: ignore[arg-type]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """A dataset without a length."""

    def __iter__(self) -> Any:
        return iter(IMAGES)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Stream(), "has no length or no items by index; give"),
        ((image for image in IMAGES), "has no length or no items by index"),
        ({"train": [], "test": []}, "a dict with train, test; convert one of its values"),
        ([], "is empty"),
        (Items(IMAGES[0], KeyError("x")), "item 1: KeyError: 'x'; look at the dataset's code"),
        ([("a.png", 1)], "item 0: begins with a str; return (image, label)"),
        ([{"a": 1, "b": 2}], "item 0: is a dict with a, b; return"),
        ([PLANES[0].float()], "numbers from 0 to 255, not from 0 to 1; leave Normalize out"),
        ([torch.full((3, 4, 4), torch.nan)], "item 0: numbers from nan"),
        ([IMAGES[0].astype(np.int64)], "item 0 is int64, not uint8"),
        ([np.zeros((4, 9, 9), np.uint8)], "has shape (1, 4, 9, 9)"),
        ([(IMAGES[0], [0.0, 1.0])], "item 0: the label is a list [0.0, 1.0]; return one"),
        ([(IMAGES[0], 0.5)], "item 0: the label is a float 0.5"),
        ([(IMAGES[0], 0), (IMAGES[1], "a")], "the labels are texts and numbers"),
        (Items(OSError("truncated")), "none of 1 images can be read, the first: truncated"),
    ],
)
def test_refusals(tmp_path: Path, dataset: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        opened(dataset, tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    dataset = Items(IMAGES[0], OSError("truncated"), {"image": {"bytes": b"no picture"}}, IMAGES[3])
    source = opened(dataset, tmp_path)
    demand_equal(source, IMAGES[[0, 3]], None)
    assert source.skipped == (
        ("item 1", "truncated"),
        ("item 2", "not a picture that Pillow knows"),
    )
    with pytest.raises(UsageError, match="item 1: truncated; correct or remove it"):
        opened(dataset, tmp_path, strict=True)


def test_full_disk(tmp_path: Path) -> None:
    class Full(Scratch):
        def file(self, name: str) -> Path:
            return Path("/dev/full")

    with pytest.raises(FastbyolError, match="No space left on device; make room"):
        source_python.open_dataset(
            source_files.random_images(9, 99, 99), "Items", scratch=Full(tmp_path)
        )


def test_convert(tmp_path: Path) -> None:
    """The public function writes what the command reads, a path or an object."""
    out, steps = tmp_path / "a.beton", list[tuple[int, int]]()
    dataset = Items(*zip(IMAGES, LABELS, strict=True), classes=["ant", "bee", "cow"])
    report = fastbyol.convert(dataset, out, progress=lambda *step: steps.append(step))
    assert (report.num_written, report.class_names) == (6, ("ant", "bee", "cow"))
    assert steps[0] == (0, 6)
    info = beton.inspect(out)
    assert info.labels is not None
    assert info.labels.tolist() == LABELS
    assert info.class_names == ("ant", "bee", "cow")
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(UsageError, match="exists already"):
        fastbyol.convert(dataset, out)
    with pytest.raises(UsageError, match="split 'test': is of paths and names"):
        fastbyol.convert(dataset, out, split="test", overwrite=True)
    report = fastbyol.convert(dataset, out, size=8, overwrite=True)
    assert report.image_size == (8, 8)
    source_files.class_folders(tmp_path / "set")
    report = fastbyol.convert(tmp_path / "set", out, mode="jpg", overwrite=True)
    assert (report.kind, report.num_written) == ("classes", 12)
