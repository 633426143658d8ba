"""Ranks that are killed or asked to stop at any instant: the run ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import processes
import pytest
import run_rig as rig
from command_line import COMPILING, Command

import leftovers
from fastbyol import api, config_io
from fastbyol.engine import exchange, ports
from fastbyol.errors import UsageError
from fastbyol_bench.rank_times import environment
from tiny import COLLAPSING
from together import end_well, start

KILLS = rig.many(1, 20)
PROGRAM = (sys.executable, "-m", "fastbyol.cli.main")
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("--max-restarts", "3", *PROGRAM[1:]),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    path = folder / "config.toml"
    path.write_text(config_io.dump(rig.make_config(folder, "train.ranks=2")))
    return path


@pytest.fixture(scope="module")
def whole(file: Path) -> dict[str, bytes]:
    """What the undisturbed run leaves, its ranks in threads of this process."""
    loaded = config_io.load(file=file)
    api.train(loaded.config, file.parent / "whole", origin=loaded.origin)
    return rig.contents(file.parent / "whole")


def children(process: int) -> list[int]:
    """Their numbers, in the order of their start."""
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in found.read_text().split()] if found.exists() else []


@pytest.mark.parametrize("program", [PROGRAM, TORCHRUN], ids=["fastbyol", "torchrun"])
def test_killed_a_rank_is_started_again_and_the_bytes_are_the_same(
    program: tuple[str, ...], file: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Either rank, at any instant from its start to the run's end."""
    command = [*program, "train", "--config", str(file)]
    draw, seconds, hit = random.Random(16), 0.0, 0
    for number in range(KILLS):
        run = tmp_path / f"run{number}"
        with (tmp_path / "output").open("w+") as output:
            process = subprocess.Popen([*command, "--out", str(run)], stdout=output, stderr=output)
            while len(workers := children(process.pid)) < 2 and process.poll() is None:
                time.sleep(0.01)
            began = time.monotonic()
            if number == 0:  # certainly amid its steps
                while not (run / "timing.jsonl").exists() and process.poll() is None:
                    time.sleep(0.01)
            else:
                time.sleep(draw.uniform(0.0, seconds))
            if process.poll() is None and len(children(process.pid)) == 2:
                os.kill(draw.choice(workers), signal.SIGKILL)
                hit += 1
            code = process.wait(processes.PATIENCE_S)
            output.seek(0)
            assert code == 0, output.read()
        # A start and the whole run, both twice at most.
        seconds = seconds or (time.monotonic() - began) / 2
        assert rig.contents(run) == whole
        assert rig.leftovers(run) == []
    print(f"{hit} of {KILLS} kills met two live ranks")
    assert hit


@pytest.mark.parametrize(
    ("sets", "code", "said"),
    [
        ((), 2, "holds a run already"),
        ((*COLLAPSING, "train.stop_on_collapse=true", "train.epochs=40"), 3, "collapsed in epoch"),
    ],
    ids=["refused", "collapsed"],
)
def test_an_error_of_all_ranks_is_printed_once(
    file: Path, tmp_path: Path, sets: tuple[str, ...], code: int, said: str
) -> None:
    """With its exit code, and nothing is left in memory or among temporary files."""
    run, temporary, before = tmp_path / "run", tmp_path / "tmp", leftovers.in_shared_memory()
    temporary.mkdir()
    if not sets:
        run.mkdir()
        (run / "config.toml").write_text("")
    settings = [word for key in sets for word in ("--set", key)]
    process = subprocess.run(
        [*PROGRAM, "train", "--config", str(file), "--out", str(run), *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        timeout=processes.PATIENCE_S,
        check=False,
    )
    assert process.returncode == code, process.stderr
    (line,) = COMPILING.sub("", process.stderr).splitlines()
    assert f"{run}: {said}" in line
    assert leftovers.lasting_in_shared_memory(before) == set()
    assert [path.name for path in temporary.iterdir()] == []


def _one_rank(run: Path, file: Path, stop_at: int | None) -> None:
    """A rank that is sent SIGTERM after its step ``stop_at``, if it is the second one."""
    wishes = exchange.Exchange.wishes

    def stopping(self: exchange.Exchange, stop: bool, save: bool) -> tuple[bool, bool]:
        own = self.ranks.rank == 1
        stopping.steps += own  # type: ignore[attr-defined]
        if own and stopping.steps == stop_at:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)
        return wishes(self, stop, save)

    stopping.steps = 0  # type: ignore[attr-defined]
    exchange.Exchange.wishes = stopping  # type: ignore[method-assign]
    if (run / "config.toml").exists():
        summary = api.resume(run)
    else:
        loaded = config_io.load(file=file)
        summary = api.train(loaded.config, run, origin=loaded.origin)
    assert summary.finished == (stop_at is None)


