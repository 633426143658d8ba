"""Rows are in the file completely or not at all, whatever happens to their writers."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbyol_bench.gpu import rows

TEXT = st.text(max_size=20)
FIGURES = st.dictionaries(
    st.text("abcdefghij_", min_size=1),
    st.one_of(TEXT, st.integers(-(2**53), 2**53), st.booleans(), st.none(), st.floats()),
)


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXT, TEXT, FIGURES), max_size=5), st.integers(0, 200))
def test_reads_back_what_was_added_and_drops_a_torn_end(
    tmp_path_factory: pytest.TempPathFactory,
    added: list[tuple[str, str, dict[str, object]]],
    cut: int,
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    writer = rows.Rows(path, "job")
    for part, name, figures in added:
        writer.add(part, name, **figures)
    read = rows.read(path)
    assert [(row["part"], row["name"]) for row in read] == [(part, name) for part, name, _ in added]
    for row, (_, _, figures) in zip(read, added, strict=True):
        for key, value in figures.items():
            assert row[key] == value or (
                isinstance(value, float) and math.isnan(value) and math.isnan(row[key])
            )
    if path.exists():
        whole = path.read_bytes()
        path.write_bytes(whole[: max(0, len(whole) - cut)])
        assert rows.read(path) == read[: len(rows.read(path))]


def test_a_failing_part_is_a_row_and_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = rows.Rows(tmp_path / "rows.jsonl", "job")
    with writer.guarded("kernel", "norm"):
        raise RuntimeError("misaligned address\nCUDA kernel errors might be")
    writer.check("kernel", "sum", holds=False, says="an error over 1e-5", err=1e-3)
    writer.check("kernel", "copy", holds=True, says="an error over 1e-5", err=1e-7)
    read = rows.read(tmp_path / "rows.jsonl")
    assert [row.get("failed") for row in read] == [
        "RuntimeError: misaligned address CUDA kernel errors might be", "an error over 1e-5", None,
    ]  # fmt: skip
    assert writer.failures == 2
    assert "Traceback" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt), writer.guarded("kernel", "norm"):
        raise KeyboardInterrupt


def test_processes_that_share_a_file_do_not_mix_their_lines(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fastbyol_bench.gpu.rows import Rows\n"
        "writer = Rows(Path(sys.argv[1]), sys.argv[2])\n"
        "for index in range(300): writer.add('part', 'x' * 500, index=index)"
    )
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", code, str(path)]
    children = [subprocess.Popen([*command, name], stdout=subprocess.DEVNULL) for name in "ab"]
    assert [child.wait(600) for child in children] == [0, 0]
    read = rows.read(path)
    assert len(read) == 600
    for name in "ab":
        assert [row["index"] for row in read if row["job"] == name] == list(range(300))
