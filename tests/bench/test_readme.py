"""The README's table is what its results say, and says no time of a CPU."""

from __future__ import annotations

from pathlib import Path

from fastbyol_bench import readme, results
from sample_results import GPU, result


def test_readme_is_up_to_date() -> None:
    text = (readme.ROOT / "README.md").read_text("utf-8")
    fresh = readme.refreshed(text, readme.ROOT / "bench" / "results")
    assert text == fresh, "README.md is stale: run python -m fastbyol_bench.readme"


def test_a_block_is_made_anew_and_the_rest_is_kept(tmp_path: Path) -> None:
    results.write(result(), tmp_path / "cpu.json")
    text = "before\n<!-- bench cpu.json -->\nold\n<!-- end of bench -->\nafter\n"
    once = readme.refreshed(text, tmp_path)
    assert once.startswith("before\n<!-- bench cpu.json -->\nA CPU, 2 cores, torch 2.11.0, 2026-01-02, commit 0123456789ab.\n")
    assert once.endswith("|\n<!-- end of bench -->\nafter\n")
    assert "| two views of 96 px | Pillow | 2 | 160 | 4.00x |  |\n" in once
    assert readme.refreshed(once, tmp_path) == once
    assert "old" not in once
    assert "fused, Triton" not in once
    assert " ms" not in once
    assert "a norm" not in once
    results.write(result(load=9.0), tmp_path / "cpu.json")
    assert "busy" in readme.refreshed(once, tmp_path)
    assert "unfinished" not in once
    results.write(result(finished=False), tmp_path / "cpu.json")
    assert "unfinished: the run was cut off" in readme.refreshed(once, tmp_path)


def test_times_are_a_gpus(tmp_path: Path) -> None:
    text = readme.table(result(machine=GPU))
    assert "| two views of 96 px | ours | 100 ms | 640 |  | 25 % |" in text
    assert "| a norm | ours | 2 us |" in text
    assert "driver 1.2" in text
