"""Forks: new runs that begin as exact copies of another run at a saved step.

env.json of a fork names its parent, the step and the changes, so that the same command goes on
with it. Its records are the parent's up to that step: the parent may be deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.config import Resolved
from fastbyol.errors import UsageError, quoted
from fastbyol.files import open_regular
from fastbyol.runs import consistency, layers, metrics
from fastbyol.runs.consistency import FREE
from fastbyol.runs.durable import Written, writing
from fastbyol.runs.environment import env_of
from fastbyol.runs.folder import CHECKPOINTS, CONFIG, FORK, RunFolder
from fastbyol.runs.inputs import absolute
from fastbyol.runs.lock import LOCK, Lock

_TENSORS = "the saved tensors are of that network"
_IMAGES = "the run's steps and accuracies are of those images"
_STEP = "a step would mean something else than before"
_RESOLVED = "it makes optim.lr and optim.weight_decay of a new run: set those"
# Why a fork cannot change a key or the keys of a section, None where it can. The longest name
# counts; those of consistency.FREE may change in any run.
REASONS: Mapping[str, str | None] = {
    "preset": "it is only the name of where a new run's values come from",
    "data": _IMAGES,
    "views": None,
    "views.size": _STEP,
    "model": _TENSORS,
    "method.name": _STEP,
    "method.temperature": None,
    "method.queue": _TENSORS,
    "optim": None,
    **dict.fromkeys(
        (
            *("optim.sgd_lr", "optim.sgd_weight_decay", "optim.lars_lr"),
            *("optim.lars_weight_decay", "optim.lr_scaling"),
        ),
        _RESOLVED,
    ),
    "schedule": None,
    "train.epochs": None,
    "train.batch_size": _STEP,
    "train.ranks": "with other shares of a batch the numbers round otherwise",
    "train.seed": None,
    "train.precision": "in another precision the numbers round otherwise",
    "train.device": None,
    "train.init_from": "the run's first weights are long trained on",
    "train.loss_scale": None,
    "train.stop_on_collapse": None,
    "train.end_in": None,
    "engine": None,
    "probe": None,
    "run.layers_every_steps": "layers.npy has one spacing of steps",
    "log": None,
}


@dataclass(frozen=True)
class Fork:
    """The origin of a fork: its parent's absolute path, the step, and the checkpoint's digest.

    ``changes`` are the changed keys' values as JSON has them.
    """

    run: str
    step: int
    digest: str
    changes: Mapping[str, Any]

    @staticmethod
    def read(run: Path) -> Fork | None:
        """Return the origin of the run in a folder; None for a run that is no fork, or damaged."""
        record = env_of(run).get(FORK)
        if not isinstance(record, dict) or record.keys() != Fork.__dataclass_fields__.keys():
            return None
        fork = Fork(**record)
        kinds = (fork.run, str), (fork.step, int), (fork.digest, str), (fork.changes, dict)
        return fork if all(isinstance(value, kind) for value, kind in kinds) else None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """A fork that was asked for: of the run in ``parent`` at ``step``, with the new ``config``.

    ``changes`` are the values that differ from the parent's. ``notes`` are remarks for the user.
    """

    parent: Path
    step: int
    config: Resolved
    origin: Mapping[str, str]
    changes: Mapping[str, object]
    notes: tuple[str, ...]

    @property
    def source(self) -> str:
        """The parent and the step as one types them."""
        return f"{self.parent}@{self.step}"


def plan(parent: Path, step: int, sets: Sequence[str]) -> Plan:
    """Return the fork of the run in ``parent`` at ``step`` with ``key=value`` texts over it.

    Raises UsageError where there is no run, or for a key that a fork cannot change.
    """
    with RunFolder.open(parent, lock=False) as folder:
        before, origin = folder.config, config_io.origins(folder.config_text)
    loaded = config_io.revise(before, sets, str(parent))
    was, now = config_io.flatten(before), config_io.flatten(loaded.config)
    changes = {key: now[key] for key in now if now[key] != was[key]}
    # A new run's lr_scaling leaves no trace in what is resolved, but another optim.lr.
    asked = config_io.requested(sets=sets)
    for key in (*(key for key in asked if asked[key].value != was[key]), *changes):
        if why := reason_against(key):
            raise UsageError(
                f"{key}: a fork cannot change it: {why}; start a new run from these weights with "
                f"`fastbyol train --init-from {quoted(checkpoint_file(parent, step))}`"
            )
    optim, notes = loaded.config.optim, loaded.notes
    if "optim.name" in changes and "optim.lr" not in changes:
        notes += (
            f"optim.name is {optim.name} from step {step} on, with the run's optim.lr = "
            f"{optim.lr:g} and optim.weight_decay = {optim.weight_decay:g}",
        )
    return Plan(parent, step, loaded.config, origin | dict.fromkeys(changes, FORK), changes, notes)


def reason_against(key: str) -> str | None:
    """Return why a fork cannot change ``key``, or None if it can."""
    if key in FREE:
        return None
    return REASONS[key] if key in REASONS else REASONS[key.partition(".")[0]]


def checkpoint_file(run: Path, step: int) -> Path:
    """Return the name of a run's checkpoint, as ``checkpoint.file_of`` does with torch."""
    return run / CHECKPOINTS / f"ckpt-{step:09d}.safetensors"


