"""Results as files: they read back as written, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fastbyol.errors import UsageError
from fastbyol_bench import results
from fastbyol_bench.results import Row
from sample_results import replace_at, result


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "it.json"
    results.write(result(), path)
    assert results.read(path) == result()
    assert json.loads(path.read_text())["schema"] == "fastbyol-bench/1"


@pytest.mark.parametrize(
    ("keys", "value", "where"),
    [
        (["schema"], "fastbyol-bench/2", "schema"),
        (["rows", 0, "timing", "median_s"], 0.0, "median_s"),
        (["rows", 0, "timing", "median_s"], "fast", "median_s"),
        (["rows", 0, "timing", "spread_s"], -1.0, "spread_s"),
        (["rows", 0, "timing", "runs"], 0, "runs"),
        (["rows", 0, "timing"], None, "rows.0"),
        (["rows", 0, "needs"], "luck", "rows.0"),
        (["rows", 1, "variant"], "ours", "twice"),
        (["rows", 0, "floor", "bound"], "hope", "bound"),
        (["machine", "cores"], 0, "cores"),
        (["machine", "colour"], "red", "colour"),
        (["date"], None, "date"),
    ],
)
def test_anything_else_is_refused_by_name(
    tmp_path: Path, keys: list[Any], value: object, where: str
) -> None:
    data = json.loads(results.dumps(result()))
    replace_at(data, keys, value)
    path = tmp_path / "it.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=where) as refused:
        results.read(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b'{"schema": "fastbyol-bench/1"}']
)
def test_no_results_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "it.json"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        results.read(path)
    with pytest.raises(UsageError, match="No such file"):
        results.read(tmp_path / "none.json")


def test_frozen_and_derived_numbers() -> None:
    row = result().rows[0]
    assert (row.img_s, row.img_cpu_s, row.share) == (640.0, 320.0, 0.25)
    with pytest.raises(ValidationError):
        row.name = "another"  # type: ignore[misc]
    assert Row(suite="a", name="b", variant="c", needs="a GPU").img_s is None
    with pytest.raises(ValidationError):
        Row(suite="a", name="b", variant="c")


def test_this_machine_and_commit() -> None:
    machine, _ = results.machine("cpu")
    assert machine.device == "cpu"
    assert machine.cores >= 1
    commit = results.commit()
    assert commit is None or len(commit.rstrip("+")) == 12


def test_kept_files_of_before_are_finished(tmp_path: Path) -> None:
    """Read files without the field ``finished``, such as the one in this repository."""
    data = json.loads(results.dumps(result(finished=False)))
    assert data.pop("finished") is False
    path = tmp_path / "it.json"
    path.write_text(json.dumps(data))
    assert results.read(path) == result(finished=True)
    assert results.read(Path(__file__).parents[2] / "bench" / "results" / "cpu.json").finished


def test_writing_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a process that dies before the rename changes nothing."""
    path = tmp_path / "it.json"
    results.write(result(), path)

    def dies(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies)
        with pytest.raises(SystemExit):
            results.write(result(quick=True), path)
    assert results.read(path) == result()


def test_without_git_the_commit_is_the_one_handed_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTBYOL_COMMIT", "0123abcd")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() == "0123abcd"
    monkeypatch.delenv("FASTBYOL_COMMIT")
    assert results.commit() is None
