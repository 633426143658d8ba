"""The runs that lie in a folder already, compared with those that are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal

from fastbyol import config_io
from fastbyol.config import DataConfig, Resolved
from fastbyol.data import beton
from fastbyol.data.contents import Contents
from fastbyol.data.embedded import BUILT_IN, file_of
from fastbyol.data.sources import is_path
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.fleet.asking import FolderStatus
from fastbyol.fleet.survey import is_done
from fastbyol.runs import inputs
from fastbyol.runs.consistency import FREE
from fastbyol.runs.folder import RunFolder

_FILES: dict[str, Literal["train", "test"]] = {"data.train": "train", "data.test": "test"}


def status(path: Path, config: Resolved) -> FolderStatus:
    """Return how far the run in ``path`` is that is to have ``config``.

    Raises UsageError if its folder holds a run of another configuration.
    """
    if not (path / "config.toml").is_file():
        return "new"
    with RunFolder.open(path, lock=False) as folder:
        _refuse_other(path, config, folder.config)
    return "done" if is_done(path, config.train.epochs) else "stopped"


def refuse_other_data(asked: Iterable[DataConfig], runs: Iterable[Path], out: Path) -> None:
    """Raise UsageError if one of ``runs``, which lie in ``out``, is on other images than asked."""
    wanted = tuple(asked)
    for path in runs:
        try:
            there = config_io.read_run(path / "config.toml").data
        except FastbyolError:
            continue  # whoever reads the results names it, and leaves it out
        for data in wanted:
            limits = (data.limit, data.test_limit) == (there.limit, there.test_limit)
            if not limits or not all(
                _same_file(path, name, data, there) for name in ("train", "test")
            ):
                raise UsageError(
                    f"{out}: holds runs on other images, such as {path} on {there.train}: name "
                    "another folder with --out"
                )


def _same_file(
    run: Path, name: Literal["train", "test"], asked: DataConfig, there: DataConfig
) -> bool:
    """Return whether the file asked for holds the run's images.

    If those were not pinned, return whether it is the same file.
    """
    wanted, made = getattr(asked, name), getattr(there, name)
    pinned = inputs.of_run(run)
    if wanted is None or wanted in BUILT_IN or pinned is None:
        return _comparable(f"data.{name}", wanted) == _comparable(f"data.{name}", made)
    file, then = file_of(wanted, name, asked), pinned.train if name == "train" else pinned.test
    return then == _contents(
        file, asked.image_field, asked.label_field, file.stat().st_mtime_ns if file.exists() else 0
    )


@lru_cache(maxsize=4)
def _contents(
    file: Path, image_field: str | None, label_field: str | None, written_ns: int
) -> Contents:
    """Look into ``file``, which was last written at ``written_ns``, once for all runs."""
    return Contents.of(
        beton.inspect(file, image_field=image_field, label_field=label_field, may_lack_labels=True)
    )


def _refuse_other(path: Path, config: Resolved, there: Resolved) -> None:
    wanted, made = config_io.flatten(config), config_io.flatten(there)
    for key in wanted:
        if key == "train.precision" and wanted[key] == "auto":
            continue  # the run has chosen for its device
        same = _comparable(key, wanted[key]) == _comparable(key, made[key])
        if name := _FILES.get(key):
            same, named_alike = _same_file(path, name, config.data, there.data), same
            if named_alike and not same:
                raise UsageError(
                    f"{wanted[key]}: holds other data than when {path} was made: put it back, "
                    "or name another folder "
                    "with --out"
                )
        if key not in FREE and not same:
            raise UsageError(
                f"{path}: holds a run with {key} = {config_io.show(made[key])}, asked for is "
                f"{config_io.show(wanted[key])}: name another folder with --out, or remove this one"
            )


def _comparable(key: str, value: object) -> object:
    """Return ``value`` in the form in which it is compared.

    The path of another run is cut to its last two parts, ARM and seed, because folders move.
    """
    if not isinstance(value, str):
        return value
    if key == "optim.replay_rates":
        return Path(value).parts[-2:]
    return (
        str(Path(value).resolve())
        if key in ("data.train", "data.test") and is_path(value)
        else value
    )