def is_begun(asked: Plan, out: Path) -> bool:
    """Return whether ``out`` has this very fork already; if not, a run can be made there.

    Raises UsageError where ``out`` is in use.
    """
    if not (out / CONFIG).exists():
        try:
            other = next((entry.name for entry in out.iterdir()), "") if out.exists() else ""
        except OSError as error:
            raise UsageError(
                f"{out}: cannot make a run folder here: {error.strerror}; name another with --out"
            ) from None
        if other:
            raise UsageError(
                f"{out}: is not empty ({other}): move that away, or name another folder with --out"
            )
        return False
    made = Fork.read(out)
    if made is None:
        raise UsageError(f"{out}: holds another run: name another folder with --out")
    # The parent may have gone on, and pruned the checkpoint.
    digest = consistency.digest_of(checkpoint_file(asked.parent, asked.step)) or made.digest
    if made != Fork(absolute(asked.parent), asked.step, digest, _as_json(asked.changes)):
        raise UsageError(
            f"{out}: holds another fork, of {made.run}@{made.step} with "
            f"{config_io.show(', '.join(made.changes) or 'no changes')}: name another folder with "
            "--out"
        )
    return True


def origin_of(asked: Plan, digest: str) -> Fork:
    """Return the record of a fork from the checkpoint with ``digest``."""
    return Fork(absolute(asked.parent), asked.step, digest, _as_json(asked.changes))


def _as_json(changes: Mapping[str, object]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(changes))
    return values


@contextmanager
def building(out: Path, config: Resolved, origin: Mapping[str, str]) -> Iterator[RunFolder]:
    """Make a run folder beside ``out``, let the caller fill it, and rename it to ``out``.

    A kill leaves at most that hidden folder, whose content the next call for ``out`` removes; an
    error removes it. Raises UsageError if another process makes it now, or the disk refuses.
    """
    beside = out.with_name(f".{out.name}.building")
    with writing(out, "; name another folder with --out"):
        beside.mkdir(parents=True, exist_ok=True)
        _clear(beside)
    folder = None
    try:
        folder = RunFolder.create(beside, config, origin)
        yield folder
        with writing(out, "; name another folder with --out"):
            folder.move(out)
    except BaseException:
        if folder is not None:
            folder.close()
        if beside.exists():
            # Unless another process is faster: then it is that one's.
            with suppress(UsageError, OSError):
                _clear(beside, remove=True)
        raise


def _clear(folder: Path, *, remove: bool = False) -> None:
    """Remove what a dead process left in ``folder``, never what a living one has there.

    With ``remove`` the folder goes, too.
    """
    lock = Lock(folder)
    try:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        if remove:
            shutil.rmtree(folder)
    finally:
        lock.release()


def copy_records(
    parent: Path, written: Mapping[str, Sequence[Any]], out: Path, *, ends: bool
) -> dict[str, list[Any]]:
    """Write the parent's records, cut to what a checkpoint says was ``written``, into ``out``.

    With ``ends`` False an event ``end`` at their end is left out, because the fork goes on. Returns
    the new records, as ``Telemetry.written``. Raises UsageError where the parent's are damaged.
    """
    if problem := consistency.damage(parent, written):
        raise UsageError(f"{problem}: fork from another step")
    num_bytes, _ = written[metrics.METRICS_FILE]
    try:
        with open_regular(parent / metrics.METRICS_FILE) as file:
            content = file.read(num_bytes)
    except OSError as error:
        raise UsageError(
            f"{parent / metrics.METRICS_FILE}: cannot read: {error.strerror}"
        ) from None
    lines = content.splitlines(keepends=True)
    if not ends and lines and lines[-1].startswith(b'{"event": "end"'):
        content = b"".join(lines[:-1])
    with writing(out / metrics.METRICS_FILE), (out / metrics.METRICS_FILE).open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
    return {
        metrics.METRICS_FILE: list(Written.of(content)),
        layers.LAYERS_FILE: list(layers.copy(parent, layers.record_of(written)[0], out)),
    }
