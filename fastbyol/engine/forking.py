"""The beginning of a fork: a run folder like its parent's as it was at a saved step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fastbyol.config import Resolved
from fastbyol.engine import capture, guards
from fastbyol.engine.device import pick_device
from fastbyol.engine.replay import with_replayed_rates
from fastbyol.engine.session import Progress
from fastbyol.engine.step import TrainState
from fastbyol.engine.trainer import Summary
from fastbyol.errors import UsageError, quoted
from fastbyol.evaluation.progress import Accuracies
from fastbyol.optim.momentum import Update, carry_over
from fastbyol.optim.schedule import at
from fastbyol.runs import checkpoint, consistency, environment, inputs
from fastbyol.runs.checkpoint import Checkpoint
from fastbyol.runs.folder import CHECKPOINTS, CONFIG, FIRST_WEIGHTS, RunFolder
from fastbyol.runs.fork import Plan, building, copy_records, origin_of
from fastbyol.runs.inputs import META, Inputs
from fastbyol.runs.metrics import last_step, read_events


def parse(text: str) -> tuple[Path, int]:
    """Return the run and the step of ``RUN@STEP``. Raises UsageError for another text."""
    match = re.fullmatch(r"(.+)@([0-9]{1,18})", text, re.DOTALL)
    if match is None:
        run = Path(text.rpartition("@")[0] or text)
        run = Path(text) if (Path(text) / CONFIG).exists() else run
        raise UsageError(
            f"{text}: write RUN@STEP, a run and the step to fork it at, such as "
            f"{quoted(run)}@{checkpoint.newest_step(run / CHECKPOINTS) or 1000}; {_saved(run)}"
        )
    return Path(match[1]), int(match[2])


def _saved(run: Path) -> str:
    """Return which steps of a run are saved, in words."""
    if not (run / CONFIG).exists():
        return f"{run} is no run"
    steps = ", ".join(map(str, checkpoint.saved_steps(run / CHECKPOINTS)))
    return f"saved steps: {steps or 'none'}"


def begin(asked: Plan, out: Path) -> RunFolder:
    """Make the folder of a fork, complete or not at all, and return it locked.

    The parent is only read, and may be running. Raises UsageError where the parent has no sound
    checkpoint of the step, or the changes do not fit it, and FastbyolError where the disk refuses.
    """
    saved, pinned = _load(asked), _inputs(asked)
    num_steps = _steps_per_epoch(asked.config, pinned)
    progress = Progress.of(saved.meta)
    ends = _check_end(asked, progress, num_steps)
    tensors = _tensors(asked, saved, num_steps)
    if "optim.replay_rates" in asked.changes:
        pinned = replace(pinned, rates=None)
    # Another way to take a step is chosen anew.
    keeps_engine = not {"engine.mode", "engine.kernels", "train.device"} & asked.changes.keys()
    with RunFolder.open(asked.parent, lock=False) as parent:
        mode = parent.kept_mode if keeps_engine else None
        first_weights = parent.env.get(FIRST_WEIGHTS)
    with building(out, asked.config, asked.origin) as folder:
        made_by = environment.made_by(pick_device(asked.config.train.device))
        folder.keep_inputs(pinned, made_by, first_weights)
        folder.keep_fork(origin_of(asked, saved.digest).as_json(), mode)
        records = copy_records(asked.parent, saved.meta["telemetry"], folder.path, ends=ends)
        meta = {**saved.meta, "config": folder.config_text, META: pinned.as_json()}
        meta["telemetry"] = records
        if not keeps_engine:
            meta["engine"] = None
        checkpoint.save(folder.checkpoints, asked.step, tensors, meta)
    return folder


def finished(folder: RunFolder) -> Summary | None:
    """Return how the run in ``folder`` ended, or None if something is left to do, or damaged."""
    pinned, train = folder.inputs, folder.config.train
    try:
        progress = Progress.of(consistency.last_meta(folder.checkpoints))
    except (LookupError, ValueError):  # resuming says what is wrong
        return None
    if pinned is None or progress.owes_epoch_end:
        return None
    num_steps = _steps_per_epoch(folder.config, pinned)
    if progress.step < num_steps * train.epochs and not progress.ends_early(train, num_steps):
        return None
    return Summary(
        run=str(folder.path),
        finished=True,
        step=progress.step,
        epoch=progress.step // num_steps,
        state=progress.state,
        accuracy=progress.accuracy,
        metrics=dict(progress.epoch_means),
        accuracies=Accuracies.of(read_events(folder.path)),
        stopped_by=None,
    )


def _steps_per_epoch(config: Resolved, pinned: Inputs) -> int:
    """Return the steps of an epoch, from the number of images that the run was made with."""
    count = pinned.train.samples
    return min(config.data.limit or count, count) // config.train.batch_size


def _load(asked: Plan) -> Checkpoint:
    """Return the parent's sound checkpoint of the step, made with its configuration."""
    parent, folder = asked.parent, asked.parent / CHECKPOINTS
    try:
        saved = checkpoint.load(checkpoint.file_of(folder, asked.step))
    except UsageError:
        if asked.step in checkpoint.saved_steps(folder):  # else it was pruned, or never there
            raise
        done = last_step(parent) + 1
        why = f"the run has come to step {done}" if asked.step > done else "it was not kept"
        raise UsageError(
            f"{asked.source}: no checkpoint of this step: {why}; {_saved(parent)}; to keep more, "
            "train with a higher run.keep_checkpoints, and run.checkpoint_every_steps for those "
            "within epochs"
        ) from None
    with RunFolder.open(parent, lock=False) as run:
        consistency.refuse_changed(parent, run.config, saved.meta["config"], str(saved.path))
    return saved


