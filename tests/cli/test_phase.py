"""`fastbyol ablate phase` as typed: what it refuses, and what it shows of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbyol.sweeps import markers
from made_sweep import SQUARE, ask, finish, written

COMMAND = ("ablate", "phase")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lr-corp"], "the nearest is lr-crop"),
        (["nowhere.toml"], "nowhere.toml"),
        (["."], "no sweep here"),
        ([".", "--seeds=2", "--set=optim.momentum=0.5"], "--seeds, --set: . is a folder"),
        (["lr-crop", "--set", "optim.lr=1"], "is crossed"),
        (["lr-crop", "--data", "nowhere.beton"], "nowhere.beton"),
    ],
)
def test_what_cannot_work_is_one_line(run, arguments: list[str], says: str, tmp_path: Path) -> None:
    code, out, error = run(*arguments)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not out
    assert not (tmp_path / "phases").exists()


def test_a_folder_is_shown_as_it_is(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markers, "_measure", lambda config: [0.1, 0.2, 0.3, 0.2, 0.2])
    text = SQUARE.replace("[optim]", "[train]\nepochs = 2\n[optim]", 1)
    code, _, error = run(str(written(tmp_path, text)), "--launcher=none")
    assert (code, "nothing to draw yet" in error) == (0, True)
    folder = tmp_path / "phases/grid"
    finish(folder, "lr=0.5,weight_decay=0.0/seed0", ["collapsed", "recovering"])
    told = run.json(str(folder), "--png=pictures")
    assert [row["mean"] for row in told["markers"]] == [pytest.approx(0.2)]
    assert [point["measures"].get("leaves", {}).get("mean") for point in told["points"]] == [
        None, None, 1.0, None,
    ]  # fmt: skip
    assert (tmp_path / "pictures/grid-leaves.png").is_file()
    assert run.output(str(folder)).count("1 of 1") == 2  # collapse, and of these leave
    # Another number of keys is no diagram.
    ask(f'{text}"model.norm" = ["gn", "none"]\n', tmp_path / "other/out")
    assert "a phase diagram has two" in run.refusal(str(tmp_path / "other/out"))
