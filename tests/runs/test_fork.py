"""What a fork may change, where it is made, and what a killed attempt leaves."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from fastbyol import config_io, load_config
from fastbyol.errors import UsageError
from fastbyol.registry.index import list_runs
from fastbyol.runs import checkpoint, consistency, fork
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.lock import InUseError, Lock
from tiny import TINY

CHANGES = {
    "optim.lr=0.5": {"optim.lr": 0.5},
    "optim.lr=0.1": {},  # the parent's
    "views.blur_p=0.1,0.2": {"views.blur_p": (0.1, 0.2)},
    "train.seed=7": {"train.seed": 7},
    "train.epochs=9": {"train.epochs": 9},
    "data.workers=3": {"data.workers": 3},
    "method.temperature=0.5": {"method.temperature": 0.5},
    "probe.every_epochs=2": {"probe.every_epochs": 2},
    "train.end_in=[['dead', 2]]": {"train.end_in": (("dead", 2),)},
    "optim.rate_cap=none": {},
}
REFUSED = (
    *("model.norm=gn", "model.projector.hidden=17", "data.train=x.beton", "data.limit=32"),
    *("train.batch_size=16", "train.ranks=2", "train.precision=bf16", "train.init_from=x"),
    *("method.name=simsiam", "method.queue=128", "run.layers_every_steps=2", "views.size=32"),
    *("optim.lr_scaling=linear", "optim.sgd_lr=0.7", "preset=paper"),
)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    with RunFolder.create(tmp_path / "run", load_config("blog", TINY), {"optim.lr": "my.toml:3"}):
        return tmp_path / "run"


def test_every_key_may_change_or_has_a_reason_why_not() -> None:
    keys = tuple(config_io.keys())
    sections = {key.partition(".")[0] for key in keys}
    assert {name.partition(".")[0] for name in fork.REASONS} == sections
    for key in keys:
        reason = fork.reason_against(key)
        assert reason is None or len(reason.split()) > 3, key
    # The keys that any run may change between two stretches, a fork may, too.
    assert not [key for key in consistency.FREE if fork.reason_against(key)]


@pytest.mark.parametrize("text", CHANGES)
def test_a_change_is_of_the_resolved_configuration(parent: Path, text: str) -> None:
    before = config_io.flatten(config_io.read_run(parent / "config.toml"))
    asked = fork.plan(parent, 6, [text])
    assert asked.changes == CHANGES[text]
    assert config_io.flatten(asked.config) == before | CHANGES[text]
    for key in before:
        origin = "my.toml:3" if key == "optim.lr" else None
        assert asked.origin.get(key) == ("fork" if key in CHANGES[text] else origin)


@pytest.mark.parametrize("text", REFUSED)
def test_what_tensors_or_steps_mean_cannot_change(parent: Path, text: str) -> None:
    key = text.partition("=")[0]
    file = checkpoint.file_of(parent / "checkpoints", 6)
    with pytest.raises(UsageError, match=rf"^{key}: a fork cannot change it: ") as error:
        fork.plan(parent, 6, [text])
    assert f"`fastbyol train --init-from {file}`" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_optimizer_keeps_the_rate_and_says_so(parent: Path) -> None:
    (note,) = fork.plan(parent, 6, ["optim.name=lars"]).notes
    assert "optim.lr = 0.1" in note
    assert not fork.plan(parent, 6, ["optim.name=lars", "optim.lr=0.2"]).notes


def test_the_horizon_stays_the_parents(parent: Path) -> None:
    before = config_io.read_run(parent / "config.toml").schedule.horizon_epochs
    assert fork.plan(parent, 6, ["train.epochs=5"]).config.schedule.horizon_epochs == before
    anew = fork.plan(parent, 6, ["train.epochs=5", "schedule.horizon_epochs=none"])
    assert anew.config.schedule.horizon_epochs == 5


def test_a_fork_appears_whole_or_not_at_all(parent: Path, tmp_path: Path) -> None:
    asked, out = fork.plan(parent, 6, []), tmp_path / "run.forks" / "6-unchanged"
    with pytest.raises(UsageError, match="no"):
        _fail_while_building(asked, out)
    assert list(out.parent.iterdir()) == []
    with fork.building(out, asked.config, asked.origin) as folder:
        pass
    with folder:
        assert folder.path == out
        with pytest.raises(InUseError):  # from its first instant on
            Lock(out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_what_a_killed_attempt_left_is_removed_and_a_living_one_is_left_alone(
    parent: Path, tmp_path: Path
) -> None:
    asked, out = fork.plan(parent, 6, []), tmp_path / "fork"
    left = tmp_path / ".fork.building"
    (left / "checkpoints").mkdir(parents=True)
    for name in ("config.toml", ".lock", "metrics.jsonl", "checkpoints/ckpt-1", ".env.json.tmp"):
        (left / name).write_text("half")
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # another process's lock
        pool.apply(_hold, (left,))
        with (
            pytest.raises(InUseError, match="another process"),
            fork.building(out, asked.config, asked.origin),
        ):
            pass
        assert (left / "metrics.jsonl").read_text() == "half"
    with fork.building(out, asked.config, asked.origin) as folder:
        assert sorted(path.name for path in folder.path.iterdir()) == [
            *(".lock", "checkpoints", "config.toml", "env.json")
        ]
        assert list(folder.checkpoints.iterdir()) == []
    folder.close()


def _fail_while_building(asked: fork.Plan, out: Path) -> None:
    with fork.building(out, asked.config, asked.origin) as folder:
        (folder.path / "metrics.jsonl").write_text("")
        assert not out.exists()
        assert list_runs(out.parent) == []  # nobody sees it yet
        raise UsageError("no")


_held: list[Lock] = []


def _hold(folder: Path) -> None:
    _held.append(Lock(folder))


def test_a_folder_that_has_something_else_is_refused(parent: Path, tmp_path: Path) -> None:
    asked = fork.plan(parent, 6, ["optim.lr=0.5"])
    with pytest.raises(UsageError, match="holds another run: name another folder with --out"):
        fork.is_begun(asked, parent)
    (tmp_path / "full").mkdir()
    assert not fork.is_begun(asked, tmp_path / "full")
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"is not empty \(thesis.tex\)"):
        fork.is_begun(asked, tmp_path / "full")
    with fork.building(tmp_path / "fork", asked.config, asked.origin) as folder:
        folder.keep_fork(fork.origin_of(asked, "d").as_json(), None)
    folder.close()
    assert fork.is_begun(asked, tmp_path / "fork")
    assert fork.Fork.read(tmp_path / "fork") == fork.Fork(str(parent), 6, "d", {"optim.lr": 0.5})
    for other in (
        fork.plan(parent, 12, ["optim.lr=0.5"]),
        fork.plan(parent, 6, ["optim.lr=0.6"]),
        fork.plan(parent, 6, []),
    ):
        with pytest.raises(UsageError, match=r"holds another fork, of .*run@6 with .optim.lr"):
            fork.is_begun(other, tmp_path / "fork")
