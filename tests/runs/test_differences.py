"""Differences between configurations, against presets edited by hand and against the order and the
values of the files.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbyol import config_io
from fastbyol.errors import UsageError
from fastbyol.runs import differences
from fastbyol.runs.folder import RunFolder

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_presets_differ_where_their_files_do() -> None:
    """Read again by a TOML parser: what both files say, and say otherwise, is told with both
    values.
    """
    found = {
        row.key: row
        for row in differences.between(differences.named("blog"), differences.named("paper"))
    }
    blog, paper = (
        config_io.flatten_table(tomllib.loads((CONFIGS / f"{name}.toml").read_text("utf-8")))
        for name in ("blog", "paper")
    )
    said = {key for key in blog.keys() & paper.keys() if blog[key] != paper[key]} - {"preset"}
    said -= {"optim.lr_scaling"}  # applied to optim.lr, which is told
    assert said
    assert said <= found.keys()
    for key in said:
        assert differences.text(found[key].a) == config_io.toml_value(blog[key])
        assert differences.text(found[key].b) == config_io.toml_value(paper[key])
        assert found[key].a_origin == "preset blog"


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "optim.momentum": st.sampled_from([0.1, 0.5, 0.9]),
            "model.norm": st.sampled_from(["bn", "gn", "ln"]),
        },
    )
)
def test_what_was_set_is_what_differs(settings: dict[str, object]) -> None:
    base = config_io.load(preset="demo")
    changed = config_io.load(
        preset="demo", sets=[f"{key}={value}" for key, value in settings.items()]
    )
    expected = {
        key: value
        for key, value in settings.items()
        if config_io.flatten(base.config)[key] != value
    }
    rows = differences.between(base, changed)
    assert {row.key: row.b for row in rows} == expected
    assert all(row.b_origin == "--set" for row in rows)
    back = differences.between(changed, base)
    assert [(row.key, row.b, row.a) for row in back] == [(row.key, row.a, row.b) for row in rows]


def test_a_run_and_a_file_tell_where_their_values_come_from(tmp_path: Path) -> None:
    loaded = config_io.load(preset="demo", sets=["model.norm=gn", "data.test=some.beton"])
    RunFolder.create(tmp_path / "run", loaded.config, loaded.origin).close()
    (row, other) = differences.between(
        differences.named("demo"), differences.named(str(tmp_path / "run"))
    )
    assert (row.key, row.a, row.b, row.b_origin) == ("data.test", None, "some.beton", "--set")
    assert (differences.text(row.a), differences.text(row.b)) == ("none", '"some.beton"')
    assert (other.key, other.a, other.b) == ("model.norm", "bn", "gn")
    (tmp_path / "mine.toml").write_text('preset = "demo"\n[model]\nnorm = "gn"\n')
    (row,) = differences.between(
        differences.named("demo"), differences.named(str(tmp_path / "mine.toml"))
    )
    assert row.b_origin.endswith("mine.toml:3")
    rows = differences.against_preset(loaded.config)
    assert [row.key for row in rows] == ["data.test", "model.norm"]


def test_a_name_that_is_nothing_is_told_with_the_nearest_preset() -> None:
    with pytest.raises(UsageError, match=r"^papper: no preset.*paper$"):
        differences.named("papper")
