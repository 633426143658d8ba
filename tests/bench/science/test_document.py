"""The tables of docs/science.md: from what is kept, and as they stand in the document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastbyol.sweeps import markers, results
from fastbyol_bench.science import document
from made_sweep import SQUARE, ask, finish

ROWS = """views.scale,optim.lr,seed,status,state,collapses,leaves
0.1+1.0,0.2,0,done,collapsed,1.0,0.0
0.1+1.0,0.2,1,done,recovering,1.0,1.0
0.1+1.0,0.8,0,done,healthy,0.0,
0.9+1.0,0.2,0,running,,,
0.9+1.0,0.8,0,done,healthy,0.0,
"""


def test_a_diagram_counts_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "KEPT", tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / document.CSV).write_text(ROWS)
    kept = {
        json.dumps({"views": {"scale": [0.1, 1.0]}}): [0.02, 0.04],
        json.dumps({"views": {"scale": [0.9, 1.0]}}): [0.2, 0.21],
    }
    (tmp_path / "some" / markers.FILE).write_text(json.dumps(kept))
    assert document.diagram("some").splitlines() == [
        "| some: learning rate | 0.1 to 1.0 | 0.9 to 1.0 |",
        "|---|---|---|",
        "| 0.2 | 2/2, 1/2 |  |",
        "| 0.8 | 0/1 | 0/1 |",
        "| marker r | 0.030 | 0.205 |",
    ]


def test_what_is_kept_of_a_sweep_says_how_long_runs_took_and_when_they_collapsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that leaves a collapse, one dead at once, a healthy one, and one not trained."""
    out, kept = tmp_path / "sweep", tmp_path / "kept"
    three = SQUARE.replace("[optim]", "[train]\nepochs = 3\n[optim]", 1)
    name = ask(three, out, seeds=4).points[0].name
    states = ["collapsing", "collapsed", "recovering"], ["dead"] * 3, ["healthy"] * 3
    for seed, of_epochs in enumerate(states):
        finish(out, f"{name}/seed{seed}", of_epochs, {"neg_cos": 0.75})
    rows = document.epochs_of(results.read(out))
    assert rows == {
        f"runs/{name}/seed{seed}": {"steps": 12, "collapsed_in": first, "distance": [0.25] * 3}
        for seed, first in enumerate((2, 1, None))
    }
    (kept / "some").mkdir(parents=True)
    (kept / "some" / document.EPOCHS).write_text(json.dumps(rows))
    monkeypatch.setattr(document, "KEPT", kept)
    assert document.counts("some") == (
        "3 runs, 36 steps. 2 are ever collapsed, first in epoch 1 to 2."
    )


def test_scores_are_shown_beside_what_is_right_without_a_model() -> None:
    judged = {
        "r": {
            "here": {"auc": 0.974, "right": 0.9111, "brier": 0.0535, "most": 0.667},
            "there": {"auc": None, "right": 0.6333, "brier": 0.3140, "most": 1.0},
        }
    }
    assert document.scores({"scores": judged}).splitlines()[2:] == [
        "| r | 0.97, 91%, 0.05 | 63%, 0.31 |",
        "| always the more frequent end | 67% | 100% |",
    ]


def test_inside_a_run_counts_what_is_collapsed() -> None:
    """The deepest is the least spread of z among the looks in a collapse, not of all."""

    def look(step: int, z: float, signal: float) -> dict[str, object]:
        spread = {"layer2": 0.5, "layer3": 0.04, "layer4": 0.0021, "z": z}
        return {
            "step": step, "spread": spread, "gradient": {"early": {"signal": signal, "noise": 2.0}}
        }  # fmt: skip

    def curve(step: int, state: str, rate: float) -> dict[str, object]:
        return {"step": step, "state": state, "early_rate": rate, "early_move": rate / 1e5}

    run = {
        "data": "here", "lr": 0.2, "seed": 3,
        "curves": [curve(8, "collapsing", 99.0), curve(16, "collapsed", 12.4),
                   curve(24, "collapsed", 30.0), curve(32, "recovering", 1.0)],
        "looks": [look(8, 1e-5, 9.0), look(16, 0.003, 1.0), look(24, 0.002, 5.0),
                  look(32, 0.1, 7.0)],
    }  # fmt: skip
    table, correlation = document.inside([run]).split("\n\n")
    assert table.splitlines()[2:] == [
        "| here | 0.2 | 3 | recovering | 24 | 0.5 | 0.04 | 0.0021 | 0.002 | 12 to 30 | 1.2 to 3.0 "
        "| 0.5 to 2.5 |"
    ]
    assert correlation.startswith("Over these 2 checkpoints")
    assert correlation.endswith("-1.00 on all, -1.00 on here at 0.2.")


def test_the_document_has_the_tables_of_what_is_kept() -> None:
    text = document.DOCUMENT.read_text("utf-8")
    assert document.fresh(text) == text
    assert set(document.blocks()) >= {"fashion-mnist"}
