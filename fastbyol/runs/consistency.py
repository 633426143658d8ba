"""Whether a run's files still are what the run wrote: its configuration, metrics.jsonl, layers.npy.

Checkpoints hold the configuration and digests of both records as they were when it was saved; env.json holds the configuration
from the start. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.config import Config, resolve
from fastbyol.errors import UsageError
from fastbyol.files import open_regular
from fastbyol.runs import layers, metrics
from fastbyol.runs.durable import Written

# What may change between two stretches of a run: no number of it depends on these.
FREE = frozenset(
    (
        *("data.cache", "data.workers", "train.max_skipped_steps"),
        *("run.checkpoint_every_steps", "run.drain_every_steps", "run.keep_checkpoints"),
    )
)
_HEADER_BYTES = 100_000_000  # the most that safetensors allows


def changed(run: Path, config: Config, recorded: str, where: str, *, paths: bool = False) -> str | None:
    """Which key of the run's ``config`` is not what ``recorded``, a config.toml kept in ``where``, says; None where all are.

    Keys of ``FREE`` do not count. Without ``paths`` nor do those that say where data lie, which are pinned by content
    (``engine.inputs``). Raises UsageError where ``recorded`` is damaged itself.
    """
    now, then = config_io.flatten(config), config_io.flatten(resolve(config_io.parse(recorded, where)))
    for key in now:
        if now[key] != then[key] and key not in FREE and (paths or not _is_path(key, now[key], then[key])):
            return f"{run / 'config.toml'}: {key} is {_shown(now[key])}, the run was made with {_shown(then[key])}"
    return None


def refuse_changed(run: Path, config: Config, recorded: str, where: str, *, paths: bool = False) -> None:
    """Raise UsageError where ``changed`` finds a key."""
    change = changed(run, config, recorded, where, paths=paths)
    if change:
        raise UsageError(
            f"{change}: put it back, or start another run from these weights with `fastbyol train --init-from {run}`"
        )


def damage(folder: Path, written: Mapping[str, Sequence[Any]]) -> str | None:
    """What of ``Telemetry.written`` is no longer in the run's files as it was; None where all is."""
    records = (
        (folder / metrics.METRICS_FILE, metrics.is_whole, written[metrics.METRICS_FILE]),
        (layers.recorded_file(folder), layers.is_whole, layers.record_of(written)),
    )
    for path, is_whole, record in records:
        try:
            whole = is_whole(folder, Written(*record))
        except OSError as error:
            return f"{path}: cannot read: {error.strerror}"
        if not whole:
            return f"{path}: is not what was written: cut, changed or lost"
    return None


def changes(run: Path, config: Config, made_with: object) -> Iterator[str]:
    """What of the run's files is not as it was written, for commands that only read. ``made_with`` is env.json's ``config``."""
    try:
        if isinstance(made_with, str) and (change := changed(run, config, made_with, str(run / "env.json"))):
            yield change
    except UsageError as error:
        yield str(error)
    try:
        what = damage(run, last_meta(run / "checkpoints")["telemetry"])
    except (LookupError, TypeError):  # no checkpoint, or a damaged one, which whoever loads it will say
        return
    if what:
        yield what


def last_meta(checkpoints: Path) -> dict[str, Any]:
    """``meta`` of the newest checkpoint in a folder, from its header; empty where there is none that can be read."""
    return meta_of(max(checkpoints.glob("ckpt-*.safetensors"), default=checkpoints))  # names are padded with zeros


def meta_of(path: Path) -> dict[str, Any]:
    """``meta`` of one checkpoint, from its header; empty where it cannot be read."""
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _HEADER_BYTES)))
        meta = json.loads(header["__metadata__"]["fastbyol"])["meta"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _is_path(key: str, *values: object) -> bool:
    """Whether the key's values only say where something lies."""
    return key in ("data.train", "data.test") or (key == "optim.replay_rates" and None not in values)


def _shown(value: object) -> str:
    return "not set" if value is None else config_io.show(value)
