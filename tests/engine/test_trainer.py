"""A run is the same run however often it is stopped, killed and resumed; and says what happened."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from processes import wait_until
from safetensors.numpy import load_file

import no_graph
from fastbyol import api
from fastbyol.config import Config
from fastbyol.engine.observer import EpochEnd, Silent, Start, StepReport
from fastbyol.errors import CollapsedError, FastbyolError, NoGraphError, UsageError
from fastbyol.registry.index import list_runs
from fastbyol.runs import checkpoint, durable
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.metrics import last_step, read_events
from tiny import COLLAPSING, STEPS_PER_EPOCH, beton_files, tiny_config

# Children come from a server that has the slow imports behind it and no threads yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fastbyol.api", "ffcv.loader"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("betons"))


@pytest.fixture(scope="module")
def whole(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, trained in a child like those that are killed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    child(api.train, tiny_config(files), run)
    return run


def child(work: Any, *arguments: Any) -> None:
    process = PROCESSES.Process(target=work, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def newest_checkpoint(run: Path) -> Path:
    return max(
        (run / "checkpoints").glob("ckpt-*.safetensors"),
        key=lambda path: int(path.stem.removeprefix("ckpt-")),
    )


def contents(run: Path) -> dict[str, Any]:
    """All that must be equal: the last checkpoint's tensors, every line of metrics, every layer
    sample.
    """
    newest = newest_checkpoint(run)
    tensors = {name: (value.dtype, value.tobytes()) for name, value in load_file(newest).items()}
    records = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "layers.npy")}
    return {"name": newest.name, "tensors": tensors, **records}


def test_an_epoch_that_was_announced_is_saved(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever becomes of who listens, and of the process with it."""

    class Gone(Silent):
        def epoch_end(self, message: EpochEnd) -> None:
            assert checkpoint.newest_step(tmp_path / "run/checkpoints") == message.step
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        api.train(tiny_config(files), tmp_path / "run", observer=Gone())
    loaded = checkpoint.load_latest(tmp_path / "run/checkpoints")
    assert (loaded.meta["step"], loaded.meta["owes_epoch_end"]) == (STEPS_PER_EPOCH, False)


