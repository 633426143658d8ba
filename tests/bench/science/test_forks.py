"""Where runs are forked, with which rates, and what is said of their futures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastbyol import api, config_io
from fastbyol.errors import FastbyolError
from fastbyol.runs.folder import CONFIG
from fastbyol.runs.layers import read_layers
from fastbyol_bench.science import document, forks
from fastbyol_bench.science.forks import FUTURES
from tiny import COLLAPSING, STEPS_PER_EPOCH, beton_files, tiny_config


def written(run: Path, cosines: list[float], changes: dict[int, tuple[str, str]]) -> Path:
    """Write epochs of ten steps with their negative cosines, and changes of state after steps."""
    run.mkdir(parents=True)
    lines = []
    for epoch, cosine in enumerate(cosines):
        step = 10 * (epoch + 1)
        if step in changes:
            before, after = changes[step]
            lines.append({"event": "state", "step": step, "before": before, "after": after})
        state = "collapsed" if cosine > 0.99 else "healthy"
        lines.append(
            {"event": "epoch", "step": step, "epoch": epoch, "state": state, "neg_cos": cosine}
        )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_deepest_collapse_and_the_way_out(tmp_path: Path) -> None:
    changes = {20: ("collapsing", "collapsed"), 50: ("collapsed", "recovering")}
    run = written(tmp_path / "run", [0.9, 0.995, 0.999, 0.998, 0.96], changes)
    assert [forks.moment_of(run, moment) for moment in forks.MOMENTS] == [30, 20]
    assert forks.left_at(run, 30) == 50
    assert forks.left_at(run, 50) is None
    relapsed = changes | {40: ("collapsed", "recovering"), 60: ("recovering", "collapsed")}
    run = written(tmp_path / "other", [0.9, 0.995, 0.999, 0.96, 0.96, 0.995], relapsed)
    assert forks.left_at(run, 30) == 40


def test_every_future_changes_what_its_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tiny parents: each can be forked so, and the rates are those that were recorded."""
    folder = tmp_path / "parents/runs/gn-lars-0.2"
    sets = (*COLLAPSING, "optim.name=lars", "optim.lr=0.2", "run.keep_checkpoints=9")
    for seed in range(2):
        config = tiny_config(beton_files(tmp_path), *sets, f"train.seed={seed}")
        api.train(config, folder / f"seed{seed}")
    monkeypatch.setattr(forks, "_is_collapsed", lambda run, step: True)
    runs = forks.parents(tmp_path)
    assert [run.name for run in runs] == ["seed0", "seed1"]
    monkeypatch.setattr(forks, "moment_of", lambda run, moment: STEPS_PER_EPOCH)
    layers = read_layers(runs[0])
    rates = layers.values[STEPS_PER_EPOCH:, :, layers.metrics.index("rate")].astype(np.float64)
    made = forks.changes("sgd-mean-rates", runs[0], STEPS_PER_EPOCH, runs)
    assert dict(made["optim.lr_mult"]) == pytest.approx(
        dict(zip(layers.names, rates.mean(0), strict=True))
    )
    replayed = forks.changes("replayed", runs[1], STEPS_PER_EPOCH, runs)
    assert replayed == {"optim.replay_rates": str(runs[0].resolve())}
    assert forks.changes("lars", runs[0], STEPS_PER_EPOCH, runs) == {}
    jobs = list(forks.jobs(tmp_path, "first"))
    assert [(job.name, job.run) for job in jobs] == [
        (name, run) for run in runs for name in FUTURES
    ]
    assert jobs[0].out == runs[0]
    # Each is a fork that trains: what the names of the settings are, nobody else checks.
    for job in jobs[1:6]:
        config = config_io.read_run(Path(forks.work(job)) / CONFIG)
        if job.name == "capped":
            assert config.optim.rate_cap == 0.8
        if job.name == "sgd-x10":
            assert config.optim.lr_mult == (("encoder.layer1", 10.0), ("encoder.layer2", 10.0))
        if job.name == "early-only":
            assert config.optim.lars_on == ("encoder.layer1", "encoder.layer2")
        assert config.optim.name == ("sgd" if job.name.startswith("sgd") else "lars")


def test_parents_are_the_first_that_collapse(tmp_path: Path) -> None:
    config = tiny_config(beton_files(tmp_path), "train.epochs=3")
    for seed, deepest in enumerate((0.995, 0.98, 0.992, 0.999, 0.996, 0.997, 0.998)):
        run = tmp_path / f"parents/runs/gn-lars-0.2/seed{seed}"
        written(run, [0.9, deepest, 0.95], {})
        (run / "config.toml").write_text(config_io.dump(config))
    names = [run.name for run in forks.parents(tmp_path)]
    assert names == ["seed0", "seed2", "seed3", "seed4", "seed5"]


def test_parents_that_are_not_there_or_not_finished_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FastbyolError, match="no parents"):
        forks.parents(tmp_path)
    config = tiny_config(beton_files(tmp_path), "train.epochs=1")
    run = Path(api.train(config, tmp_path / "parents/runs/gn-lars-0.2/seed0").run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(FastbyolError, match="seed0: is not finished"):
        forks.parents(tmp_path)


def test_the_table_counts_who_left() -> None:
    ends = (
        ("lars", 400, "recovering", 0.7, 60.4),
        ("lars", 250, "collapsed", 0.991, 55.0),
        ("capped", None, "collapsed", 0.9996, 11.0),
    )
    rows = [
        {
            "future": name, "step": 100, "left_at": left, "state": state, "neg_cos": [1.0, cosine],
            "accuracy": accuracy,
        }
        for name, left, state, cosine, accuracy in ends
    ]  # fmt: skip
    lines = document.endings(rows).splitlines()
    expected = (
        "| lars | 2 of 2 | 150 to 300 | 1 of 2 | 1 collapsed, 1 recovering "
        "| 0.70 to 0.99 | 55 to 60 |"
    )
    assert lines[2] == expected
    assert "| capped | 0 of 1 |  | 0 of 0 | 1 collapsed | 1.00 to 1.00 | 11 to 11 |" in lines
    assert "| replayed | 0 of 0 |  | 0 of 0 |  |  |  |" in lines
