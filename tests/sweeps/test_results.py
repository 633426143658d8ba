"""Measures of runs, means of points: against numbers that were written by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastbyol.errors import UsageError
from fastbyol.fleet.ledger import RUNS, Call, Ledger
from fastbyol.sweeps import results
from made_sweep import SQUARE, ask, finish

FOUR = SQUARE.replace("[optim]", "[train]\nepochs = 4\n[optim]", 1)
LOW, HIGH = "lr=0.1,weight_decay=0.0", "lr=0.5,weight_decay=0.0"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    ask(FOUR, folder, seeds=3)
    return folder


def point(sweep: results.Sweep, name: str) -> results.PointResult:
    return next(each for each in sweep.points if each.name == name)


def test_means_are_of_finished_seeds_alone(out: Path) -> None:
    finish(out, f"{LOW}/seed0", ["healthy"] * 4, {"accuracy": 40.0, "neg_cos": 0.25})
    finish(out, f"{LOW}/seed1", ["healthy"] * 4, {"accuracy": 50.0, "neg_cos": None})
    finish(out, f"{LOW}/seed2", ["healthy"] * 3, {"accuracy": 99.0, "neg_cos": 0.75})
    low = point(results.read(out), LOW)
    assert low.summary("accuracy") == results.Summary(45.0, 40.0, 50.0, 2)
    assert low.summary("neg_cos") == results.Summary(0.25, 0.25, 0.25, 1)
    assert low.summary("loss") is None
    assert (len(low.done), len(low.runs), dict(low.left)) == (2, 3, {"new": 1})
    assert point(results.read(out), HIGH).summary("accuracy") is None


def test_shares_follow_from_the_states(out: Path) -> None:
    finish(out, f"{LOW}/seed0", ["collapsing", "collapsed", "recovering", "healthy"])
    finish(out, f"{LOW}/seed1", ["healthy", "collapsed", "collapsed", "dead"])
    finish(out, f"{LOW}/seed2", ["healthy", "collapsing", "collapsing", "collapsing"])
    low = point(results.read(out), LOW)
    third = 1 / 3
    summaries = {name: low.summary(name) for name in results.OF_STATES}
    assert {name: (each.mean, each.count) for name, each in summaries.items() if each} == {
        "collapsed": pytest.approx((third, 3)),
        "recovered": pytest.approx((third, 3)),
        "collapses": pytest.approx((2 * third, 3)),
        "leaves": (0.5, 2),  # of the two that collapsed
        "epochs_collapsed": pytest.approx((4 / 3, 3)),
    }
    # By scipy.stats.binomtest, Wilson's interval of one in two.
    assert summaries["leaves"].interval == pytest.approx((0.094531, 0.905469), abs=1e-6)
    assert low.states == {"healthy": 1, "dead": 1, "collapsing": 1}


def test_a_collapse_within_an_epoch_counts(out: Path) -> None:
    """An epoch's observation may pass several states, each of which is an event."""
    key = f"{LOW}/seed0"
    finish(out, key, ["healthy"] * 4)
    file = out / RUNS / key / "metrics.jsonl"
    passing = [("healthy", "collapsing"), ("collapsing", "collapsed"), ("collapsed", "recovering")]
    lines = file.read_text().splitlines()
    for before, after in reversed(passing):
        event = {"event": "state", "step": 4, "before": before, "after": after}
        lines.insert(1, json.dumps(event))
    file.write_text("\n".join(lines) + "\n")
    (run,) = point(results.read(out), LOW).done
    assert (run.measures["recovered"], run.measures["collapsed"]) == (1.0, 0.0)


def test_points_come_in_the_order_of_the_grid_and_later_numbers_between(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(SQUARE.replace("[0.1, 0.5]", "[0.5, 0.1]"), out)
    assert results.read(out).axes["optim.lr"] == (0.5, 0.1)
    ask(SQUARE.replace("[0.1, 0.5]", "[0.2, 1]"), out)
    sweep = results.read(out)
    assert sweep.axes["optim.lr"] == (0.1, 0.2, 0.5, 1.0)
    assert [each.values["optim.lr"] for each in sweep.points] == [
        lr for lr in (0.1, 0.2, 0.5, 1.0) for _ in range(2)
    ]


def test_values_that_are_no_numbers_survive(tmp_path: Path) -> None:
    text = (
        '[grid]\n"optim.lars_on" = [["*"], ["encoder", "head"], []]\n"optim.rate_cap" = [1, "none"]'
    )
    made = ask(text, tmp_path / "out")
    sweep = results.read(tmp_path / "out")
    assert sweep.axes == made.axes
    assert [dict(each.values) for each in sweep.points] == [
        dict(each.values) for each in made.points
    ]


def test_the_usual_measure_is_the_accuracy_where_there_is_one(out: Path) -> None:
    assert results.read(out).chosen_measure(None) is None
    finish(out, f"{LOW}/seed0", ["healthy"] * 4)
    assert results.read(out).chosen_measure(None) == "neg_cos"
    finish(out, f"{LOW}/seed1", ["healthy"] * 4, {"accuracy": 50.0})
    sweep = results.read(out)
    assert sweep.chosen_measure(None) == "accuracy"
    with pytest.raises(UsageError, match="the nearest is neg_cos"):
        sweep.chosen_measure("negcos")


def test_a_run_that_is_lost_or_damaged_is_no_result(out: Path) -> None:
    finish(out, f"{LOW}/seed0", ["healthy"] * 4, {"accuracy": 40.0})
    finish(out, f"{LOW}/seed1", ["healthy"] * 4, {"accuracy": 50.0})
    ask(FOUR, out, seeds=3)  # writes down that they are done
    shutil.rmtree(out / RUNS / LOW / "seed0")
    (out / RUNS / LOW / "seed1/metrics.jsonl").write_text("no JSON\n")
    low = point(results.read(out), LOW)
    assert not low.done
    assert dict(low.left) == {"lost": 2, "new": 1}


def test_a_run_that_failed_is_failed_whatever_lies_in_its_folder(out: Path) -> None:
    """Somebody's file may lie there, and be the cause."""
    for seed, name in ((0, "mine.txt"), (1, "metrics.jsonl")):
        entry = Ledger(out).entry(f"{LOW}/seed{seed}")
        assert entry is not None
        entry.with_row(status="failed", error="is not empty").write()
        entry.path.mkdir(parents=True)
        (entry.path / name).write_text("{}\n{}\n")
    low = point(results.read(out), LOW)
    assert dict(low.left) == {"failed": 2, "new": 1}
    assert [run.note for run in low.runs] == ["is not empty", "is not empty", ""]


def test_a_row_or_a_call_of_no_sweep_is_one_line(out: Path) -> None:
    entry = Ledger(out).entry(f"{LOW}/seed0")
    assert entry is not None
    entry.with_row(point=None).write()
    with pytest.raises(UsageError, match=r"seed0\.json: damaged: no point of a sweep"):
        results.read(out)
    entry.write()
    Call(out, "sweep", {})
    with pytest.raises(UsageError, match="a call without its axes"):
        results.read(out)


def test_folders_without_a_sweep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sweep here"):
        results.read(tmp_path)
    Call(tmp_path, "mini", {})
    with pytest.raises(UsageError, match="holds no sweep, but ablations"):
        results.read(tmp_path)
