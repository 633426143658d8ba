"""The workers of one machine: killed, started again, interrupted, and left by their supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PATIENCE_S, wait_until

from fastbyol.fleet import ledger, node, worker
from fastbyol.fleet.node import MOST_QUICK, Node, NodeEnd
from fastbyol.fleet.worker import Options
from fastbyol.runs import checkpoint
from fastbyol.runs.metrics import last_step
from folders import ask, claims_in, rows
from small import SETS, content, contents

ARMS = ("gn-sgd-mlp-none", "gn-lars-0.1")
LONG = ("train.epochs=6",)
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs, never interrupted, one after the other in this process."""
    out = tmp_path_factory.mktemp("whole")
    ask(out, *ARMS, seeds=2, sets=LONG)
    assert worker.work(Options(str(out)), print) is None
    return out


def start(out: Path) -> subprocess.Popen[str]:
    """``ablate run`` with two workers."""
    words = ["ablate", "run", *ARMS, "--seeds=2", "--jobs=2", f"--out={out}"]
    words += [f"--set={text}" for text in (*SETS, *LONG)]
    command = [sys.executable, "-m", "fastbyol.cli.main", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_node(
    out: Path, jobs: int = 1, tick: Callable[[], None] = lambda: None
) -> tuple[NodeEnd, list[str]]:
    """Workers of this process on the folder, and what they said."""
    said: list[str] = []
    slots = ({"OMP_NUM_THREADS": "1"},) * jobs
    return Node(Options(str(out)), slots, said.append).run(tick), said


def go_on(out: Path) -> list[str]:
    """The same command again, by two workers to the end."""
    ask(out, *ARMS, seeds=2, sets=LONG)
    end, said = run_node(out, 2)
    assert end == NodeEnd()
    return said


LEFT = ("stopped", "new")


def two_have_steps(out: Path, lines: int = 10) -> bool:
    """Whether two runs have so many lines of metrics, and a checkpoint of an epoch."""
    metrics = list(out.glob("runs/*/*/metrics.jsonl"))
    enough = [len(path.read_bytes().splitlines()) >= lines for path in metrics]
    saved = {path.parent for path in out.glob("runs/*/*/checkpoints/ckpt-*.safetensors")}
    return sum(enough) >= 2 and len(saved) >= 2


def workers_of(parent: int) -> list[int]:
    ids = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"fastbyol.fleet.worker" in words and str(parent).encode() in words:
            ids.append(int(entry.parent.name))
    return ids


def logs(out: Path) -> str:
    return "".join(path.read_text() for path in (out / "logs").iterdir())


@linux
def test_a_killed_command_takes_its_workers_along_and_the_next_goes_on(
    whole: Path, tmp_path: Path
) -> None:
    """Linux sends them SIGTERM when it dies: they save."""
    process = start(tmp_path)
    wait_until(lambda: two_have_steps(tmp_path), process)
    assert len(workers_of(process.pid)) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not workers_of(process.pid))
    ends = [row["attempts"][-1]["how"] for row in rows(tmp_path).values() if row.get("attempts")]
    assert set(ends) <= {"SIGTERM", "done"}
    assert len(ends) - ends.count("done") == 2
    # The faster worker may have gone on to a run of which nothing is saved yet.
    saved = [row for row in rows(tmp_path).values() if row["status"] == "stopped" and row["step"]]
    assert claims_in(tmp_path) == []
    runs = [path.parent for path in tmp_path.glob("runs/*/*/metrics.jsonl")]
    assert [checkpoint.newest_step(run / "checkpoints") for run in runs] == [
        last_step(run) + 1 for run in runs
    ]
    said = go_on(tmp_path)
    assert sum("goes on at step" in line for line in said) == len(saved) > 0
    assert contents(tmp_path / "runs") == contents(whole / "runs")
    assert "Traceback" not in logs(tmp_path)


