"""Comparison of a run's files with what the run wrote: config.toml, metrics.jsonl, layers.npy.

env.json contains the first configuration; a checkpoint contains its own, and digests of the
records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.config import Config
from fastbyol.errors import UsageError
from fastbyol.files import open_regular
from fastbyol.runs import layers, metrics
from fastbyol.runs.durable import Written

# Keys that may change between two stretches of a run: none of its numbers depends on them.
FREE = frozenset(
    (
        *("data.cache", "data.workers", "train.max_skipped_steps"),
        *("run.checkpoint_every_steps", "run.checkpoint_every_s"),
        *("run.drain_every_steps", "run.keep_checkpoints"),
        *("log.to", "log.project", "log.layers_every_steps", "log.pictures", "log.wait_s"),
    )
)
_HEADER_BYTES = 100_000_000  # the most that safetensors allows


def changed(
    run: Path, config: Config, recorded: str, where: str, *, paths: bool = False
) -> str | None:
    """Return a message about the first key of ``config`` that differs from ``recorded``, or None.

    ``recorded`` is the text of a config.toml, found in ``where``. Keys of ``FREE`` do not count,
    nor without ``paths`` do paths of data, which are pinned by content (``inputs``).
    Raises UsageError where ``recorded`` is damaged.
    """
    now, then = config_io.flatten(config), config_io.flatten(config_io.parse(recorded, where))
    for key in now:
        if (
            now[key] != then[key]
            and key not in FREE
            and (paths or not _is_path(key, now[key], then[key]))
        ):
            return (
                f"{run / 'config.toml'}: {key} is {_shown(now[key])}, the run was made with "
                f"{_shown(then[key])}"
            )
    return None


def refuse_changed(
    run: Path, config: Config, recorded: str, where: str, *, paths: bool = False
) -> None:
    """Raise UsageError where ``changed`` finds a key."""
    change = changed(run, config, recorded, where, paths=paths)
    if change:
        raise UsageError(
            f"{change}: put it back, or start another run from these weights with `fastbyol train "
            f"--init-from {run}`"
        )


def damage(folder: Path, written: Mapping[str, Sequence[Any]]) -> str | None:
    """Return a message about the first file that has changed since it was recorded, or None.

    ``written`` is ``Telemetry.written`` of that time.
    """
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
    """Yield messages about changed files. ``made_with`` is env.json's ``config``."""
    try:
        if isinstance(made_with, str) and (
            change := changed(run, config, made_with, str(run / "env.json"))
        ):
            yield change
    except UsageError as error:
        yield str(error)
    try:
        if change := damage(run, last_meta(run / "checkpoints")["telemetry"]):
            yield change
    except (LookupError, TypeError):  # no checkpoint, or a damaged one: loading it says so
        return


def last_meta(checkpoints: Path) -> dict[str, Any]:
    """Return ``meta`` of the newest checkpoint in a folder, empty where it cannot be read."""
    return meta_of(
        max(checkpoints.glob("ckpt-*.safetensors"), default=checkpoints)
    )  # names are padded with zeros


def meta_of(path: Path) -> dict[str, Any]:
    """Return ``meta`` of one checkpoint without torch, empty where it cannot be read."""
    meta = _header_of(path).get("meta")
    return meta if isinstance(meta, dict) else {}


def digest_of(path: Path) -> str | None:
    """Return the digest that one checkpoint says it has, None where it cannot be read."""
    digest = _header_of(path).get("digest")
    return digest if isinstance(digest, str) else None


def _header_of(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _HEADER_BYTES)))
        record = json.loads(header["__metadata__"]["fastbyol"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_path(key: str, *values: object) -> bool:
    """Return whether the key's values are only paths of files."""
    return key in ("data.train", "data.test") or (
        key == "optim.replay_rates" and None not in values
    )


def _shown(value: object) -> str:
    return "not set" if value is None else config_io.show(value)
