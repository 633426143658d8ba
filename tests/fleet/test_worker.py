"""Workers that pull: each run done once, whatever happens to workers, hosts, clocks and disks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import run_rig as rig
from processes import PATIENCE_S, wait_until
from small_disk import small_disk

import no_graph
from fastbyol.engine import trainer
from fastbyol.errors import FastbyolError
from fastbyol.fleet import asking, claim, ledger, worker
from fastbyol.fleet.claim import SIGN, LostClaimError, Owner, acquire
from fastbyol.fleet.ledger import Ledger
from fastbyol.fleet.survey import Surveyor
from fastbyol.fleet.worker import MOST_LOSSES, Options
from folders import TWELVE, another_host, ask, claims_in, rows, work
from small import content, contents

SHORT = ("train.epochs=2",)
LONG = ("train.epochs=15",)


def start(out: Path, said: Path | None = None, **options: Any) -> BaseProcess:
    """A worker in a process of its own."""
    process = rig.PROCESSES.Process(target=work, args=({"out": str(out), **options}, said))
    process.start()
    return process


def end(*processes: BaseProcess, code: int = 0) -> None:
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == code


def here(out: Path, **options: Any) -> tuple[str | None, list[str]]:
    """A worker in this process: what ended it, and what it said."""
    said: list[str] = []
    return worker.work(Options(str(out), **options), said.append), said


@pytest.fixture(autouse=True)
def _stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker in this process must not become another one."""

    def become_fresh(began: float) -> NoReturn:
        raise AssertionError("the worker wants a fresh process")

    monkeypatch.setattr(worker, "_become_fresh", become_fresh)


def row(out: Path, name: str) -> Any:
    (found,) = [each for each in Surveyor(out).look().rows if each.run == name]
    return found


def steps(run: Path) -> int:
    """How many lines the run's metrics have."""
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve runs by one worker that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole")
    ask(out, *TWELVE, seeds=3, sets=SHORT)
    assert here(out)[0] is None
    return out


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two longer runs that nobody disturbs."""
    out = tmp_path_factory.mktemp("long")
    ask(out, "gn-lars-0.1", seeds=2, sets=LONG)
    assert here(out)[0] is None
    return out


TRIALS = rig.many(1, 100)


@pytest.mark.slow
def test_four_workers_that_are_killed_at_random_do_each_run_once(
    whole: Path, tmp_path: Path
) -> None:
    """Bytes are those of one undisturbed worker, no claim is left, and every attempt is told."""
    reference = contents(whole / "runs")
    draw, kills = random.Random(17), 0
    for trial in range(TRIALS):
        out = tmp_path / f"trial{trial}"
        ask(out, *TWELVE, seeds=3, sets=SHORT)
        workers = [start(out) for _ in range(4)]
        quota = draw.randrange(4, 13)
        while any(each.is_alive() for each in workers):
            time.sleep(draw.uniform(0.0, 0.8))
            index = draw.randrange(4)
            if quota and workers[index].is_alive():
                workers[index].kill()
                workers[index].join()
                quota, kills = quota - 1, kills + 1
                workers[index] = start(out)
        end(*workers)
        assert contents(out / "runs") == reference
        assert claims_in(out) == []
        for key, each in rows(out).items():
            assert each["status"] == "done", (key, each)
            ends = [attempt["how"] for attempt in each["attempts"]]
            assert ends[-1] == "done"
            assert set(ends[:-1]) <= {"lost"}
        shutil.rmtree(out)
    print(f"{TRIALS} trials, {kills} kills")


def test_status_is_right_while_four_workers_write(whole: Path, tmp_path: Path) -> None:
    """Each run in one status, counts that add up, and nothing that was done is undone."""
    out = tmp_path / "out"
    ask(out, *TWELVE, seeds=3, sets=SHORT)
    workers = [start(out) for _ in range(4)]
    surveyor, done = Surveyor(out), set[str]()
    seen = set[str]()
    while any(each.is_alive() for each in workers):
        look = surveyor.look()
        counts = look.counts
        assert sum(counts.values()) == len(look.rows) == 12
        assert counts["running"] <= 4
        assert counts["lost"] == counts["failed"] == counts["damaged"] == counts["silent"] == 0
        now = {each.run for each in look.rows if each.status == "done"}
        assert done <= now
        for name in now - done:
            run = "runs/{}/seed{}".format(*name.split(" seed "))
            assert content(out / run) == content(whole / run)
        done = now
        seen |= {each.status for each in look.rows}
        assert json.loads(json.dumps(look.as_json()))["epochs"] == 24
        assert 0 <= look.epochs_done <= 24
    end(*workers)
    assert {"running", "new", "done"} <= seen
    assert surveyor.look().counts["done"] == 12
    assert surveyor.look().epochs_done == 24


def test_a_stolen_claim_stops_its_worker_and_the_other_finishes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host takes the run in the middle: this worker writes nothing more, and goes on with
    the next run.
    """
    ask(tmp_path, "gn-lars-0.1", seeds=2, sets=SHORT)
    (first, _) = Ledger(tmp_path).entries()
    stolen: list[claim.Claim] = []
    fit = trainer.fit

    def steal(folder: Any, config: Any, observer: Any) -> Any:
        progress = observer.progress

        def report(message: Any) -> None:
            if message.step >= 6 and not stolen:
                thief = acquire(
                    first.stem, first.claimed + 1, Owner(host="far", boot="another", stale_s=1.0)
                )
                assert thief is not None
                stolen.append(thief)
            progress(message)

        observer.progress = report
        return fit(folder, config, observer)

    monkeypatch.setattr(trainer, "fit", steal)
    monkeypatch.setattr(worker, "POLL_S", 0.05)
    reason, said = here(tmp_path, waits=False, stale_s=1.0)
    assert reason is None
    (line,) = [line for line in said if line.startswith("gn-lars-0.1 seed 0: ") and "far:" in line]
    assert "nothing more is written here" in line
    for seed in (0, 1):
        run = f"runs/gn-lars-0.1/seed{seed}"
        assert content(tmp_path / run) == content(whole / run)
    attempts = rows(tmp_path)["gn-lars-0.1/seed0"]["attempts"]
    assert [attempt["how"] for attempt in attempts] == ["lost", "done"]
    assert "taken over from" in row(tmp_path, "gn-lars-0.1 seed 0").note