def test_two_ranks_then_one_process_then_two_again(
    file: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGTERM to one rank stops all after the same step, saved, and the bytes stay the same.

    The step after the signal's carries the wish, and the one after that if the signal comes late.
    """
    run, begun = tmp_path / "run", 0
    for count, stop_at in ((2, 3), (1, 4), (2, None)):
        end_well(start(count, _one_rank, run, file, stop_at))
        saved = int(rig.checkpoints(run)[-1].stem.removeprefix("ckpt-"))
        if stop_at is not None:
            assert begun + stop_at < saved <= begun + stop_at + 2
        begun = saved
    assert rig.contents(run) == whole
    assert rig.leftovers(run) == []


def _asked_for_two_rates(run: Path, file: Path) -> None:
    loaded = config_io.load(file=file, sets=[f"optim.lr=0.{os.environ['RANK']}5"])
    with pytest.raises(UsageError, match=r"optim\.lr: 0\.15 on rank 1, 0\.05 on the first one"):
        api.train(loaded.config, run)


def test_a_machine_that_is_asked_for_something_else_is_told(file: Path, tmp_path: Path) -> None:
    """All are, and nothing is made."""
    end_well(start(2, _asked_for_two_rates, tmp_path / "run", file))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", 33), "33 ranks need 33 images a batch or more"),
        (("--ranks", 17, "--norm-scope", "rank"), "17 ranks need 34 images a batch or more"),
        (("--ranks", 3, "--processes", 2), "3 ranks cannot be spread evenly over 2 processes"),
        (("--gpus", 2), "--gpus: 2 asked for, and the run is on a cpu"),
        (("--gpus", 0), "--gpus"),
        (("--ranks", 2, "--nnodes", 2), "--rdzv-endpoint HOST:PORT"),
        (("--ranks", 2, "--rdzv-endpoint", "localhost:1"), "say how many with --nnodes"),
        (
            ("--ranks", 3, "--nnodes", 2, "--rdzv-endpoint", "x", "--out", "run"),
            "3 ranks cannot be spread evenly over 2 nodes",
        ),
        (("--ranks", 2, "--nnodes", 2, "--rdzv-endpoint", "x"), "--out: not given"),
        (
            ("--ranks", 2, "--nnodes", 2, "--rdzv-endpoint", "x", "--out", "run"),
            "write HOST:PORT",
        ),
        (
            ("--ranks", 2, "--nnodes", 2, "--rdzv-endpoint", "localhost:0", "--out", "run"),
            "write HOST:PORT",
        ),
    ],
)
def test_counts_that_cannot_be_are_one_line(
    run: Command, tmp_path: Path, arguments: tuple[Any, ...], said: str
) -> None:
    """Before anything is started or made."""
    device = () if "--gpus" in arguments else ("--device", "cpu")
    assert said in run.refusal("train", "--preset", "demo", *device, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the first process of those that somebody else starts, and where nodes meet.

    There it may be that another node's launcher listens. Asking takes seconds.
    """
    if not rig.FULL:
        monkeypatch.setattr(ports.subprocess, "run", Mock(side_effect=subprocess.SubprocessError))
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        endpoint = ("--nnodes", 2, "--rdzv-endpoint", f"localhost:{port}", "--out", "run")
        said = run.refusal("train", "--preset", "demo", "--ranks", 2, "--device", "cpu", *endpoint)
        assert f"port {port} is in use" in said
        for name, value in environment(0, 2, port).items():
            monkeypatch.setenv(name, value)
        said = run.refusal("train", "--preset", "demo", "--device", "cpu", "--out", "run")
        assert f"MASTER_PORT: {port} is in use" in said
        monkeypatch.setenv("MASTER_PORT", "many")
        said = run.refusal("train", "--preset", "demo", "--device", "cpu", "--out", "run")
        assert "MASTER_PORT: 'many' is no port" in said
        monkeypatch.setenv("MASTER_ADDR", "nosuch.invalid")
        said = run.refusal("train", "--preset", "demo", "--device", "cpu", "--out", "run")
        assert "MASTER_ADDR: nosuch.invalid: " in said
        monkeypatch.delenv("MASTER_ADDR")
        assert "start with torchrun" in run.refusal("train", "--preset", "demo", "--out", "run")
    assert list(tmp_path.iterdir()) == []
