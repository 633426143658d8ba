"""The loop of a run: train an epoch, end it, until all are done or a signal asks to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NoReturn

from torch import Tensor

from fastbyol.config import IN_COLLAPSE, Resolved
from fastbyol.data import loader
from fastbyol.engine import capture, digest, guards
from fastbyol.engine.device import fitting_threads, pick_device
from fastbyol.engine.interrupt import Interrupt, Stopped
from fastbyol.engine.joining import join
from fastbyol.engine.observer import EpochEnd, Observer, Silent, StepReport
from fastbyol.engine.probe import evaluate_together
from fastbyol.engine.ranks import (
    Alone,
    Processes,
    Ranks,
    Team,
    agree,
    current,
    from_first,
    run_threads,
)
from fastbyol.engine.saving import Saver
from fastbyol.engine.session import Preparation, Progress, Session
from fastbyol.engine.telemetry import Telemetry, Unrecorded
from fastbyol.engine.worker import worker
from fastbyol.errors import CollapsedError, FastbyolError, NoGraphError, quoted
from fastbyol.evaluation.collapse import CollapseMonitor
from fastbyol.evaluation.intervals import Accuracy
from fastbyol.evaluation.progress import Accuracies
from fastbyol.process import exact_products, left_as_found
from fastbyol.runs import checkpoint
from fastbyol.runs.folder import RunFolder
from fastbyol.runs.metrics import METRICS_FILE, read_events


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    ``metrics`` are the last epoch's means. ``accuracy`` is in percent, None where nothing was
    probed. ``accuracies`` are those of random weights, the best and the last, and on how many
    images. ``stopped_by`` is the signal that ended an unfinished run.
    """

    run: str
    finished: bool
    step: int
    epoch: int
    state: str
    accuracy: float | None
    metrics: dict[str, float]
    accuracies: Accuracies
    stopped_by: str | None


def fit(
    folder: RunFolder,
    config: Resolved,
    observer: Observer | None = None,
    processes: Alone | Processes | None = None,
    ranks: int = 1,
) -> Summary:
    """Start the run in ``folder``, or go on from its newest checkpoint, and train to its end.

    ``config`` is the folder's; only its data may lie elsewhere. Returns early, saved and resumable,
    after a signal of ``interrupt.SIGNALS``. Torch's switches and threads are put back at the end.
    Of ``processes`` this is the first, the others call ``follow``; each has its part of the
    ``ranks``.

    Raises CollapsedError where ``train.stop_on_collapse`` is set and an epoch ends collapsed,
    FastbyolError where memory or disk run out or numbers are no longer finite, NoGraphError where
    the run has to go on in a fresh process, and LostRankError where another rank is gone.
    """
    own = partial(_lead, folder, config, observer or Silent())
    return _in_threads(own, processes or Alone(), ranks, config)


def follow(processes: Processes, config: Resolved, ranks: int) -> Summary:
    """Train as ``fit`` does in the first of ``processes``, without its files: return its summary.

    ``config`` and ``ranks`` are that one's. Raises the errors of ``fit``.
    """
    return _in_threads(_follow, processes, ranks, config)


