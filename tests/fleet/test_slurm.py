"""Workers as jobs: submitit's local executor interrupts one for real; sbatch is a script."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import run_rig as rig

from fastbyol.errors import UsageError
from fastbyol.fleet import launchers, slurm
from fastbyol.fleet.launch import Launch
from fastbyol.fleet.slurm import NodeJob
from folders import ask, claims_in, rows
from small import contents

submitit = pytest.importorskip("submitit", reason="the extra [slurm] is missing")
LONG = ("train.epochs=15",)


def task_of(controller: int) -> int:
    """The process of submitit's task, whose parent is the controller."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if fields[1] == str(controller) and b"submitit.core._submit" in command:
            return int(stat.parent.name)
    raise AssertionError("submitit has no task")


@pytest.mark.slow
def test_an_interrupted_job_saves_is_requeued_and_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``_interrupt`` of a job sends SLURM's signal to submitit's controller, which has no handler
    for it; the same signal goes to its task, as SLURM sends it.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.sys.path))  # type: ignore[attr-defined]
    out, reference = tmp_path / "out", tmp_path / "reference"
    for folder in (out, reference):
        ask(folder, "gn-lars-0.1", seeds=2, sets=LONG)
    assert NodeJob(str(reference), "cpu", 1).run("") is None
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=30, signal_delay_s=60)
    job = executor.submit(NodeJob(str(out), "cpu", 1))
    run, until = out / "runs/gn-lars-0.1/seed0/metrics.jsonl", time.monotonic() + rig.PATIENCE_S
    while not run.exists() or len(run.read_bytes().splitlines()) < 10:
        assert time.monotonic() < until, job.stderr()
        assert not job.done(), job.stderr()
        time.sleep(0.05)
    os.kill(task_of(job._process.pid), signal.SIGUSR2)
    assert job.result() == "nothing is left to do"
    assert "this job is preempted" in job.stderr()
    assert "Requeued job" in job.stdout()
    attempts = rows(out)["gn-lars-0.1/seed0"]["attempts"]
    assert [attempt["how"] for attempt in attempts] == ["a signal", "done"]
    assert 0 < attempts[1]["from_step"] < 15 * 8
    assert {attempt["job"] for attempt in attempts} == {job.job_id}
    assert contents(out / "runs") == contents(reference / "runs")
    assert claims_in(out) == []


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        (None, 60), ("30", 30), ("30:30", 31), ("4:00:00", 240), ("0:00:30", 1), ("1-0", 1440),
        ("1-2:30", 1590), ("2-00:00:01", 2881),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_reads_it(limit: str | None, minutes: int) -> None:
    """The forms of sbatch(1): minutes, minutes:seconds, hours:minutes:seconds, days-hours, ..."""
    assert slurm._minutes(limit) == minutes


@pytest.mark.parametrize("limit", ["", "4h", "0", "0:00:00", "-1", "1:2:3:4", "1:-2"])
def test_no_time_is_refused(limit: str) -> None:
    with pytest.raises(UsageError, match="--time"):
        slurm._minutes(limit)


@pytest.mark.parametrize("word", ["gpus", "=8", "Gpus=8", "gpus-per-node=8"])
def test_a_parameter_without_a_value_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="KEY=VALUE"):
        launchers.check(Launch("slurm", slurm=(word,)))


@pytest.mark.parametrize(
    "launch",
    [Launch(nodes=2), Launch("ray", partition="x"), Launch(time="1:00"), Launch(slurm=("a=1",))],
)
def test_options_of_slurm_are_for_slurm(launch: Launch) -> None:
    with pytest.raises(UsageError, match="--launcher slurm"):
        launchers.check(launch)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster that takes every job: the script that was submitted, as a file."""
    folder, script = tmp_path / "bin", tmp_path / "script"
    folder.mkdir()
    for name in ("srun", "sbatch"):
        (folder / name).write_text(f'#!/bin/sh\ncp "$1" {script}\necho Submitted batch job 12\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return script


def submitted(script: Path, out: Path, **options: Any) -> set[str]:
    """The lines of the script that a launch submits."""
    out.mkdir(exist_ok=True)
    ids = slurm.submit(Launch("slurm", **options), out)
    assert ids == tuple(f"12_{number}" for number in range(options["nodes"]))
    return set(script.read_text().splitlines())


def test_the_submitted_script(sbatch: Path, tmp_path: Path) -> None:
    lines = submitted(sbatch, tmp_path / "out", nodes=4, partition="gpu", time="4:00:00")
    assert lines >= {
        "#SBATCH --array=0-3%4", "#SBATCH --partition=gpu", "#SBATCH --time=240",
        "#SBATCH --signal=USR2@120", "#SBATCH --exclusive", "#SBATCH --open-mode=append",
        "#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1",
    }  # fmt: skip
    own = ("gpus_per_node=8", "account=me", "cpus_per_task=16")
    lines = submitted(sbatch, tmp_path / "out", nodes=2, slurm=own)
    assert lines >= {
        "#SBATCH --gpus-per-node=8", "#SBATCH --account=me", "#SBATCH --cpus-per-task=16",
    }  # fmt: skip
    assert "#SBATCH --exclusive" not in lines


def test_what_submitit_or_slurm_refuse_is_one_line(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="colour"):
        slurm.submit(Launch("slurm", slurm=("colour=red",)), tmp_path)
    (sbatch.parent / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'no such partition' >&2\nexit 1\n"
    )
    with pytest.raises(UsageError, match="no such partition") as caught:
        slurm.submit(Launch("slurm"), tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="srun"):
        slurm.submit(Launch("slurm"), tmp_path)
