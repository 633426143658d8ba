"""A fork is its parent up to its step, bit for bit, and what it was asked to be from there on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbyol import api
from fastbyol.engine import forking
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.runs import checkpoint
from fastbyol.runs.fork import Fork, plan
from fastbyol.runs.layers import read_layers
from fastbyol.runs.metrics import is_finished, read_events, read_metrics
from tiny import COLLAPSING, STEPS_PER_EPOCH, beton_files, tiny_config

KINDS = {
    "sgd": ("optim.name=sgd",),
    "lars": ("optim.name=lars", "optim.lr_scaling=linear"),
    "ranks": ("train.ranks=2",),
    "contrastive": ("method.name=contrastive", "method.queue=16"),
}
AT = 8  # in the middle of the second epoch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("betons"))


def trained(files: tuple[Path, Path], out: Path, *sets: str) -> Path:
    every = ("run.checkpoint_every_steps=2", "run.keep_checkpoints=100")
    api.train(tiny_config(files, *every, *sets), out)
    return out


@pytest.fixture(scope="module")
def parents(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parents")
    return {name: trained(files, folder / name, *sets) for name, sets in KINDS.items()}


def contents(run: Path) -> dict[str, Any]:
    """Everything that must be the same: the last tensors and both records, as bytes."""
    last = checkpoint.load_latest(run / "checkpoints")
    tensors = {name: value.numpy().tobytes() for name, value in last.tensors.items()}
    records = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "layers.npy")}
    return {"done": last.meta["step"], **tensors, **records}


def steps(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run)[0]


def forked(parent: Path, tmp_path: Path, *sets: str, step: int = AT) -> Path:
    return Path(api.fork(parent, step, sets, tmp_path / f"fork{len(list(tmp_path.iterdir()))}").run)


@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH, AT, 3 * STEPS_PER_EPOCH])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_fork_ends_as_its_parent(
    parents: dict[str, Path], tmp_path: Path, kind: str, step: int
) -> None:
    fork = forked(parents[kind], tmp_path, step=step)
    assert contents(fork) == contents(parents[kind])
    assert (fork / "config.toml").read_text() == (parents[kind] / "config.toml").read_text()


def test_its_first_step_is_its_parents_next(parents: dict[str, Path], tmp_path: Path) -> None:
    """Also where later steps differ: their rate counts only after the first one's measures."""
    fork = forked(parents["sgd"], tmp_path, "optim.lr=0.7")
    ours, theirs = steps(fork)[AT], steps(parents["sgd"])[AT]
    assert ours.pop("lr") != theirs.pop("lr")
    assert ours == theirs
    assert steps(fork)[AT + 1] != steps(parents["sgd"])[AT + 1]


@pytest.mark.parametrize(
    "change",
    ["optim.lr=0.7", "views.flip_p=0.0", "train.seed=9", "optim.name=sgd", "schedule.tau=0.5"],
)
def test_a_changed_fork_differs_only_from_its_step_on(
    parents: dict[str, Path], tmp_path: Path, change: str
) -> None:
    parent, fork = parents["lars"], forked(parents["lars"], tmp_path, change)
    assert steps(fork)[:AT] == steps(parent)[:AT]
    ours, theirs = read_layers(fork), read_layers(parent)
    assert np.array_equal(ours.values[:AT], theirs.values[:AT])
    assert ours.values.shape == theirs.values.shape
    assert not np.array_equal(ours.values[AT:], theirs.values[AT:])
    assert len(steps(fork)) == len(steps(parent))
    # It is the change that makes the difference: the same fork is the same run.
    assert contents(forked(parent, tmp_path, change)) == contents(fork)


