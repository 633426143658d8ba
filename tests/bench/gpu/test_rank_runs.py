"""Runs that differ in a bit are told from those that do not, and epochs are those of the clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastbyol
from fastbyol.errors import UsageError
from fastbyol.runs import checkpoint
from fastbyol_bench.gpu import rank_runs
from tiny import TINY


def saved(folder: Path, step: int, **tensors: torch.Tensor) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "checkpoints", step, tensors, {})
    return folder


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    zero = torch.zeros(3)
    run = saved(tmp_path / "run", 4, a=zero, b=zero.clone())
    assert rank_runs.differing(run, saved(tmp_path / "twin", 4, a=zero, b=zero)) is None
    minus = torch.tensor([0.0, -0.0, 0.0])  # equal, and yet other bits
    assert rank_runs.differing(run, saved(tmp_path / "sign", 4, a=zero, b=minus)) == (
        "b differs, by 0 at most"
    )
    assert rank_runs.differing(run, saved(tmp_path / "few", 4, a=zero)) == "only one has b"
    later = rank_runs.differing(run, saved(tmp_path / "later", 5, a=zero, b=zero))
    assert later == "one ended at step 4, the other at 5"


def test_the_exit_code_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(saved(tmp_path / str(n), 1, a=torch.full((1,), float(n)))) for n in range(2)]
    assert rank_runs.main(["same", runs[0], runs[0]]) == 0
    assert rank_runs.main(["same", *runs]) == 1
    assert capsys.readouterr().out == "same\nDIFFERS: a differs, by 1 at most\n"
    with pytest.raises(UsageError, match="same or epochs"):
        rank_runs.main(["other"])


def test_an_epoch_lasts_from_one_end_to_the_next(tmp_path: Path) -> None:
    """With the clock of a run replaced: steps of a second, and three more at an epoch's end."""
    sets = [*TINY, "data.train=textures", "train.epochs=3", "probe.every_epochs=0"]
    run = tmp_path / "run"
    fastbyol.train(fastbyol.load_config("demo", sets), run)
    lines = [json.loads(line) for line in (run / "timing.jsonl").read_text("utf-8").splitlines()]
    total = max(line["step"] for line in lines)
    steps = total // 3
    for line in lines:
        line["unix_s"] = line["step"] + 3.0 * (max(line["step"] - 1, 0) // steps)
    (run / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rank_runs.epochs(run) == ([steps + 3.0, steps + 3.0], steps)
    name, number, seconds, spread, batch, rate = rank_runs.table([run])[1].split()
    assert (name, number, float(seconds), spread) == ("run", "2", steps + 3, "0")
    assert rate == f"{steps * int(batch) / (steps + 3):,.0f}"
