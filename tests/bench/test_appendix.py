"""The README's section on the appendix: made of the verdicts that lie under bench/results, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastbyol.errors import UsageError
from fastbyol_bench import appendix

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = "bench/results/ablations"
TOLD = {
    "scale": "mini",
    "commands": ["fastbyol ablate run --all"],
    "runs": 4,
    "claims": [
        {
            "id": "C5", "says": "It | stays.", "seeds": "2-3", "outcome": "reproduced", "unsettled": {},
            "statements": [
                {"text": "It ends.", "held": True, "evidence": "held for 3 of 3 seeds. seed 0: x", "role": "main", "rule": ""},
                {"text": "It learns.", "held": False, "evidence": "held for 0 of 3 seeds", "role": "other", "rule": ""},
            ],
        },
        {"id": "C6", "says": "It goes.", "seeds": "0", "outcome": "undetermined", "unsettled": {}, "statements": []},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "verdicts.json").write_text(json.dumps(TOLD))
    return tmp_path


def test_the_readme_says_what_was_measured() -> None:
    """No verdicts, no section; with them the section is theirs, and both pictures are there."""
    readme = (ROOT / "README.md").read_text("utf-8")
    folder = ROOT / RESULTS
    assert (appendix.BEGIN in readme) == (folder / appendix.VERDICTS).exists()
    if appendix.BEGIN in readme:
        assert appendix.filled(readme, appendix.section(folder, RESULTS)) == readme, (
            f"run: python -m {appendix.__name__} {RESULTS} README.md"
        )
        assert all((folder / name).exists() for name in appendix.PICTURES)


def test_a_row_tells_what_decides(folder: Path) -> None:
    made = appendix.section(folder, "results")
    assert "| C5 | It \\| stays. | reproduced | 2-3 | It ends. held for 3 of 3 seeds |" in made
    assert "It learns" not in made
    assert "4 runs: 1 reproduced, 1 undetermined." in made
    assert "![" in made
    assert "(results/timing.png)" in made
    assert "\nfastbyol ablate run --all\n" in made


def test_filling_twice_changes_nothing_more(folder: Path) -> None:
    readme = "# title\n\ntext\n\n## By example\nmore\n"
    once = appendix.filled(readme, appendix.section(folder, "results"))
    assert once.startswith("# title\n\ntext\n\n<!-- appendix")
    assert once.endswith(f"{appendix.END}\n\n## By example\nmore\n")
    assert appendix.filled(once, appendix.section(folder, "results")) == once
    changed = appendix.filled(once, appendix.section(folder, "elsewhere"))
    assert changed == once.replace("(results/", "(elsewhere/")


def test_one_mark_alone_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="one of the two marks"):
        appendix.filled(f"a\n{appendix.BEGIN}\n", appendix.section(folder, "results"))


def test_without_verdicts_the_command_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fastbyol ablate report --png"):
        appendix.section(tmp_path, "results")
