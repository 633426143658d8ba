"""Rates of one run used in another, through the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbyol import api
from fastbyol.errors import UsageError
from fastbyol.runs.layers import read_layers
from tiny import beton_files, tiny_config

LARS = ("optim.name=lars", "optim.lr=0.3", "probe.every_epochs=0")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("betons"))


@pytest.fixture(scope="module")
def source(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("source") / "run"
    api.train(tiny_config(files, *LARS), run)
    return run


def rates(run: Path) -> np.ndarray:
    layers = read_layers(run)
    return np.asarray(layers.values[:, :, layers.metrics.index("rate")])


def test_its_own_rates_make_the_same_run_again(
    files: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    """The rates are recorded in the precision that they were used in, so every step is the same bit
    for bit.
    """
    api.train(tiny_config(files, *LARS, f"optim.replay_rates={source}"), tmp_path / "run")
    ours, theirs = ((run / "metrics.jsonl").read_bytes() for run in (tmp_path / "run", source))
    assert ours == theirs
    assert np.array_equal(rates(tmp_path / "run"), rates(source))


def test_another_seed_has_the_rates_and_other_metrics(
    files: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    summary = api.train(
        tiny_config(files, *LARS, f"optim.replay_rates={source}", "train.seed=5"), tmp_path / "run"
    )
    assert summary.finished
    assert np.array_equal(rates(tmp_path / "run"), rates(source))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() != (
        source / "metrics.jsonl"
    ).read_bytes()
    assert api.evaluate(tmp_path / "run")["step"] == summary.step  # which needs no rates


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("train.epochs=4",), "recorded 18 steps and this run has 24"),
        (("model.norm=gn", "model.projector.norm=none"), "another network"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(
    files: tuple[Path, Path], source: Path, tmp_path: Path, sets: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        api.train(
            tiny_config(files, *LARS, f"optim.replay_rates={source}", *sets), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_there_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        api.train(tiny_config(files, *LARS, "optim.replay_rates=nowhere"), tmp_path / "run")
