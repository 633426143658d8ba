"""``fastbyol embed`` as typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import Command

from fastbyol import api
from tiny import beton_files, tiny_config

COMMAND = ["embed"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    config = tiny_config(beton_files(folder), "train.epochs=1", "probe.every_epochs=0")
    api.train(config, folder / "run")
    return folder / "run"


def test_a_file_and_a_picture(run: Command, trained: Path) -> None:
    out = run.output(trained, "--out", "y.npz", "--picture", "y.png")
    first, second = out.splitlines()
    assert first == "y.npz: embeddings y of 50 images (test.beton, test), 32 numbers each"
    assert second.startswith("y.png: by pca, ")
    with np.load("y.npz") as file:
        assert file["y"].shape == (50, 32)
    result = run.json(trained, "--out", "z.npz", "--projections", "--split", "train", "--limit", 9)
    assert (result["column"], result["num_images"], result["dim"]) == ("z", 9, 8)
    assert result["out"] == "z.npz"
    assert result["picture"] is None


def test_existing_files_are_replaced_if_asked(run: Command, trained: Path) -> None:
    run.output(trained, "--out", "y.npz")
    assert "exists already" in run.refusal(trained, "--out", "y.npz")
    run.output(trained, "--out", "y.npz", "--overwrite", "--limit", 3)
    with np.load("y.npz") as file:
        assert len(file["y"]) == 3


def test_bad_input_is_one_line(run: Command, trained: Path) -> None:
    assert "--out" in run.refusal(trained)
    assert "no such file" in run.refusal("nowhere", "--out", "y.npz").lower()
    assert "umap" in run.refusal(trained, "--picture", "y.png", "--by", "tsne")
    assert ".parquet" in run.refusal(trained, "--out", "y.csv")
    assert list(Path().iterdir()) == []