def _inputs(asked: Plan) -> Inputs:
    pinned = inputs.of_run(asked.parent)
    if pinned is None:
        raise UsageError(
            f"{asked.parent}: what its data held was not written down when it was begun: "
            f"`fastbyol resume {quoted(asked.parent)}` does so, even of a finished run"
        )
    return pinned


def _check_end(asked: Plan, progress: Progress, num_steps: int) -> bool:
    """Return whether the state ends the fork where it begins, as it ended its parent.

    Raises UsageError where the changes leave the fork nothing to train.
    """
    train, done = asked.config.train, -(-progress.step // num_steps)
    if train.epochs < done:
        raise UsageError(
            f"train.epochs = {train.epochs}: at step {progress.step} the run is in its epoch "
            f"{done}: ask for {done} or more"
        )
    ends = progress.ends_early(train, num_steps)
    if ends and "train.end_in" in asked.changes:
        raise UsageError(
            f"train.end_in: at step {progress.step} the run has been {progress.state} for that "
            "long, so nothing is left to train: ask for more epochs of it"
        )
    return ends


def _tensors(asked: Plan, saved: Checkpoint, num_steps: int) -> Mapping[str, Tensor]:
    """Return the fork's tensors. Raises UsageError where the configuration cannot train them."""
    config = asked.config
    device = pick_device(config.train.device)
    capture.choose(config.engine, device)  # refuses what this machine lacks
    state = TrainState.create(config, steps_per_epoch=num_steps, device=device)
    state.load_tensors(saved.tensors)
    if config.optim.replay_rates is not None:
        rates, total = Path(config.optim.replay_rates), num_steps * config.train.epochs
        with_replayed_rates(state, rates, total_steps=total)
    if {"optim.name", "optim.dialect"} & asked.changes.keys():
        with RunFolder.open(asked.parent, lock=False) as parent:
            before = parent.config.model_copy(update={"engine": config.engine})
        old = TrainState.create(before, steps_per_epoch=num_steps, device=device)
        old.step.copy_(state.step)
        carry_over(state.arena.momentum, _update(old), _update(state))
    if (name := guards.not_finite(state.tensors())) is not None:
        raise UsageError(
            f"{asked.source}: {name} would hold infinity: optim.lr is too low here for the run's "
            "momentum: ask for a higher one"
        )
    return state.tensors()


def _update(state: TrainState) -> Update:
    return Update(state.recipe.rule, state.arena.table, at(state.lr, state.step))