def test_steps_are_taken_while_a_checkpoint_is_written(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second epoch's is kept from the disk until the third one has taken steps."""
    save, went_on, waited = checkpoint.save, threading.Event(), list[bool]()

    class Ahead(Silent):
        def progress(self, message: StepReport) -> None:
            if message.step > 2 * STEPS_PER_EPOCH + 1:
                went_on.set()

    def slow(*args: Any, step: int, **kwargs: Any) -> Path:
        if step == 2 * STEPS_PER_EPOCH:
            waited.append(went_on.wait(60))
        return save(*args, step=step, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    config = tiny_config(files, "run.drain_every_steps=1")
    api.train(config, tmp_path / "run", observer=Ahead())
    assert waited == [True]
    assert contents(tmp_path / "run") == contents(whole)


def test_no_later_step_is_recorded_before_a_runs_first_checkpoint(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that lost its checkpoints looked like one that was killed before it had any."""
    save, steps = checkpoint.save, list[int]()

    def slow(*args: Any, **kwargs: Any) -> Path:
        time.sleep(0.3)
        steps.append(last_step(tmp_path / "run"))
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    api.train(tiny_config(files, "run.drain_every_steps=1"), tmp_path / "run")
    assert steps[0] == STEPS_PER_EPOCH - 1
    assert steps[1] > 2 * STEPS_PER_EPOCH - 1


def test_a_run_in_blocks_leaves_what_a_run_of_pixels_leaves(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Tensors of the same names and shapes, nearly the same numbers, and an encoder of pixels."""
    sets = ("model.stem=torchvision", "model.norm=ln", "train.epochs=1", "optim.sgd_lr=1e-3")
    saved, embeddings = [], []
    for stem in ("plain", "blocks"):
        run = tmp_path / stem
        api.train(tiny_config(files, *sets, f"engine.stem={stem}"), run)
        saved.append(load_file(newest_checkpoint(run)))
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        embeddings.append(api.load_encoder(run)(x))
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert (saved[1][name].shape, saved[1][name].dtype) == (tensor.shape, tensor.dtype)
        # Six steps in fp32.
        assert np.linalg.norm(saved[1][name] - tensor) <= 1e-3 * np.linalg.norm(tensor), name
    torch.testing.assert_close(*embeddings, rtol=1e-3, atol=1e-4)


def full_disk(*_: Any) -> NoReturn:
    time.sleep(0.3)
    raise OSError(errno.ENOSPC, "No space left on device")


def two_ctrl_c(path: Path, write: Any) -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    durable.write_atomically(path, write)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        (full_disk, FastbyolError, "0006.safetensors: cannot write: No space left on device; e"),
        (two_ctrl_c, KeyboardInterrupt, "^$"),
    ],
)
def test_a_run_whose_first_checkpoint_is_not_written_begins_again(
    files: tuple[Path, Path],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: Any,
    error: type[BaseException],
    says: str,
) -> None:
    """The loop has taken further steps by then, of which nothing is recorded."""
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_atomically", what)
        with pytest.raises(error, match=says):
            api.train(tiny_config(files), tmp_path / "run")
    assert last_step(tmp_path / "run") == STEPS_PER_EPOCH - 1
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    child(api.resume, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_come_by_time_too(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, ranks: int
) -> None:
    """After every step where the time is always up; several ranks agree on it in the step after."""
    sets = ("run.checkpoint_every_s=1e-9", "run.keep_checkpoints=100", f"train.ranks={ranks}")
    api.train(tiny_config(files, *sets), tmp_path / "run")
    steps = checkpoint.saved_steps(tmp_path / "run/checkpoints")
    apart = {1: 1, 2: 2}[ranks]
    assert {*range(apart, 3 * STEPS_PER_EPOCH, apart)} <= {*steps}
    if ranks == 1:
        assert contents(tmp_path / "run") == contents(whole)
    api.train(tiny_config(files, *sets[1:], "run.checkpoint_every_s=1e6"), tmp_path / "rare")
    assert checkpoint.saved_steps(tmp_path / "rare/checkpoints") == [6, 12, 18]
    assert contents(tmp_path / "run") == contents(tmp_path / "rare")


def test_untrained_weights_are_probed_before_the_first_step(
    whole: Path, files: tuple[Path, Path]
) -> None:
    """As ``eval --weights random`` does it, and once, whatever is resumed."""
    (event,) = [row for row in read_events(whole) if row["event"] == "untrained"]
    assert (whole / "metrics.jsonl").read_text().startswith('{"event": "untrained", "step": 0, ')
    expected = api.evaluate(whole, "blog", weights="random")
    assert event["accuracy"] == pytest.approx(expected["accuracy"])
    assert event["num_scored"] == expected["num_test"]


class Killer(Silent):
    """Kills its own process, as a power cut would, once ``step`` is reached."""

    def __init__(self, at: int) -> None:
        self.at = at

    def progress(self, message: StepReport) -> None:
        if message.step >= self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def epoch_end(self, message: EpochEnd) -> None:
        if message.step >= self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_run(config: Config, run: Path, at: int) -> None:
    process = PROCESSES.Process(target=train_until, args=(config, run, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def train_until(config: Config, run: Path, at: int) -> None:
    api.train(config, run, observer=Killer(at))


@pytest.mark.parametrize(
    "at", [1, 4, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3, 2 * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH - 1]
)
def test_killed_at_a_step_and_resumed_is_the_uninterrupted_run(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, at: int
) -> None:
    run = tmp_path / "run"
    killed_run(tiny_config(files, "run.drain_every_steps=1"), run, at)
    child(api.resume, run)
    assert contents(run) == contents(whole)


@pytest.mark.parametrize(
    "encoder",
    [
        "timm:test_vit",
        "timm:test_resnet",  # with batch norm
        "torchvision:efficientnet_b0",  # with batch norm, dropout and stochastic depth
    ],
)
def test_a_run_of_another_librarys_network_is_resumed_bit_for_bit(
    files: tuple[Path, Path], tmp_path: Path, encoder: str
) -> None:
    pytest.importorskip(encoder.partition(":")[0])  # timm is an extra
    config = tiny_config(
        files,
        "model.width=64",
        "model.stem=torchvision",
        f"model.encoder={encoder}",
        "views.size=32",
        "run.checkpoint_every_steps=2",
        "run.drain_every_steps=1",
        "train.epochs=2",
    )
    child(api.train, config, tmp_path / "whole")
    killed_run(config, tmp_path / "killed", STEPS_PER_EPOCH + 3)
    child(api.resume, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    accuracies = [
        event["accuracy"] for event in read_events(tmp_path / "whole") if event["event"] == "epoch"
    ]
    assert len(accuracies) == 2
    net = api.load_encoder(tmp_path / "killed")
    assert type(net).__module__.startswith(encoder.partition(":")[0])


def test_a_killed_run_finds_its_queue_again(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed in mid-epoch, once the pointer has gone round a queue that is no whole number of
    batches.
    """
    config = tiny_config(
        files, "method.name=contrastive", "method.queue=27", "run.checkpoint_every_steps=2"
    )
    child(api.train, config, tmp_path / "whole")
    killed_run(config, tmp_path / "killed", STEPS_PER_EPOCH + 2)
    child(api.resume, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert contents(tmp_path / "whole")["tensors"]["queue"][0] == np.float32


@pytest.mark.parametrize("after_s", [0.05, 0.25, 0.5])
def test_killed_at_any_instant_and_resumed_is_the_uninterrupted_run(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, after_s: float
) -> None:
    """The instant is measured from the first line of metrics on: wherever it falls, in a step, a
    probe or a write.
    """
    run = tmp_path / "run"
    process = PROCESSES.Process(
        target=api.train, args=(tiny_config(files, "run.checkpoint_every_steps=2"), run)
    )
    process.start()
    wait_until((run / "metrics.jsonl").exists, process)
    time.sleep(after_s)
    process.kill()
    process.join(60)
    child(api.resume, run)
    assert contents(run) == contents(whole)


def test_sigterm_saves_between_steps_and_resumes(
    files: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    child(train_and_term, tiny_config(files, "run.drain_every_steps=1"), run)
    (saved,) = (run / "checkpoints").glob("*.safetensors")
    assert saved.stem == "ckpt-000000003", "saved in mid-epoch, after the step of the signal"
    child(api.resume, run)
    assert contents(run) == contents(whole)


class Terminator(Silent):
    def progress(self, message: StepReport) -> None:
        if message.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def train_and_term(config: Config, run: Path) -> None:
    summary = api.train(config, run, observer=Terminator())
    assert not summary.finished


def test_resuming_a_finished_run_changes_nothing(whole: Path) -> None:
    before = contents(whole)
    summary = api.resume(whole)
    assert summary.finished
    assert contents(whole) == before


class Recorder(Silent):
    def __init__(self) -> None:
        self.starts: list[Start] = []
        self.epochs: list[EpochEnd] = []

    def start(self, message: Start) -> None:
        self.starts.append(message)

    def epoch_end(self, message: EpochEnd) -> None:
        self.epochs.append(message)


def test_the_observer_hears_every_epoch_and_metrics_hold_every_step(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    heard = Recorder()
    summary = api.train(tiny_config(files), tmp_path / "run", observer=heard)
    assert [message.epoch for message in heard.epochs] == [0, 1, 2]
    assert heard.starts[0].steps_per_epoch == STEPS_PER_EPOCH
    assert summary.finished
    assert summary.accuracy == heard.epochs[-1].accuracy
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line["step"] for line in lines if "event" not in line]
    assert steps == list(range(3 * STEPS_PER_EPOCH))
    means = [line for line in lines if line.get("event") == "epoch"]
    for message in means:
        losses = [
            line["loss"]
            for line in lines
            if "event" not in line and line["epoch"] == message["epoch"]
        ]
        assert message["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_learning_rate_and_tau_follow_the_blog_schedule(whole: Path) -> None:
    """Stepped per epoch over 320 epochs: lr (1 + cos(pi e / 320)) / 2, tau 1 - (1 - .996) (1 +
    cos(pi e / 320)) / 2.
    """
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "event" not in row:
            half = (1 + np.cos(np.pi * row["epoch"] / 320)) / 2
            assert row["lr"] == pytest.approx(0.1 * half, rel=1e-6)
            assert row["tau"] == pytest.approx(1 - 0.004 * half, rel=1e-6)


def test_streaming_and_resident_data_give_the_same_run(
    files: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    child(api.train, tiny_config(files, "data.cache=none"), tmp_path / "run")
    assert contents(tmp_path / "run") == contents(whole)


def test_stop_on_collapse_saves_and_raises(files: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny_config(
        files, "train.stop_on_collapse=true", "train.epochs=40", "probe.every_epochs=0", *COLLAPSING
    )
    with pytest.raises(CollapsedError, match="collapsed in epoch"):
        api.train(config, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))


def test_a_run_ends_in_the_state_that_was_asked_for(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Finished, and the same bytes as the longer run's up to there, also after a kill."""
    settings = [*COLLAPSING, "train.epochs=4"]
    ends = [*settings, 'train.end_in=[["healthy", 4], ["collapsed", 2]]']
    api.train(tiny_config(files, *settings), tmp_path / "whole")
    summary = api.train(tiny_config(files, *ends), tmp_path / "ended")
    assert (summary.finished, summary.state, summary.stopped_by) == (True, "collapsed", None)
    states = [e["state"] for e in read_events(tmp_path / "whole") if e["event"] == "epoch"]
    last = next(n for n in range(4) if states[n - 1 : n + 1] == ["collapsed"] * 2)
    assert last < 3  # else both are the same run
    assert summary.step == (last + 1) * STEPS_PER_EPOCH
    *rest, end = (tmp_path / "ended/metrics.jsonl").read_text().splitlines()
    assert json.loads(end) == {
        "event": "end", "step": summary.step, "epoch": last, "state": "collapsed",
    }  # fmt: skip
    # A whole run probes at its last epoch, which nobody knows of one that ends early.
    assert rest == (tmp_path / "whole/metrics.jsonl").read_text().splitlines()[: len(rest)]
    (row,) = [row for row in list_runs(tmp_path) if row.name == "ended"]
    assert (row.status, row.epochs_done, row.epochs) == ("done", last + 1, 4)

    killed_run(tiny_config(files, *ends), tmp_path / "killed", summary.step)
    before = contents(tmp_path / "killed")
    assert api.resume(tmp_path / "killed").finished
    assert contents(tmp_path / "killed") == before == contents(tmp_path / "ended")


def test_changes_of_state_are_events_with_their_signals_and_a_resumed_run_tells_the_same(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = tiny_config(
        files, "train.epochs=6", "probe.every_epochs=2", "run.drain_every_steps=1", *COLLAPSING
    )
    child(api.train, config, tmp_path / "whole")
    events = read_events(tmp_path / "whole")
    states = [event for event in events if event["event"] == "state"]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [event["after"] for event in states][:2] == ["collapsing", "collapsed"]
    for event in states:
        (epoch,) = (e for e in epochs if e["step"] == event["step"])
        assert {
            name: event[name] for name in ("neg_cos", "pos_cos", "std_z", "dead_y", "grad_norm")
        } == {name: epoch[name] for name in ("neg_cos", "pos_cos", "std_z", "dead_y", "grad_norm")}
    assert [event["rank_y"] is not None for event in epochs] == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert epochs[-1]["state"] == states[-1]["after"]
    changed = states[1]["step"]
    for at in (changed, changed + 2):
        run = tmp_path / f"killed-{at}"
        killed_run(config, run, at)
        child(api.resume, run)
        assert contents(run) == contents(tmp_path / "whole")


def test_a_batch_larger_than_the_set_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batch"):
        api.train(tiny_config(files, "train.batch_size=64"), tmp_path / "run")


def test_the_trained_encoder_loads_from_run_and_file(whole: Path) -> None:
    import torch

    newest = newest_checkpoint(whole)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = api.load_encoder(whole)(x), api.load_encoder(newest)(x)
        untrained = api.load_encoder(whole, weights="random")(x)
    assert first.shape == (3, 32)
    assert torch.equal(first, second)
    assert not torch.allclose(first, untrained)


def engine_of(run: Path) -> str:
    """The mode that the newest checkpoint's steps were taken in."""
    return str(checkpoint.load_latest(run / "checkpoints").meta["engine"])


def test_a_run_without_a_graph_asks_for_another_process_and_goes_on_there_compiled(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is the folder's: a resume does not try again, before the first checkpoint and
    after it.
    """
    tried: list[str] = []

    def fail(work: Any) -> Any:
        tried.append("once")
        return no_graph.fail(work)

    no_graph.install(fail, monkeypatch.setattr)
    run, config = tmp_path / "run", tiny_config(files, "train.epochs=2")
    with pytest.raises(NoGraphError) as raised:
        api.train(config, run)
    assert str(raised.value) == (
        f"{run}: no CUDA graph ({no_graph.WHY}): its steps are compiled from now on, in a fresh "
        f"process: fastbyol resume {run}"
    )
    assert raised.value.run == run
    assert not (run / "metrics.jsonl").exists()
    with RunFolder.open(run, lock=True) as folder:
        assert (folder.kept_mode, folder.config.engine.mode) == ("compile", "auto")
        assert folder.env["torch"]
    assert api.resume(run).finished
    assert (engine_of(run), tried) == ("compile", ["once"])
    for path in sorted((run / "checkpoints").glob("*"))[1:]:
        path.unlink()
    assert api.resume(run).finished
    assert (engine_of(run), tried) == ("compile", ["once"])
    api.train(tiny_config(files, "train.epochs=2", "engine.mode=compile"), tmp_path / "compiled")
    assert contents(run) == contents(tmp_path / "compiled")


def test_a_run_that_had_a_graph_and_cannot_have_one_goes_on_compiled(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(work: Any) -> Any:
        metrics = work()

        def play() -> None:
            for static, new in zip(metrics, work(), strict=True):
                static.copy_(new)

        return metrics, play

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        no_graph.install(record, patched.setattr)
        api.train(tiny_config(files, "train.epochs=2"), run)
    whole = contents(run)
    assert engine_of(run) == "graph"
    for path in sorted((run / "checkpoints").glob("*"))[1:]:
        path.unlink()
    no_graph.install(patch=monkeypatch.setattr)
    with pytest.raises(NoGraphError):
        api.resume(run)
    assert api.resume(run).finished
    assert engine_of(run) == "compile"
    assert contents(run) == whole


def test_a_graph_that_was_asked_for_is_not_replaced(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_graph.install(patch=monkeypatch.setattr)
    with pytest.raises(
        FastbyolError, match=r"no CUDA graph .*: take --engine compile, or eager$"
    ) as raised:
        api.train(tiny_config(files, "engine.mode=graph"), tmp_path / "run")
    assert not isinstance(raised.value, NoGraphError)
    with RunFolder.open(tmp_path / "run", lock=False) as folder:
        assert folder.kept_mode is None


def test_a_signal_that_breaks_a_recording_off_is_no_failed_one(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code may swallow the exception of the signal's handler and fail in its own way."""

    def stopped(work: Any) -> Any:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("cannot record")

    no_graph.install(stopped, monkeypatch.setattr)
    assert not api.train(tiny_config(files), tmp_path / "run").finished
    with RunFolder.open(tmp_path / "run", lock=False) as folder:
        assert folder.kept_mode is None


def test_want_of_memory_while_recording_says_what_to_lower(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(work: Any) -> Any:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    no_graph.install(full, monkeypatch.setattr)
    with pytest.raises(FastbyolError, match=r"^out of memory: lower train.batch_size"):
        api.train(tiny_config(files), tmp_path / "run")


def test_a_folder_that_cannot_keep_the_choice_says_so(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than that every process asks for the next one."""
    run = tmp_path / "run"

    def fail(work: Any) -> Any:
        (run / "env.json").unlink()
        (run / "env.json").mkdir()
        return no_graph.fail(work)

    no_graph.install(fail, monkeypatch.setattr)
    with pytest.raises(FastbyolError, match=r"env.json: cannot write") as raised:
        api.train(tiny_config(files), run)
    assert not isinstance(raised.value, NoGraphError)