def _far_worker(out: str, said: Path, name: str, stale_s: float) -> None:
    with another_host(name):
        work({"out": out, "stale_s": stale_s}, said)


def test_a_heartbeat_that_stops_and_starts_again(long: Path, tmp_path: Path) -> None:
    """A worker is paused on one host for longer than its time. Another host takes its run over.
    Woken, it says that the run is another's, writes nothing more, and works on.
    """
    out = tmp_path / "out"
    ask(out, "gn-lars-0.1", seeds=2, sets=LONG)
    paused = rig.PROCESSES.Process(
        target=_far_worker, args=(str(out), tmp_path / "paused", "a", 5.0)
    )
    paused.start()
    run = out / "runs/gn-lars-0.1/seed0"
    wait_until(lambda: steps(run) > 8, paused)
    assert paused.pid is not None
    os.kill(paused.pid, signal.SIGSTOP)
    before = (run / "metrics.jsonl").read_bytes()
    other = rig.PROCESSES.Process(target=_far_worker, args=(str(out), tmp_path / "other", "b", 5.0))
    other.start()
    time.sleep(1.5)
    assert row(out, "gn-lars-0.1 seed 0").status in ("silent", "running")
    wait_until(lambda: len(rows(out)["gn-lars-0.1/seed0"]["attempts"]) == 2, other)
    wait_until(lambda: steps(run) > len(before.splitlines()) + 5, other)
    os.kill(paused.pid, signal.SIGCONT)
    end(paused, other)
    assert "nothing more is written here" in (tmp_path / "paused").read_text()
    assert [each["status"] for each in rows(out).values()] == ["done", "done"]
    note = row(out, "gn-lars-0.1 seed 0").note
    assert note.startswith("taken over from")
    assert contents(out / "runs") == contents(long / "runs")
    assert claims_in(out) == []


