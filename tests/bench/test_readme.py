"""The documents: tables match the results, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastbyol_bench import readme, results
from sample_results import GPU, result

WRITTEN = [readme.ROOT / "CONTRIBUTING.md", readme.README, *sorted(readme.DOCS.glob("*.md"))]
DOCUMENTS = [
    *WRITTEN,
    *(readme.ROOT / name for name in ("CHANGELOG.md", "bench/README.md", "tests/faults/README.md")),
]
# Code in backticks that names a file: one of these folders, then a name with a suffix.
FILE = re.compile(r"`((?:fastbyol|kernels|bench|tests|configs|docs)/[\w./-]*\.\w+)`")


@pytest.mark.parametrize("path", readme.DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_are_up_to_date(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text == readme.refreshed(text, readme.RESULTS), (
        f"{path.name} is stale: run python -m fastbyol_bench.readme"
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(readme.ROOT)))
def test_links_and_names_of_files_lead_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in FILE.findall(text) if not (readme.ROOT / name).exists()]
    assert not missing


def test_the_short_table_has_at_most_six_rows_of_the_long_one() -> None:
    rows = [
        row
        for row in readme.short_table(results.read(readme.RESULTS / "cpu.json")).splitlines()
        if row.endswith("x |")
    ]
    assert len(rows) == len(readme.SHORT) <= 6
    long = (readme.DOCS / "speed.md").read_text("utf-8")
    assert all(
        re.search(rf"\| {re.escape(name)} \| {re.escape(peer)} \| .*x \|", long)
        for name, peer in readme.SHORT
    )


def test_a_block_is_made_anew_and_the_rest_is_kept(tmp_path: Path) -> None:
    results.write(result(), tmp_path / "cpu.json")
    text = "before\n<!-- bench cpu.json -->\nold\n<!-- end of bench -->\nafter\n"
    once = readme.refreshed(text, tmp_path)
    assert once.startswith(
        "before\n<!-- bench cpu.json -->\nA CPU, 2 cores, torch 2.11.0, 2026-01-02, commit "
        "0123456789ab.\n"
    )
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
