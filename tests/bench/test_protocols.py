"""The table of protocols is made of what was measured, and fine-tuning beats the linear probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastbyol import api
from fastbyol_bench import protocols
from fastbyol_bench.protocols import CASES, FIELDS, FINETUNE, KEPT, LINEAR, SEEDS, Case


def test_the_document_says_what_was_measured() -> None:
    text = protocols.DOCUMENT.read_text("utf-8")
    assert protocols.fresh(text) == text, f"run: python -m {protocols.__name__} docs"


def test_every_case_was_measured_with_every_seed() -> None:
    rows = json.loads(KEPT.read_text("utf-8"))["rows"]
    measured = [(row["seed"], Case(*row["case"])) for row in rows]
    assert sorted(measured, key=str) == sorted(
        [(seed, case) for seed in SEEDS for case in CASES], key=str
    )


def test_fine_tuning_beats_the_linear_probe_beyond_both_intervals() -> None:
    rows = json.loads(KEPT.read_text("utf-8"))["rows"]
    ends = {(row["seed"], Case(*row["case"])): row for row in rows}
    for seed in SEEDS:
        linear, tuned = ends[seed, LINEAR], ends[seed, FINETUNE]
        assert linear["num_test"] == tuned["num_test"] == 10_000
        assert linear["num_train"] == tuned["num_train"]
        assert tuned["accuracy_low"] > linear["accuracy_high"]


def test_a_stopped_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is not measured again; each case asks for what its name says."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def evaluate(run: Path, protocol: str, **options: Any) -> dict[str, Any]:
        asked.append((protocol, options))
        return dict.fromkeys((*FIELDS, "classes"), 50)

    monkeypatch.setattr(api, "evaluate", evaluate)
    monkeypatch.setattr(api, "train", lambda config, run: run.mkdir())
    monkeypatch.setattr(api, "resume", lambda run: None)
    first = protocols.measure(tmp_path)
    assert len(asked) == len(SEEDS) * len(CASES)
    for case, (protocol, options) in zip(CASES, asked, strict=False):
        assert (protocol, options["weights"]) == (case.protocol, case.weights)
        assert (options["data"], options["labels"]) == (case.data, case.labels)
        assert options["test_data"] == (None if case.data else "fashion-mnist")
    assert protocols.measure(tmp_path) == first
    assert len(asked) == len(SEEDS) * len(CASES)


def test_a_row_has_one_seeds_interval_and_all_seeds_range() -> None:
    def row(seed: int, case: Case, accuracy: float) -> dict[str, Any]:
        half = 1.0
        return {
            "seed": seed, "case": list(case), "accuracy": accuracy, "top5_accuracy": 99.0,
            "accuracy_low": accuracy - half, "accuracy_high": accuracy + half,
            "num_train": 4096, "num_test": 10_000, "num_classes": 10,
        }  # fmt: skip

    rows = [row(1, LINEAR, 76.0), row(0, LINEAR, 75.0), row(0, FINETUNE, 80.0)]
    rows += [row(1, FINETUNE, 77.5), row(0, Case("finetune", "random", 0.1), 60.0)]
    made = protocols.block({"cpu": "one", "rows": rows}).splitlines()
    assert "in 1 of 2 runs." in made[1]
    assert "| linear | 4,096 | 10,000 | 75.0% (74.1 to 75.8) | 75.0 to 76.0 % | 99.0 % |" in made
    assert any(
        line.startswith("| finetune, 10 % of the labels, from random weights | ") for line in made
    )
