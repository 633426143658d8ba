"""The arms, which are runs that claims are about: settings over those of a scale.

Both lie in ``configs/ablations``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fastbyol import config_io
from fastbyol.ablations.claims import CLAIMS
from fastbyol.config_io import Flag, Loaded
from fastbyol.errors import UsageError, check_choice, nearest

ScaleName = Literal["full", "short", "long", "mini"]
SCALES: tuple[ScaleName, ...] = ("full", "short", "long", "mini")
USUAL: tuple[ScaleName, ...] = ("full", "short", "mini")


@dataclass(frozen=True)
class Arm:
    """One arm, with all its ``settings`` by dotted key.

    Of NAME@WHAT the ``base`` is NAME, and ``changes`` are the settings that differ from it. ``at``
    has further settings by scale. ``rates_of`` is the arm whose rates this one replays.
    """

    name: str
    about: str
    base: str | None
    settings: Mapping[str, object]
    changes: Mapping[str, object]
    at: Mapping[str, Mapping[str, object]]
    scales: tuple[ScaleName, ...]
    rates_of: str | None

    @property
    def claims(self) -> tuple[str, ...]:
        """Ids of the claims of which this is an arm, a control or an open reading."""
        name = self.base or self.name
        return tuple(claim.id for claim in CLAIMS if name in (*claim.arms, *claim.controls))


@cache
def arms() -> Mapping[str, Arm]:
    """Return every arm by name, in the order of ``arms.toml``."""
    tables = tomllib.loads(_file("arms").read_text("utf-8"))
    return MappingProxyType({name: _arm(name, tables) for name in tables})


def arm(name: str) -> Arm:
    """Return the arm ``name``. Raises UsageError, with the nearest names, if there is none."""
    if name not in arms():
        near = nearest(name, arms(), most=3)
        raise UsageError(
            f"{name}: no such arm{'; nearest: ' + ', '.join(near) if near else ''}; see `fastbyol "
            "ablate list`"
        )
    return arms()[name]


def load(
    chosen: Arm,
    scale: ScaleName,
    *,
    seed: int,
    sets: Sequence[str] = (),
    flags: Mapping[str, Flag] | None = None,
) -> Loaded:
    """Return the configuration of an arm's run.

    Weakest first: the preset of ``scale``, its file, ``sets``, the arm's own settings, ``flags``.
    So ``sets`` cannot turn an arm into another, but can change what the arm sets for this scale
    alone. Raises UsageError as ``config_io.load`` does.
    """
    check_choice("scale", scale, SCALES)
    changed = config_io.requested(sets=sets)
    here = {key: value for key, value in chosen.at.get(scale, {}).items() if key not in changed}
    own = {
        key: Flag(f"arm {chosen.name}", value) for key, value in {**chosen.settings, **here}.items()
    }
    strongest = {**own, "train.seed": Flag("seed", seed), **(flags or {})}
    return config_io.load(file=_file(scale), sets=sets, flags=strongest)


def _arm(name: str, tables: Mapping[str, Mapping[str, Any]]) -> Arm:
    table = tables[name]
    base = name.partition("@")[0] if "@" in name else None
    changes = config_io.flatten_table(table["set"])
    under = _arm(base, tables) if base else None
    at = table.get("at", {}).items()
    own = {scale: config_io.flatten_table(settings) for scale, settings in at}
    return Arm(
        name=name,
        about=str(table["about"]),
        base=base,
        settings=MappingProxyType({**(under.settings if under else {}), **changes}),
        changes=MappingProxyType(changes),
        at={
            scale: {**(under.at.get(scale, {}) if under else {}), **own.get(scale, {})}
            for scale in SCALES
        },
        scales=tuple(table.get("scales", USUAL)),
        rates_of=table.get("rates_of"),
    )


def _file(name: str) -> Path:
    return config_io.config_folder() / "ablations" / f"{name}.toml"
