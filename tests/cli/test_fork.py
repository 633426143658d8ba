"""``fastbyol fork`` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Command

from fastbyol import api
from tiny import beton_files, tiny_config

COMMAND = ["fork"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fork")
    api.train(tiny_config(beton_files(folder), "train.epochs=2"), folder / "run@home")
    return folder / "run@home"


def test_a_fork_is_trained_to_its_end_and_has_a_page(run: Command, parent: Path) -> None:
    summary = run.json(f"{parent}@6", "--seed", 5, "--set", "optim.lr=0.25", "--device", "cpu")
    out = Path(f"{parent}.forks") / "6-lr=0.25,seed=5"
    assert (summary["run"], summary["finished"], summary["step"]) == (str(out), True, 12)
    assert json.loads((out / "env.json").read_text())["fork"]["changes"] == {
        "optim.lr": 0.25,
        "train.seed": 5,
    }
    assert "seed = 5  # fork" in (out / "config.toml").read_text()
    assert (out / "report.html").exists()
    assert "6-lr=0.25,seed=5" in (out.parent / "forks.html").read_text()
    code, _, err = run(f"{parent}@6", "--seed", 5, "--set", "optim.lr=0.25")
    assert code == 0, err
    assert "is finished" in run.output(f"{parent}@6", "--seed", 5, "--set", "optim.lr=0.25")


def test_bad_input_is_one_line(run: Command, parent: Path, tmp_path: Path) -> None:
    how = f"{parent}: write RUN@STEP, a run and the step to fork it at, such as {parent}@12; "
    assert f"{how}saved steps: 6, 12\n" in run.refusal(parent)
    assert "x is no run" in run.refusal("x")
    assert "x is no run" in run.refusal("x@first")
    assert "no run here" in run.refusal("x@6")
    assert "it was not kept" in run.refusal(f"{parent}@7")
    assert "the run has come to step 12" in run.refusal(f"{parent}@{10**17}")
    assert "optim.lrr (--set): no such key; the nearest is optim.lr" in run.refusal(
        f"{parent}@6", "--set", "optim.lrr=1"
    )
    assert "model.norm: a fork cannot change it" in run.refusal(
        f"{parent}@6", "--set", "model.norm=gn"
    )
    assert "optim.lr = -1" in run.refusal(f"{parent}@6", "--set", "optim.lr=-1")
    assert "holds another run" in run.refusal(f"{parent}@6", "--out", parent)
    (tmp_path / "file").touch()
    assert "Not a directory" in run.refusal(f"{parent}@6", "--out", "file")
    assert "Not a directory" in run.refusal(f"{parent}@6", "--out", "file/x", code=1)
    assert not Path("fork").exists()
