"""Phase diagrams: what a name or a file asks for, and what the table and the page say of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbyol.errors import UsageError
from fastbyol.show import figures
from fastbyol.sweeps import phase, results
from made_sweep import SQUARE, ask, finish, written

SHORT = SQUARE.replace("[optim]", "[train]\nepochs = 4\n[optim]", 1)
LOW, HIGH = "lr=0.1,weight_decay=0.0", "lr=0.5,weight_decay=1.5e-06"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Three seeds of each of four points: of one all collapse and two leave, of one none does."""
    ask(SHORT, tmp_path / "out", seeds=3)
    out = tmp_path / "out"
    finish(out, f"{LOW}/seed0", ["healthy", "collapsed", "recovering", "healthy"])
    finish(out, f"{LOW}/seed1", ["collapsed", "collapsed", "collapsed", "recovering"])
    finish(out, f"{LOW}/seed2", ["collapsing", "collapsed", "collapsed", "collapsed"])
    for seed in range(3):
        finish(out, f"{HIGH}/seed{seed}", ["healthy"] * 4)
    return out


def test_every_name_is_two_keys_over_the_settings_of_the_ablations() -> None:
    assert phase.names() == ("lr-crop", "lr-data", "lr-width", "lr-decay")
    for name in phase.names():
        made = phase.read(name)
        assert (len(made.axes), made.seeds) == (2, 3)
        config = made.points[0].tasks[0].config
        assert config.train.end_in == (("recovering", 3), ("healthy", 5), ("dead", 1))
        assert (config.model.norm, config.optim.name) == ("gn", "lars")
    crop = phase.read("lr-crop", seeds=5, sets=["train.epochs=3"])
    assert list(crop.axes) == ["views.scale", "optim.lr"]
    assert len(crop.tasks) == 6 * 5 * 5
    assert crop.points[0].tasks[0].config.train.epochs == 3


def test_a_file_ends_runs_early_unless_it_says_when(tmp_path: Path) -> None:
    (task, *_) = phase.read(str(written(tmp_path, SHORT))).tasks
    assert task.config.train.end_in == (("recovering", 3), ("healthy", 5), ("dead", 1))
    own = SHORT.replace("epochs = 4", 'epochs = 4\nend_in = [["collapsed", 2]]')
    (task, *_) = phase.read(str(written(tmp_path, own))).tasks
    assert task.config.train.end_in == (("collapsed", 2),)
    (task, *_) = phase.read(str(written(tmp_path, own)), sets=["train.end_in=[]"]).tasks
    assert task.config.train.end_in == ()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("lr-corp", "diagram: 'lr-corp' is none of .*; the nearest is lr-crop"),
        ("nowhere.toml", "nowhere.toml: "),
        ("three.toml", "crosses 3 keys, a phase diagram two"),
        ("one.toml", "crosses 1 keys, a phase diagram two"),
    ],
)
def test_what_is_no_diagram_is_one_line(
    target: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, f'{SHORT}"model.norm" = ["gn", "none"]\n', "three.toml")
    written(tmp_path, SHORT[: SHORT.index('"optim.weight_decay"')], "one.toml")
    with pytest.raises(UsageError, match=says):
        phase.read(target)


def test_a_mistake_in_a_named_diagram_names_its_line() -> None:
    with pytest.raises(UsageError, match=r"is crossed \(.*phases\.toml:\d+\)"):
        phase.read("lr-crop", sets=["optim.lr=1"])


def test_rows_count_who_collapses_and_who_of_these_leaves(out: Path) -> None:
    sweep = results.read(out)
    low, *_, high = phase.rows(sweep)
    # Intervals by scipy.stats.binomtest(k, n).proportion_ci(method="wilson").
    assert low == [
        "0.1", "0.0", "3", "3 of 3", "0.44 to 1.00", "2 of 3", "0.21 to 0.94", "2", "",
    ]  # fmt: skip
    assert high == ["0.5", "1.5e-06", "3", "0 of 3", "0.00 to 0.56", "", "", "", ""]
    assert [len(row) for row in phase.rows(sweep)] == [len(phase.header(sweep))] * 4


def test_the_page_has_both_shares_and_what_stands_below_each_column(
    out: Path, tmp_path: Path
) -> None:
    sweep = results.read(out)
    under = {0.1: "r 0.077 ± 0.004", 0.5: "r 0.006"}
    paths = phase.write(sweep, under, tmp_path / "pictures")
    names = ["out/sweep.csv", "out/phase.html", "pictures/out-collapses.png"]
    assert paths == [*(tmp_path / name for name in names), tmp_path / "pictures/out-leaves.png"]
    page = paths[1].read_text("utf-8")
    assert page.count("<svg") == 2
    assert page.count("r 0.077 ± 0.004") == page.count("r 0.006") == 2
    assert "share of seeds that collapse" in page
    assert "share of the collapsed that leave" in page
    assert "<td>2 of 3</td>" in page
    # Who never collapsed has no share of leaving: hatched, as what is not finished.
    first, second = page.split("<svg")[1:]
    assert (f'id="cell:{HIGH}"' in first, f'id="cell:{HIGH}"' in second) == (True, False)
    assert phase.write(sweep, under) == paths[:2]
    assert paths[1].read_text("utf-8") == page


def test_other_sweeps_and_a_missing_matplotlib(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other/out"
    ask(f'{SHORT}"model.norm" = ["gn", "none"]\n', other)
    with pytest.raises(UsageError, match="a sweep over 3 keys, a phase diagram has two"):
        phase.layout(results.read(other))
    monkeypatch.setattr(figures, "available", lambda: False)
    assert phase.write(results.read(out), {}) == [out / "sweep.csv"]
