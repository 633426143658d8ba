"""A worker: it claims the first run of a folder that nobody has, trains it, and takes the next.

    python -m fastbyol.fleet.worker OPTIONS PARENT_PID

There is no dispatcher. The folder is all that workers share, a run's state is its own folder, and
a run goes on bit for bit, so a worker that dies costs the steps since the last checkpoint.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from fastbyol import config_io, output
from fastbyol.config import Resolved
from fastbyol.engine import interrupt, trainer
from fastbyol.engine.allocator import keep_freed_memory
from fastbyol.engine.device import pick_device
from fastbyol.engine.observer import EpochEnd, Start, StepReport
from fastbyol.engine.precision import choose_precision
from fastbyol.errors import FastbyolError, NoGraphError, UsageError, chain, quoted
from fastbyol.evaluation.intervals import accuracy_text
from fastbyol.files import DISK_ERRORS
from fastbyol.fleet import ledger
from fastbyol.fleet.claim import (
    BEATS,
    STALE_S,
    Claim,
    LostClaimError,
    Owner,
    Seen,
    Watch,
    acquire,
    claims_below,
    look,
    remove,
)
from fastbyol.fleet.ledger import LEDGER, Entry, Ledger
from fastbyol.loggers.observer import logged
from fastbyol.runs import checkpoint, inputs
from fastbyol.runs.folder import CONFIG, RunFolder
from fastbyol.runs.lock import InUseError
from fastbyol.show.screen import duration

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# As often in a row a run may end with its process, before it counts as failed: killed for its
# memory, for example. An attempt that saved something starts the count anew.
MOST_LOSSES = 10
TICK_S, POLL_S = 0.5, 2.0
# Nobody reads a sign more often.
SAY_S = 1.0
# A run that another process of this machine works on without a claim, such as `resume`.
IN_USE_S = 30.0
# A process that was killed drops its claim's lock first, and the run's so much later, at most.
DYING_S = 5.0
# When a worker that goes on in a fresh process was begun, by the monotonic clock.
_BEGAN = "FASTBYOL_WORKER_BEGAN"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a worker works. ``minutes``: after so many it saves and ends.

    ``waits``: whether it stays while others work on all that is left, to go on with theirs if they
    die; else it leaves as soon as it has seen that they live. After ``stale_s`` seconds without a
    sign of life another may have its run. ``job`` is a scheduler's name for it.
    """

    out: str
    minutes: float | None = None
    waits: bool = True
    stale_s: float = STALE_S
    job: str = ""


class FreshProcessError(FastbyolError):
    """A process that can do no more on its device; another goes on."""


class DiskError(FastbyolError):
    """A folder that cannot be written: a fault of no run, so the worker ends."""


class Pulse(threading.Thread):
    """Beside the training: signs of life, the time limit, and the request to stop.

    ``reason`` says why the worker ends, None while it goes on.
    """

    def __init__(self, options: Options, began: float) -> None:
        super().__init__(daemon=True, name="pulse")
        self._out, self._beat_s = Path(options.out), options.stale_s / BEATS
        self._until = None if options.minutes is None else began + 60.0 * options.minutes
        self._minutes = options.minutes
        self._ended = threading.Event()
        self._claim: Claim | None = None
        self._beaten = 0.0
        self.reason: str | None = None
        self.is_training = False

    def run(self) -> None:
        while not self._ended.wait(TICK_S):
            claim = self._claim
            if claim is not None and time.monotonic() - self._beaten >= self._beat_s:
                self._beaten = time.monotonic()
                with suppress(OSError):
                    claim.beat()
            if self.reason is None:
                if self._until is not None and time.monotonic() >= self._until:
                    self.reason = f"its {self._minutes:g} minutes are over"
                elif ledger.is_asked_to_stop(self._out):
                    self.reason = "asked by `fastbyol ablate stop`"
            if self.reason is not None and self.is_training:
                # Again and again: before it trains it has no ear for it, and the second is ignored.
                os.kill(os.getpid(), signal.SIGUSR1)

    def watch_over(self, claim: Claim | None) -> None:
        """Give signs for ``claim`` from now on."""
        self._beaten, self._claim = time.monotonic(), claim

    def end(self) -> None:
        """Stop."""
        self._ended.set()