def test_a_run_that_always_fails_stops_nothing_else(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1", seeds=3, sets=SHORT)
    blocked = tmp_path / "runs/gn-lars-0.1/seed1"
    blocked.mkdir(parents=True)
    (blocked / "a file of somebody's").touch()
    for times in (1, 2):
        reason, said = here(tmp_path)
        assert reason is None
        assert any("seed 1: failed: " in line and "is not empty" in line for line in said)
        found = row(tmp_path, "gn-lars-0.1 seed 1")
        assert found.status == "failed"
        assert "is not empty" in found.note
        assert ("(failed 2 times)" in found.note) == (times == 2)
        assert Surveyor(tmp_path).look().counts["done"] == 2
        (again,) = asking.retry(tmp_path, ())
        assert again.name == "gn-lars-0.1 seed 1"
    (blocked / "a file of somebody's").unlink()
    here(tmp_path)
    assert Surveyor(tmp_path).look().counts["done"] == 3
    assert len(rows(tmp_path)["gn-lars-0.1/seed1"]["failed_before"]) == 2


def test_a_run_that_kills_its_worker_fails_in_the_end(tmp_path: Path) -> None:
    """Without a step forward the next attempt would end alike: after so many it is left."""
    ask(tmp_path, "gn-lars-0.1", sets=SHORT)
    for _ in range(MOST_LOSSES):
        (entry,) = Ledger(tmp_path).entries()
        held = acquire(entry.stem, entry.claimed, Owner(boot="gone"))
        assert held is not None
        lost = worker.Worker(Options(str(tmp_path)), print, worker.Pulse(Options(str(tmp_path)), 0))
        lost._begun(entry, held)
        held.say(ended="killed")
        held.close()
        assert row(tmp_path, entry.name).status == "stopped"
    reason, said = here(tmp_path)
    assert reason is None
    assert f"killed {MOST_LOSSES} times at step 0" in said[-1]
    assert row(tmp_path, "gn-lars-0.1 seed 0").status == "failed"
    asking.retry(tmp_path, ("gn-lars-0.1",))
    here(tmp_path)
    assert row(tmp_path, "gn-lars-0.1 seed 0").status == "done"


def test_a_full_disk_ends_the_worker_and_no_run(whole: Path, tmp_path: Path) -> None:
    """It ends in one line; status tells; with room again everything goes on, nothing lost."""
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        out = disk / "out"
        ask(out, "gn-lars-0.1", "gn-lars-0.2", seeds=2, sets=SHORT)
        filler = disk / "filler"
        process = start(out, tmp_path / "said")
        wait_until(lambda: steps(out / "runs/gn-lars-0.1/seed0") > 2, process)
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        end(process, code=2)
        said = (tmp_path / "said").read_text()
        assert "No space left on device" in said
        assert "Traceback" not in said
        look = Surveyor(out).look()
        assert look.counts["failed"] == 0
        assert any("the disk is full" in note for note in look.notes)
        filler.unlink()
        end(start(out, tmp_path / "said"))
        assert Surveyor(out).look().counts["done"] == 4
        assert claims_in(out) == []
        for run in (f"runs/gn-lars-0.{arm}/seed{seed}" for arm in (1, 2) for seed in (0, 1)):
            assert content(out / run) == content(whole / run)


def test_a_time_limit_ends_a_worker_at_a_safe_point(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1", sets=("train.epochs=1000",))
    reason, said = here(tmp_path, minutes=0.15)
    assert reason == "its 0.15 minutes are over"
    assert "saved at step" in said[0]
    found = row(tmp_path, "gn-lars-0.1 seed 0")
    assert (found.status, found.note) == ("stopped", reason)
    assert 0 < found.step < 1000 * 8
    assert claims_in(tmp_path) == []


def test_stop_reaches_workers_that_train_and_those_that_come(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(out, "gn-lars-0.1", sets=LONG)
    process = start(out, tmp_path / "said")
    wait_until(lambda: steps(out / "runs/gn-lars-0.1/seed0") > 10, process)
    ledger.ask_to_stop(out)
    end(process)
    assert "asked by `fastbyol ablate stop`" in (tmp_path / "said").read_text()
    assert row(out, "gn-lars-0.1 seed 0").status == "stopped"
    assert any("were asked to stop" in note for note in Surveyor(out).look().notes)
    assert "--undo" in str(here(out)[0])
    ledger.allow(out)
    assert here(out, minutes=0.0)[0] == "its 0 minutes are over"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_the_next_worker_goes_on_bit_for_bit(
    long: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    ask(out, "gn-lars-0.1", sets=LONG)
    process = start(out, tmp_path / "said")
    wait_until(lambda: steps(out / "runs/gn-lars-0.1/seed0") > 10, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    end(process)
    assert f"stopped: {number.name}: saved at step" in (tmp_path / "said").read_text()
    reason, said = here(out)
    assert reason is None
    assert "goes on at step" in said[0]
    run = "runs/gn-lars-0.1/seed0"
    assert content(out / run) == content(long / run)


def test_a_replay_waits_for_its_source_and_fails_with_it(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.2-replayed", sets=("train.epochs=1",))
    assert row(tmp_path, "gn-lars-0.2-replayed seed 0").status == "waiting"
    source = tmp_path / "runs/gn-lars-0.2/seed1"
    source.mkdir(parents=True)
    (source / "a file of somebody's").touch()
    here(tmp_path)
    failed = {key for key, each in rows(tmp_path).items() if each["status"] == "failed"}
    assert failed == {"gn-lars-0.2/seed1", "gn-lars-0.2-replayed/seed0"}
    assert "rates" in row(tmp_path, "gn-lars-0.2-replayed seed 0").note
    (source / "a file of somebody's").unlink()
    asking.retry(tmp_path, ())
    here(tmp_path)
    assert {each["status"] for each in rows(tmp_path).values()} == {"done"}


def test_a_worker_that_does_not_wait_leaves_what_others_have(tmp_path: Path) -> None:
    """But not before it has seen that they live."""
    ask(tmp_path, "gn-lars-0.1", sets=SHORT)
    (entry,) = Ledger(tmp_path).entries()
    held = acquire(entry.stem, entry.claimed, Owner(boot="another", stale_s=60.0))
    assert held is not None
    ended: list[str | None] = []
    thread = threading.Thread(target=lambda: ended.append(here(tmp_path, waits=False)[0]))
    thread.start()
    time.sleep(1.0)
    assert thread.is_alive()
    held.beat()
    thread.join(PATIENCE_S)
    assert ended == [None]
    assert not (entry.path / "config.toml").exists()


def test_a_run_in_use_without_a_claim_is_left_alone(tmp_path: Path) -> None:
    """``fastbyol resume`` has it, which locks its folder on this host."""
    from fastbyol.runs.lock import Lock

    ask(tmp_path, "gn-lars-0.1", seeds=2, sets=SHORT)
    reason, _ = here(tmp_path)
    (tmp_path / "ledger/gn-lars-0.1/seed0.json").write_text(
        json.dumps(rows(tmp_path)["gn-lars-0.1/seed0"] | {"status": "stopped"})
    )
    lock = Lock(tmp_path / "runs/gn-lars-0.1/seed0")
    reason, said = here(tmp_path, minutes=0.02)
    assert reason is not None
    assert "in use" in said[0]
    lock.release()
    assert here(tmp_path)[0] is None
    assert {each["status"] for each in rows(tmp_path).values()} == {"done"}


def test_a_run_that_a_dying_process_still_has_is_waited_for(tmp_path: Path) -> None:
    """It dropped its claim's lock before."""
    from fastbyol.runs.lock import Lock

    ask(tmp_path, "gn-lars-0.1", sets=SHORT)
    path = tmp_path / "runs/gn-lars-0.1/seed0"
    path.mkdir(parents=True)
    timer = threading.Timer(2.0, Lock(path).release)
    timer.start()
    assert here(tmp_path)[0] is None
    timer.join()
    assert [each["how"] for each in rows(tmp_path)["gn-lars-0.1/seed0"]["attempts"]] == ["done"]


def test_a_run_begun_on_another_kind_of_device_is_left_for_it(tmp_path: Path) -> None:
    """Its numbers would be others here."""
    ask(tmp_path, "gn-lars-0.1", seeds=2, sets=SHORT)
    path = tmp_path / "ledger/gn-lars-0.1/seed0.json"
    begun = {"claim": 1, "device": "cuda", "from_step": 0, "how": "SIGTERM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attempts": [begun]}))
    assert here(tmp_path)[0] is None
    assert [each["status"] for each in rows(tmp_path).values()] == ["new", "done"]


def test_a_folder_without_runs_and_damaged_entries_are_told(tmp_path: Path) -> None:
    with pytest.raises(FastbyolError, match="no runs were asked for here"):
        here(tmp_path)
    ask(tmp_path, "gn-lars-0.1", seeds=2, sets=SHORT)
    (tmp_path / "ledger/gn-lars-0.1/seed0.json").write_text('{"arm": ')
    assert here(tmp_path)[0] is None
    look = Surveyor(tmp_path).look()
    assert (look.counts["done"], look.counts["damaged"]) == (1, 1)
    assert "ask for the run again" in next(
        each.note for each in look.rows if each.status == "damaged"
    )


def test_a_run_without_a_graph_goes_on_in_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker becomes that process, and keeps its time limit."""
    starts, out = tmp_path / "starts", tmp_path / "out"
    ask(out, "gn-lars-0.1", seeds=2, sets=("train.epochs=1",))
    monkeypatch.setenv("NO_GRAPH_STARTS", str(starts))
    command = [os.sys.executable, no_graph.__file__, "ablate", "work", str(out)]  # type: ignore[attr-defined]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        assert f"gn-lars-0.1 seed {seed}: stopped: " in done.stdout
        assert f"gn-lars-0.1 seed {seed}: done" in done.stdout
    assert no_graph.WHY in done.stdout
    ids = [line.split()[0] for line in starts.read_text().splitlines()]
    assert len(ids) == 3
    assert len(set(ids)) == 1


def test_whoever_lost_its_claim_raises(tmp_path: Path) -> None:
    ask(tmp_path, "gn-lars-0.1", sets=SHORT)
    (entry,) = Ledger(tmp_path).entries()
    held = acquire(entry.stem, 0, Owner())
    assert held is not None
    shutil.rmtree(held.path)
    with pytest.raises(LostClaimError):
        held.check()
    assert not (held.path / SIGN).exists()
