"""Several runs at a time, in processes: killed, interrupted, failing, done before."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import no_graph
from fastbyol.ablations import ledger, plan, pool, runner
from fastbyol.ablations.arms import arm
from fastbyol.ablations.suite import Suite
from fastbyol.runs import checkpoint
from fastbyol.runs.metrics import last_step
from small import SETS, contents

ARMS = ("gn-sgd-mlp-none", "gn-lars-0.1")
LONG = (*SETS, "train.epochs=6")
PATIENCE_S = 600.0


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    sets = [f"--set={text}" for text in LONG]
    command = [
        sys.executable,
        "-m",
        "fastbyol.cli.main",
        "ablate",
        "run",
        *ARMS,
        "--seeds=2",
        "--jobs=2",
        f"--out={out}",
    ]
    return subprocess.Popen(
        [*command, *sets, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def execute(out: Path, runs: tuple[plan.Run, ...], *, jobs: int = 1) -> tuple[runner.Outcome, str]:
    text = io.StringIO()
    console = Console(file=text, width=200)
    outcome = runner.execute(runs, out, "mini", asked={}, jobs=jobs, device="cpu", console=console)
    return outcome, text.getvalue()


def make(
    out: Path, *names: str, seeds: int = 1, sets: tuple[str, ...] = LONG
) -> tuple[plan.Run, ...]:
    return plan.make([arm(name) for name in names], "mini", out, seeds=seeds, sets=sets)


def wait_for_steps(process: subprocess.Popen[str], out: Path, lines: int) -> None:
    """Until two runs have ``lines`` lines or more; fails where the process ends before."""
    began = time.monotonic()
    while (
        sum(
            len(path.read_bytes().splitlines()) >= lines
            for path in out.glob("runs/*/*/metrics.jsonl")
        )
        < 2
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.01)


def workers_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"fastbyol.ablations.worker" in words and str(parent).encode() in words:
            found.append(int(entry.parent.name))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs, never interrupted, one after the other in one process."""
    out = tmp_path_factory.mktemp("whole")
    outcome, _ = execute(out, make(out, *ARMS, seeds=2))
    assert len(outcome.finished) == 4
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_runner_takes_its_workers_along_and_the_next_goes_on(
    whole: Path, tmp_path: Path
) -> None:
    process = start(tmp_path)
    wait_for_steps(process, tmp_path, 10)
    began = time.monotonic()
    while not list(
        tmp_path.glob("runs/*/*/checkpoints/ckpt-*.safetensors")
    ):  # rows come before the checkpoint of an epoch
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.01)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    began = time.monotonic()
    while workers_of(process.pid):
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.01)
    outcome, said = execute(tmp_path, make(tmp_path, *ARMS, seeds=2), jobs=2)
    assert len(outcome.finished) + len(outcome.skipped) == 4
    assert "goes on at step" in said
    assert contents(tmp_path / "runs") == contents(whole / "runs")


def test_ctrl_c_saves_and_the_next_call_goes_on(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_steps(process, tmp_path, 10)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, said
    assert "saved at step" in said
    assert "; interrupted, the same command goes on" in said.replace("\n", "")
    assert "Traceback" not in said + (tmp_path / "workers.log").read_text()
    kept = ledger.read(tmp_path)
    assert kept["calls"][0]["interrupted"] is True
    assert "stopped" in {row["status"] for row in kept["runs"].values()}
    outcome, _ = execute(tmp_path, make(tmp_path, *ARMS, seeds=2), jobs=2)
    assert not outcome.failed
    assert contents(tmp_path / "runs") == contents(whole / "runs")


def test_a_hangup_with_nobody_left_to_listen_saves_too(tmp_path: Path) -> None:
    """A terminal that is closed and its shell send it twice, and what is printed from then on goes
    nowhere.
    """
    process = start(tmp_path)
    wait_for_steps(process, tmp_path, 10)
    workers = workers_of(process.pid)
    assert process.stdout is not None
    process.stdout.close()
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE_S) == 130
    assert not [worker for worker in workers if Path(f"/proc/{worker}/cmdline").exists()]
    kept = ledger.read(tmp_path)
    assert (kept["calls"][0]["interrupted"], {row["status"] for row in kept["runs"].values()}) == (
        True,
        {"stopped"},
    )
    assert "Traceback" not in (tmp_path / "workers.log").read_text()
    runs = [path.parent for path in tmp_path.glob("runs/*/*/metrics.jsonl")]
    assert [checkpoint.newest_step(run / "checkpoints") for run in runs] == [
        last_step(run) + 1 for run in runs
    ]


