"""The differences between two configurations, key by key, with the origin of each value."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastbyol import config_io
from fastbyol.config import Resolved
from fastbyol.config_io import Loaded
from fastbyol.errors import UsageError, nearest
from fastbyol.runs.folder import RunFolder


class Difference(NamedTuple):
    """A key with two values, and the origin of each."""

    key: str
    a: object
    b: object
    a_origin: str
    b_origin: str


def named(name: str) -> Loaded:
    """Return the resolved configuration of a preset, a TOML file or a run folder.

    Raises UsageError, with the nearest preset, where ``name`` is none of these.
    """
    if name in config_io.presets():
        return config_io.load(preset=name)
    path = Path(name)
    if path.is_dir():
        with RunFolder.open(path, lock=False) as folder:
            origin = dict.fromkeys(config_io.flatten(folder.config), "the run") | config_io.origins(
                folder.config_text
            )
            return Loaded(folder.config, origin)
    if path.is_file():
        return config_io.load(file=path)
    near = nearest(name, config_io.presets(), least=0.0)[0]
    raise UsageError(
        f"{name}: no preset, configuration file or run folder of this name; the nearest preset is "
        f"{near}"
    )


def between(a: Loaded, b: Loaded) -> list[Difference]:
    """Return the keys, but for ``preset``, whose values differ, in the order of config.py."""
    left, right = config_io.flatten(a.config), config_io.flatten(b.config)
    return [
        Difference(key, left[key], right[key], a.origin[key], b.origin[key])
        for key in left
        if key != "preset" and left[key] != right[key]
    ]


def against_preset(config: Resolved) -> list[Difference]:
    """Return the differences of a run's configuration from the preset that it names."""
    base = config_io.load(preset=config.preset)
    return between(base, Loaded(config, dict.fromkeys(config_io.flatten(config), "the run")))


def text(value: object) -> str:
    """Return a value as TOML, ``none`` for a key that is absent."""
    return "none" if value is None else config_io.toml_value(value)
