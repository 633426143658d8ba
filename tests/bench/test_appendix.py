"""The tables of the post's claims are made of the verdicts under bench/results alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastbyol.errors import UsageError
from fastbyol_bench import appendix

OLD = {
    "scale": "mini",
    "commands": ["fastbyol ablate run --all"],
    "runs": 4,
    "claims": [
        {
            "id": "C5", "says": "It | stays.", "seeds": "2-3", "outcome": "reproduced",
            "unsettled": {},
            "statements": [
                {"text": "It ends.", "held": True, "evidence": "held for 3 of 3 seeds. seed 0: x",
                "role": "main", "rule": ""},
                {"text": "It learns.", "held": False, "evidence": "held for 0 of 3 seeds",
                "role": "other", "rule": ""},
            ],
        },
        {"id": "C6", "says": "It goes.", "seeds": "0", "outcome": "undetermined", "unsettled": {},
        "statements": []},
    ],
}  # fmt: skip


def claim(name: str, outcome: str, seeds: str, *held: tuple[str, str, int, int]) -> dict[str, Any]:
    """A verdict with statements (text, role, yes, asked) whose intervals are made up."""
    counts = {"open": 0, "interval": [0.2, 1.0], "evidence": ""}
    statements = [
        {"text": text, "held": 2 * yes > asked, "role": role, "yes": yes, "asked": asked, **counts}
        for text, role, yes, asked in held
    ]
    return {
        "id": name,
        "says": f"{name} says.",
        "seeds": seeds,
        "outcome": outcome,
        "statements": statements,
    }


def verdicts(
    scale: str, claims: Sequence[Mapping[str, Any]], **account: Sequence[str]
) -> dict[str, Any]:
    kept = {
        "asked": ["a", "b", "c"],
        "done": ["a", "b", "c"],
        "failed": {},
        "stopped": [],
        "left": [],
        **account,
    }
    command = f"fastbyol ablate run --all --scale {scale}"
    return {
        "scale": scale,
        "data": ["fashion-mnist"],
        "commands": [command],
        "runs": 3,
        "account": kept,
        "claims": claims,
    }


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Write short and long runs of the same images, and older runs of others."""
    mini = verdicts(
        "mini",
        [
            claim("C5", "partly", "3", ("It ends.", "main", 3, 3), ("It is useless.", "other", 0,
            3), ("So.", "other", 3, 3)),
            claim("C6", "undetermined", "0", ("It goes.", "main", 0, 0)),
        ],
        done=["a"], failed={"b": "why"}, left=["c"],
    )  # fmt: skip
    long = verdicts(
        "long", [claim("C5", "undetermined", "0"), claim("C6", "reproduced", "3", ("It goes.",
        "main", 4, 5))]
    )  # fmt: skip
    for name, content in (("mini", mini), ("long", long), ("textures", OLD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "verdicts.json").write_text(json.dumps(content))
    (tmp_path / "long" / "recoveries.png").touch()
    return [tmp_path / name for name in ("mini", "long", "textures")]


@pytest.mark.parametrize("path", [appendix.DOCUMENT, appendix.README], ids=lambda path: path.name)
def test_the_documents_say_what_was_measured(path: Path) -> None:
    assert path.read_text("utf-8") == appendix.fresh()[path], f"run: python -m {appendix.__name__}"


def test_the_summary_has_six_claims_and_every_outcome() -> None:
    made = appendix.summary(appendix.FOLDERS, appendix.README.parent)
    rows = [line for line in made.splitlines() if re.match(r"\| [CM]\d+ ", line)]
    assert len(rows) == len(appendix.SHORT) <= 6
    kept = json.loads((appendix.FOLDERS[0] / "verdicts.json").read_text("utf-8"))["claims"]
    outcomes = {row.split(" | ")[2].partition(" (")[0] for row in rows}
    assert outcomes >= {claim["outcome"] for claim in kept if claim["outcome"] != "undetermined"}
    full = appendix.section(appendix.FOLDERS, appendix.README.parent)
    assert all(" | ".join(row.split(" | ")[:3]) in full for row in rows)


def test_a_claim_is_shown_at_the_scale_that_can_show_it(folders: list[Path]) -> None:
    made = appendix.section(folders, folders[0].parent)
    assert (
        "\n| claim | the post | Fashion-MNIST | what decides | textures |\n|---|---|---|---|---|\n"
        in made
    )
    c5, c6 = (line for line in made.splitlines() if line.startswith(("| C5", "| C6")))
    shares = "It ends: 3 of 3 (.20 to 1.00)<br>It is useless: 0 of 3 (.20 to 1.00)"
    assert c5 == f"| C5 | C5 says. | partly (mini, seeds: 3) | {shares} | reproduced |"
    assert (
        c6 == "| C6 | C6 says. | reproduced (long, seeds: 3) | It goes: 4 of 5 (.20 to 1.00) | "
        "undetermined |"
    )


def test_seeds_without_an_answer_make_no_share(folders: list[Path]) -> None:
    long = json.loads((folders[1] / "verdicts.json").read_text())
    long["claims"][1]["statements"][0] |= {"yes": 1, "asked": 3, "open": 2}
    (folders[1] / "verdicts.json").write_text(json.dumps(long))
    assert "| It goes: 1 of 3, 2 open |" in appendix.section(folders, folders[0].parent)


def test_the_runs_are_accounted_for(folders: list[Path]) -> None:
    made = appendix.section(folders, folders[0].parent).splitlines()
    mini = "1 of 3 runs (mini scale, [report](mini/report.html), 1 failed, 1 left)"
    long = "3 of 3 runs (long scale, [report](long/report.html))"
    assert f"- Fashion-MNIST: 1 partly, 1 reproduced; from {mini} and {long}." in made
    old = (
        "4 runs (mini scale, [report](textures/report.html)), judged by the rule of its time: "
        "two thirds of two or three seeds"
    )
    assert f"- textures: 1 not run, 1 reproduced; from {old}." in made
    assert "fastbyol ablate run --all --scale long" in made
    assert "fastbyol ablate run --all  # as typed then; today with --data textures" in made


def test_pictures_are_those_that_are_there(folders: list[Path]) -> None:
    (folders[2] / "timing.png").touch()
    made = appendix.section(folders, folders[0].parent)
    assert made.count("![") == 1
    assert "(long/recoveries.png)" in made


def test_a_folder_that_is_missing_has_no_column(folders: list[Path]) -> None:
    alone = appendix.section([folders[0].parent / "nowhere", folders[2]], folders[0].parent)
    assert "\n| claim | the post | textures | what decides |\n|---|---|---|---|\n" in alone
    assert (
        "| C5 | It \\| stays. | reproduced (mini, seeds: 2-3) | It ends: held for 3 of 3 seeds |"
        in alone
    )
    assert "It learns" not in alone


def test_links_are_relative_to_the_document(folders: list[Path]) -> None:
    (folders[0] / "timing.png").touch()
    made = appendix.section(folders, folders[0])
    assert "(./timing.png)" in made
    assert "(../long/recoveries.png)" in made


def test_without_verdicts_the_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fastbyol ablate report --png"):
        appendix.section([tmp_path], tmp_path)
    (tmp_path / "verdicts.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        appendix.section([tmp_path], tmp_path)
