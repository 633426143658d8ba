"""Runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import make_run

from fastbyol.errors import UsageError
from fastbyol.registry import comparison
from fastbyol.runs import differences
from fastbyol.runs.lock import Lock


def test_settings_that_differ_are_those_of_two_by_two(tmp_path: Path) -> None:
    sets = (["optim.name=lars"], ["model.norm=gn", "data.test=x"], ["train.seed=4", "optim.lr=1"])
    runs = [make_run(tmp_path / str(n), *each) for n, each in enumerate(sets)]
    pairs = [(a, b) for a in runs for b in runs]
    expected = {
        row.key
        for a, b in pairs
        for row in differences.between(differences.named(str(a)), differences.named(str(b)))
    }
    compared = comparison.of(runs)
    assert set(compared.keys) == expected
    assert compared.as_json()["differences"]["model.norm"] == ["bn", "gn", "bn"]
    table = compared.table()
    assert table[0] == ["", "0", "1", "2"]
    assert ["data.test", "none", "x", "none"] in table
    assert [line[0] for line in table if line[0] in compared.keys] == list(compared.keys)
    assert "accuracy" not in [line[0] for line in table]  # no run has measured it


def test_equal_names_become_paths_and_status_is_asked_now(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / folder / "run") for folder in "ab"]
    lock = Lock(runs[1])
    compared = comparison.of(runs)
    lock.release()
    assert compared.names == [str(run) for run in runs]
    assert [row.status for row in compared.rows] == ["stopped", "running"]
    assert compared.keys == ()


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for runs, says in (
        ([run], "2 to 24 runs, not 1"),
        ([run] * 25, "not 25"),
        ([run, tmp_path / "absent"], "no run here"),
    ):
        with pytest.raises(UsageError, match=says):
            comparison.of(runs)
    (run / "config.toml").write_text("[")
    with pytest.raises(UsageError, match="not valid TOML"):
        comparison.of([run, run])
