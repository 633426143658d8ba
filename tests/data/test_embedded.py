"""Built-in sets: each is made once, however many processes ask for it at once."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import source_files
import tiny
from fastbyol.config import DataConfig
from fastbyol.data import beton, convert, embedded

CONFIG = DataConfig(textures_count=64, textures_size=16)
PROCESSES = multiprocessing.get_context("forkserver")


def ask(start: Any, answers: Any, cache: str) -> None:
    """Answer with the inode of the set's file, and whether this process wrote it."""
    wrote = []
    convert_ = convert.convert

    def counting(*arguments: Any, **options: Any) -> Any:
        wrote.append(1)
        return convert_(*arguments, **options)

    convert.convert = counting
    os.environ["FASTBYOL_CACHE"] = cache  # a server of forks has the environment of its own start
    start.wait()
    path = embedded.training_file(CONFIG)
    answers.put((path.stat().st_ino, len(wrote)))


def test_of_three_that_ask_at_once_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    start, answers = PROCESSES.Event(), PROCESSES.Queue()
    children = [
        PROCESSES.Process(target=ask, args=(start, answers, str(tmp_path / "cache")))
        for _ in range(3)
    ]
    for child in children:
        child.start()
    start.set()
    pairs = [answers.get(timeout=300) for _ in children]
    for child in children:
        child.join(60)
    assert len({inode for inode, _ in pairs}) == 1
    assert sum(wrote for _, wrote in pairs) == 1
    assert beton.inspect(embedded.training_file(CONFIG)).num_samples == 64


def test_the_file_is_found_again_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path))
    path = embedded.training_file(CONFIG)
    monkeypatch.setattr(convert, "convert", lambda *_, **__: pytest.fail("made again"))
    assert embedded.training_file(CONFIG) == path


def _folder(to: Path) -> str:
    for part, count in (("train", 6), ("val", 4)):
        source_files.class_folders(to / part, per_class=count)
    return str(to)


def _packed(to: Path, name: str) -> str:
    _folder(to / "unpacked")
    return str(source_files.packed(to / "unpacked", to / name))


def _shards(to: Path) -> str:
    for part in ("train", "val"):
        source_files.webdataset(to, shards=3, per_shard=6, name=part)
    return str(to)


def _braces(to: Path) -> str:
    source_files.webdataset(to, shards=3, per_shard=6)
    return str(to / "shard-{000000..000002}.tar")


def _written(to: Path, write: Any, at: str = ".", **counts: int) -> str:
    write(to, **counts)
    return str(to / at)


def _npy(to: Path) -> str:
    for part, count in (("train", 20), ("test", 12)):
        np.save(to / f"x_{part}.npy", source_files.random_images(count, 18, 18, count))
        np.save(to / f"y_{part}.npy", np.arange(count) % 3)
    return str(to)


def _mnist(to: Path) -> str:
    source_files.idx(to / "MNIST" / "raw", train=30, test=30, packed=False)
    return f"torchvision:MNIST:{to}"


def _beton(to: Path) -> str:
    convert.convert("textures", to / "a.beton", count=64, size=16)
    return str(to / "a.beton")


# What ``--data`` takes, by its builder, and whether it has images for the probe besides.
KINDS = {
    "beton": (_beton, False),
    "folder": (_folder, True),
    "tar": (lambda to: _packed(to, "a.tar"), True),
    "tar.gz": (lambda to: _packed(to, "a.tar.gz"), True),
    "zip": (lambda to: _packed(to, "a.zip"), True),
    "webdataset": (_shards, True),
    "webdataset of braces": (_braces, False),
    "parquet": (lambda to: _written(to, source_files.parquet, train=20, test=12), True),
    "saved set": (lambda to: _written(to, source_files.saved_set, train=20, test=12), True),
    "npz": (lambda to: _written(to / "a.npz", source_files.npz), False),
    "npy": (_npy, True),
    "idx": (lambda to: _written(to, source_files.idx, train=30, test=30), True),
    "cifar10": (lambda to: _written(to, source_files.cifar10, test=30), True),
    "svhn": (lambda to: _written(to, source_files.svhn, train=20, test=30), True),
    "stl10": (lambda to: _written(to, source_files.stl10, test=30), True),
    "torchvision": (_mnist, True),
}
SHORT = ("--epochs", "1", *(word for each in tiny.TINY for word in ("--set", each)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_on_and_evaluated(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    build, has_parts = KINDS[kind]
    (tmp_path / "in").mkdir()
    data = build(tmp_path / "in")
    test = () if has_parts else ("--test-data", data)
    run.output("train", "--data", data, *test, *SHORT, "--out", "a")
    for protocol in ("blog", "knn"):
        result = run.json("eval", "a", "--protocol", protocol)
        assert result["num_test"] >= 6
        assert result["num_classes"] >= 2
        assert protocol == "blog" or result["num_train"] >= 12
