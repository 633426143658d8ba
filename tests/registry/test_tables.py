"""Exports, read back by other libraries."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest
from made_runs import make_run
from pyarrow import parquet

from fastbyol import config_io
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.registry import tables
from fastbyol.registry.index import list_runs
from fastbyol.registry.row import FIELDS, Row

NAMES = (
    "plain", "<img src=x onerror=alert(1)>", 'quo"te, & "more"', "a\nb\r\nc", "\u202eright",
    "\udce9", "]]>", "<script>", "é文",
)  # fmt: skip
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1")


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    root = tmp_path / "runs"
    for name in (*NAMES, *FORMULAS):
        make_run(root / name, "optim.name=lars", epochs=[{"accuracy": 61.25, "neg_cos": None}])
    make_run(root / "other", "optim.lr=0.5", "model.ws=true")
    return list_runs(root)


def test_csv_is_read_back_as_it_was(rows: list[Row]) -> None:
    text = tables.csv_text(rows)
    lines = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    assert len(lines) == len(rows) == len(NAMES) + len(FORMULAS) + 1
    for line, row in zip(lines, rows, strict=True):
        assert None not in line
        escaped = "\\udce9" if row.name == "\udce9" else row.name
        assert line["name"] == (f"'{escaped}" if row.name in FORMULAS else escaped)
        for key in ("accuracy", "accuracy_low", "optim.lr", "train.epochs", "views.hue", "loss"):
            value = row.value(key)
            assert line[key] == ("" if value is None else repr(value))
        assert line["model.ws"] == str(row.settings["model.ws"]).lower()
        assert line["views.scale"] == "[0.2, 1.0]"
        assert line["neg_cos"] == line["data.test"] == ""
    text.encode()


def test_no_text_is_a_formula_and_negative_numbers_stay_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "=cmd|'calc'!A0", epochs=[{"neg_cos": -0.5, "=x": 1.0}])
    (run / "env.json").write_text('{"started": "@x"}')
    text = tables.csv_text(list_runs(tmp_path / "runs"))
    (line,) = csv.DictReader(io.StringIO(text, newline=""))
    assert line["name"] == "'=cmd|'calc'!A0"
    assert line["started"] == "'@x"
    assert line["neg_cos"] == "-0.5"
    assert line["'=x"] == "1.0"


def test_parquet_has_a_type_for_every_column(rows: list[Row], tmp_path: Path) -> None:
    file = tmp_path / "runs.parquet"
    tables.write_parquet(rows, file)
    table = parquet.read_table(file)
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds.keys() >= {*FIELDS, *config_io.keys()}
    assert set(kinds.values()) == {"string", "double", "int64", "bool"}
    for key, kind in {
        "name": "string", "epochs": "int64", "accuracy": "double", "best_epoch": "int64",
        "rank_y": "double", "optim.lr": "double", "optim.name": "string", "model.ws": "bool",
        "train.seed": "int64", "views.scale": "string", "model.predictor.layers": "int64",
        "data.label_field": "string", "views.blur_p": "string", "views.flip_p": "double",
    }.items():  # fmt: skip
        assert kinds[key] == kind, key
    back = table.to_pylist()
    assert [line["name"] for line in back] == [
        row.name.replace("\udce9", "\\udce9") for row in rows
    ]
    for key in ("accuracy", "accuracy_high", "neg_cos", "optim.lr", "train.seed", "model.ws"):
        assert [line[key] for line in back] == [row.value(key) for row in rows]
    tables.write_parquet([], file)  # the same columns, whatever the runs
    empty = parquet.read_schema(file)
    assert {field.name: str(field.type) for field in empty} == kinds


def test_every_settings_type_is_that_of_its_values() -> None:
    for preset in config_io.presets():
        for key, value in config_io.flatten(config_io.load(preset=preset).config).items():
            kind = tables._kind(key)
            named = {"float64": float, "int64": int, "bool": bool}.get(kind, str)
            assert value is None or type(value) is named or kind == "string", key
            assert kind != "string" or not isinstance(value, int | float), key


def test_files_are_replaced_whole_and_devices_left_alone(rows: list[Row], tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text("old")
    (tmp_path / "link.csv").symlink_to(file)
    tables.write_csv(rows, tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert file.read_bytes().startswith(b"name,path,status,")
    assert {path.name for path in tmp_path.glob("*.csv")} == {"runs.csv", "link.csv"}
    for where in (Path("/dev/null"), tmp_path, tmp_path / "absent" / "runs.csv"):
        with pytest.raises(FastbyolError, match="cannot write"):
            tables.write_csv(rows, where)


def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fastbyol\[hf\]'"):
        tables.write_parquet([], tmp_path / "x.parquet")