class SignObserver:
    """The observer that puts a run's progress into its claim's sign."""

    def __init__(self, claim: Claim, name: str, tell: Tell) -> None:
        self._claim, self._name, self._tell = claim, name, tell
        self._last_s = 0.0

    def start(self, message: Start) -> None:
        """Say what begins."""
        if message.first_step:
            self._tell(f"{self._name}: goes on at step {message.first_step}")
        epoch = message.first_step // message.steps_per_epoch
        self._say(step=message.first_step, epoch=epoch, on=message.device)

    def progress(self, message: StepReport) -> None:
        """Say how far the run is."""
        if time.monotonic() - self._last_s >= SAY_S:
            measured = {"step": message.step, "img_s": message.img_s, "left_s": message.eta_s}
            self._say(**measured, state=message.state, neg_cos=message.metrics["neg_cos"])

    def epoch_end(self, message: EpochEnd) -> None:
        """Say what the epoch brought."""
        measured: dict[str, Any] = {
            "step": message.step, "img_s": message.img_s, "left_s": message.eta_s,
        }  # fmt: skip
        if message.accuracy is not None:
            measured |= {"accuracy": message.accuracy, "num_scored": message.num_scored}
        self._say(
            **measured, epoch=message.epoch + 1, state=message.state,
            neg_cos=message.metrics["neg_cos"],
        )  # fmt: skip

    def note(self, text: str) -> None:
        """Print a remark."""
        self._tell(f"{self._name}: {text}")

    def _say(self, **fields: Any) -> None:
        self._last_s = time.monotonic()
        with suppress(OSError):
            self._claim.say(**fields)


