"""The tables of docs/science.md: from what is kept, and as they stand in the document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastbyol.sweeps import markers
from fastbyol_bench.science import document

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
    assert list(document.diagram("some")) == [
        "| some: learning rate | 0.1 to 1.0 | 0.9 to 1.0 |",
        "|---|---|---|",
        "| 0.2 | 2/2, 1/2 |  |",
        "| 0.8 | 0/1 | 0/1 |",
        "| marker r | 0.030 | 0.205 |",
    ]


def test_the_document_has_the_tables_of_what_is_kept() -> None:
    text = document.DOCUMENT.read_text("utf-8")
    assert document.fresh(text) == text
    assert set(document.blocks()) >= {"fashion-mnist"}
