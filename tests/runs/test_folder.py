"""folder.py, lock.py, environment.py: one folder, one run, one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbyol import config_io
from fastbyol.config import Config
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.runs import checkpoint, lock
from fastbyol.runs.environment import environment
from fastbyol.runs.folder import RunFolder, default_run_path
from fastbyol.runs.lock import Lock, is_locked
from fastbyol.runs.metrics import MetricsFile, last_step


def config(*sets: str) -> Config:
    return config_io.load(preset="blog", sets=sets).config


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert error.value.exit_code == 2
    return text


@contextmanager
def held_by_another_process(path: Path) -> Iterator[None]:
    code = (
        "import sys; from pathlib import Path; from fastbyol.runs.lock import Lock; held = "
        "Lock(Path(sys.argv[1]));"
    )
    code += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


def write_epochs(folder: RunFolder, *epochs: dict[str, Any]) -> None:
    with closing(MetricsFile(folder.path, ["loss"], steps_per_epoch=1, resume_step=0)) as metrics:
        for epoch, fields in enumerate(epochs):
            metrics.append_steps(epoch, np.zeros((1, 1), np.float32))
            metrics.append_event("epoch", epoch + 1, {"epoch": epoch, **fields})


def test_a_new_run_says_what_it_is_and_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastbyol", "train", "--lr", "0.1"])
    loaded = config_io.load(preset="blog", flags={"optim.lr": ("--lr", 0.1)})
    with RunFolder.create(tmp_path / "a" / "run", loaded.config, loaded.origin) as folder:
        assert "lr = 0.1  # --lr\n" in folder.config_text
        assert "momentum = 0.9  # preset blog\n" in folder.config_text
        assert folder.checkpoints.is_dir()
        assert folder.env["command"] == ["fastbyol", "train", "--lr", "0.1"]
        assert folder.env["torch"] == torch.__version__
        assert folder.env["threads"] == torch.get_num_threads()
        assert folder.env["cores"] >= 1
        assert {
            "fastbyol",
            "python",
            "triton",
            "numpy",
            "ffcv",
            "cpu",
            "gpus",
            "platform",
            "started",
        } <= folder.env.keys()
    with RunFolder.open(folder.path, lock=False) as again:
        assert again.config == loaded.config
        assert again.config_text == folder.config_text
    assert {path.name for path in folder.path.iterdir()} == {
        "config.toml",
        "env.json",
        "checkpoints",
        ".lock",
    }


@pytest.mark.parametrize(
    ("name", "says"), [("config.toml", "fastbyol resume {}"), ("thesis.tex", "thesis.tex")]
)
def test_a_folder_that_is_used_is_refused_untouched(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_text("as it was")
    with pytest.raises(UsageError) as caught:
        RunFolder.create(tmp_path, config())
    assert says.format(tmp_path) in one_line(caught)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "as it was")]


def test_an_empty_folder_and_the_rest_of_a_killed_creation_are_fine(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in (".lock", "env.json", ".config.toml.tmp"):
        (tmp_path / name).touch()
    with RunFolder.create(tmp_path, config()) as folder:
        assert folder.env["python"]


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_an_unwritable_place_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        RunFolder.create(tmp_path / place, config())
    assert "--out" in one_line(caught)
    with pytest.raises(UsageError) as caught:
        default_run_path(config(), tmp_path / place)
    assert "--out" in one_line(caught)


def test_opening_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="no run here"):
            RunFolder.open(path, lock=True)
        assert not (path / ".lock").exists()


def test_a_run_with_a_damaged_configuration_names_the_line(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", config()):
        pass
    text = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(text.replace("momentum = 0.9", "momentum = 9.0"))
    with pytest.raises(UsageError) as caught:
        RunFolder.open(tmp_path / "run", lock=True)
    assert "optim.momentum = 9.0" in one_line(caught)
    assert "config.toml:" in one_line(caught)


def test_two_processes_never_work_on_one_run(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()):
        assert is_locked(tmp_path)
        with pytest.raises(UsageError, match="another process"):
            Lock(tmp_path)
    assert not is_locked(tmp_path)
    with held_by_another_process(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(UsageError, match="another process") as caught:
            RunFolder.open(tmp_path, lock=True)
        one_line(caught)
        with RunFolder.open(tmp_path, lock=False) as folder:
            assert folder.config == config()
    with RunFolder.open(tmp_path, lock=True):  # the system let go of it when the process was killed
        pass


def test_a_lock_whose_file_was_removed_is_not_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder before removed its refused run; who had the file open by then locks one that
    nobody else can see.
    """
    taken = lock._try_lock

    def removed_between(descriptor: int) -> bool:
        monkeypatch.setattr(lock, "_try_lock", taken)
        (tmp_path / ".lock").unlink()
        return taken(descriptor)

    monkeypatch.setattr(lock, "_try_lock", removed_between)
    held = Lock(tmp_path)
    assert is_locked(tmp_path)
    held.release()
    assert not is_locked(tmp_path)


