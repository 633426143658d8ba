"""Jobs of a SLURM cluster without one: by submitit's local executor, and by an sbatch that only
writes down what it is told. `make slurm-test` runs a real one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from processes import PATIENCE_S, wait_until

from fastbyol.errors import UsageError
from fastbyol.fleet import slurm
from fastbyol.fleet.launch import Launch
from fastbyol.fleet.node import Process
from fastbyol.fleet.worker import Options
from folders import ask, claims_in, rows
from small import contents

submitit = pytest.importorskip("submitit", reason="the extra `slurm` is not installed")

COMMAND = ("ablate",)
LONG = ("train.epochs=15",)


def below(process: int) -> list[int]:
    """The children of a process, and theirs, as Linux lists them."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *below(child))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The bytes of a run that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole")
    ask(out, "gn-lars-0.1", sets=LONG, launch="local")
    return contents(out / "runs")


def training_job(folder: Path) -> tuple[Path, Any]:
    """A folder of one run, and submitit's job that is amid it."""
    out = folder / "out"
    ask(out, "gn-lars-0.1", sets=LONG)
    executor = submitit.LocalExecutor(folder / "jobs")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(slurm.NodeJob(str(out), "cpu", 1))
    metrics = out / "runs/gn-lars-0.1/seed0/metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 10, job)
    return out, job


def test_a_job_that_is_told_saves_is_queued_again_and_goes_on(
    whole: dict[str, object], tmp_path: Path
) -> None:
    """As SLURM does it: SIGUSR2 to every process of the job's step.

    Not by ``job._interrupt``, which kills submitit's controller and never reaches the job.
    """
    out, job = training_job(tmp_path)
    assert len(claims_in(out)) == 1
    for process in below(int(job.job_id)):
        os.kill(process, signal.SIGUSR2)
    assert job.result() == "nothing is left to do"
    assert "Requeued job" in job.stderr() + job.stdout()
    assert contents(out / "runs") == whole
    first, second = rows(out)["gn-lars-0.1/seed0"]["attempts"]
    assert first["how"] == "SIGUSR2"
    assert 0 < first["step"] == second["from_step"]
    assert (first["job"], second["how"]) == (job.job_id, "done")
    assert claims_in(out) == []


