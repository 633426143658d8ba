"""`data marker`: its numbers against the functions they come from, its lines, its refusals."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from command_line import Command

from fastbyol.cli import data_marker
from fastbyol.config import ViewsConfig
from fastbyol.config_io import load
from fastbyol.data import convert, loader
from fastbyol.data.order import subset
from fastbyol.evaluation.marker import measure, variance_ratio, view_batches
from tiny import NETWORK

COMMAND = ("data", "marker")
SETS = [word for setting in NETWORK for word in ("--set", setting)]


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("some") / "some.beton"
    convert.convert("textures", path, count=40, size=16)
    return path


def test_measures_what_a_run_with_this_limit_would_see(run: Command, some: Path) -> None:
    got = run.json(some, *SETS, "--seeds", 2, "--images", 24, "--device", "cpu")
    gn = ["model.norm=gn", "model.projector.norm=none", "model.predictor.norm=none"]
    config = load(preset="demo", sets=[*NETWORK, *gn]).config
    images = loader.read_all(some, workers=1, size=16).images
    ids = subset(40, 24)
    assert ids is not None
    share = measure(images[ids], config, (0, 1), ids=ids)
    for name, cosines in (("y", share.y), ("z", share.z)):
        assert got[name]["r"] == pytest.approx(cosines.r, abs=1e-6)
        assert got[name]["pos"] == pytest.approx(cosines.pos)
        assert got[name]["neg"] == pytest.approx(cosines.neg)
        assert got[name]["r_mean"] == pytest.approx(statistics.fmean(got[name]["r"]))
        assert got[name]["r_sd"] == pytest.approx(np.std(got[name]["r"], ddof=1))
    ratios = [variance_ratio(view_batches(images[ids], config, seed, ids=ids)) for seed in (0, 1)]
    assert got["variance_ratio"] == pytest.approx(ratios)
    assert 0.0 < got["knn_entropy"] < 1.0
    assert (got["images"], got["images_in_file"], got["classes"]) == (24, 40, 10)
    assert (got["seeds"], got["preset"], got["model"]["norm"]) == ([0, 1], "demo", "gn")
    assert ViewsConfig.model_validate(got["views"]) == config.views
    assert min(got["seconds"].values()) > 0.0


def test_prints_a_line_for_each_quantity(run: Command, some: Path) -> None:
    words = (some, *SETS, "--seeds", 2)
    got, lines = run.json(*words), run.output(*words).splitlines()
    r = got["y"]["r"]
    line = next(line for line in lines if line.startswith("r of embeddings y: "))
    numbers = [float(number) for number in re.findall(r"-?\d\.\d+", line)]
    of_seeds = [statistics.fmean(r), statistics.stdev(r), min(r), max(r)]
    assert numbers == pytest.approx(of_seeds, abs=1e-3)
    assert line.endswith("2 seeds)")
    assert lines[0] == f"file: {some}, 40 of its 40 images"
    assert "(10 classes)" in lines[-2]
    one = run.output(some, *SETS, "--seeds", 1)
    assert "(one seed)" in one
    assert "+-" not in one


def test_says_what_was_not_measured(run: Command, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    for name, arrays in (("bare", {}), ("one", {"labels": np.zeros(12, np.int64)})):
        np.savez(tmp_path / f"{name}.npz", images=images, **arrays)
        convert.convert(str(tmp_path / f"{name}.npz"), tmp_path / f"{name}.beton")
    still = ("scale=1,1", "ratio=1,1", "jitter_p=0", "grayscale_p=0", "flip_p=0")
    sets = [word for setting in still for word in ("--set", f"views.{setting}")]
    out = run.output("bare.beton", *SETS, *sets, "--seeds", 1)
    assert "not measured: no labels" in out
    assert "not measured: two views of an image never differ" in out
    assert "r of embeddings y: 1.0" in out
    assert "not measured: one class" in run.output("one.beton", *SETS, "--seeds", 1)
    got = run.json("bare.beton", *SETS, *sets, "--seeds", 1)
    assert (got["knn_entropy"], got["variance_ratio"], got["y"]["r_sd"]) == (None, [None], None)


def test_a_named_preset_is_itself(run: Command, some: Path) -> None:
    got = run.json(some, "--preset", "blog", *SETS, "--seeds", 1, "--set", "model.norm=ln")
    assert (got["model"]["norm"], got["model"]["projector"]["norm"]) == ("ln", "bn")
    own = run.json(some, *SETS, "--seeds", 1, "--set", "model.projector.norm=bn")
    assert (own["model"]["norm"], own["model"]["projector"]["norm"]) == ("gn", "bn")


def test_refuses_in_one_line(run: Command, some: Path, tmp_path: Path) -> None:
    assert "nothing.beton: no such file" in run.refusal("nothing.beton")
    assert "'--images'" in run.refusal(some, "--images", 1)
    assert "'--seeds'" in run.refusal(some, "--seeds", 0)
    assert "no such preset" in run.refusal(some, "--preset", "demon")
    assert "model.nrom" in run.refusal(some, "--set", "model.nrom=gn")
    assert "device" in run.refusal(some, "--device", "tpu")
    np.savez(tmp_path / "single.npz", images=np.zeros((1, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "black.npz", images=np.zeros((9, 16, 16, 3), np.uint8))
    for name in ("single", "black"):
        convert.convert(str(tmp_path / f"{name}.npz"), tmp_path / f"{name}.beton")
    assert "single.beton: 1 image" in run.refusal("single.beton")
    assert "all views have the same embeddings" in run.refusal("black.beton", *SETS)


def test_views_in_words() -> None:
    blog = ViewsConfig()
    assert data_marker.views_in_words(blog) == (
        "96 px, crops of 0.2 to 1 of the area, aspect 0.75 to 1.33, flip 50%, "
        "jitter of strength 0.5 80%, grey 20%, gaussian blur of 0.1 to 2 px 50%, no solarize"
    )
    paper = blog.model_copy(update={"blur_p": (1.0, 0.1), "solarize_p": (0.0, 0.2), "flip_p": 0.0})
    words = data_marker.views_in_words(paper)
    assert "no flip" in words
    assert words.endswith("gaussian blur of 0.1 to 2 px 100% and 10%, solarize 0% and 20%")
    assert "no jitter" in data_marker.views_in_words(blog.model_copy(update={"strength": 0.0}))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.0061, 0.0081], "0.00710 +- 0.00141 (0.00610 to 0.00810, 2 seeds)"),
        ([0.999], "0.99900 (one seed)"),
        ([0.5, 0.5, 0.5], "0.500 +- 0.000 (0.500 to 0.500, 3 seeds)"),
        ([0.0, 0.0], "0.00 +- 0.00 (0.00 to 0.00, 2 seeds)"),
        ([1.0], "1.00 (one seed)"),
        ([9.0], "9.00 (one seed)"),
    ],
)
def test_numbers_have_the_digits_that_matter(values: list[float], text: str) -> None:
    assert data_marker._over_seeds(values) == text