@dataclass
class Worker:
    """One worker on the folder ``options.out``; ``tell`` prints a line."""

    options: Options
    tell: Tell
    pulse: Pulse
    watch: Watch = field(default_factory=Watch)
    busy_until: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger(Path(self.options.out))
        options = self.options
        self.owner = Owner(options.stale_s, options.job)
        # The device that each run is for which cannot be trained here.
        self._others: dict[str, str] = {}
        self._kinds: dict[str, str | None] = {}

    def work(self) -> str | None:
        """Train until nothing is left to do, or something ends the worker; return what, or None.

        Raises DiskError where the folder cannot be written, FreshProcessError where this process
        can do no more.
        """
        is_waiting = False
        with interrupt.handling(self._note_signal, interrupt.signals_to_handle()):
            interrupt.let_in()
            while self.pulse.reason is None:
                try:
                    claimed = self._claim_next()
                except OSError as error:
                    raise DiskError(f"{self.options.out}: cannot claim: {error.strerror}") from None
                if isinstance(claimed, list):
                    if not claimed or self._may_leave(claimed):
                        self._tell_of_others()
                        return None
                    if not is_waiting:
                        self.tell(f"waits for runs of other workers: {len(claimed)}")
                    is_waiting = True
                    time.sleep(min(POLL_S, self.options.stale_s / 4))
                    continue
                is_waiting = False
                self._train(*claimed)
        return self.pulse.reason

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self.pulse.reason is None:
            self.pulse.reason = signal.Signals(number).name
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _may_leave(self, others: Sequence[Seen | None]) -> bool:
        """Return whether all that is left is in the hands of workers that are alive.

        None stands for a run that waits for another one or is in use.
        """
        seen = [other for other in others if other is not None]
        return not self.options.waits and all(map(self.watch.has_seen_alive, seen))

    def _claim_next(self) -> tuple[Entry, Claim] | list[Seen | None]:
        """Claim the first run that is neither done nor in other hands.

        Without one return what the runs that are left wait for: others' claims.
        """
        others: list[Seen | None] = []
        claims = claims_below(Path(self.options.out) / LEDGER)
        entries = self.ledger.entries()
        status = {entry.key: entry.status for entry in entries}
        self._others = {
            entry.key: device
            for entry in entries
            if entry.status not in ("done", "failed") and (device := self._other_device(entry))
        }
        for entry in entries:
            number = claims.get(entry.stem, 0)
            if entry.status in ("done", "failed"):
                if number and entry.tells_end_of(number):
                    remove(look(entry.stem, number).path)  # its owner was killed before it did
                continue
            if entry.key in self._others or entry.after in self._others:
                continue
            seen = look(entry.stem, number) if number else None
            if (
                seen is not None
                and not entry.tells_end_of(number)
                and not self.watch.is_dead(seen, self.options.stale_s)
            ):
                others.append(seen)
            elif self.busy_until.get(entry.key, 0.0) > time.monotonic() or (
                entry.after is not None and status.get(entry.after) not in ("done", "failed", None)
            ):
                others.append(None)
            elif claimed := self._claim(entry, max(number, entry.claimed)):
                return claimed
            else:
                others.append(None)  # another was faster
        return others

    def _other_device(self, entry: Entry) -> str | None:
        """Return the device that the run is for, or the kind that it was begun on; None if here."""
        device = entry.row["device"]
        if device not in self._kinds:
            try:
                self._kinds[device] = pick_device(device).type
            except UsageError:
                self._kinds[device] = None
        here = self._kinds[device]
        begun = {attempt["device"] for attempt in entry.attempts}
        if here is None:
            return str(device)
        return None if not begun or here in begun else str(begun.pop())

    def _tell_of_others(self) -> None:
        """Say which runs are left because this machine has not their device."""
        if self._others:
            devices = ", ".join(sorted(set(self._others.values())))
            self.tell(f"leaves {len(self._others)} runs for a machine with their device: {devices}")

    def _claim(self, entry: Entry, last: int) -> tuple[Entry, Claim] | None:
        claim = acquire(entry.stem, last, self.owner)
        if claim is None:
            return None
        # Another may have trained it to its end since it was read.
        now = self.ledger.entry(entry.key)
        if now is None or now.status in ("done", "failed") or now.claimed >= claim.number:
            claim.release()
            return None
        return now, claim

    def _train(self, entry: Entry, claim: Claim) -> None:
        """Train a run that this worker has claimed, and write down what became of it."""
        self.pulse.watch_over(claim)
        began = time.monotonic()
        try:
            entry = self._begun(entry, claim)
            if entry.status == "failed":
                return
            how = self._result(entry, claim)
            self._end(entry, claim, how, time.monotonic() - began)
        except LostClaimError as error:
            self.tell(f"{entry.name}: {error}")
        finally:
            self.pulse.watch_over(None)
            claim.close()

    def _begun(self, entry: Entry, claim: Claim) -> Entry:
        """Write down that an attempt begins, unless there were too many; return the entry now."""
        step = checkpoint.newest_step(entry.path / "checkpoints") or 0
        attempts = list(entry.attempts)
        if entry.is_open:
            attempts[-1] = {**attempts[-1], "ended": ledger.now(), "how": "lost"}
        attempt = {
            "claim": claim.number, "worker": self.owner.name, "job": self.owner.job,
            "device": pick_device(entry.row["device"]).type, "began": ledger.now(),
            "from_step": step,
        }  # fmt: skip
        entry = entry.with_row(claimed=claim.number, attempts=[*attempts, attempt])
        losses = 0
        for before in reversed(attempts):
            if before["how"] != "lost" or before["from_step"] != step:
                break
            losses += 1
        why = None
        if losses >= MOST_LOSSES:
            why = f"its process was killed {losses} times at step {step}: see whether memory lasts"
        elif entry.after is not None:
            source = self.ledger.entry(entry.after)
            if source is None or source.status == "failed":
                why = f"the run whose rates it replays failed: {entry.after}"
        if why is not None:
            return self._end(entry, claim, {"error": why}, 0.0)
        self._write(entry.with_row(status="stopped"), claim)
        return entry

    def _result(self, entry: Entry, claim: Claim) -> dict[str, Any]:
        """Train the run or go on with it; return its summary, ``error``, ``again`` or ``stopped``.

        ``again``: why another process must go on. ``disk``: why nobody can.
        """
        observer = SignObserver(claim, entry.name, self.tell)
        try:
            asked = entry.config()
            if pick_device(asked.train.device).type == "cpu":
                # One a worker: that fills the cores best, and has the same bits on any machine.
                torch.set_num_threads(1)
            with self._free_folder(entry, asked, observer) as folder:
                folder.fence = claim.check
                # The files of a run that goes on may have been moved: they are where it was asked
                # for now.
                config = inputs.with_paths(folder.config, asked)
                self.pulse.is_training = True
                with logged(folder.path, config, observer) as watching:
                    return asdict(trainer.fit(folder, config, watching))
        except LostClaimError:
            raise
        except InUseError:
            self.busy_until[entry.key] = time.monotonic() + IN_USE_S
            return {"stopped": "in use by a process without a claim"}
        except NoGraphError as error:
            return {"again": str(error)}
        except FastbyolError as error:
            return {"disk" if _is_of_disk(error) else "error": str(error)}
        except KeyboardInterrupt:
            self.pulse.reason = self.pulse.reason or "SIGINT"
            return {"stopped": "SIGINT"}
        except Exception as error:  # one run's fault must not cost the others
            traceback.print_exc()
            return {
                "error": f"{type(error).__name__}: {error}",
                "again": "after an unexpected error",
            }
        finally:
            self.pulse.is_training = False
            gc.collect()

    def _free_folder(self, entry: Entry, asked: Resolved, observer: SignObserver) -> RunFolder:
        """Return the run's folder, for which a dying process is waited."""
        until = time.monotonic() + DYING_S
        while True:
            try:
                return self._folder(entry, asked, observer)
            except InUseError:
                if time.monotonic() >= until or self.pulse.reason is not None:
                    raise
                time.sleep(TICK_S / 5)

    def _folder(self, entry: Entry, asked: Resolved, observer: SignObserver) -> RunFolder:
        if (entry.path / CONFIG).is_file():
            return RunFolder.open(entry.path, lock=True)
        config = choose_precision(asked, observer.note)
        origin = config_io.origins(entry.row["config"])
        return RunFolder.create(entry.path, inputs.with_paths(config, config), origin)

    def _end(self, entry: Entry, claim: Claim, result: Mapping[str, Any], seconds: float) -> Entry:
        """Write down how an attempt ended, release the claim, and tell.

        Raises DiskError or FreshProcessError if the worker cannot go on.
        """
        step = checkpoint.newest_step(entry.path / "checkpoints") or 0
        fields: dict[str, Any] = {"status": "stopped", "step": step}
        if "error" in result:
            how, what = "failed", f"failed: {result['error']}"
            fields |= {"status": "failed", "error": result["error"]}
        elif result.get("finished"):
            how = "done"
            kept = {key: result[key] for key in ("step", "state", "accuracy")}
            kept["num_scored"] = scored = result["accuracies"]["num_scored"]
            fields |= {"status": "done", "error": None, **kept}
            accuracy = kept["accuracy"]
            shown = "" if accuracy is None else f", {accuracy_text(accuracy, scored)}"
            what = f"done, {kept['state']}{shown}"
        else:
            if "finished" in result and self.pulse.reason is None:
                self.pulse.reason = result["stopped_by"]
            why = result.get("disk") or result.get("again") or result.get("stopped")
            how = str(why or self.pulse.reason)
            what = f"stopped: {how}: " + (f"saved at step {step}" if step else "no step is saved")
        attempts = list(entry.attempts)
        attempts[-1] = {
            **attempts[-1], "ended": ledger.now(), "how": how, "step": step,
            "seconds": round(seconds, 1),
        }  # fmt: skip
        total = round(entry.row.get("seconds", 0.0) + seconds, 1)
        entry = entry.with_row(**fields, attempts=attempts, seconds=total)
        self._write(entry, claim, what)
        claim.release()
        self.tell(f"{entry.name}: {what}, {duration(seconds)}; {self._share()}")
        if "disk" in result:
            raise DiskError(result["disk"])
        if "again" in result:
            raise FreshProcessError(result["again"])
        return entry

    def _write(self, entry: Entry, claim: Claim, what: str = "stopped") -> None:
        """Write the ledger file; where that cannot be done, say so in the claim's sign."""
        claim.check()
        try:
            entry.write()
        except FastbyolError as error:
            with suppress(OSError):
                claim.say(ended=f"{what}; {error}")
            raise DiskError(str(error)) from None

    def _share(self) -> str:
        entries = self.ledger.entries()
        return f"{sum(entry.status == 'done' for entry in entries)} of {len(entries)} done"