def test_ctrl_c_saves_and_the_next_call_goes_on(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_until(lambda: two_have_steps(tmp_path), process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, said
    assert "saved at step" in said
    assert "; interrupted, the same command goes on" in said.replace("\n", "")
    assert "Traceback" not in said + logs(tmp_path)
    kept = ledger.read(tmp_path)
    assert kept["calls"][0]["interrupted"] is True
    assert "stopped" in {row["status"] for row in kept["runs"].values()} <= {"done", *LEFT}
    assert claims_in(tmp_path) == []
    go_on(tmp_path)
    assert contents(tmp_path / "runs") == contents(whole / "runs")


@linux
def test_a_hangup_with_nobody_left_to_listen_saves_too(tmp_path: Path) -> None:
    """A terminal that is closed and its shell send it twice, and what is printed from then on goes
    nowhere.
    """
    process = start(tmp_path)
    wait_until(lambda: two_have_steps(tmp_path), process)
    workers = workers_of(process.pid)
    assert process.stdout is not None
    process.stdout.close()
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE_S) == 130
    assert not [each for each in workers if Path(f"/proc/{each}/cmdline").exists()]
    kept = ledger.read(tmp_path)
    assert kept["calls"][0]["interrupted"] is True
    assert "stopped" in {row["status"] for row in kept["runs"].values()} <= {"done", *LEFT}
    assert "Traceback" not in logs(tmp_path)
    runs = [path.parent for path in tmp_path.glob("runs/*/*/metrics.jsonl")]
    assert [checkpoint.newest_step(run / "checkpoints") for run in runs] == [
        last_step(run) + 1 for run in runs
    ]


@linux
def test_a_worker_that_is_killed_is_started_again_and_its_run_goes_on(
    whole: Path, tmp_path: Path
) -> None:
    """With -9, as when memory is short: the run goes on from its last checkpoint."""
    ask(tmp_path, "gn-lars-0.1", sets=LONG)
    killed: list[int] = []

    def tick() -> None:
        if not killed and list(tmp_path.glob("runs/*/*/checkpoints/ckpt-*.safetensors")):
            killed.extend(workers_of(os.getpid()))
            os.kill(killed[0], signal.SIGKILL)

    end, said = run_node(tmp_path, 1, tick)
    assert end == NodeEnd()
    assert f"worker {killed[0]} was killed by SIGKILL: another one goes on" in said
    assert any("gn-lars-0.1 seed 0: goes on at step" in line for line in said)
    (row,) = rows(tmp_path).values()
    assert row["status"] == "done"
    assert [attempt["how"] for attempt in row["attempts"]] == ["lost", "done"]
    run = "runs/gn-lars-0.1/seed0"
    assert content(tmp_path / run) == content(whole / run)
    assert "Traceback" not in logs(tmp_path)
    assert claims_in(tmp_path) == []


def test_workers_that_die_before_a_word_are_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path, "gn-lars-0.1", sets=LONG)
    monkeypatch.setattr(node.sys, "executable", "/bin/false")
    end, said = run_node(tmp_path)
    assert len(said) == MOST_QUICK - 1  # "another one goes on" is said where one does
    assert all("ended with code 1: another one goes on" in line for line in said)
    (problem,) = end.problems
    assert problem.startswith(f"{MOST_QUICK} workers in a row were ended with code 1: see ")
    assert str(tmp_path / "logs") in problem


def test_a_worker_that_cannot_go_on_is_a_problem_and_its_log_says_why(tmp_path: Path) -> None:
    """Another would do no better."""
    out = tmp_path / "nothing asked for"
    end, said = run_node(out)
    (problem,) = end.problems
    assert problem.startswith("a worker could not go on: see ")
    assert ["no runs were asked for here" in line for line in said] == [True]
    assert "fastbyol: error: " in logs(out)
    assert "Traceback" not in logs(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_before_a_worker_listens_ends_it_too(
    tmp_path: Path, number: signal.Signals
) -> None:
    """While it imports, it has no ear for it."""
    ask(tmp_path, "gn-lars-0.1", sets=LONG)
    sent: list[int] = []

    def tick() -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    end, _ = run_node(tmp_path, 2, tick)
    assert (end.stopped_by, end.problems) == (number.name, ())
    (row,) = rows(tmp_path).values()
    assert row["status"] in ("new", "stopped")
    assert claims_in(tmp_path) == []
