"""Sets of torchvision by name, read from files in their true formats.

As in torchvision's own tests, checksums are not compared: those of the true files are in its code.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

import source_files
from fastbyol.data import convert, source_torchvision, sources
from fastbyol.data.scratch import Scratch
from fastbyol.data.source_arrays import Source
from fastbyol.errors import UsageError
from fastbyol.runs import inputs
from test_sources import demand_equal


def opened(name: str, tmp_path: Path, **options: Any) -> Source:
    return sources.open_source(
        f"torchvision:{name}", scratch=Scratch(tmp_path / "scratch"), **options
    )


def refusal(name: str, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        opened(name, tmp_path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = source_files.cifar10(tmp_path)
    for name in ("_check_integrity", "_load_meta"):
        monkeypatch.setattr(datasets.CIFAR10, name, lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "classes", list(source_files.CIFAR10_NAMES), False)
    for split in ("train", "test"):
        source = opened(f"cifar10:{tmp_path}", tmp_path, split=split)
        demand_equal(source, *written[split])
        assert source.class_names == source_files.CIFAR10_NAMES
        assert (source.kind, source.split) == ("torchvision", split)
        assert source.splits == ("train", "test")


def test_mnist_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set lies where torchvision puts it; idx files say 28 x 28, and are not padded."""
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path))
    written = source_files.idx(tmp_path / "torchvision/KMNIST/raw", packed=False)
    images, labels = written["test"]
    source = opened("KMNIST", tmp_path, split="test")
    demand_equal(source, images[:, 2:-2, 2:-2], labels)
    assert source.class_names == tuple(datasets.KMNIST.classes)
    assert opened("kmnist", tmp_path).split == "train"


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlabelled images have the label -1 in torchvision, too."""
    written = source_files.stl10(tmp_path)
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    source = opened(f"STL10:{tmp_path}", tmp_path, split="train+unlabeled")
    both = np.concatenate([written[part][0] for part in ("train", "unlabeled")])
    demand_equal(source, both, written["train"][1] + written["unlabeled"][1])


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    folder = tmp_path / "torchvision"
    message = refusal("CIFAR10", tmp_path)
    assert "cifar-10-python.tar.gz" in message
    assert f"below {folder}, or name their folder, torchvision:CIFAR10:ROOT" in message
    assert "FashionMNIST/raw/train-images-idx3-ubyte.gz" in refusal("FashionMNIST", tmp_path)
    assert "below /nowhere" in refusal("DTD:/nowhere", tmp_path)
    assert not Path("/nowhere").exists()


def test_refusals(tmp_path: Path) -> None:
    assert "'CIFAR11' is none of MNIST" in refusal("CIFAR11", tmp_path)
    assert "the nearest is CIFAR10" in refusal("CIFAR11", tmp_path)
    assert "'val' is none of train, test" in refusal("MNIST", tmp_path, split="val")
    assert "has no splits of it" in refusal("EuroSAT", tmp_path, split="test")


def test_sets_are_torchvisions() -> None:
    """Every name is a class, and takes the argument that chooses the split."""
    import inspect

    from fastbyol.data.source_torchvision import SETS

    for name, (argument, _) in SETS.items():
        arguments = inspect.signature(getattr(datasets, name).__init__).parameters
        assert not argument or argument in arguments, name
        assert name == "FakeData" or {"root", "download"} <= {*arguments, *_passed_on(name)}


def _passed_on(name: str) -> tuple[str, ...]:
    return ("download",) if name == "QMNIST" else ()  # to MNIST


def test_a_root_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's configuration is valid from anywhere."""
    monkeypatch.chdir(tmp_path)
    assert source_torchvision.absolute("torchvision:MNIST:a") == f"torchvision:MNIST:{tmp_path}/a"
    for name in ("torchvision:MNIST", "torchvision:MNIST:", "textures", "a:b:c"):
        assert source_torchvision.absolute(name) == name
    assert inputs.absolute("torchvision:MNIST:a") == f"torchvision:MNIST:{tmp_path}/a"


def test_files_of(tmp_path: Path) -> None:
    """What is converted is known by the set's name and the files below its root."""
    source_files.idx(tmp_path)
    names = sources.files_of(f"torchvision:mnist:{tmp_path}")
    assert len(names) == 4
    assert all(name.startswith("MNIST/") for name in names)
    assert sources.files_of("torchvision:MNIST") == {}
    assert sources.is_source("torchvision:MNIST")
    assert not sources.is_path("torchvision:MNIST")


def test_converted(tmp_path: Path) -> None:
    report = convert.convert("torchvision:FakeData", tmp_path / "a.beton", size=16)
    assert (report.num_written, report.image_size) == (64, (16, 16))