def _is_of_disk(error: BaseException) -> bool:
    """Return whether ``error`` came of a file system that is full or fails."""
    return any(isinstance(why, OSError) and why.errno in DISK_ERRORS for why in chain(error))


def work(options: Options, tell: Tell) -> str | None:
    """Work on a folder until nothing is left; return what ended the worker before, or None.

    Raises UsageError for a folder where nothing was asked for, and DiskError where it cannot be
    written. Where a fresh process has to go on, this one becomes it.
    """
    out = Path(options.out)
    ledger.demand(out)
    began = float(os.environ.pop(_BEGAN, time.monotonic()))
    pulse = Pulse(options, began)
    pulse.start()
    worker = Worker(options, tell, pulse)
    try:
        if ledger.is_asked_to_stop(out):
            undo = f"fastbyol ablate stop {quoted(out)} --undo"
            return f"asked by `fastbyol ablate stop`; `{undo}` takes it back"
        reason = worker.work()
    except FreshProcessError as error:
        tell(f"goes on in a fresh process: {error}")
        pulse.end()
        _become_fresh(began)
    finally:
        pulse.end()
    return reason


def _become_fresh(began: float) -> NoReturn:
    os.environ[_BEGAN] = repr(began)
    sys.stdout.flush()
    sys.stderr.flush()
    with interrupt.held_back():  # the new program has no handlers yet
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _end_with_parent(parent: int) -> None:
    """Ask Linux for SIGTERM when the parent dies, so that the run is saved."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the request
        sys.exit(1)


def main() -> None:
    """Work as the options in JSON say, for the process that started this one."""
    _end_with_parent(int(sys.argv[2]))
    keep_freed_memory()
    with output.guarded():  # a log on a full disk ends no run
        try:
            reason = work(Options(**json.loads(sys.argv[1])), output.say)
        except FastbyolError as error:
            output.say(f"fastbyol: error: {error}", err=True)
            output.say(f"worker {os.getpid()} ends: {error}")
            sys.exit(2)
        if reason is not None:
            output.say(f"worker {os.getpid()} ends: {reason}")


if __name__ == "__main__":
    main()
