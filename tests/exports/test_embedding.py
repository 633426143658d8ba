"""A run's embeddings in files are those of ``features.embed``, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from small_disk import small_disk
from torch import nn

import source_files
from fastbyol import api
from fastbyol.data import beton, loader
from fastbyol.data.contents import Contents
from fastbyol.data.convert import convert
from fastbyol.data.order import subset
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.evaluation import features
from fastbyol.exports import embedding
from fastbyol.runs import checkpoint
from tiny import beton_files, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    config = tiny_config(beton_files(folder), "train.epochs=1", "probe.every_epochs=0")
    api.train(config, folder / "run")
    return folder / "run"


def expected(run: Path, file: Path, weights: str = "trained", *, z: bool = False) -> np.ndarray:
    """Embed all images of ``file`` at once."""
    config, net, _ = api._load_net(run, weights)
    images = loader.read_all(file, workers=1, size=16).images
    module = nn.Sequential(net.encoder, net.projector) if z else net.encoder
    return features.embed(module, images, config.views, device="cpu").numpy()


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("weights", api.WEIGHTS)
@pytest.mark.parametrize("z", [False, True])
def test_files_hold_what_embed_returns(run: Path, tmp_path: Path, weights: str, z: bool) -> None:
    result = api.embed(run, tmp_path / "e.npz", weights=weights, projections=z)
    api.embed(run, tmp_path / "e.parquet", weights=weights, projections=z)
    column, file = "z" if z else "y", run.parent / "test.beton"
    wanted, info = expected(run, file, weights, z=z), beton.inspect(file)
    read = arrays(tmp_path / "e.npz")
    assert np.array_equal(read[column], wanted)
    assert np.array_equal(read["ids"], np.arange(50))
    assert np.array_equal(read["labels"], info.labels)
    assert tuple(read["class_names"]) == info.class_names
    table = parquet.read_table(tmp_path / "e.parquet")
    values = table[column].combine_chunks().flatten().to_numpy().reshape(wanted.shape)
    assert np.array_equal(values, wanted)
    assert table["label"].to_pylist() == info.labels.tolist()
    about = json.loads(str(read["about"]))
    assert about == json.loads(table.schema.metadata[b"fastbyol"])
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    digest = checkpoint.load(newest).digest
    assert about["checkpoint"] == (None if weights == "random" else digest)
    assert about["step"] == (0 if weights == "random" else 6)
    assert (about["run"], about["weights"], about["data"]) == ("run", weights, "test.beton, test")
    assert {key: about[key] for key in Contents._fields} == Contents.of(info)._asdict()
    assert (result["num_images"], result["dim"]) == wanted.shape


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_many_batches_are_those_of_one_call(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Convolutions of another number of images round otherwise."""
    images = tmp_path / "many.beton"
    convert("textures", images, count=1100, size=16, seed=5)
    result = api.embed(run, tmp_path / f"e{suffix}", data=images)
    if suffix == ".npz":
        y = arrays(tmp_path / "e.npz")["y"]
    else:
        column = parquet.read_table(tmp_path / "e.parquet")["y"].combine_chunks()
        y = column.flatten().to_numpy().reshape(1100, -1)
    assert np.array_equal(y, expected(run, images))
    assert result["data"] == "many.beton"


def test_a_limit_takes_the_same_images_for_all_runs(run: Path, tmp_path: Path) -> None:
    api.embed(run, tmp_path / "e.npz", limit=7, split="train")
    read, chosen = arrays(tmp_path / "e.npz"), subset(48, 7)
    assert chosen is not None
    assert read["ids"].tolist() == chosen.tolist()
    images = loader.read_all(run.parent / "train.beton", workers=1, size=16, limit=7)
    config, net, _ = api._load_net(run, "trained")
    wanted = features.embed(net.encoder, images.images, config.views, device="cpu")
    assert np.array_equal(read["y"], wanted)
    assert read["labels"].tolist() == images.labels.tolist()


