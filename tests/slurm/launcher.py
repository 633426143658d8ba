"""`fastbyol ablate run --launcher slurm` on a real SLURM, which pre-empts and cancels its jobs.

`make slurm-test` runs this file. `make test` does not: SLURM needs root and Debian's packages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cluster
import pytest

from folders import claims_in, rows
from small import SETS, content, contents

# All arms and controls of two claims.
CLAIMS = ("C6", "C7")
EPOCHS = 40
STEPS = 8 * EPOCHS
PATIENCE_S = 900.0
FASTBYOL = (sys.executable, "-m", "fastbyol.cli.main", "ablate")


@contextmanager
def slurm(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[None]:
    """A cluster of this machine, in this process's environment."""
    assert not cluster.missing(), f"no {', '.join(cluster.missing())}: run make slurm-test"
    # pytest's own folders are too long for sockets.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    try:
        with cluster.cluster(folder, **options) as variables:
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            # Machines have more cores than the two that jobs are to get.
            if (spare := (os.cpu_count() or 1) - 2) > 0:
                sbatch(folder, f"--ntasks={spare}", "--wrap", "sleep 3600")
            yield
        assert cluster.running(variables) == []
    finally:
        shutil.rmtree(folder)


def sbatch(folder: Path, *arguments: str) -> None:
    """Submit a job that nobody pre-empts, and that pre-empts others."""
    command = ["sbatch", "--partition=high", "--chdir", str(folder), *arguments]
    subprocess.run(command, check=True, timeout=cluster.PATIENCE, capture_output=True)


def ablate(*arguments: str) -> str:
    done = subprocess.run([*FASTBYOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(out: Path, *arguments: str, claims: tuple[str, ...] = CLAIMS) -> str:
    sets = [f"--set={text}" for text in (*SETS, f"train.epochs={EPOCHS}")]
    return ablate("run", *claims, "--seeds=1", f"--out={out}", "--device=cpu", *sets, *arguments)


def submit(out: Path, nodes: int, claims: tuple[str, ...] = CLAIMS) -> str:
    launch = ("--launcher=slurm", f"--nodes={nodes}", "--partition=low", "--time=1:00:00")
    began = time.monotonic()
    output = run(out, *launch, "--slurm=cpus_per_task=1", "--jobs=1", claims=claims)
    print(f"submitted in {time.monotonic() - began:.0f} s: {output.splitlines()[-1]}")
    return output


def status(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(ablate("status", str(out), "--json"))
    return report


def wait_until(happened: Callable[[], object], what: str, out: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        logs = "\n".join(path.read_text() for path in (out / "slurm").glob("*/*_log.*"))
        assert time.monotonic() < end, f"{what}\n{logs[-5000:]}"
        time.sleep(0.2)


def amid(out: Path) -> int:
    """How many runs have taken steps and are not near their end."""
    counts = [len(path.read_bytes().splitlines()) for path in out.glob("runs/*/*/metrics.jsonl")]
    return sum(10 < count < 2 * STEPS // 3 for count in counts)


def jobs() -> list[str]:
    """What SLURM says of the jobs that are not over."""
    return [line for line in told("squeue", "--noheader") if "fastbyol" in line]


def field(name: str) -> list[str]:
    """A field of all our jobs, also of those that are over, sorted."""
    lines = [line for line in told("scontrol", "-o", "show", "job") if "JobName=fastbyol" in line]
    return sorted(line.partition(f" {name}=")[2].split()[0] for line in lines)


def told(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on this machine, without SLURM."""
    out = tmp_path_factory.mktemp("reference")
    run(out, "--jobs=2")
    return out


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("user_signal", [True, False], ids=["SIGUSR2", "SIGTERM"])
def test_a_pre_empted_job_goes_on_bit_for_bit(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_signal: bool
) -> None:
    """An array of two jobs trains all runs. One job is pre-empted amid a run: it saves, is requeued
    and goes on. Sites send SIGUSR2, or SIGTERM alone.
    """
    with slurm(monkeypatch, user_signal=user_signal, grace=30 if user_signal else 15):
        output = submit(tmp_path, 2)
        assert "work on them" in output
        wait_until(lambda: amid(tmp_path) == 2, "both jobs train", tmp_path)
        sbatch(tmp_path, "--ntasks=1", "--wrap", "touch urgent")
        wait_until((tmp_path / "urgent").exists, "the urgent job runs", tmp_path)
        whole = len(rows(reference))
        wait_until(lambda: status(tmp_path)["counts"]["done"] == whole, "all end", tmp_path)
        wait_until(lambda: not jobs(), "the jobs end by themselves", tmp_path)
        assert (field("Restarts"), field("JobState")) == (["0", "1"], ["COMPLETED"] * 2)
    assert contents(tmp_path / "runs") == contents(reference / "runs")
    assert claims_in(tmp_path) == []
    (row,) = [row for row in rows(tmp_path).values() if len(row["attempts"]) > 1]
    cut, after = row["attempts"]
    attempts = [attempt for row in rows(tmp_path).values() for attempt in row["attempts"]]
    assert len({attempt["job"] for attempt in attempts}) == 2
    assert cut["how"] == ("SIGUSR2" if user_signal else "SIGTERM")
    assert 0 < cut["step"] == after["from_step"] < STEPS
    assert {row["attempts"][-1]["how"] for row in rows(tmp_path).values()} == {"done"}
    logs = "".join(path.read_text() for path in (tmp_path / "slurm").rglob("*.out"))
    assert f"goes on at step {cut['step']}" in logs
    print(f"{whole} runs, one cut at step {cut['step']}: {json.dumps(cut)}")


@pytest.mark.timeout(3000)
def test_a_cancelled_job_saves_and_stays_cancelled(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command on this machine goes on with its run."""
    with slurm(monkeypatch):
        submit(tmp_path, 1, claims=("gn-lars-0.1",))
        wait_until(lambda: amid(tmp_path) == 1, "the run begins", tmp_path)
        subprocess.run(["scancel", "--name=fastbyol"], check=True)
        wait_until(lambda: not jobs(), "the job is gone", tmp_path)
        time.sleep(2 * cluster.CREDENTIAL)  # a requeued one would be back by now
        assert not jobs()
        assert field("JobState") == ["CANCELLED"]
        now = status(tmp_path)
        assert now["counts"]["stopped"] == 1, now
        assert 0 < now["runs"][0]["step"] < STEPS
    run(tmp_path, claims=("gn-lars-0.1",))
    path = "runs/gn-lars-0.1/seed0"
    assert content(tmp_path / path) == content(reference / path)
    assert claims_in(tmp_path) == []