def test_a_job_that_gets_sigterm_saves_and_waits_for_its_end(
    whole: dict[str, object], tmp_path: Path
) -> None:
    """Where it ended by itself, SLURM would not queue it again. Until then SIGUSR2 does."""
    out, job = training_job(tmp_path)
    (task, worker) = below(int(job.job_id))
    os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller hands it on
    wait_until(lambda: worker not in below(int(job.job_id)), job)
    assert claims_in(out) == []
    assert rows(out)["gn-lars-0.1/seed0"]["status"] == "stopped"
    time.sleep(1.5)
    assert below(int(job.job_id)) == [task]
    os.kill(task, signal.SIGUSR2)
    assert job.result() == "nothing is left to do"
    assert contents(out / "runs") == whole
    assert len(rows(out)["gn-lars-0.1/seed0"]["attempts"]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_worker_without_handlers_yet_survives_a_signal(
    tmp_path: Path, number: signal.Signals
) -> None:
    """It hears of it once it has them, and ends as asked."""
    ask(tmp_path, "gn-lars-0.1", sets=LONG)
    worker = Process(Options(str(tmp_path)), {}, tmp_path / "log")
    os.kill(worker.process.pid, number)
    assert worker.process.wait(PATIENCE_S) == 0
    lines = worker.lines()
    assert lines is not None
    assert lines[-1].endswith(f" ends: {number.name}")
    worker.pipe.close()
    assert claims_in(tmp_path) == []


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster whose sbatch writes each script to the file that is returned."""
    folder, script = tmp_path / "bin", tmp_path / "script"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\ncat "$1" > {script}\necho Submitted batch job 17\n')
    (folder / "srun").write_text("#!/bin/sh\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return script


def test_what_sbatch_is_told(sbatch: Path, tmp_path: Path) -> None:
    launch = Launch("slurm", nodes=3, partition="gpu", time="2-0")
    assert slurm.submit(launch, tmp_path / "out") == ("17_0", "17_1", "17_2")
    script = sbatch.read_text()
    lines = script.splitlines()
    for option in (
        "array=0-2%3", "partition=gpu", f"time={48 * 60}", "signal=USR2@120", "exclusive",
        "requeue", "open-mode=append", "nodes=1", "ntasks-per-node=1", "job-name=fastbyol",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    (step,) = [line for line in lines if line.startswith("srun ")]
    assert "--cpu-bind=none sh -c 'trap" in step
    assert sys.executable in step
    assert len(list((tmp_path / "out" / slurm.JOBS).glob("17_*_submitted.pkl"))) == 3


def test_the_machine_is_shared_where_its_parts_are_asked_for(sbatch: Path, tmp_path: Path) -> None:
    more = ("gpus_per_node=8", "setup=module load cuda", "srun_args=--mpi=none")
    more += ('additional_parameters={reservation="mine"}',)
    assert slurm.submit(Launch("slurm", slurm=more), tmp_path / "out") == ("17",)
    lines = sbatch.read_text().splitlines()
    assert "#SBATCH --gpus-per-node=8" in lines
    assert "#SBATCH --reservation=mine" in lines
    assert "#SBATCH --requeue" in lines
    assert "#SBATCH --time=60" in lines
    assert "module load cuda" in lines
    assert "#SBATCH --exclusive" not in lines
    assert any("--cpu-bind=none --mpi=none" in line for line in lines)


def test_a_job_ignores_signals_while_it_starts() -> None:
    told = "import signal; print(*(signal.getsignal(n) for n in (15, signal.SIGUSR2)))"
    command = f'{slurm._PYTHON} {sys.executable} -c "{told}"'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Handlers.SIG_IGN"] * 2 or done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [  # `man sbatch`: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
        (None, 60),  # days-hours:minutes and days-hours:minutes:seconds
        ("30", 30),
        ("30:00", 30),
        ("30:01", 31),  # SLURM rounds up, too
        ("1:30:00", 90),
        ("100:00:00", 6000),
        ("1-0", 24 * 60),
        ("2-03", 51 * 60),
        ("1-02:30", 26 * 60 + 30),
        ("1-02:30:15", 26 * 60 + 31),
    ],
)
def test_times_are_read_as_slurm_reads_them(limit: str | None, minutes: int) -> None:
    assert slurm._minutes(limit) == minutes


@pytest.mark.parametrize("limit", ["", "an hour", "1:2:3:4", "1-2-3", "-5", "1.5", "4h", "1-"])
def test_other_times_are_refused(limit: str) -> None:
    with pytest.raises(UsageError, match="write hours:minutes:seconds"):
        slurm._minutes(limit)


@pytest.mark.parametrize("limit", ["0", "4", "4:00", "0:00:30"])
def test_times_without_room_for_a_notice_are_refused(limit: str) -> None:
    with pytest.raises(UsageError, match="too short: 5 minutes"):
        slurm._minutes(limit)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("gpus_per_node", "write KEY=VALUE"),
        ("=8", "write KEY=VALUE"),
        ("mem=", "write KEY=VALUE"),
        ("gpus-per-node=8", "there are gpus_per_node"),
        ("acount=me", "there are account"),
        ("nodes=2", "cannot be set"),
        ("use_srun=false", "cannot be set"),
        ("additional_parameters=8", "write a table"),
    ],
)
def test_parameters_that_are_refused(word: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as refused:
        slurm._parameters([word])
    assert str(refused.value).startswith(f"--slurm {word.partition('=')[0]}")


def test_parameters_are_values_of_toml_or_texts() -> None:
    words = ["gpus_per_node=8", "account=mine", "exclusive=true", 'setup=["a", "b"]', "gres=gpu:2"]
    assert slurm._parameters(words) == {
        "gpus_per_node": 8, "account": "mine", "exclusive": True, "setup": ["a", "b"],
        "gres": "gpu:2",
    }  # fmt: skip


def test_what_cannot_work_is_refused_before_anything_is_written(
    run: Command, sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(launcher: str, *more: object) -> str:
        words = ("gn-lars-0.1", "--launcher", launcher, "--out", tmp_path / "out")
        return run.refusal("run", *words, *more)

    assert "write hours:minutes:seconds" in refusal("slurm", "--time", "soon")
    assert "--slurm paritition: cannot be set" in refusal("slurm", "--slurm", "paritition=low")
    for more in (("--nodes", 2), ("--partition", "low"), ("--time", "9"), ("--slurm", "mem=1")):
        for launcher in ("local", "none", "ray"):
            assert "are for --launcher slurm" in refusal(launcher, *more)
    assert "--address: is for" in refusal("slurm", "--address", "auto")
    monkeypatch.setenv("PATH", "")
    assert "no sbatch and no srun here" in refusal("slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install 'fastbyol[slurm]'" in refusal("slurm")
    assert not (tmp_path / "out").exists()


def test_what_sbatch_refuses_is_told_in_one_line(
    run: Command, sbatch: Path, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    words = ("gn-lars-0.1", "--launcher", "slurm", "--out", tmp_path / "out", "--seeds", 1)
    refusal = run.refusal("run", *words, "--set", "data.train=textures")
    assert "--launcher slurm: sbatch: error: invalid partition" in refusal