def test_images_of_folders_without_labels(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name in ("x", "y"):
        source_files.class_folders(folder / name)
    api.embed(run, tmp_path / "labelled.npz", data=folder / "x")
    assert arrays(tmp_path / "labelled.npz")["class_names"].size
    np.savez(tmp_path / "images.npz", images=np.zeros((5, 16, 16, 3), np.uint8))
    result = api.embed(run, tmp_path / "e.npz", data=tmp_path / "images.npz",
                       picture=tmp_path / "e.png")  # fmt: skip
    assert set(arrays(tmp_path / "e.npz")) == {"y", "ids", "about"}
    assert result["labels"] is None
    assert "no labels" in result["notes"][0]
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_some_of_many_rows(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PICTURED", 20)
    seen = []
    lay_out = embedding.plane.lay_out

    def spy(rows: torch.Tensor, way: str) -> Any:
        seen.append((rows, way))
        return lay_out(rows, way)

    monkeypatch.setattr(embedding.plane, "lay_out", spy)
    result = api.embed(run, picture=tmp_path / "e.html")
    ((rows, way),) = seen
    chosen = subset(50, 20)
    assert chosen is not None
    assert np.array_equal(rows, expected(run, run.parent / "test.beton")[chosen.numpy()])
    assert way == "pca"
    assert 0 < sum(result["variance_shares"]) <= 1
    assert "20 of 50 images" in (tmp_path / "e.html").read_text()


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_full_disk_is_one_line_and_leaves_nothing(run: Path, tmp_path: Path, suffix: str) -> None:
    images = tmp_path / "many.beton"
    convert("textures", images, count=1100, size=16, seed=5)
    with small_disk(tmp_path / "disk", 65536) as disk:
        with pytest.raises(FastbyolError, match=r"e\.\w+: cannot write: No space left") as caught:
            api.embed(run, disk / f"e{suffix}", data=images)
        assert "\n" not in str(caught.value)
        assert list(disk.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there.npz").touch()
    for arguments, words in (
        ({}, "nothing to write"),
        ({"out": "e.csv"}, "ends in .npz or .parquet"),
        ({"out": tmp_path / "there.npz"}, "exists already"),
        ({"out": tmp_path / "no" / "e.npz"}, "no such folder"),
        ({"out": tmp_path / "e.npz", "limit": -1}, "--limit -1"),
        ({"out": tmp_path / "e.npz", "picture": "e.gif"}, "ends in .png or .html"),
        ({"picture": tmp_path / "e.png", "by": "tsne"}, "pca, umap"),
        ({"out": tmp_path / "e.npz", "split": "val"}, "train, test"),
        ({"out": tmp_path / "e.npz", "data": "fashion-mnist", "split": "val"}, "train, test"),
        ({"out": tmp_path / "e.npz", "data": tmp_path / "absent"}, "absent"),
        ({"out": tmp_path / "e.npz", "label_field": "absent"}, "absent"),
    ):
        with pytest.raises(UsageError, match=words):
            api.embed(run, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]


def test_an_encoder_that_diverged_is_refused(run: Path, tmp_path: Path) -> None:
    config, net, loaded = api._load_net(run, "trained")
    with torch.no_grad():
        net.encoder.conv1.weight.fill_(float("nan"))
    wishes = embedding.Wishes(
        out=tmp_path / "e.npz", picture=None, by="pca", data=None, split=None, weights="trained",
        projections=False, limit=0, image_field=None, label_field=None, overwrite=False,
    )  # fmt: skip
    with pytest.raises(FastbyolError, match=r"test.beton, test: 50 of 50 rows hold NaN"):
        embedding.write(run, config, net, loaded, wishes, device=torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_changed_images_of_the_run_are_refused(run: Path, tmp_path: Path) -> None:
    test = run.parent / "test.beton"
    before = test.read_bytes()
    try:
        convert("textures", test, count=50, size=16, seed=77, overwrite=True)
        with pytest.raises(UsageError, match="is not the test data"):
            api.embed(run, tmp_path / "e.npz")
        api.embed(run, tmp_path / "e.npz", data=test)
    finally:
        test.write_bytes(before)
