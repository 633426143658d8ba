"""The ranges over seeds match the kept runs; a narrower CPU's settings reach the libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastbyol
from fastbyol_bench import demo_seeds
from tiny import TINY

RECORD: dict[str, Any] = {
    "cpu": "one",
    "data": "fashion-mnist",
    "cpus": {
        "native": [
            {"seed": 0, "state": "healthy", "random": 70.04, "byol": 73.0, "supervised": 82.0},
            {"seed": 1, "state": "healthy", "random": 72.56, "byol": 77.25, "supervised": 82.0},
        ],
        "avx2": [{"seed": 0, "state": "healthy", "random": 70.0, "byol": 75.5, "supervised": None}],
    },
}
LEDGER = {
    "runs": {
        "a": {"arm": "gn-lars-0.1", "state": "recovering", "accuracy": 55.0},
        "b": {"arm": "gn-lars-0.1", "state": "collapsed", "accuracy": 9.375},
        "c": {"arm": "gn-lars-0.1", "state": "collapsed", "accuracy": 9.375},
        "d": {"arm": "gn-lars-0.2", "state": "recovering", "accuracy": 59.75},
        "e": {"arm": "gn-lars-0.2", "state": "recovering", "accuracy": 63.25},
        "f": {"arm": "gn-lars-0.2@exclude", "state": "healthy", "accuracy": 99.0},
    }
}


def test_the_document_says_what_was_measured() -> None:
    text = demo_seeds.DOCUMENT.read_text("utf-8")
    assert demo_seeds.fresh(text) == text, f"run: python -m {demo_seeds.__name__} docs"


def test_five_seeds_and_two_cpus_lie_within_ten_points() -> None:
    cpus = json.loads(demo_seeds.KEPT.read_text("utf-8"))["cpus"]
    assert set(cpus) == set(demo_seeds.CPUS)
    assert all([row["seed"] for row in rows] == list(demo_seeds.SEEDS) for rows in cpus.values())
    accuracies = [row["byol"] for rows in cpus.values() for row in rows]
    assert max(accuracies) - min(accuracies) < 10


def test_a_range_is_the_lowest_and_the_highest_of_what_was_run() -> None:
    made = demo_seeds.block(RECORD, LEDGER).splitlines()
    assert made[1] == "| linear accuracy | native, seeds: 2 | avx2, seeds: 1 |"
    assert "| random weights | 70.0 to 72.6 % | 70.0 % |" in made
    assert "| BYOL | 73.0 to 77.2 % | 75.5 % |" in made
    assert "| supervised | 82.0 % | not run |" in made
    unlabelled = {
        name: [row | {"supervised": None} for row in rows] for name, rows in RECORD["cpus"].items()
    }
    assert "supervised" not in demo_seeds.block({**RECORD, "cpus": unlabelled}, LEDGER)
    assert "| gn-lars-0.1 | collapsed 2 of 3, 9.4 %; recovering 1 of 3, 55.0 % |" in made
    assert "| gn-lars-0.2 | recovering 2 of 2, 59.8 to 63.2 % |" in made


def test_the_block_takes_its_own_place_and_no_other() -> None:
    made, marks = demo_seeds.block(RECORD, LEDGER), (demo_seeds.BEGIN, demo_seeds.END)
    once = demo_seeds.filled(
        f"before\n{demo_seeds.BEGIN}\nold\n{demo_seeds.END}\nafter\n", *marks, made
    )
    assert once == demo_seeds.filled(once, *marks, made) == f"before\n{made}\nafter\n"
    with pytest.raises(ValueError, match="not found"):
        demo_seeds.filled(f"before\n{demo_seeds.BEGIN}\n", *marks, made)


def test_finished_runs_are_collected_with_the_accuracies_that_they_recorded(tmp_path: Path) -> None:
    sets = [
        *TINY,
        "data.train=textures",
        "data.textures_test_count=64",
        "train.epochs=1",
        "train.seed=3",
    ]
    summary = fastbyol.train(fastbyol.load_config("demo", sets), tmp_path / "native" / "seed3")
    (tmp_path / "avx2").mkdir()
    (tmp_path / "native" / demo_seeds.SUPERVISED).write_text('{"3": 50.5}')
    cpus = demo_seeds.collected(tmp_path)["cpus"]
    events = map(
        json.loads,
        (tmp_path / "native" / "seed3" / "metrics.jsonl").read_text("utf-8").splitlines(),
    )
    first = next(event for event in events if event.get("event") == "untrained")
    assert cpus["avx2"] == []
    (row,) = cpus["native"]
    assert (row["seed"], row["random"], row["supervised"]) == (3, first["accuracy"], 50.5)
    assert row["byol"] == summary.accuracy


def test_the_settings_of_a_narrower_cpu_reach_the_libraries() -> None:
    """Ask torch and numba, and what oneDNN and MKL print at their first operation."""
    code = (
        "import torch, numba.core.config as numba\n"
        "torch.nn.functional.conv2d(torch.ones(64, 16, 8, 8), torch.ones(16, 16, 3, 3))\n"
        "torch.ones(64, 64) @ torch.ones(64, 64)\n"
        "print('torch', torch.backends.cpu.get_cpu_capability()); print('numba', numba.CPU_NAME)\n"
    )
    settings = {**os.environ, **demo_seeds.CPUS["avx2"], "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=settings, check=True, capture_output=True, text=True
    )
    assert all(
        name in ended.stdout for name in ("torch", "numba haswell", "onednn_verbose", "MKL_VERBOSE")
    )
    assert "avx512" not in ended.stdout.lower().replace("-", "")
