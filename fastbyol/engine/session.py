"""Everything a run's loop works with, made ready before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastbyol.config import Resolved, TrainConfig
from fastbyol.data import beton, decoder, embedded, loader
from fastbyol.data.beton import BetonInfo
from fastbyol.engine import capture, guards, origin
from fastbyol.engine import ranks as ranking
from fastbyol.engine.device import pick_device
from fastbyol.engine.observer import Observer, Start
from fastbyol.engine.origin import FirstWeights
from fastbyol.engine.ranks import Alone, Ranks
from fastbyol.engine.replay import with_replayed_rates
from fastbyol.engine.step import LAYER_METRICS, METRICS, TrainState, share_of
from fastbyol.engine.telemetry import Telemetry
from fastbyol.errors import UsageError
from fastbyol.evaluation import protocol
from fastbyol.evaluation.collapse import CollapseMonitor
from fastbyol.runs import checkpoint, consistency, environment, inputs
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.inputs import Inputs
from fastbyol.runs.metrics import last_step


@dataclass(frozen=True)
class Progress:
    """How far a run has come. With the tensors of its state this is what a checkpoint keeps.

    ``owes_epoch_end``: all steps of an epoch are done, and its end with the probe is not.
    ``collapse``: ``CollapseMonitor.to_dict``. ``accuracy``: the last one measured, in percent.
    ``epoch_means``: of the last epoch that ended.
    """

    step: int = 0
    owes_epoch_end: bool = False
    collapse: Mapping[str, Any] = field(default_factory=CollapseMonitor().to_dict)
    accuracy: float | None = None
    epoch_means: Mapping[str, float] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """The collapse state at the last epoch's end."""
        return str(self.collapse["state"])

    def ends_early(self, train: TrainConfig, steps_per_epoch: int) -> bool:
        """Tell whether as many epochs in a row have ended in the state as ``train.end_in`` asks."""
        since = self.collapse["events"][-1]["step"] if self.collapse["events"] else steps_per_epoch
        in_a_row = (self.step - since) // steps_per_epoch + 1
        return any(self.state == state and in_a_row >= most for state, most in train.end_in)

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Progress:
        """Return the progress that a checkpoint's meta holds.

        Raises ValueError where it cannot be.
        """
        CollapseMonitor.from_dict(meta["collapse"])
        return cls(**{name: meta[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Session:
    """The parts that a run's loop works with. None is replaced; tensors change in place.

    ``config`` is the run's, with its data where they lie now. ``repeated``: what the meta of every
    checkpoint repeats. ``recorded``: telemetry's record in the checkpoint that the run goes on
    from. ``other_versions``: what changed since then, name -> [before, now]. The three are empty on
    ranks other than the first, whose ``folder`` is None.
    """

    path: Path
    folder: RunFolder | None
    config: Resolved
    observer: Observer
    batches: loader.Loader
    test: loader.Images | None
    state: TrainState
    take_step: capture.Engine
    ranks: Ranks = field(default_factory=Alone)
    repeated: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Sequence[Any]] | None = None
    other_versions: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that the run trains on."""
        return self.state.step.device

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of an epoch."""
        return self.batches.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run."""
        return self.steps_per_epoch * self.config.train.epochs

    def is_finished(self, progress: Progress) -> bool:
        """Tell whether no epoch's end is owed, and no step is left or the state ends the run."""
        if progress.owes_epoch_end:
            return False
        return progress.step >= self.total_steps or progress.ends_early(
            self.config.train, self.steps_per_epoch
        )

    def open_telemetry(self, step: int, wait: Callable[[], None]) -> Telemetry:
        """Open the run's records, cut back to ``step``. They ``wait`` before they are written."""
        run = self.config.run

        def fence() -> None:
            wait()
            if self.folder is not None:
                self.folder.fence()

        return Telemetry(
            self.path,
            metric_names=METRICS,
            layer_names=self.state.segment_names,
            layer_metric_names=LAYER_METRICS,
            steps_per_epoch=self.steps_per_epoch,
            drain_every=run.drain_every_steps,
            layers_every=run.layers_every_steps,
            device=self.device,
            resume_step=step,
            resume_written=self.recorded,
            fence=fence,
        )


class _Saved(NamedTuple):
    """The progress and versions, telemetry's record and engine's mode of an earlier process.

    ``first`` are the weights that a run without one starts from.
    """

    progress: Progress
    made_by: Mapping[str, Any]
    recorded: Mapping[str, Sequence[Any]] | None = None
    mode: str | None = None
    first: FirstWeights | None = None


class Terms(NamedTuple):
    """What the first rank tells the others before any of them opens the data."""

    run: Path
    config: Resolved
    made_from: Inputs
    cache: loader.Cache


class Beginning(NamedTuple):
    """What the first rank tells the others before any of them takes a step.

    ``rates`` (T, S) are those to replay, or None.
    """

    progress: Progress
    mode: capture.Choice
    rates: torch.Tensor | None


@dataclass(frozen=True)
class Preparation:
    """The first rank's work before the first step. It can be done again at any point.

    In the run's folder only env.json and config.toml are written, and only after every check. Alone
    it can be broken off, too. ``joining`` has what the other ranks do meanwhile.
    """

    folder: RunFolder
    config: Resolved
    observer: Observer
    ranks: Ranks = field(default_factory=Alone)

    @cached_property
    def pinned(self) -> Inputs | None:
        """What the run was made from; None for runs of a time when that was not written down."""
        return self.folder.inputs

    @cached_property
    def device(self) -> torch.device:
        """The device that the run trains on."""
        return pick_device(self.config.train.device)

    def run(self, opened: ExitStack) -> tuple[Session, Progress]:
        """Open the data, build the networks, and take over what was saved.

        ``opened`` closes all of it.

        Raises UsageError where data, weights, rates or configuration are not what the run was made
        with, and NoGraphError where the run has to go on in a fresh process.
        """
        config, ranks = self.config, self.ranks
        train, test = self._inspect_data()
        made_from = Inputs.of(train, test, self._choose_decoder(train, test))
        self._check_data(made_from, train, test)
        cache = config.data.cache
        if ranks.count > 1:
            cache = loader.choose_cache(
                train,
                device=self.device,
                size=config.data.size or config.views.size,
                limit=config.data.limit,
                cache=cache,
            )
            ranking.from_first(ranks, Terms(self.folder.path, config, made_from, cache))
        batches = opened.enter_context(
            open_batches(config, train, made_from.decoder, cache, self.device, ranks)
        )
        if test is None:
            self.observer.note("no --test-data: accuracy is not measured")
        test_images = read_test(config, test, made_from.decoder, self.device, ranks)
        steps_per_epoch, total_steps = (
            batches.steps_per_epoch,
            batches.steps_per_epoch * config.train.epochs,
        )
        state = TrainState.create(
            config, steps_per_epoch=steps_per_epoch, device=self.device, ranks=ranks
        )
        # The state is filled before its step is captured: a graph keeps the addresses that it saw.
        state, made_from, saved = self._fill(state, made_from, steps_per_epoch, total_steps)
        made_by = environment.made_by(self.device) | {"ranks": str(ranks.count)}
        if config.model.foreign is not None:
            library, name = config.model.foreign
            # torchvision's version is there in any case.
            made_by[library] = environment.package_version(library)
            self.observer.note(
                f"encoder {name} of {library}: its own operations, a pass per view, without "
                "dropout: slower than fastbyol's encoders; views, heads, optimizer and moving "
                "average stay fused"
            )
        other_versions = self._note_other_versions(saved.made_by, made_by)
        if saved.progress.step < total_steps:
            self._refuse_full_disk(state, steps=total_steps - saved.progress.step)
        # Nothing speaks against the run any more: what it is made from is written down.
        if made_from != self.pinned:
            first = None if saved.first is None else saved.first.as_json()
            self.folder.keep_inputs(made_from, made_by, first)
        if config != self.folder.config:
            self.folder.keep_paths(config)
        self._announce(train, batches, state, saved.progress.step)
        engine = self._ready_engine(batches, state, saved)
        session = Session(
            path=self.folder.path,
            folder=self.folder,
            config=config,
            observer=self.observer,
            batches=batches,
            test=test_images,
            state=state,
            take_step=engine,
            ranks=ranks,
            repeated={
                "config": self.folder.config_text,
                "engine": engine.mode,
                inputs.META: made_from.as_json(),
                "made_by": made_by,
            },
            recorded=saved.recorded,
            other_versions=other_versions,
        )
        return session, saved.progress

    def _inspect_data(self) -> tuple[BetonInfo, BetonInfo | None]:
        """Look at the training and the test file."""
        data = self.config.data
        if not self.folder.is_new:
            inputs.refuse_missing(self.folder.path, data)
        inspect = partial(beton.inspect, image_field=data.image_field, label_field=data.label_field)
        train, test = embedded.training_file(data), embedded.held_out_file(data)
        return inspect(train, may_lack_labels=True), None if test is None else inspect(test)

    def _choose_decoder(self, *files: BetonInfo | None) -> str:
        if self.pinned is None:
            return decoder.choose(self.config.data.decoder)
        before = self.pinned.decoder
        chosen = decoder.choose_again(before)
        # Raw images have the same pixels by every decoder, JPEG images have not.
        if chosen != before and not all(file is None or file.raw.all() for file in files):
            inputs.refuse_other_decoder(self.folder.path, before)
        return chosen

    def _check_data(self, now: Inputs, train: BetonInfo, test: BetonInfo | None) -> None:
        run = self.folder.path
        if self.pinned is not None:
            data = self.config.data
            names = [embedded.name_of(train.path, data.train)]
            if test is not None:
                names.append(embedded.name_of(test.path, data.test or data.train))
            inputs.refuse_other_data(run, self.pinned, now, *names)
        elif checkpoint.newest_step(self.folder.checkpoints) or last_step(run) >= 0:
            self.observer.note(
                f"{run}: what its data held was not written down when it was begun, so nobody can "
                "tell whether they still do; "
                "from now on it is"
            )
        if test is not None and now.test is not None and now.test.images == now.train.images:
            self.observer.note(
                f"{test.path}: holds the training images: accuracy on them says nothing of images "
                "not seen"
            )

    def _refuse_other(self, what: str, name: str, digest: str) -> None:
        """Raise UsageError where ``digest`` is not the pinned one of that name."""
        if self.pinned is not None and getattr(self.pinned, name) not in (None, digest):
            run = self.folder.path
            raise UsageError(
                f"{what}: changed since {run} was begun: put it back, or start another run with "
                "`fastbyol train`"
            )

    def _fill(
        self, state: TrainState, made_from: Inputs, steps_per_epoch: int, total_steps: int
    ) -> tuple[TrainState, Inputs, _Saved]:
        """Give ``state`` its rates and tensors.

        Return it, and what it was made from and goes on from.
        """
        source = self.config.optim.replay_rates
        if source:
            state, rates = with_replayed_rates(state, Path(source), total_steps=total_steps)
            self._refuse_other(f"optim.replay_rates: what {source} recorded", "rates", rates)
            made_from = replace(made_from, rates=rates)
        if checkpoint.newest(self.folder.checkpoints) is None:
            saved, weights = self._begin(state, steps_per_epoch)
        else:
            saved, weights = (
                self._restore(state),
                None if self.pinned is None else self.pinned.weights,
            )
        return state, replace(made_from, weights=weights), saved

    def _begin(self, state: TrainState, steps_per_epoch: int) -> tuple[_Saved, str | None]:
        """Give a run without checkpoints its first weights.

        Return also the digest of those it was given.
        """
        folder, source = self.folder, self.config.train.init_from
        # Every epoch ends with a checkpoint, and no later step is recorded before there is one: a
        # run with steps beyond its first epoch had one.
        if last_step(folder.path) >= steps_per_epoch:
            raise UsageError(
                f"{folder.checkpoints}: no checkpoint, though the run had made some: put them "
                "back, or start a new run"
            )
        if isinstance(made_with := folder.env.get("config"), str):
            self._refuse_changed(made_with, folder.path / "env.json")
        if source is None:
            return _Saved(Progress(), folder.env), None
        first = origin.copy_weights(state, source, self.config.views)
        self._refuse_other(f"{source}: the weights to start from", "weights", first.digest)
        for line in first.lines():
            self.observer.note(line)
        return _Saved(Progress(), folder.env, first=first), first.digest

    def _restore(self, state: TrainState) -> _Saved:
        """Fill ``state`` from the newest checkpoint that is sound and whose run's records are."""
        run = self.folder.path
        loaded = checkpoint.load_latest(
            self.folder.checkpoints,
            objection=lambda saved: consistency.damage(run, saved.meta["telemetry"]),
        )
        for warning in loaded.warnings:
            self.observer.note(warning)
        meta = loaded.meta
        self._refuse_changed(meta["config"], loaded.path)
        state.load_tensors(loaded.tensors)
        # A checkpoint that names no engine is of a time when there was only the eager one.
        made_by, mode = meta.get("made_by", self.folder.env), meta.get("engine", "eager")
        return _Saved(Progress.of(meta), made_by, meta["telemetry"], mode)

    def _refuse_changed(self, made_with: str, where: Path) -> None:
        """Raise UsageError where the run's configuration is not the recorded one."""
        # Where no contents are pinned, data are known by their names alone.
        by_name = self.pinned is None
        consistency.refuse_changed(
            self.folder.path, self.folder.config, made_with, str(where), paths=by_name
        )

    def _note_other_versions(
        self, before: Mapping[str, Any], now: Mapping[str, str | None]
    ) -> dict[str, list[str | None]]:
        """Return which versions changed, the device among them, and note it for the user."""
        changed = {
            key: [before[key], now[key]] for key in now if key in before and before[key] != now[key]
        }
        if changed:
            words = ", ".join(
                f"{key} was {old or 'absent'}, is {new or 'absent'}"
                for key, (old, new) in changed.items()
            )
            self.observer.note(
                f"goes on otherwise than before: {words}: numbers may round differently now"
            )
        return changed

    def _refuse_full_disk(self, state: TrainState, *, steps: int) -> None:
        needed = guards.disk_bytes(
            self.config,
            checkpoint_bytes=sum(
                tensor.numel() * tensor.element_size() for tensor in state.tensors().values()
            ),
            steps=steps,
            num_metrics=len(METRICS),
            layer_numbers=len(LAYER_METRICS) * len(state.segment_names),
        )
        saved_bytes = checkpoint.total_bytes(self.folder.checkpoints)  # which go as new ones come
        guards.refuse_full_disk(self.folder.path, needed - saved_bytes, self.config)

    def _announce(
        self, file: BetonInfo, batches: loader.Loader, state: TrainState, step: int
    ) -> None:
        self.observer.start(
            Start(
                run=str(self.folder.path),
                device=str(self.device),
                data=embedded.name_of(file.path, self.config.data.train),
                num_samples=batches.num_samples,
                num_parameters=sum(p.numel() for p in state.online.parameters()),
                steps_per_epoch=batches.steps_per_epoch,
                epochs=self.config.train.epochs,
                first_step=step,
            )
        )

    def _ready_engine(
        self, batches: loader.Loader, state: TrainState, saved: _Saved
    ) -> capture.Engine:
        """Return what takes the steps, compiled for the next batch.

        The other ranks get the state and take over the choice. A run that has no steps left
        compiles nothing.
        """
        chosen = capture.choose(
            self.config.engine,
            self.device,
            before=self.folder.kept_mode or saved.mode,
            ranks=self.ranks,
            batch_size=self.config.train.batch_size,
            foreign=self.config.model.foreign is not None,
        )
        replayed = None if state.rate_override is None else state.rate_override.recorded
        rates = None if replayed is None else replayed.cpu()
        ranking.from_first(self.ranks, Beginning(saved.progress, chosen, rates))
        hand_over(state)
        will_train = saved.progress.step < batches.steps_per_epoch * self.config.train.epochs
        if chosen.mode != "eager" and will_train:
            self.observer.note(f"engine {chosen.mode}: compiling the step, which may take minutes")
        return ready_engine(self.config, batches, state, chosen, saved.progress.step)


def open_batches(
    config: Resolved,
    file: BetonInfo,
    decoder: str,
    cache: loader.Cache,
    device: torch.device,
    ranks: Ranks,
) -> loader.Loader:
    """Open the training file for the share of its batches that ``ranks.rank`` has."""
    data, share = config.data, share_of(config.train.batch_size, ranks)
    return loader.open_loader(
        file,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        device=device,
        cache=cache,
        workers=data.workers,
        size=data.size or config.views.size,
        limit=data.limit,
        decoder=decoder,
        columns=slice(share.first, share.first + share.count),
        shared=ranks.share if ranks.count > 1 else None,
    )


def read_test(
    config: Resolved,
    file: BetonInfo | None,
    decoder: str,
    device: torch.device,
    ranks: Ranks,
) -> loader.Images | None:
    """Read the test file, if there is one, and check that the probe can use it.

    Unless training images are to be streamed, the test images stay on ``device`` if they fit.
    """
    if file is None:
        return None
    data = config.data
    test = loader.read_all(
        file,
        workers=data.workers,
        size=data.size or config.views.size,
        limit=data.test_limit,
        decoder=decoder,
        labels="needed",
        device=loader.CPU if data.cache == "none" else device,
        shared=ranks.share if ranks.count > 1 else None,
    )
    protocol.check(config.probe.protocol, test=test, train=None)
    return test


def hand_over(state: TrainState) -> None:
    """Copy the first rank's tensors to all ranks."""
    for tensor in state.tensors().values():
        state.ranks.copy_first_(tensor)
    state.renew()


def ready_engine(
    config: Resolved,
    batches: loader.Loader,
    state: TrainState,
    choice: capture.Choice,
    step: int,
) -> capture.Engine:
    """Return what takes the steps from ``step`` on, compiled for the next batch if there is one."""
    engine = capture.engine(state, config, choice)
    if choice.mode != "eager" and step < batches.steps_per_epoch * config.train.epochs:
        epoch, first = divmod(step, batches.steps_per_epoch)
        with closing(batches.epoch(epoch, start_step=first)) as upcoming:
            engine.prepare(next(upcoming), epoch)
    return engine
