"""The script for GPU machines, as far as a machine without one can tell: order, budget, what is left out, what is killed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from fastbyol_bench import gpu_machine
from fastbyol_bench.gpu_machine import Job, failed, jobs, run


def python(name: str, code: str, most_s: float = 60.0, **needs: tuple[str, ...]) -> Job:
    return Job("bench", name, (sys.executable, "-c", code), most_s, **needs)


def test_runs_leaves_out_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_machine, "LEAST_S", 0.5)
    hang = (
        "import subprocess, sys; print('up', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    chosen = [
        python("fine", "print('hello')"),
        python("fails", "raise SystemExit(3)"),
        python("module", "", modules=("no_such_module",)),
        python("program", "", programs=("no-such-program",)),
        python("hangs", hang, most_s=5.0),
    ]
    began = time.monotonic()
    outcomes = {outcome.name: outcome for outcome in run(chosen, tmp_path / "out", 500)}
    assert time.monotonic() - began < 50
    assert (outcomes["fine"].code, outcomes["fails"].code) == (0, 3)
    assert outcomes["module"].why == "not installed: no_such_module"
    assert outcomes["program"].why == "not installed: no-such-program"
    assert outcomes["hangs"].why == "cut off after 5 s"
    assert [name for name, outcome in outcomes.items() if failed(outcome)] == ["fails", "hangs"]
    assert (tmp_path / "out" / "bench-fine.log").read_text() == "hello\n"
    kept = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["name"] for row in kept] == list(outcomes)


def test_stops_when_the_budget_is_used_up(tmp_path: Path) -> None:
    clock = iter(range(0, 10_000, 100))
    outcomes = run([python(str(i), "") for i in range(4)], tmp_path, 350, now=lambda: float(next(clock)))
    assert [outcome.code for outcome in outcomes] == [0, None, None, None]
    assert "of the budget left" in outcomes[1].why


def test_the_jobs_exist(tmp_path: Path) -> None:
    """Every job's files, modules and options are there, so that none fails for its command alone."""
    found = (*jobs(tmp_path), *jobs(tmp_path, on_gpu=False))
    assert {job.stage for job in found} == set(gpu_machine.STAGES)
    for job in found:
        for part in job.command:
            if part.startswith("tests/"):
                assert (gpu_machine.ROOT / part).exists(), part
        assert job.most_s <= 540
    dry = run(found, tmp_path, 540, dry=True)
    assert all(outcome.code is None and outcome.why for outcome in dry)


def test_train_jobs_are_valid_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbyol import cli

    seen = []
    monkeypatch.setattr(
        cli, "_train", lambda loaded, out, observer: seen.append(loaded.config) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    for job in (*jobs(tmp_path), *jobs(tmp_path, on_gpu=False)):
        if job.stage == "train":
            monkeypatch.setattr(sys, "argv", ["fastbyol", *job.command[3:]])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 130
    assert [(config.model.norm, config.optim.name, config.train.precision, config.train.device) for config in seen] == [
        ("bn", "sgd", "bf16", "cuda"),
        ("gn", "lars", "bf16", "cuda"),
        ("bn", "sgd", "fp32", "cpu"),
        ("gn", "lars", "fp32", "cpu"),
    ]
