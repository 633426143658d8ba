"""`fastbyol ablate work`, `status`, `stop` and `retry` as typed: what they print and refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol.fleet import ledger
from fastbyol.fleet.ledger import Ledger
from folders import ask, rows

COMMAND = ("ablate",)
SHORT = ("train.epochs=1",)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["work", "nowhere"], "no such folder"),
        (["status", "nowhere"], "no such folder"),
        (["status", "nowhere", "--json"], "fastbyol ablate run --out nowhere"),
        (["stop", "nowhere"], "no such folder"),
        (["stop", "nowhere", "--undo"], "no such folder"),
        (["retry", "nowhere"], "no such folder"),
        (["status", "out/calls"], "no runs were asked for here"),
        (["work", "out/ledger/gn-lars-0.1/seed0.json"], "is no folder"),
        (["status", "out", "--watch", "--json"], "--watch: has no JSON"),
        (["retry", "out", "gn-lars-0.3"], "gn-lars-0.3: no such run"),
        (["retry", "out", "gn-lars-0.1/seed0"], "did not fail"),
        (["work", "out", "--stale", "0.1"], "--stale"),
        (["work", "out", "--minutes", "-1"], "--minutes"),
        (["work"], "DIR"),
        (["run", "gn-lars-0.1", "--launcher", "pbs"], "pbs"),
    ],
)
def test_what_cannot_work_is_one_line(run, tmp_path: Path, arguments: list[str], says: str) -> None:
    ask(tmp_path / "out", "gn-lars-0.1")
    before = rows(tmp_path / "out")
    assert says in run.refusal(*arguments)
    assert rows(tmp_path / "out") == before
    assert not (tmp_path / "nowhere").exists()


def test_work_trains_what_nobody_has_and_says_so(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(out, "gn-lars-0.1", seeds=2, sets=SHORT)
    ledger.ask_to_stop(out)
    assert f"`fastbyol ablate stop {out} --undo`" in run.output("work", "out")
    assert "workers may go on" in run.output("stop", "out", "--undo")
    *lines, last = run.output("work", "out").splitlines()
    assert last == "out: 2 runs: 2 done; 100 %"
    assert [line.partition(":")[0] for line in lines] == [
        "gn-lars-0.1 seed 0",
        "gn-lars-0.1 seed 1",
    ]
    assert all(": done, " in line for line in lines)
    assert lines[1].endswith("; 2 of 2 done")
    assert run.output("work", "out") == "out: 2 runs: 2 done; 100 %\n"
    told = run.json("status", "out")
    assert (told["counts"]["done"], told["epochs_done"], told["epochs"]) == (2, 2, 2)


def test_suggested_commands_can_be_pasted(run, tmp_path: Path) -> None:
    """A folder's name may have blanks."""
    out = tmp_path / "two words"
    ask(out, "gn-lars-0.1")
    run.output("stop", "two words")
    suggested = [run.output("work", "two words"), run.output("status", "two words")]
    for said in (text.replace("\n", " ") for text in suggested):
        command = shlex.split(re.findall("`([^`]*)`", said)[-1])
        assert command[:3] == ["fastbyol", "ablate", "stop"]
        assert Path(command[3]).name == "two words"


def test_work_leaves_runs_for_another_device(run, tmp_path: Path) -> None:
    """It neither fails them nor dies of them."""
    ask(tmp_path / "out", "gn-lars-0.1", seeds=2, sets=SHORT)
    for seed, device in ((0, "cuda:31"), (1, "cuda:30")):
        entry = Ledger(tmp_path / "out").entry(f"gn-lars-0.1/seed{seed}")
        assert entry is not None
        entry.with_row(device=device).write()
    said, last = run.output("work", "out").splitlines()
    assert said == "leaves 2 runs for a machine with their device: cuda:30, cuda:31"
    assert last == "out: 2 runs: 2 new; 0 %"
    assert [row["status"] for row in rows(tmp_path / "out").values()] == ["new", "new"]


def test_status_shows_and_tells(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    ask(tmp_path / "out", "gn-lars-0.1", "gn-lars-0.2", seeds=2)
    assert run.output("status", "out") == "4 runs: 4 new; 0 %\n"
    for key, fields in (
        ("gn-lars-0.1/seed0", {"status": "done", "accuracy": 50.0}),
        ("gn-lars-0.1/seed1", {"status": "failed", "error": "it broke"}),
    ):
        entry = Ledger(tmp_path / "out").entry(key)
        assert entry is not None
        entry.with_row(**fields).write()
    out = run.output("status", "out").splitlines()
    assert out[0] == "4 runs: 1 done, 1 failed, 2 new; 25 %"
    assert out[-1] == "gn-lars-0.1 seed 1: it broke"
    told = run.json("status", "out")
    assert told["out"] == "out"
    assert {key: count for key, count in told["counts"].items() if count} == {
        "done": 1,
        "failed": 1,
        "new": 2,
    }
    assert (told["left_s"], told["notes"]) == (None, [])
    by_run = {row["run"]: row for row in told["runs"]}
    assert by_run["gn-lars-0.1 seed 0"]["accuracy"] == 50.0
    assert by_run["gn-lars-0.1 seed 1"]["note"] == "it broke"
    assert by_run["gn-lars-0.2 seed 0"]["status"] == "new"


def test_status_of_a_damaged_folder_says_what_to_do(run, tmp_path: Path) -> None:
    ask(tmp_path / "out", "gn-lars-0.1", seeds=2)
    (tmp_path / "out/ledger/gn-lars-0.1/seed1.json").write_text("")
    out = run.output("status", "out").replace("\n", "")
    assert "1 new, 1 damaged" in out.replace("  ", " ")
    assert "damaged: ask for the run again" in out


@pytest.mark.skipif(sys.platform != "linux", reason="waits for output with select")
def test_a_watch_ends_quietly_with_ctrl_c(tmp_path: Path) -> None:
    ask(tmp_path / "out", "gn-lars-0.1")
    command = [sys.executable, "-m", "fastbyol.cli.main", "ablate", "status", "out", "--watch"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert set(lines) | set(out.splitlines(keepends=True)) == {"1 runs: 1 new; 0 %\n"}


def test_stop_is_a_request_that_the_next_call_takes_back(run, tmp_path: Path) -> None:
    ask(tmp_path / "out", "gn-lars-0.1", sets=SHORT)
    said = run.output("stop", "out")
    assert said == "out: asked the workers to save and end; 0 runs are being trained\n"
    assert "were asked to stop" in run.output("status", "out").replace("\n", "")
    assert run.json("status", "out")["notes"][0].startswith("out: workers were asked to stop")
    ask(tmp_path / "out", "gn-lars-0.1", sets=SHORT)
    assert run.json("status", "out")["notes"] == []


def test_retry_names_what_is_tried_again(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(out, "gn-lars-0.1", "gn-lars-0.2", seeds=2)
    assert run.output("retry", "out") == "out: no run has failed\n"
    for entry in Ledger(out).entries():
        entry.with_row(status="failed", error="it broke").write()
    said = run.output("retry", "out", "gn-lars-0.1/seed1")
    assert said == "gn-lars-0.1 seed 1: is tried again by the next worker\n"
    assert len(run.output("retry", "out").splitlines()) == 3
    assert {row["status"] for row in rows(out).values()} == {"new"}
    assert {json.dumps(row["failed_before"]) for row in rows(out).values()} == {'["it broke"]'}
