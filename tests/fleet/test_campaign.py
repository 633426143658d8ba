"""A call that asks for runs and has them trained here: done before, failing, of earlier code."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fastbyol.ablations import plan
from fastbyol.ablations.arms import arm
from fastbyol.ablations.suite import Suite
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.fleet import campaign, ledger
from fastbyol.fleet.campaign import Outcome
from fastbyol.fleet.launch import Launch
from folders import claims_in, rows
from small import SETS, contents

ARMS = ("gn-sgd-mlp-none", "gn-lars-0.1")
SHORT = (*SETS, "train.epochs=1")


def make(
    out: Path, *names: str, seeds: int = 1, sets: tuple[str, ...] = SHORT
) -> tuple[plan.Run, ...]:
    return plan.make([arm(name) for name in names], "mini", out, seeds=seeds, sets=sets)


def execute(
    out: Path,
    runs: tuple[plan.Run, ...],
    scale: str = "mini",
    *,
    retry_failed: bool = True,
    **launch: object,
) -> tuple[Outcome, str]:
    """The runs by workers of this machine, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    how = Launch(**{"jobs": 1, "device": "cpu", **launch})  # type: ignore[arg-type]
    outcome = campaign.execute(
        plan.tasks(runs, out), out, scale, asked={"targets": []}, launch=how, console=console,
        retry_failed=retry_failed,
    )  # fmt: skip
    assert isinstance(console.file, io.StringIO)
    return outcome, console.file.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs by two workers."""
    out = tmp_path_factory.mktemp("whole")
    outcome, said = execute(out, make(out, *ARMS, seeds=2), jobs=2)
    assert len(outcome.finished) == 4
    assert (outcome.skipped, outcome.stopped, outcome.failed) == ((), (), ())
    assert (outcome.interrupted, outcome.problems) == (False, ())
    # The worker that has nothing left may wait for the other one, and says so.
    lines = [line for line in said.splitlines() if not line.startswith("waits for ")]
    assert sum(": done, " in line for line in lines) == len(lines) == 4
    return out


def test_what_is_done_is_skipped(whole: Path) -> None:
    before, calls = contents(whole / "runs"), len(ledger.read(whole)["calls"])
    outcome, said = execute(whole, make(whole, *ARMS, seeds=2))
    assert (outcome.finished, len(outcome.skipped), said) == ((), 4, "")
    assert contents(whole / "runs") == before
    kept = ledger.read(whole)
    assert [call["interrupted"] for call in kept["calls"]] == [False] * (calls + 1)
    assert kept["runs"]["gn-lars-0.1/seed1"]["status"] == "done"
    assert kept["runs"]["gn-lars-0.1/seed1"]["claims"] == ["C7", "C12"]
    assert claims_in(whole) == []


def test_a_folder_of_earlier_code_goes_on(whole: Path, tmp_path: Path) -> None:
    """It has ledger.json alone. What is done is skipped with what is known of it, what is missing
    is trained, and the report counts each run once.
    """
    out = tmp_path / "out"
    shutil.copytree(whole / "runs", out / "runs")
    shutil.rmtree(out / "runs/gn-sgd-mlp-none/seed1")
    runs = make(out, *ARMS, seeds=2)
    names = [run.name for run in runs]
    old = {
        run.task.key: {
            "arm": run.arm.name, "seed": run.seed, "claims": list(run.arm.claims), "status": "done",
            "step": 8, "state": "healthy", "accuracy": None, "seconds": 7.5,
            "failed_before": ["no memory"] if run.seed else [],
        }
        for run in runs
    }  # fmt: skip
    old["gn-sgd-mlp-none/seed1"] |= {"status": "failed", "error": "its process was killed"}
    call = {"command": ["fastbyol", "ablate", "run"], "runs": names, "interrupted": False}
    text = json.dumps({"scale": "mini", "calls": [call], "runs": old})
    (out / "ledger.json").write_text(text)
    before = {path: path.read_bytes() for path in (out / "runs").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="at scale mini, not short"):
        execute(out, runs, "short")
    assert list(Suite.read(out).account.asked) == names
    outcome, _ = execute(out, runs)
    assert outcome.finished == ("gn-sgd-mlp-none seed 1",)
    assert set(outcome.skipped) == {*names} - {*outcome.finished}
    assert all(path.read_bytes() == content for path, content in before.items())
    assert contents(out / "runs") == contents(whole / "runs")
    assert (out / "ledger.json").read_text() == text
    made = rows(out)
    assert made["gn-lars-0.1/seed1"]["seconds"] == 7.5
    assert made["gn-lars-0.1/seed1"]["failed_before"] == ["no memory"]
    again = made["gn-sgd-mlp-none/seed1"]
    assert again["seconds"] > 7.5
    assert again["failed_before"] == ["no memory", "its process was killed"]
    account = Suite.read(out).account
    assert sorted(account.asked) == sorted(account.done) == sorted(names)
    assert not account.failed
    assert not account.stopped
    assert not account.left
    assert execute(out, runs)[0].finished == ()


def test_one_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    good = make(tmp_path, "gn-lars-0.2-replayed")
    blocked = good[0].path  # of the first seed, whose rates nobody takes
    blocked.mkdir(parents=True)
    (blocked / "a file of somebody's").touch()
    outcome, said = execute(tmp_path, good)
    assert [name for name, _ in outcome.failed] == ["gn-lars-0.2 seed 0"]
    assert "is not empty" in outcome.failed[0][1]
    assert set(outcome.finished) == {"gn-lars-0.2 seed 1", "gn-lars-0.2-replayed seed 0"}
    assert "gn-lars-0.2 seed 0: failed: " in said
    with pytest.raises(FastbyolError, match=r"1 of the runs failed; gn-lars-0\.2 seed 0: "):
        campaign.refuse_problems(outcome)
    assert rows(tmp_path)["gn-lars-0.2/seed0"]["status"] == "failed"
    left_alone, _ = execute(tmp_path, good, retry_failed=False)
    assert (left_alone.finished, left_alone.failed) == ((), outcome.failed)
    assert set(left_alone.skipped) == set(outcome.finished)
    (blocked / "a file of somebody's").unlink()
    again, _ = execute(tmp_path, good)
    assert again.finished == ("gn-lars-0.2 seed 0",)
    found = Suite.read(tmp_path).account
    assert (len(found.done), dict(found.failed)) == (3, {})
    (failure,) = found.odd
    assert failure.startswith("gn-lars-0.2 seed 0: failed before (")
    assert "is not empty" in failure


def test_the_folder_of_a_single_run_is_refused(tmp_path: Path) -> None:
    runs = make(tmp_path, *ARMS)
    (tmp_path / "config.toml").touch()
    with pytest.raises(UsageError, match="holds a single run"):
        execute(tmp_path, runs)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_a_replay_fails_with_its_source(tmp_path: Path) -> None:
    runs = make(tmp_path, "gn-lars-0.2-replayed")
    source = next(run for run in runs if run.name == "gn-lars-0.2 seed 1")
    source.path.mkdir(parents=True)
    (source.path / "a file of somebody's").touch()
    outcome, _ = execute(tmp_path, runs)
    assert {name for name, _ in outcome.failed} == {
        "gn-lars-0.2 seed 1",
        "gn-lars-0.2-replayed seed 0",
    }


def test_without_workers_the_runs_are_asked_for_alone(tmp_path: Path) -> None:
    runs = make(tmp_path, "gn-lars-0.1", seeds=2)
    outcome, said = execute(tmp_path, runs, launcher="none", device="cuda")
    assert outcome.stopped == ("gn-lars-0.1 seed 0", "gn-lars-0.1 seed 1")
    assert (outcome.finished, outcome.problems, said) == ((), (), "")
    campaign.refuse_problems(outcome)
    assert not (tmp_path / "runs").exists()
    assert ledger.read(tmp_path)["calls"][0]["runs"] == [run.name for run in runs]


def test_what_cannot_work_here_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out, runs = tmp_path / "out", make(tmp_path / "out", "gn-lars-0.1")
    for launch, says in (
        ({"device": "cuda:77"}, "cuda:77 is not there"),
        ({"device": "cuda:77", "launcher": "slurm", "time": "soon"}, r"--time soon|not installed"),
        ({"nodes": 2}, "--launcher slurm"),
        ({"launcher": "none", "slurm": ("gpus_per_node=8",)}, "--launcher slurm"),
        ({"address": "auto"}, "--launcher ray"),
    ):
        with pytest.raises(UsageError, match=says):
            execute(out, runs, **launch)  # type: ignore[arg-type]
        assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="name a folder that can be written with --out"):
        execute(tmp_path / "file", make(tmp_path / "file", "gn-lars-0.1"))