def make_at(path: Path, start: Any, answers: Any) -> None:
    start.wait()
    try:
        with RunFolder.create(path, config()):
            answers.put("made")
            time.sleep(1.0)
    except UsageError as error:
        answers.put(str(error))


def test_of_two_runs_begun_at_once_in_one_folder_one_is_told(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    start, answers = processes.Event(), processes.Queue()
    children = [
        processes.Process(target=make_at, args=(tmp_path / "run", start, answers)) for _ in range(3)
    ]
    for child in children:
        child.start()
    start.set()
    said = sorted(answers.get(timeout=600) for _ in children)
    for child in children:
        child.join(60)
    assert said.count("made") == 1
    assert all(
        "another process works on this run" in text or "holds a run already" in text
        for text in said
        if text != "made"
    )


def used(path: Path) -> None:
    with RunFolder.open(path, lock=True) as folder:
        assert folder.inputs is None
        assert last_step(path) == -1
        checkpoint.load_latest(folder.checkpoints)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.toml", "no run here"),
        ("env.json", "no checkpoint"),  # its loss is no harm
        (".lock", "No such device"),
        ("metrics.jsonl", "is a named pipe"),
        ("checkpoints/ckpt-000000006.safetensors", "is a named pipe"),
    ],
)
def test_a_pipe_among_a_runs_files_is_waited_for_by_nobody(
    tmp_path: Path, name: str, says: str
) -> None:
    with RunFolder.create(tmp_path / "run", config()):
        pass
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(UsageError, match=says) as caught:
        used(tmp_path / "run")
    one_line(caught)


def test_a_run_refused_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    """A wrong data file must not use up the name given with --out."""
    with pytest.raises(UsageError), RunFolder.create(tmp_path / "run", config()):
        raise UsageError("no such beton")
    assert list(tmp_path.iterdir()) == []


def test_other_ends_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FastbyolError), RunFolder.create(tmp_path / "failed", config()):
        raise FastbyolError("out of memory")
    assert (tmp_path / "failed" / "config.toml").exists()
    folder = RunFolder.create(tmp_path / "noted", config())
    (folder.path / "notes.txt").touch()
    with pytest.raises(UsageError), folder:
        raise UsageError("no such beton")
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]
    started = RunFolder.create(tmp_path / "started", config())
    write_epochs(started, {})
    with pytest.raises(UsageError), started:
        raise UsageError("the test file went away")
    assert (started.path / "config.toml").exists()


def test_names_say_the_run_and_count_up(tmp_path: Path) -> None:
    plain = config("model.norm=gn", "model.projector.norm=none", "model.predictor.norm=none")
    assert default_run_path(plain, tmp_path).name == "gn-sgd0.8-mlp_none-s0-1"
    assert default_run_path(plain, tmp_path).name == "gn-sgd0.8-mlp_none-s0-2"
    (tmp_path / "gn-sgd0.8-mlp_none-s0-41").mkdir()
    assert default_run_path(plain, tmp_path).name == "gn-sgd0.8-mlp_none-s0-42"
    mixed = config("optim.name=lars", "model.predictor.norm=none", "model.ws=true", "train.seed=3")
    assert default_run_path(mixed, tmp_path).name == "bn-lars0.2-mlp_bn_none-ws-s3-1"
    other = config("method.name=simsiam", "model.predictor.layers=0")
    assert default_run_path(other, tmp_path).name == "simsiam-bn-sgd0.8-mlp_bn_absent-s0-1"
    with RunFolder.create(default_run_path(plain, tmp_path), plain) as folder:
        assert folder.path.name.endswith("-43")


def test_names_are_claimed_even_where_another_process_comes_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = default_run_path(config(), tmp_path)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    assert default_run_path(config(), tmp_path).name == taken.name.removesuffix("1") + "2"


def test_listing_leaves_torch_alone() -> None:
    code = (
        "import sys; import fastbyol.runs.folder, fastbyol.show.run_report; sys.exit('torch' "
        "in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_env_json_is_json_and_its_loss_no_harm(tmp_path: Path) -> None:
    json.dumps(environment(), allow_nan=False)
    with RunFolder.create(tmp_path, config()) as folder:
        (tmp_path / "env.json").unlink()
        assert folder.env == {}
