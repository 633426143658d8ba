"""The loop, top to bottom: open the data, build or restore the state, step, watch, probe, save."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastbyol.config import Config
from fastbyol.data import beton, decoder, embedded, loader
from fastbyol.data.beton import BetonInfo
from fastbyol.engine import capture, guards, origin
from fastbyol.engine.device import fitting_threads, pick_device
from fastbyol.engine.interrupt import Interrupt, Stopped
from fastbyol.engine.observer import EpochEnd, Observer, Progress, Silent, Start
from fastbyol.engine.replay import with_replayed_rates
from fastbyol.engine.step import LAYER_METRICS, METRICS, TrainState
from fastbyol.engine.telemetry import Telemetry
from fastbyol.errors import CollapsedError, FastbyolError, NoGraphError, UsageError
from fastbyol.evaluation import protocol
from fastbyol.evaluation.collapse import CollapseMonitor
from fastbyol.evaluation.progress import Accuracies
from fastbyol.process import exact_products, left_as_found
from fastbyol.runs import checkpoint, consistency, environment, inputs
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.inputs import Inputs
from fastbyol.runs.metrics import METRICS_FILE, last_step, read_events


@dataclass(frozen=True)
class Summary:
    """How a run ended. ``metrics`` are the last epoch's means, ``accuracy`` is in percent or None where nothing was probed.

    ``accuracies`` are those of random weights, the best and the last, and on how many images.
    """

    run: str
    finished: bool
    step: int
    epoch: int
    state: str
    accuracy: float | None
    metrics: dict[str, float]
    accuracies: Accuracies


class Pace:
    """Images per second over the last stretch of steps, and what is left at that pace."""

    def __init__(self, batch_size: int, step: int) -> None:
        self._batch_size = batch_size
        self._mark, self._step = time.perf_counter(), step
        self.img_s = 0.0

    def update(self, step: int) -> float:
        now = time.perf_counter()
        if step > self._step:
            self.img_s = (step - self._step) * self._batch_size / max(now - self._mark, 1e-9)
        self._mark, self._step = now, step
        return self.img_s

    def restart(self) -> None:
        """Leave out of the next figure the time since the last one (a probe, a checkpoint)."""
        self._mark = time.perf_counter()

    def left_s(self, steps: int) -> float:
        return steps * self._batch_size / self.img_s if self.img_s else 0.0


class Trainer:
    """One run in one process. ``fit`` starts it or goes on from the newest checkpoint in its folder.

    ``config`` is the folder's, but that its data may lie elsewhere than the folder says: that is kept once it is proved to be
    the same.
    """

    def __init__(self, folder: RunFolder, config: Config, observer: Observer | None = None) -> None:
        self.folder, self.config = folder, config
        self.observer: Observer = observer or Silent()
        self.device = pick_device(config.train.device)
        self.monitor = CollapseMonitor()
        self.accuracy: float | None = None
        self.epoch_means: dict[str, float] = {}
        self.step = self.steps_per_epoch = self.total_steps = 0
        self.inputs: Inputs
        # Whether the steps of an epoch are done and its end, with the probe, is not.
        self.owes_epoch_end = False

    def fit(self) -> Summary:
        """Train to the configured end. Returns early, saved and resumable, after a signal of ``interrupt.SIGNALS``.

        Raises ``CollapsedError`` where ``train.stop_on_collapse`` is set and an epoch ends collapsed, ``FastbyolError`` where
        memory or disk run out or the numbers are no longer finite, and ``NoGraphError`` where the run has to go on in a fresh
        process: it is as it was, but for the mode that its folder keeps.
        """
        with Interrupt() as interrupt, ExitStack() as opened, guards.memory_advice(self.config):
            try:
                with interrupt.abortable():
                    batches = self._prepare(opened)
            except Stopped:
                return self._say_stopped(f"{interrupt.requested}: stopped before a step was made")
            except NoGraphError as error:
                self.folder.keep_mode("compile")
                run = self.folder.path
                raise NoGraphError(
                    f"{run}: {error}: its steps are compiled from now on, in a fresh process: fastbyol resume {run}", run
                ) from error
            with self._open_telemetry() as self.telemetry:
                self._loop(batches, interrupt)
            if interrupt.requested:
                return self._say_stopped(f"{interrupt.requested}: saved at step {self.step}")
        return self.summary()

    def _prepare(self, opened: ExitStack) -> loader.Loader:
        """Data, networks and what was saved: all that goes before the first step and can be done again."""
        config = self.config
        self.step = checkpoint.newest_step(self.folder.checkpoints) or 0
        self.pinned = self.folder.inputs
        train_file, test_file = self._data_files()
        batches = opened.enter_context(self._open(train_file))
        self.test = self._read_test(test_file)
        self.steps_per_epoch = batches.steps_per_epoch
        self.total_steps = self.steps_per_epoch * config.train.epochs
        self.state = TrainState.create(config, steps_per_epoch=self.steps_per_epoch, device=self.device)
        if config.optim.replay_rates:
            self.state, rates = with_replayed_rates(self.state, Path(config.optim.replay_rates), total_steps=self.total_steps)
            self._refuse_other(f"optim.replay_rates: what {config.optim.replay_rates} recorded", "rates", rates)
            self.inputs = replace(self.inputs, rates=rates)
        self.step = self._restore()
        self._refuse_full_disk()
        self._keep_inputs()
        self._say_start(train_file.path, batches.num_samples)
        self.take_step = self._engine(batches)
        return batches

    def _data_files(self) -> tuple[BetonInfo, BetonInfo | None]:
        """Look at training and test file, which hold what they held when the run was made."""
        run, data = self.folder.path, self.config.data
        if not self.folder.is_new:
            inputs.refuse_missing(run, data)
        train, test = embedded.training_file(data), embedded.held_out_file(data)
        inspect = partial(beton.inspect, image_field=data.image_field, label_field=data.label_field)
        infos = inspect(train, may_lack_labels=True), None if test is None else inspect(test)
        self.inputs = Inputs.of(*infos, self._decoder(*infos))
        if self.pinned is not None:
            inputs.refuse_other_data(run, self.pinned, self.inputs, train, test)
        elif self.step or last_step(run) >= 0:
            self.observer.note(
                f"{run}: what its data held was not written down when it was begun, so nobody can tell whether they still do; "
                "from now on it is"
            )
        if self.inputs.test is not None and self.inputs.test.images == self.inputs.train.images:
            self.observer.note(f"{test}: holds the training images: accuracy on them says nothing of images not seen")
        return infos

    def _decoder(self, *infos: BetonInfo | None) -> str:
        """Choose what decodes: what the run was begun with, but for raw images, of which all give the same pixels."""
        if self.pinned is None:
            return decoder.choose(self.config.data.decoder)
        then = self.pinned.decoder
        chosen = decoder.choose_again(then)
        if chosen != then and not all(info is None or info.raw.all() for info in infos):
            inputs.refuse_other_decoder(self.folder.path, then)
        return chosen

    def _refuse_other(self, what: str, name: str, digest: str) -> None:
        then = None if self.pinned is None else getattr(self.pinned, name)
        if then not in (None, digest):
            run = self.folder.path
            raise UsageError(f"{what}: changed since {run} was begun: put it back, or start another run with `fastbyol train`")

    def _keep_inputs(self) -> None:
        """Write down what the run is made from and where its data lie, once nothing speaks against them."""
        if self.pinned is not None and self.inputs.weights is None:
            self.inputs = replace(self.inputs, weights=self.pinned.weights)  # which no later stretch reads
        if self.inputs != self.pinned:
            self.folder.keep_inputs(self.inputs, self.made_by)
        if self.config != self.folder.config:
            self.folder.keep_paths(self.config)

    def _engine(self, batches: loader.Loader) -> capture.Engine:
        """What takes the steps, ready for the next batch; a run with none left prepares nothing."""
        chosen = capture.choose(self.config.engine, self.device, before=self.folder.kept_mode or self._mode_before)
        engine = capture.engine(self.state, self.config, chosen)
        if chosen.mode != "eager" and self.step < self.total_steps:
            self.observer.note(f"engine {chosen.mode}: compiling the step, which may take minutes")
            epoch, first = divmod(self.step, self.steps_per_epoch)
            with closing(batches.epoch(epoch, start_step=first)) as upcoming:
                engine.prepare(next(upcoming), epoch)
        return engine

    def _loop(self, batches: loader.Loader, interrupt: Interrupt) -> None:
        config = self.config
        if self.other_versions and self.step < self.total_steps:
            self.telemetry.event("versions", step=self.step, changed=self.other_versions)
        if config.train.init_from and checkpoint.newest(self.folder.checkpoints) is None:
            self._save()  # the run must not depend on another's file for longer than it has to
        if self.step == 0:
            self._probe_untrained(interrupt)
        self.pace = Pace(config.train.batch_size, self.step)
        while not interrupt.requested and (self.owes_epoch_end or self.step < self.total_steps):
            if self.owes_epoch_end:
                self._end_epoch((self.step - 1) // self.steps_per_epoch, interrupt)
            else:
                self._epoch(batches, interrupt)

    def _say_stopped(self, what: str) -> Summary:
        summary = self.summary()
        if not summary.finished:
            self.observer.note(f"{what}; go on with: fastbyol resume {self.folder.path}")
        return summary

    def summary(self) -> Summary:
        """Where the run stands."""
        begun = (self.folder.path / METRICS_FILE).exists()
        return Summary(
            run=str(self.folder.path),
            finished=0 < self.total_steps <= self.step and not self.owes_epoch_end,
            step=self.step,
            epoch=self.step // max(self.steps_per_epoch, 1),
            state=self.monitor.state,
            accuracy=self.accuracy,
            metrics=self.epoch_means,
            accuracies=Accuracies.of(read_events(self.folder.path) if begun else ()),
        )

    def _open(self, file: BetonInfo) -> loader.Loader:
        config = self.config
        return loader.open_loader(
            file,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            device=self.device,
            cache=config.data.cache,
            workers=config.data.workers,
            size=config.data.size or config.views.size,
            limit=config.data.limit,
            decoder=self.inputs.decoder,
        )

    def _read_test(self, file: BetonInfo | None) -> loader.Images | None:
        if file is None:
            self.observer.note("no --test-data: accuracy is not measured")
            return None
        data, size = self.config.data, self.config.data.size or self.config.views.size
        test = loader.read_all(
            file,
            workers=data.workers,
            size=size,
            limit=data.test_limit,
            decoder=self.inputs.decoder,
            labels="needed",
        )
        protocol.check(self.config.probe.protocol, test=test, train=None)
        return test

    def _open_telemetry(self) -> Telemetry:
        run = self.config.run
        return Telemetry(
            self.folder.path,
            metric_names=METRICS,
            layer_names=self.state.segment_names,
            layer_metric_names=LAYER_METRICS,
            steps_per_epoch=self.steps_per_epoch,
            drain_every=run.drain_every_steps,
            layers_every=run.layers_every_steps,
            device=self.device,
            resume_step=self.step,
            resume_written=self._written,
        )

    def _restore(self) -> int:
        """Take over what was saved last, and the step it was saved at; for a new run the weights it starts from, and 0."""
        self._written: Mapping[str, Sequence[Any]] | None = None
        self._mode_before: str | None = None
        run, config = self.folder.path, self.config
        # Where nothing was pinned a file is known by its name alone, but for those that the caller names.
        paths = self.pinned is None
        self.made_by = environment.made_by(self.device)
        if checkpoint.newest(self.folder.checkpoints) is None:
            self._refuse_lost_checkpoints()
            if isinstance(made_with := self.folder.env.get("config"), str):
                consistency.refuse_changed(run, self.folder.config, made_with, str(run / "env.json"), paths=paths)
            if config.train.init_from:
                weights = origin.take_weights(self.state, Path(config.train.init_from))
                self._refuse_other(f"{config.train.init_from}: the checkpoint to start from", "weights", weights)
                self.inputs = replace(self.inputs, weights=weights)
            self._note_versions(self.folder.env)
            return 0
        loaded = checkpoint.load_latest(
            self.folder.checkpoints, objection=lambda loaded: consistency.damage(run, loaded.meta["telemetry"])
        )
        for warning in loaded.warnings:
            self.observer.note(warning)
        consistency.refuse_changed(run, self.folder.config, loaded.meta["config"], str(loaded.path), paths=paths)
        self._note_versions(loaded.meta.get("made_by", self.folder.env))
        self.state.load_tensors(loaded.tensors)
        self._written = loaded.meta["telemetry"]
        self._mode_before = loaded.meta.get("engine", "eager")  # there was a time when nothing else was
        self.owes_epoch_end = loaded.meta["owes_epoch_end"]
        self.monitor = CollapseMonitor.from_dict(loaded.meta["collapse"])
        self.accuracy = loaded.meta["accuracy"]
        self.epoch_means = loaded.meta["epoch_means"]
        return int(loaded.meta["step"])

    def _note_versions(self, before: Mapping[str, Any]) -> None:
        """Say what of the versions and the device is not as ``before``: numbers may round otherwise."""
        now = self.made_by
        self.other_versions = {key: [before[key], now[key]] for key in now if key in before and before[key] != now[key]}
        if self.other_versions:
            words = ", ".join(
                f"{key} was {then or 'absent'}, is {is_now or 'absent'}" for key, (then, is_now) in self.other_versions.items()
            )
            self.observer.note(f"goes on with other versions than before: {words}: numbers may round otherwise from here on")

    def _refuse_lost_checkpoints(self) -> None:
        """Every epoch ends with a checkpoint: a run with steps beyond its first epoch had one."""
        if last_step(self.folder.path) >= self.steps_per_epoch:
            raise UsageError(
                f"{self.folder.checkpoints}: no checkpoint, though the run had made some: put them back, or start a new run"
            )

    def _refuse_full_disk(self) -> None:
        tensors = self.state.tensors().values()
        needed = guards.disk_bytes(
            self.config,
            checkpoint_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            steps=self.total_steps - self.step,
            num_metrics=len(METRICS),
            layer_numbers=len(LAYER_METRICS) * len(self.state.segment_names),
        )
        if self.step < self.total_steps:
            guards.refuse_full_disk(self.folder.path, needed - checkpoint.total_bytes(self.folder.checkpoints), self.config)

    def _say_start(self, data: Path, num_samples: int) -> None:
        self.observer.start(
            Start(
                run=str(self.folder.path),
                device=str(self.device),
                data=str(data),
                num_samples=num_samples,
                num_parameters=sum(p.numel() for p in self.state.online.parameters()),
                steps_per_epoch=self.steps_per_epoch,
                epochs=self.config.train.epochs,
                first_step=self.step,
            )
        )

    def _epoch(self, batches: loader.Loader, interrupt: Interrupt) -> None:
        every = self.config.run.checkpoint_every_steps
        epoch, first = divmod(self.step, self.steps_per_epoch)
        for batch in batches.epoch(epoch, start_step=first):
            rows = self.telemetry.record(self.take_step(batch, epoch))
            self.step += 1
            if rows:
                self._stop_if_skipping()
                self._say_progress(epoch, rows[-1])
            if self.step % self.steps_per_epoch == 0:
                break
            if interrupt.requested:
                self._save()
                return
            if every and self.step % every == 0:
                self._save()
        self.owes_epoch_end = True
        self._end_epoch(epoch, interrupt)

    def _say_progress(self, epoch: int, metrics: dict[str, float]) -> None:
        img_s = self.pace.update(self.step)
        left = self.pace.left_s(self.total_steps - self.step)
        self.observer.progress(Progress(self.step, epoch, img_s, left, self.monitor.state, metrics))

    def _end_epoch(self, epoch: int, interrupt: Interrupt) -> None:
        means = self.telemetry.epoch_summary()
        self._stop_if_skipping()
        img_s = self.pace.update(self.step)
        try:
            with interrupt.abortable():
                measured, rank = self._probe(epoch)
        except Stopped:
            self._save()
            return
        self.owes_epoch_end = False
        self.epoch_means = means
        if self.telemetry.skipped_in_row < self.steps_per_epoch:  # else there is nothing to observe
            self._watch(means, rank)
        if measured is not None:
            self.accuracy = measured
        self.telemetry.event(
            "epoch", step=self.step, epoch=epoch, state=self.monitor.state, accuracy=measured, rank_y=rank, **means
        )
        left = self.pace.left_s(self.total_steps - self.step)
        self._save()
        # An epoch that was announced is saved, whatever becomes of the process or of who listens.
        self.observer.epoch_end(
            EpochEnd(epoch, self.config.train.epochs, self.step, img_s, left, self.monitor.state, measured, means)
        )
        self.pace.restart()
        self._stop_if_collapsed(epoch)

    def _watch(self, means: dict[str, float], rank: float | None) -> None:
        """Tell the monitor of the epoch, and the run's file of every change of state."""
        known = len(self.monitor.events)
        watched = {name: means[name] for name in ("neg_cos", "pos_cos", "std_z", "dead_y", "grad_norm")}
        self.monitor.update(step=self.step, rank_y=rank, **watched)
        for event in self.monitor.events[known:]:
            self.telemetry.event("state", **asdict(event))

    def _probe_untrained(self, interrupt: Interrupt) -> None:
        """Record what the weights give before the first step; a run that was killed before its first checkpoint has that."""
        if self.test is None or any(event["event"] == "untrained" for event in read_events(self.folder.path)):
            return
        try:
            with interrupt.abortable():
                accuracy, rank, num_scored = self._evaluate(self.test)
        except Stopped:
            return
        given = {"weights": "given"} if self.config.train.init_from else {}
        self.telemetry.event("untrained", step=0, accuracy=accuracy, rank_y=rank, num_scored=num_scored, **given)

    def _probe(self, epoch: int) -> tuple[float | None, float | None]:
        """Accuracy in percent and effective rank of the embeddings; None and None where this epoch is not probed."""
        every, last = self.config.probe.every_epochs, epoch + 1 == self.config.train.epochs
        if self.test is None or not (last or (every and (epoch + 1) % every == 0)):
            return None, None
        return self._evaluate(self.test)[:2]

    def _evaluate(self, test: loader.Images) -> tuple[float, float, int]:
        """Return accuracy in percent, effective rank of the embeddings, and on how many images both were measured."""
        result = protocol.evaluate(
            self.config.probe.protocol,
            self.state.online.encoder,
            test=test,
            train=None,
            views=self.config.views,
            device=self.device,
            dtype=self.state.recipe.views_dtype,
        )
        # Six digits: the last ones depend on the number of threads, and a resumed run may have others.
        return float(result["accuracy"]), float(f"{result['rank']:.6g}"), int(result["num_test"])

    def _save(self) -> None:
        self.telemetry.flush()
        self._stop_if_skipping()
        tensors = self.state.tensors()
        self._refuse_not_finite(tensors)
        checkpoint.save(
            self.folder.checkpoints,
            step=self.step,
            tensors=tensors,
            meta={
                "config": self.folder.config_text,
                "step": self.step,
                "collapse": self.monitor.to_dict(),
                "accuracy": self.accuracy,
                "epoch_means": self.epoch_means,
                "owes_epoch_end": self.owes_epoch_end,
                "telemetry": self.telemetry.written,
                "engine": self.take_step.mode,
                inputs.META: self.inputs.as_json(),
                "made_by": self.made_by,
            },
            keep=self.config.run.keep_checkpoints,
        )

    def _refuse_not_finite(self, tensors: Mapping[str, torch.Tensor]) -> None:
        bad = guards.not_finite(tensors)
        if bad is not None:
            raise FastbyolError(
                f"{self.folder.path}: step {self.step}: {bad} holds NaN or infinity: not saved; {self._way_on()}"
            )

    def _stop_if_skipping(self) -> None:
        skipped = self.telemetry.skipped_in_row
        if skipped > self.config.train.max_skipped_steps:
            raise FastbyolError(
                f"{self.folder.path}: {skipped} steps in a row had a gradient that is not finite "
                f"(train.max_skipped_steps: {self.config.train.max_skipped_steps}); {self._way_on()}"
            )

    def _way_on(self) -> str:
        """What to do about numbers that blew up: the last checkpoint is good, since no other kind is written."""
        good = checkpoint.newest(self.folder.checkpoints)
        start = (
            f"start again from the last good checkpoint with `fastbyol train --init-from {good}` and"
            if good
            else "start again with"
        )
        return f"{start} a lower optim.lr, or with train.precision = fp32"

    def _stop_if_collapsed(self, epoch: int) -> None:
        if self.config.train.stop_on_collapse and self.monitor.state in ("collapsed", "dead"):
            raise CollapsedError(
                f"{self.folder.path}: collapsed in epoch {epoch + 1} (negative cosine {self.epoch_means['neg_cos']:.4f}); "
                f"saved at step {self.step}"
            )


def fit(folder: RunFolder, config: Config, observer: Observer | None = None) -> Summary:
    """Run ``config`` in ``folder`` to its end; see ``Trainer.fit``.

    What it sets for the process, torch's switches and threads, is put back at its end.
    """
    with left_as_found(), fitting_threads(config):
        exact_products()
        return Trainer(folder, config, observer).fit()
