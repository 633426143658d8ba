"""The document says what was measured, and measuring measures the demonstration's runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import fastbyol
from fastbyol_bench import embedding_figures
from tiny import TINY


def test_the_document_says_what_was_measured() -> None:
    text = embedding_figures.DOCUMENT.read_text("utf-8")
    name = embedding_figures.__name__
    assert embedding_figures.fresh(text) == text, f"run: python -m {name} docs"
    assert embedding_figures.PICTURE.is_file()


def test_runs_are_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_figures, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(embedding_figures, "DATA", "textures")
    few = ("data.train=textures", "data.textures_test_count=64", "train.epochs=1")
    for seed, where in enumerate(embedding_figures.RUNS.values()):
        config = fastbyol.load_config("demo", [*TINY, *few, f"train.seed={seed}"])
        fastbyol.train(config, tmp_path / where)
    record = embedding_figures.measure(tmp_path)
    assert list(record["runs"]) == list(embedding_figures.RUNS)
    for where, row in zip(embedding_figures.RUNS.values(), record["runs"].values(), strict=True):
        result = fastbyol.evaluate(tmp_path / where, "knn", test_data="textures", lidar=True)
        assert (row["knn"], row["rank"]) == (result["accuracy"], result["rank"])
        assert row["lidar_z"] == result["lidar_z"]
        assert row["embedded"] == result["num_train"] + result["num_test"]
    lines = embedding_figures.block(record).splitlines()
    assert lines[0] == embedding_figures.BEGIN
    assert lines[-1] == embedding_figures.END
    assert all(line.count("|") == 5 for line in lines[1:-3] if line)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 800