def test_what_is_done_is_skipped_and_what_is_missing_added(whole: Path) -> None:
    before = contents(whole / "runs")
    outcome, said = execute(whole, make(whole, *ARMS, seeds=2))
    assert (outcome.finished, len(outcome.skipped), said) == ((), 4, "")
    assert contents(whole / "runs") == before
    kept = ledger.read(whole)
    assert [call["interrupted"] for call in kept["calls"]] == [False, False]
    assert kept["runs"]["gn-lars-0.1/seed1"]["status"] == "done"
    assert kept["runs"]["gn-lars-0.1/seed1"]["claims"] == ["C7", "C12"]


def test_one_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    good = make(tmp_path, "gn-lars-0.2-replayed", sets=(*SETS, "train.epochs=1"))
    blocked = good[0].path  # of the first seed, whose rates nobody takes
    blocked.mkdir(parents=True)
    (blocked / "a file of somebody's").touch()
    outcome, said = execute(tmp_path, good)
    assert [name for name, _ in outcome.failed] == ["gn-lars-0.2 seed 0"]
    assert "is not empty" in outcome.failed[0][1]
    assert set(outcome.finished) == {"gn-lars-0.2 seed 1", "gn-lars-0.2-replayed seed 0"}
    assert "gn-lars-0.2 seed 0: failed: " in said
    assert (
        json.loads((tmp_path / "ledger.json").read_text())["runs"]["gn-lars-0.2/seed0"]["status"]
        == "failed"
    )
    (blocked / "a file of somebody's").unlink()
    again, _ = execute(tmp_path, good)
    assert again.finished == ("gn-lars-0.2 seed 0",)
    found = Suite.read(tmp_path).account
    assert (len(found.done), dict(found.failed)) == (3, {})
    (failure,) = found.odd
    assert failure.startswith("gn-lars-0.2 seed 0: failed before (")
    assert "is not empty" in failure


def test_a_replay_fails_with_its_source(tmp_path: Path) -> None:
    runs = make(tmp_path, "gn-lars-0.2-replayed", sets=(*SETS, "train.epochs=1"))
    source = next(run for run in runs if run.name == "gn-lars-0.2 seed 1")
    source.path.mkdir(parents=True)
    (source.path / "a file of somebody's").touch()
    outcome, _ = execute(tmp_path, runs)
    assert {name for name, _ in outcome.failed} == {
        "gn-lars-0.2 seed 1",
        "gn-lars-0.2-replayed seed 0",
    }


def test_a_worker_that_is_killed_costs_its_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastbyol.ablations.pool import Worker

    begin, killed = Worker.begin, []

    def begin_and_kill(worker: Worker, run: plan.Run) -> None:
        begin(worker, run)
        if not killed:
            killed.append(run.name)
            worker.kill()

    monkeypatch.setattr(Worker, "begin", begin_and_kill)
    outcome, _ = execute(
        tmp_path, make(tmp_path, "gn-lars-0.1", seeds=2, sets=(*SETS, "train.epochs=1"))
    )
    assert outcome.failed == (("gn-lars-0.1 seed 0", "its process was killed by SIGKILL"),)
    assert outcome.finished == ("gn-lars-0.1 seed 1",)


def test_a_run_without_a_graph_goes_on_in_a_new_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, begin = tmp_path / "starts", subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return begin([sys.executable, no_graph.__file__, "--worker", *command[-2:]], **options)

    monkeypatch.setattr(pool, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
    monkeypatch.setenv("NO_GRAPH_STARTS", str(starts))
    sets = (*SETS, "train.epochs=1")
    outcome, said = execute(
        tmp_path / "out", make(tmp_path / "out", "gn-lars-0.1", seeds=2, sets=sets)
    )
    assert outcome.finished == ("gn-lars-0.1 seed 0", "gn-lars-0.1 seed 1"), said
    for seed in (0, 1):
        (line,) = (
            line
            for line in said.splitlines()
            if line.startswith(f"gn-lars-0.1 seed {seed}: ") and "no CUDA graph" in line
        )
        assert no_graph.WHY in line
    workers = [line.split()[0] for line in starts.read_text().splitlines()]
    assert len(set(workers)) == 3, (
        "the second run begins in the process that went on with the first"
    )
