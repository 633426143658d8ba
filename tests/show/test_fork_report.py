"""What a page of forks says of them is what their records have."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbyol.errors import UsageError
from fastbyol.evaluation.progress import Accuracies
from fastbyol.runs.fork import Fork
from fastbyol.runs.metrics import read_metrics
from fastbyol.show import figures, fork_report
from fastbyol.show.fork_report import Future
from fastbyol.show.run_report import RunCurves

OLD_RUN = Path(__file__).parent.parent / "runs" / "old" / "finished"


def curves(num_steps: int, states: Any = (), per_epoch: int = 4) -> RunCurves:
    """Curves whose loss is the step, whose rates are 10 ** -step in layer1 and twice that in 2."""
    steps = np.arange(num_steps, dtype=np.float64)
    rate = 10.0 ** -steps[:, None]
    return RunCurves(
        name="run",
        epochs=steps / per_epoch,
        metrics={"loss": steps, "neg_cos": 1 - 2.0**-steps, "std_z": steps / 10},
        events=[
            *({"event": "state", "step": at, "after": after} for at, after in states),
            {"event": "epoch", "epoch": 0, "state": "collapsed"},
        ],
        accuracies=Accuracies(None, None, None, None, None),
        layer_epochs=steps / per_epoch,
        layer_names=("encoder.layer1.a.weight", "encoder.layer2.a.weight", "encoder.layer1.a.bias"),
        rates=np.hstack([rate, 2 * rate, 100 * rate]),
        rate_ceiling=None,
    )


def future(step: int | None, num_steps: int = 12, states: Any = (), label: str = "x") -> Future:
    return Future(label, step, f"lr = {step}", 3, curves(num_steps, states))


def test_a_network_without_resnets_stages_has_no_pictures_of_them() -> None:
    """Their axes are logarithmic, and would have no number."""
    own = future(4)
    names = ("encoder.net.stages.0.weight", "encoder.net.layer2.weight", "encoder.net.norm.bias")
    other = replace(own, curves=replace(own.curves, layer_names=names))
    shown = [
        [picture[0] for picture in fork_report.pictures_of(fork_report.Bundle("x", None, (each,)))]
        for each in (own, other)
    ]
    assert shown[0] == [picture[0] for picture in fork_report.PICTURES]
    assert shown[1] == [name for name in shown[0] if name != "layer1"]


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ((), "was not in one"),
        (((4, "collapsing"), (12, "collapsed"), (16, "recovering")), "was not in one"),
        (((4, "collapsed"),), "stays"),
        (((4, "collapsed"), (8, "dead")), "stays"),
        (((4, "collapsed"), (12, "dead"), (16, "collapsed")), "stays"),
        (((4, "collapsed"), (20, "recovering"), (24, "collapsed")), "12"),
        (((4, "collapsed"), (6, "recovering"), (12, "collapsed")), "was not in one"),
    ],
)
def test_the_way_out_is_counted_from_the_fork(states: Any, words: str) -> None:
    assert future(8, states=states).way_out() == words


def test_lines_are_the_common_past_the_parent_and_each_future_from_its_step_on() -> None:
    """Joined to the step before. The second epoch begins at step 4."""
    bundle = fork_report.Bundle("run", future(None), (future(4, 8), future(6)))
    axes = figures.blank(4, 3).add_subplot()
    fork_report.draw(axes, bundle, fork_report._loss)
    past, parent, *rest = axes.get_lines()
    past_steps, *others = (np.asarray(line.get_ydata()) for line in (past, parent))
    assert past_steps.tolist() == [1e-12, 1, 2, 3]
    assert others[0].tolist() == list(range(3, 12))
    at = [line.get_xdata()[0] for line in rest[:2]]
    assert at == [4 / 4, 6 / 4]
    ends = [(line.get_label(), *np.asarray(line.get_ydata())[[0, -1]]) for line in rest[2:]]
    assert ends == [("4: lr = 4", 3, 7), ("6: lr = 6", 5, 11)]
    assert len({line.get_color() for line in (past, parent, *rest[2:])}) == 4


def test_without_the_parent_a_fork_has_the_past() -> None:
    bundle = fork_report.Bundle("run", None, (future(4, 8), future(6)))
    axes = figures.blank(4, 3).add_subplot()
    fork_report.draw(axes, bundle, fork_report._loss)
    assert len(np.asarray(axes.get_lines()[0].get_ydata())) == 6


def test_rates_are_the_mean_of_a_stages_weights() -> None:
    pictures = {each[0]: each[-1] for each in fork_report.PICTURES}
    for stage, factor in (("layer1", 1.0), ("layer2", 2.0)):
        _, rates = pictures[stage](curves(3))
        assert rates.tolist() == pytest.approx([factor, factor / 10, factor / 100])
    assert pictures["neg_cos"](curves(40))[1][[1, 39]].tolist() == [0.5, 1e-8]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A parent, a fork of it at step 2, and one that is damaged."""
    parent = shutil.copytree(OLD_RUN, tmp_path / "old")
    for name in ("2-lr=0.5", "4-broken"):
        fork = shutil.copytree(OLD_RUN, tmp_path / "old.forks" / name)
        record = Fork(str(parent), int(name[0]), "d", {"optim.lr": 0.5, "optim.rate_cap": None})
        (fork / "env.json").write_text(json.dumps({"fork": record.as_json()}))
    (tmp_path / "old.forks" / "4-broken" / "config.toml").write_text("no")
    (tmp_path / "old.forks" / ".2.building").mkdir()
    return tmp_path / "old.forks"


def test_the_table_says_what_the_records_say(folder: Path) -> None:
    assert fork_report.is_of_forks(folder)
    assert not fork_report.is_of_forks(folder.with_name("old"))
    bundle = fork_report.read(folder)
    rows = {row[0]: row[1:] for row in fork_report.rows(bundle)}
    assert rows.keys() == {"old", "2-lr=0.5"}  # the damaged one is logged
    last = [e for e in read_metrics(folder.with_name("old"))[1] if e["event"] == "epoch"][-1]
    step, changes, _, state, _, accuracy = rows["2-lr=0.5"]
    assert (step, changes) == ("2", "optim.lr = 0.5, optim.rate_cap = none")
    assert state == last["state"]
    assert accuracy.startswith(f"{last['accuracy']:.1f}%")
    assert rows["old"][:2] == ("", "the parent")


def test_the_page_is_the_same_file_each_time_and_leaves_nothing_beside(folder: Path) -> None:
    (page,) = fork_report.write(folder)
    first = page.read_text()
    assert first.count("<svg") == len(fork_report.PICTURES)
    assert "optim.lr = 0.5" in first
    before = sorted(path.name for path in folder.iterdir())
    assert fork_report.write(folder) == [page]
    assert page.read_text() == first
    assert sorted(path.name for path in folder.iterdir()) == before
    shutil.rmtree(folder.with_name("old"))
    assert "the parent" not in fork_report.write(folder)[0].read_text()


def test_a_folder_without_forks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sound forks here: `fastbyol fork RUN@STEP`"):
        fork_report.read(tmp_path / "x.forks")
