"""`fastbyol sweep` as typed: what it trains, shows and refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fastbyol.show import figures
from made_sweep import SQUARE, finish, small, written

COMMAND = ("sweep",)
AXES = '"optim.lr" = [0.1, 0.5]\n"model.norm" = ["gn", "none"]'


def last_event(run: Path) -> dict[str, object]:
    """The last event of a run's metrics."""
    event: dict[str, object] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return event


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.toml"], "nowhere.toml"),
        (["."], "no sweep here"),
        ([".", "--seeds=2", "--set=optim.momentum=0.5"], "--seeds, --set: . is a folder"),
        ([".", "--jobs=2"], "launch options: . is a folder"),
        (["grid.toml", "--set", "optim.lr=1"], "optim.lr (--set): is crossed (grid.toml:6)"),
        (["grid.toml", "--measure", "acuracy"], "the nearest is accuracy"),
        (["grid.toml", "--x", "momentum"], "--x: 'momentum' is none of optim.lr"),
        (["grid.toml", "--x", "lr", "--y", "optim.lr"], "--x and --y: are both optim.lr"),
        (["grid.toml", "--data", "nowhere.beton"], "nowhere.beton"),
        (["grid.toml", "--seeds", "1000", "--set", "optim.lrr=1"], "optim.lrr (--set)"),
        (["grid.toml", "--nodes", "2"], "--launcher slurm"),
    ],
)
def test_what_cannot_work_is_one_line(run, arguments: list[str], says: str, tmp_path: Path) -> None:
    written(tmp_path, SQUARE)
    code, out, error = run(*arguments)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sweeps").exists()
    assert not out or "--nodes" in arguments


def test_a_grid_is_trained_shown_and_extended(run, tmp_path: Path) -> None:
    written(tmp_path, small(AXES))
    out = run.output("grid.toml", "--jobs=2", "--png=pictures", "--measure=loss")
    folder = tmp_path / "sweeps/grid"
    assert f"4 points of optim.lr x model.norm, 4 runs, in {folder}" in out.replace("\n", "")
    assert (tmp_path / "pictures/grid-loss.png").is_file()
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [(row["optim.lr"], row["model.norm"], row["status"]) for row in rows] == [
        (lr, norm, "done") for lr in ("0.1", "0.5") for norm in ("gn", "none")
    ]
    assert [float(row["loss"]) for row in rows] == [
        last_event(folder / row["folder"])["loss"] for row in rows
    ]
    table = out[out.index(" lr ") :].splitlines()
    cells = table[1].split()
    assert cells[:4] == ["0.1", "gn", "1", rows[0]["state"]]
    assert float(cells[4]) == pytest.approx(float(rows[0]["loss"]), rel=1e-3)
    # Finished runs stay as they are; a larger grid adds to them.
    written(tmp_path, small(AXES.replace("0.5]", "0.5, 0.2]")))
    told = run.json("grid.toml", "--jobs=2")
    assert len(told["skipped"]) == 4
    assert len(told["finished"]) == 2
    assert told["axes"]["optim.lr"] == [0.1, 0.5, 0.2]
    assert told["measure"] == "accuracy"
    assert len(told["runs"]) == 6
    assert [point["measures"]["accuracy"]["mean"] for point in told["points"]] == [
        last_event(Path(each["path"]))["accuracy"] for each in told["runs"]
    ]
    assert "holds a sweep with optim.momentum" in run("grid.toml", "--set=optim.momentum=0.5")[2]
    # The folder alone says the same.
    again = run.json("sweeps/grid")
    assert (again["points"], again["axes"]) == (told["points"], told["axes"])


def test_without_workers_it_shows_what_is_there(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SQUARE.replace("[optim]", "[train]\nepochs = 1\n[optim]", 1)
    written(tmp_path, text)
    code, out, error = run("grid.toml", "--launcher=none", "--seeds=2")
    assert code == 0
    assert "start workers" in out
    assert error == f"{tmp_path}/sweeps/grid: no run is finished: nothing to draw yet\n"
    assert not (tmp_path / "sweeps/grid/sweep.csv").exists()
    finish(
        tmp_path / "sweeps/grid", "lr=0.5,weight_decay=0.0/seed1", ["collapsed"], {"accuracy": 12.5}
    )
    monkeypatch.setattr(figures, "available", lambda: False)
    code, out, error = run("sweeps/grid", "--measure=collapsed")
    assert code == 0
    assert "1 of 2" in out
    assert "matplotlib is not installed" in error
    assert (tmp_path / "sweeps/grid/sweep.csv").exists()
    assert not (tmp_path / "sweeps/grid/sweep.html").exists()
    assert "the nearest is neg_cos" in run.refusal("sweeps/grid", "--measure=negcos")
    assert "matplotlib" in run.refusal("sweeps/grid", "--png=pictures")
