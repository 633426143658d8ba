"""`fastbyol ablate run --launcher ray` on a cluster of two CPUs of this machine.

`make ray-test` runs this file. `make test` does not: Ray is 80 MB that nothing else needs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from folders import TWELVE, ask, claims_in, rows
from small import SETS, contents

ray = pytest.importorskip("ray", reason="the extra [ray] is missing")
PATIENCE_S = 900.0
EPOCHS = 6


def start(out: Path) -> subprocess.Popen[str]:
    sets = [f"--set={text}" for text in (*SETS, f"train.epochs={EPOCHS}")]
    command = [sys.executable, "-m", "fastbyol.cli.main", "ablate", "run", *TWELVE, "--seeds=3"]
    return subprocess.Popen(
        [*command, f"--out={out}", "--device=cpu", "--launcher=ray", "--jobs=2", *sets],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def workers(out: Path) -> list[int]:
    """The processes of workers on the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"fastbyol.fleet.worker" in words and str(out).encode() in b" ".join(words):
            found.append(int(path.parent.name))
    return found


def wait_for_steps(process: subprocess.Popen[str], out: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not any(len(p.read_bytes()) > 2000 for p in out.glob("runs/*/*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs by one worker of this machine."""
    from fastbyol.fleet.worker import Options, work

    out = tmp_path_factory.mktemp("reference")
    ask(out, *TWELVE, seeds=3, sets=(f"train.epochs={EPOCHS}",))
    assert work(Options(str(out)), print) is None
    return out


@pytest.mark.timeout(1800)
def test_twelve_runs_on_two_cpus_one_worker_killed(reference: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_steps(process, tmp_path)
    os.kill(workers(tmp_path)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert "12 runs done" in output.replace("\n", " ")
    assert contents(tmp_path / "runs") == contents(reference / "runs")
    assert claims_in(tmp_path) == []
    hows = [attempt["how"] for row in rows(tmp_path).values() for attempt in row["attempts"]]
    print(f"attempts: {hows.count('done')} done, {hows.count('lost')} lost")
    assert sorted(set(hows)) == ["done", "lost"]
    assert "Traceback" not in output


@pytest.mark.timeout(1800)
def test_ctrl_c_saves_and_the_next_call_finishes(reference: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_steps(process, tmp_path)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert "interrupted, the same command goes on" in output.replace("\n", "")
    assert workers(tmp_path) == []
    assert "stopped" in {row["status"] for row in rows(tmp_path).values()}
    process = start(tmp_path)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert contents(tmp_path / "runs") == contents(reference / "runs")