def _in_threads(
    work: Callable[[Ranks, Interrupt], Summary],
    processes: Alone | Processes,
    ranks: int,
    config: Resolved,
) -> Summary:
    """Call ``work`` as this process's first rank, and follow as its others in threads beside it."""
    here = worker()
    on_node = ranks if here is None else ranks // processes.count * here.local_count
    with (
        left_as_found(),
        fitting_threads(config, on_node),
        Interrupt() as interrupt,
        guards.memory_advice(config),
    ):
        exact_products()
        if isinstance(processes, Processes):
            processes.use(pick_device(config.train.device))
        if ranks == processes.count:
            with current(processes):
                return work(processes, interrupt)
        team = Team(ranks // processes.count, processes)
        return run_threads(
            team.ranks(), lambda own: (_follow if own.rank else work)(own, interrupt)
        )[0]


def _lead(
    folder: RunFolder, config: Resolved, observer: Observer, ranks: Ranks, interrupt: Interrupt
) -> Summary:
    run = folder.path
    with ExitStack() as opened:
        try:
            with interrupt.abortable() if ranks.count == 1 else nullcontext():
                session, begun = Preparation(folder, config, observer, ranks).run(opened)
        except Stopped:
            step = checkpoint.newest_step(folder.checkpoints) or 0
            return _summary(folder, Progress(step=step), None, interrupt.requested)
        except NoGraphError as error:
            folder.keep_mode("compile")
            what = f"{error}: its steps are compiled from now on, in a fresh process"
            raise NoGraphError(f"{run}: {what}: fastbyol resume {quoted(run)}", run) from error
        opened.callback(capture.release, session.take_step)
        saver = Saver()
        with session.open_telemetry(begun.step, saver.wait_for_first) as telemetry, saver:
            progress = _train(session, begun, telemetry, interrupt, saver)
        who = None
        if not session.is_finished(progress):
            who = interrupt.requested or "a signal to another rank"
        return from_first(ranks, _summary(folder, progress, session, who))


def _follow(ranks: Ranks, interrupt: Interrupt) -> Summary:
    with ExitStack() as opened:
        session, begun = join(ranks, opened)
        opened.callback(capture.release, session.take_step)
        _train(session, begun, Unrecorded(), interrupt, Saver())
        return from_first(ranks, None)


def _train(
    session: Session,
    begun: Progress,
    telemetry: Telemetry | Unrecorded,
    interrupt: Interrupt,
    saver: Saver,
) -> Progress:
    """Go on from ``begun`` to the end of the run, or to where one of the ranks is asked to stop."""
    pace = Pace(session.config.train.batch_size, begun.step, session.total_steps)
    alarm = Alarm(None if session.folder is None else session.config.run.checkpoint_every_s)
    return Loop(session, telemetry, interrupt, pace, alarm, saver).run(begun)


@dataclass(frozen=True)
class _Measured:
    """A probe's accuracy in percent, the embeddings' effective rank, and how many it scored."""

    accuracy: float | None = None
    rank_y: float | None = None
    num_scored: int | None = None

    def fields(self) -> dict[str, float | None]:
        """Return what an event has of it."""
        if self.accuracy is None or self.num_scored is None:
            return {"accuracy": None, "rank_y": None}
        return {**Accuracy(self.accuracy, self.num_scored).fields(), "rank_y": self.rank_y}


@dataclass(frozen=True)
class Loop:
    """One rank's way through a run: its methods take the progress and return the new one.

    All ranks go the same way, and decide where it ends together; ``telemetry`` records the first's.
    """

    session: Session
    telemetry: Telemetry | Unrecorded
    interrupt: Interrupt
    pace: Pace
    alarm: Alarm
    saver: Saver

    def run(self, progress: Progress) -> Progress:
        """Train to the end of the run, or until a signal asks one of the ranks to stop."""
        self._before_the_first_step(progress)
        while not self._is_asked_to_stop() and not self.session.is_finished(progress):
            if not progress.owes_epoch_end:
                progress = self._train_epoch(progress)
            if progress.owes_epoch_end:
                progress = self._end_epoch(progress)
        self.saver.wait()
        return progress

    def _is_asked_to_stop(self) -> bool:
        return bool(agree(self.session.ranks, int(self.interrupt.requested is not None)))

    def _before_the_first_step(self, progress: Progress) -> None:
        session, here = self.session, worker()
        self._refuse_differing(progress)
        if here is not None and here.restarts and progress.step:
            # torchrun starts all again after any failure: this one is no reason to go on.
            self._stop_if_collapsed(progress, (progress.step - 1) // session.steps_per_epoch)
        if session.other_versions and progress.step < session.total_steps:
            self.telemetry.event("versions", step=progress.step, changed=session.other_versions)
        if session.config.train.init_from and progress.step == 0:
            # The run must not depend on another run's file for longer than it has to.
            self._save(progress)
        if progress.step == 0:
            self._probe_untrained()

    def _train_epoch(self, progress: Progress) -> Progress:
        """Take the steps that the epoch still has; a signal breaks it off between two of them."""
        session, step = self.session, progress.step
        every = session.config.run.checkpoint_every_steps
        epoch, first = divmod(step, session.steps_per_epoch)
        for batch in session.batches.epoch(epoch, start_step=first):
            rows = self.telemetry.record(session.take_step(batch, epoch))
            step += 1
            progress = replace(progress, step=step)
            if rows:  # a ring's worth has come off the device
                self._refuse_to_skip_on()
                img_s, left_s = self.pace.update(step)
                session.observer.progress(
                    StepReport(step, epoch, img_s, left_s, progress.state, rows[-1])
                )
            self.saver.poll()
            stops, saves = self._wishes_after_step()
            if step % session.steps_per_epoch == 0:
                return replace(progress, owes_epoch_end=True)
            if stops or saves or (every and step % every == 0):
                self._save(progress)
            if stops:
                break
        return progress

    def _wishes_after_step(self) -> tuple[bool, bool]:
        """Tell whether to stop and whether to save: after the same step on all ranks."""
        own = self.interrupt.requested is not None, self.alarm.rings()
        exchange = self.session.state.exchange
        return own if exchange is None else exchange.wishes(*own)

    def _end_epoch(self, progress: Progress) -> Progress:
        """Probe, watch for a collapse, write the epoch's event, save, tell the observer."""
        session, step = self.session, progress.step
        epoch = (step - 1) // session.steps_per_epoch
        means = self.telemetry.epoch_summary()
        self._refuse_to_skip_on()
        img_s, left_s = self.pace.update(step)
        try:
            with self._abortable():
                measured = self._probe(epoch)
        except Stopped:
            # The steps are kept; a later process probes.
            self._save(progress)
            return progress
        if session.ranks.rank == 0:
            progress = self._with_epoch(progress, epoch, means, measured)
        progress = from_first(session.ranks, progress)
        message = EpochEnd(
            epoch,
            session.config.train.epochs,
            step,
            img_s,
            left_s,
            progress.state,
            measured.accuracy,
            measured.num_scored,
            means,
        )
        # An epoch is announced once its checkpoint is on the disk, whatever becomes of the process
        # or of its observer: a few steps into the next epoch.
        self._save(progress, partial(session.observer.epoch_end, message))
        self.pace.restart()
        self._stop_if_collapsed(progress, epoch)
        return progress

    def _with_epoch(
        self,
        progress: Progress,
        epoch: int,
        means: Mapping[str, float],
        measured: _Measured,
    ) -> Progress:
        """Return the progress with ``epoch``'s measures in it, and write its events."""
        step = progress.step
        monitor = CollapseMonitor.from_dict(progress.collapse)
        # Else there is nothing to observe.
        if self.telemetry.skipped_in_row < self.session.steps_per_epoch:
            self._watch(monitor, step, means, measured.rank_y)
        # Events of a step are written before its checkpoint, which remembers the file as it then
        # is.
        self.telemetry.event(
            "epoch",
            step=step,
            epoch=epoch,
            state=monitor.state,
            **measured.fields(),
            **means,
        )
        ended = Progress(
            step,
            owes_epoch_end=False,
            collapse=monitor.to_dict(),
            accuracy=progress.accuracy if measured.accuracy is None else measured.accuracy,
            epoch_means=means,
        )
        if ended.ends_early(self.session.config.train, self.session.steps_per_epoch):
            self.telemetry.event("end", step=step, epoch=epoch, state=ended.state)
        return ended

    @contextmanager
    def _abortable(self) -> Iterator[None]:
        """Let a request to stop raise ``Stopped`` inside; with other ranks, only before it."""
        if self.session.ranks.count == 1:
            with self.interrupt.abortable():
                yield
            return
        if self._is_asked_to_stop():
            raise Stopped
        yield

    def _watch(
        self, monitor: CollapseMonitor, step: int, means: Mapping[str, float], rank: float | None
    ) -> None:
        """Update the monitor with an epoch's means and write an event for every change of state."""
        num_before = len(monitor.events)
        signals = {
            name: means[name] for name in ("neg_cos", "pos_cos", "std_z", "dead_y", "grad_norm")
        }
        monitor.update(step=step, rank_y=rank, **signals)
        for event in monitor.events[num_before:]:
            self.telemetry.event("state", **asdict(event))

    def _probe_untrained(self) -> None:
        """Measure and record the untrained weights' accuracy, unless an earlier process did."""
        session = self.session
        if session.test is None:
            return
        was_measured = session.folder is not None and any(
            e["event"] == "untrained" for e in read_events(session.path)
        )
        if agree(session.ranks, int(was_measured)):
            return
        try:
            with self._abortable():
                measured = self._evaluate(session.test)
        except Stopped:
            return
        origin = {"weights": "given"} if session.config.train.init_from else {}
        self.telemetry.event(
            "untrained", step=0, **measured.fields(), num_scored=measured.num_scored, **origin
        )

    def _probe(self, epoch: int) -> _Measured:
        """Return what ``_evaluate`` does; nothing in an epoch without a probe."""
        config, test = self.session.config, self.session.test
        every, is_last = config.probe.every_epochs, epoch + 1 == config.train.epochs
        if test is None or not (is_last or (every and (epoch + 1) % every == 0)):
            return _Measured()
        return self._evaluate(test)

    def _evaluate(self, test: loader.Images) -> _Measured:
        session = self.session
        result = evaluate_together(
            session.ranks,
            session.config.probe.protocol,
            session.state.online.encoder,
            test=test,
            views=session.config.views,
            device=session.device,
            dtype=session.state.recipe.views_dtype,
        )
        # Six digits: the last ones depend on the number of threads, and a resumed run may have
        # others.
        rank = float(f"{result['rank']:.6g}")
        return _Measured(float(result["accuracy"]), rank, int(result["num_test"]))

    def _save(self, progress: Progress, announce: Callable[[], None] = lambda: None) -> None:
        """Let a checkpoint be written that goes with the records; then ``announce``.

        No other kind than a good one is written, and one that all ranks have.
        """
        session = self.session
        self.telemetry.flush()
        self._refuse_to_skip_on()
        self._refuse_differing(progress)
        self.alarm.restart()
        if session.folder is None:
            return
        meta = {**session.repeated, **asdict(progress), "telemetry": self.telemetry.written}
        self.saver.save(
            session.state.tensors(),
            partial(self._write, session.folder, progress.step, meta),
            announce,
            is_first=checkpoint.newest_step(session.folder.checkpoints) is None,
        )

    def _write(
        self, folder: RunFolder, step: int, meta: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write the checkpoint of ``step``, after the records: the work of the saver's thread."""
        if (name := guards.not_finite(tensors)) is not None:
            self._fail(f"step {step}: {name} holds NaN or infinity: not saved")
        self.telemetry.sync()
        folder.fence()
        checkpoint.save(
            folder.checkpoints,
            step=step,
            tensors=tensors,
            meta=meta,
            keep=self.session.config.run.keep_checkpoints,
            proceed=self.saver.proceed,
        )

    def _refuse_differing(self, progress: Progress) -> None:
        """Raise FastbyolError where the ranks have come to different weights."""
        difference, run = digest.differing(self.session.state), self.session.path
        if difference is not None:
            error = FastbyolError(
                f"{run}: step {progress.step}: {difference}, which a faulty device can do: not "
                "saved; go on from the last good checkpoint, elsewhere, with: fastbyol resume "
                f"{run}"
            )
            error.is_of_all = True
            raise error

    def _refuse_to_skip_on(self) -> None:
        """Raise FastbyolError after too many steps in a row without a finite gradient."""
        skipped, limit = self.telemetry.skipped_in_row, self.session.config.train.max_skipped_steps
        if skipped > limit:
            self._fail(
                f"{skipped} steps in a row had a gradient that is not finite "
                f"(train.max_skipped_steps: {limit})"
            )

    def _fail(self, what: str) -> NoReturn:
        """Raise FastbyolError about numbers that blew up, and say how to start again."""
        folder = self.session.folder
        good = None if folder is None else checkpoint.newest(folder.checkpoints)
        start = (
            f" from the last good checkpoint with `fastbyol train --init-from {quoted(good)}` and"
            if good
            else " with"
        )
        raise FastbyolError(
            f"{self.session.path}: {what}; start again{start} a lower optim.lr, or with "
            "train.precision = fp32"
        )

    def _stop_if_collapsed(self, progress: Progress, epoch: int) -> None:
        session = self.session
        if session.config.train.stop_on_collapse and progress.state in IN_COLLAPSE:
            self.saver.wait()
            error = CollapsedError(
                f"{session.path}: collapsed in epoch {epoch + 1} "
                f"(negative cosine {progress.epoch_means['neg_cos']:.4f}); saved at step "
                f"{progress.step}"
            )
            error.is_of_all = True
            raise error


class Pace:
    """A measure of images per second over the last stretch of steps, and of the seconds left."""

    def __init__(self, batch_size: int, step: int, total_steps: int) -> None:
        self._batch_size, self._total_steps = batch_size, total_steps
        self._mark, self._step = time.perf_counter(), step
        self._img_s = 0.0

    def update(self, step: int) -> tuple[float, float]:
        """Return images per second since the last update, and seconds left at that pace.

        The seconds are 0 if they are not known.
        """
        now = time.perf_counter()
        if step > self._step:
            self._img_s = (step - self._step) * self._batch_size / max(now - self._mark, 1e-9)
        self._mark, self._step = now, step
        left = (self._total_steps - step) * self._batch_size
        return self._img_s, left / self._img_s if self._img_s else 0.0

    def restart(self) -> None:
        """Leave out of the next figure the time since the last one (a probe, a checkpoint)."""
        self._mark = time.perf_counter()


class Alarm:
    """A clock that rings once, ``every_s`` seconds after ``restart``; never where that is None."""

    def __init__(self, every_s: float | None) -> None:
        self._every_s = every_s
        self.restart()

    def restart(self) -> None:
        """Set it to ring that much later."""
        self._at = math.inf if self._every_s is None else time.monotonic() + self._every_s

    def rings(self) -> bool:
        """Tell whether it rings now; then it is silent until ``restart``."""
        if time.monotonic() < self._at:
            return False
        self._at = math.inf
        return True


def _summary(
    folder: RunFolder, progress: Progress, session: Session | None, stopped_by: str | None
) -> Summary:
    begun = (folder.path / METRICS_FILE).exists()
    return Summary(
        run=str(folder.path),
        finished=session is not None and session.is_finished(progress),
        step=progress.step,
        epoch=0 if session is None else progress.step // session.steps_per_epoch,
        state=progress.state,
        accuracy=progress.accuracy,
        metrics=dict(progress.epoch_means),
        accuracies=Accuracies.of(read_events(folder.path) if begun else ()),
        stopped_by=stopped_by,
    )