def test_another_optimizer_goes_on_as_fast_as_its_parent_went(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    """LARS's buffer is a velocity; of SGD's the learning rate makes one."""
    fork = forked(parents["lars"], tmp_path, "optim.name=sgd", "optim.lr=0.25")
    buffers = [
        checkpoint.load(checkpoint.file_of(run / "checkpoints", AT)).tensors["arena.momentum"]
        for run in (fork, parents["lars"])
    ]
    lr = np.float32(steps(fork)[AT]["lr"])
    assert lr != 0.25  # it follows the cosine
    torch.testing.assert_close(buffers[0] * lr, buffers[1], rtol=2e-7, atol=0.0)


def test_the_resolved_rate_is_not_scaled_again(parents: dict[str, Path], tmp_path: Path) -> None:
    rates = [
        steps(forked(parents["lars"], tmp_path, *sets))[AT]["lr"]
        for sets in ((), ("optim.lr=0.00625",))
    ]
    assert rates[0] == rates[1]  # 0.2 * 8 / 256


def test_a_fork_of_a_fork_needs_neither_ancestor(
    parents: dict[str, Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    parent = trained(files, tmp_path / "parent")
    first = Path(api.fork(parent, 6, ["optim.lr=0.2"]).run)
    shutil.rmtree(parent)
    second = Path(api.fork(first, 12, ["train.seed=3"]).run)
    assert second == tmp_path / "parent.forks/6-lr=0.2.forks/12-seed=3"
    assert steps(second)[:12] == steps(first)[:12]
    shutil.rmtree(first)
    assert api.resume(second).finished
    origin = Fork.read(second)
    assert origin is not None
    assert (origin.run, origin.step, origin.changes) == (str(first), 12, {"train.seed": 3})


def test_the_same_call_goes_on_or_changes_nothing(parents: dict[str, Path], tmp_path: Path) -> None:
    fork = forked(parents["sgd"], tmp_path, "train.epochs=4")
    whole = contents(fork)
    assert whole["done"] == 4 * STEPS_PER_EPOCH
    before = {path: path.read_bytes() for path in fork.rglob("*") if path.is_file()}
    again = api.fork(parents["sgd"], AT, ["train.epochs=4"], fork)
    assert again.finished
    other = api.resume(shutil.copytree(fork, tmp_path / "copy"))
    assert replace(other, run=again.run) == again
    assert {path: path.read_bytes() for path in fork.rglob("*") if path.is_file()} == before
    newest = checkpoint.newest(fork / "checkpoints")
    assert newest is not None
    newest.unlink()  # as if it had been killed before
    assert api.fork(parents["sgd"], AT, ["train.epochs=4"], fork).finished
    assert contents(fork) == whole


def test_a_run_that_its_state_ended_can_go_on(files: tuple[Path, Path], tmp_path: Path) -> None:
    ends = "train.end_in=[['collapsed', 1]]"
    parent = trained(files, tmp_path / "run", *COLLAPSING, "train.epochs=8", ends)
    last = checkpoint.newest_step(parent / "checkpoints")
    assert last is not None
    assert last < 8 * STEPS_PER_EPOCH
    assert contents(forked(parent, tmp_path, step=last)) == contents(parent)
    fork = forked(parent, tmp_path, "train.end_in=[]", step=last)
    assert len(steps(fork)) == 8 * STEPS_PER_EPOCH
    assert [event["event"] for event in read_events(fork)].count("end") == 0
    assert is_finished(read_events(fork), 8)
    with pytest.raises(UsageError, match=r"train.end_in: at step \d+ the run has been collapsed"):
        forked(fork, tmp_path, "train.end_in=[['collapsed', 1]]", step=last)


def refusal(parent: Path, tmp_path: Path, *sets: str, step: int = AT) -> str:
    """Return the error; nothing may be left of the attempt."""
    out = tmp_path / "refused" / "fork"
    with pytest.raises(UsageError) as error:
        api.fork(parent, step, sets, out)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_step_that_was_not_kept_is_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    missed = refusal(parents["sgd"], tmp_path, step=7)
    assert "it was not kept; saved steps: 2, 4, 6, 8, 10" in missed
    assert "run.keep_checkpoints" in missed
    assert "the run has come to step 18" in refusal(parents["sgd"], tmp_path, step=100)


def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    parent = parents["sgd"]
    assert "ask for 2 or more" in refusal(parent, tmp_path, "train.epochs=1")
    assert "matches no parameter" in refusal(parent, tmp_path, "optim.lr_mult=[['x', 2.0]]")
    assert "optim.rate_cap" in refusal(parent, tmp_path, "optim.rate_cap=1.0")
    assert "no run here" in refusal(tmp_path / "no", tmp_path)
    assert "engine.mode: graph needs a CUDA" in refusal(parent, tmp_path, "engine.mode=graph")


def test_damage_is_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    parent = shutil.copytree(parents["sgd"], tmp_path / "run")
    file = checkpoint.file_of(parent / "checkpoints", AT)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{file}: damaged" in refusal(parent, tmp_path)
    file.write_bytes(whole)
    lines = (parent / "metrics.jsonl").read_text()
    (parent / "metrics.jsonl").write_text(lines.replace('"step": 3', '"step": 4', 1))
    assert "metrics.jsonl: is not what was written" in refusal(parent, tmp_path)
    (parent / "metrics.jsonl").write_text(lines)
    config = (parent / "config.toml").read_text()
    (parent / "config.toml").write_text(config.replace("momentum = 0.9", "momentum = 0.8"))
    assert "optim.momentum is 0.8" in refusal(parent, tmp_path)
    (parent / "config.toml").write_text(config)
    assert contents(forked(parent, tmp_path)) == contents(parent)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file it is that cannot be forced to it."""
    fsync, out = os.fsync, tmp_path / "forks" / "fork"
    calls = fails_at = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    asked = plan(parents["sgd"], AT, ["train.seed=4"])
    while not out.exists():
        calls, fails_at = 0, fails_at + 1
        with pytest.raises(FastbyolError, match="No space left on device") as error:
            forking.begin(asked, out).close()
        assert "\n" not in str(error.value)
        assert out.exists() or list(out.parent.iterdir()) == []
    assert fails_at > 10
    # The last one came after the rename: the fork is whole.
    summary = api.fork(parents["sgd"], AT, ["train.seed=4"], out)
    assert (summary.finished, summary.step) == (True, 3 * STEPS_PER_EPOCH)


def test_another_parent_of_the_same_name_is_noticed(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    parent = shutil.copytree(parents["sgd"], tmp_path / "run")
    fork = Path(api.fork(parent, AT).run)
    checkpoint.file_of(parent / "checkpoints", AT).unlink()  # pruned: still the same parent
    assert api.fork(parent, AT).finished
    shutil.rmtree(parent)
    shutil.copytree(parents["contrastive"], parent)
    with pytest.raises(UsageError, match="holds another fork"):
        api.fork(parent, AT)
    assert json.loads((fork / "env.json").read_text())["fork"]["step"] == AT
