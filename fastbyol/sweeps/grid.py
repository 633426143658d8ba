"""A grid: a TOML file that crosses values of configuration keys, and the runs that it means.

preset = "demo"              # demo, if none is named
seeds = 3                    # runs a point, from first_seed = 0 on

[optim]                      # settings of all points, as in a file of --config
name = "lars"

[grid]                       # what is crossed
"optim.lr" = [0.1, 0.2, 0.5]
"optim.weight_decay" = [0.0, 1.5e-6]
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fastbyol import config_io
from fastbyol.config import DataConfig, Resolved, derived
from fastbyol.config_io import Flag, Setting
from fastbyol.data.embedded import BUILT_IN
from fastbyol.errors import UsageError
from fastbyol.fleet import existing, ledger
from fastbyol.fleet.asking import FolderStatus
from fastbyol.fleet.ledger import CALLS, RUNS, Task
from fastbyol.runs import inputs
from fastbyol.runs.consistency import FREE
from fastbyol.sweeps.names import point_name

SCALE = "sweep"
DEFAULT_PRESET = "demo"
# A protection against mistakes: crossing grows quickly.
MOST_RUNS = 10_000
SEED = "train.seed"
# What a run may have of its own, beside the axes: how a grid calls its runs, and names of files,
# which are compared by content.
_NOT_COMPARED = FREE | {"preset", SEED, "data.train", "data.test"}

Values = Mapping[str, object]


@dataclass(frozen=True)
class Point:
    """One combination of values, by dotted key as the configuration has them, and its runs."""

    name: str
    values: Values
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Grid:
    """What a file asks for. ``base`` are the settings that all points share; ``notes`` are remarks.

    ``axes`` are the values by dotted key, in the order of the file; ``seeds`` the runs of a point.
    """

    file: Path
    axes: Mapping[str, tuple[object, ...]]
    base: Values
    points: tuple[Point, ...]
    seeds: int
    notes: tuple[str, ...]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All runs in the order to start them: a first seed of every point, then the next."""
        return tuple(point.tasks[number] for number in range(self.seeds) for point in self.points)

    @property
    def data(self) -> tuple[DataConfig, ...]:
        """The images that runs are on, each once."""
        return tuple(dict.fromkeys(task.config.data for task in self.tasks))

    def record(self) -> dict[str, Any]:
        """Return what a call keeps of the grid, as JSON values."""
        record = {"file": str(self.file), "axes": self.axes, "base": self.base, "seeds": self.seeds}
        return dict(json.loads(json.dumps(record)))


def read(file: Path, **stronger: Any) -> Grid:
    """Read ``file``; ``stronger`` are ``make``'s options. Raises UsageError as ``make`` does."""
    return make(*config_io.read_document(config_io.read_text(file), str(file)), file, **stronger)


def make(
    table: dict[str, Any],
    where: Callable[[str], str],
    file: Path,
    *,
    seeds: int | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Flag] | None = None,
) -> Grid:
    """Make the grid of the document ``table`` in ``file``; ``where`` tells a key's line.

    ``seeds``, ``sets`` and ``flags`` count before what it says. Raises UsageError for anything that
    cannot be trained as it is written.
    """
    crossed = _axes(table.pop("grid", None), where, file)
    count = _number(table.pop("seeds", None), "seeds", where, least=1)
    first = _number(table.pop("first_seed", None), "first_seed", where, least=0)
    base = config_io.settings_of(table, where)
    origins = {key: where(f"grid.{key}") for key in crossed}
    _refuse_twice(origins, config_io.requested(base=base, sets=sets, flags=flags))
    if SEED in crossed and (seeds, count, first) != (None, None, None):
        raise UsageError(
            f"{SEED} ({origins[SEED]}): is crossed, and so are seeds: leave out one of them"
        )
    count = seeds or count or 1
    num_runs = count * math.prod(map(len, crossed.values()))
    if num_runs > MOST_RUNS:
        raise UsageError(
            f"{file}: crosses to {num_runs:,} runs, more than {MOST_RUNS:,}: take fewer values or "
            "seeds, or several files and folders"
        )
    layers = {"base": base, "sets": sets, "default": DEFAULT_PRESET}
    made = [
        _Combination.of(dict(zip(crossed, values, strict=True)), origins, flags or {}, layers)
        for values in product(*crossed.values())
    ]
    _refuse_equal(file, made)
    _refuse_stopping(file, made)
    return Grid(
        file=file,
        axes={key: tuple(dict.fromkeys(one.values[key] for one in made)) for key in crossed},
        base=made[0].shared,
        points=tuple(one.point(range(first or 0, (first or 0) + count)) for one in made),
        seeds=count,
        notes=tuple(dict.fromkeys(note for one in made for note in one.notes)),
    )


@dataclass(frozen=True)
class _Combination:
    """A combination of values: as the configuration has them, what comes of it, what it shares."""

    values: Values
    config: Resolved
    origin: Mapping[str, str]
    shared: Values
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        values: Values,
        origins: Mapping[str, str],
        flags: Mapping[str, Flag],
        layers: Mapping[str, Any],
    ) -> _Combination:
        own = {key: Flag(origins[key], value) for key, value in values.items()}
        strongest = {**flags, **own}
        loaded = config_io.load(flags=strongest, **layers)
        asked = config_io.load_unresolved(flags=strongest, **layers)
        config, as_asked = _absolute(loaded.config), config_io.flatten(asked)
        shared = {
            key: as_asked[key] if key in derived(asked) else value
            for key, value in config_io.flatten(config).items()
            if key not in _NOT_COMPARED and key not in values
        }
        for key, name in (("data.train", config.data.train), ("data.test", config.data.test)):
            if key not in values:
                shared[key] = name if name in BUILT_IN or name is None else "a file"
        own_values = {key: as_asked[key] for key in values}
        return cls(own_values, config, loaded.origin, shared, loaded.notes)

    def point(self, seeds: Sequence[int]) -> Point:
        """Return the point with a run for each seed, or for the one that is crossed."""
        name, config = point_name(self.values), self.config
        if SEED in self.values:
            seeds = (config.train.seed,)
        tasks = []
        for seed in seeds:
            train = config.train.model_copy(update={"seed": seed})
            own = config.model_copy(update={"train": train})
            origin = {**self.origin, SEED: self.origin[SEED] if SEED in self.values else "seed"}
            tasks.append(Task(name, seed, own, origin, about={"point": dict(self.values)}))
        return Point(name, self.values, tuple(tasks))


def _refuse_equal(file: Path, made: Sequence[_Combination]) -> None:
    """Raise UsageError for two combinations with one configuration, or one name."""
    configs: dict[Resolved, str] = {}
    names: set[str] = set()
    for one in made:
        name = point_name(one.values)
        if one.config in configs:
            raise UsageError(
                f"{file}: {configs[one.config]} and {name} are the same configuration: leave out "
                "one of them"
            )
        if name in names:
            raise UsageError(f"{file}: two points have the name {name}: take a shorter value")
        configs[one.config] = name
        names.add(name)


def _refuse_stopping(file: Path, made: Sequence[_Combination]) -> None:
    """Raise UsageError for runs that a collapse would end: a sweep follows all to their end."""
    if any(one.config.train.stop_on_collapse for one in made):
        raise UsageError(
            f"{file}: train.stop_on_collapse: would count collapsed runs as failed: leave it out"
        )


def _axes(table: object, where: Callable[[str], str], file: Path) -> dict[str, tuple[object, ...]]:
    """Return the lists of ``[grid]`` by dotted key."""
    if not isinstance(table, dict) or not table:
        raise UsageError(
            f'{file}: nothing is crossed: add a section [grid] with lists, such as "optim.lr" = '
            "[0.1, 0.2]"
        )
    axes: dict[str, tuple[object, ...]] = {}
    for key, values in _leaves(table):
        origin = where(f"grid.{key}")
        config_io.requested(flags={key: Flag(origin, values)})  # refuses unknown keys
        if key == "preset":
            raise UsageError(f"preset ({origin}): cannot be crossed: cross keys that it sets")
        if key in axes:
            raise UsageError(f"{key} ({origin}): is crossed twice: leave out one of them")
        if not isinstance(values, list) or not values:
            raise UsageError(
                f"{key} = {config_io.show(values)} ({origin}): should be a list of values to cross"
            )
        if _is_list(key) and not all(isinstance(value, list) for value in values):
            raise UsageError(
                f"{key} = {config_io.show(values)} ({origin}): each value is a list itself: write "
                "a list of lists"
            )
        for index, value in enumerate(values):
            if value in values[:index]:
                raise UsageError(
                    f"{key} ({origin}): {config_io.show(value)} is there twice: leave out one"
                )
        axes[key] = tuple(values)
    return axes


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted key and value of all that is in nested tables."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_list(key: str) -> bool:
    kinds = config_io.alternatives(config_io.keys()[key])
    return any(typing.get_origin(kind) is tuple for kind in kinds)


def _number(value: object, name: str, where: Callable[[str], str], *, least: int) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < least:
        raise UsageError(
            f"{name} = {config_io.show(value)} ({where(name)}): should be a whole number from "
            f"{least} on"
        )
    return value


def _refuse_twice(origins: Mapping[str, str], settings: Mapping[str, Setting]) -> None:
    """Raise UsageError for settings of all points that are crossed, and for a seed."""
    for key, setting in settings.items():
        if key in origins:
            raise UsageError(
                f"{key} ({setting.origin}): is crossed ({origins[key]}): leave out one of them"
            )
        if key == SEED:
            raise UsageError(
                f"{SEED} ({setting.origin}): seeds and first_seed of the file say which: leave it "
                "out"
            )


def _absolute(config: Resolved) -> Resolved:
    """Return the configuration with absolute paths, since workers may start anywhere."""
    config = inputs.with_paths(config, config)
    if config.train.init_from is None:
        return config
    from fastbyol.engine.origin import source_of

    source, _ = source_of(config.train.init_from)
    train = config.train.model_copy(update={"init_from": source})
    return config.model_copy(update={"train": train})


def tasks(grid: Grid, out: Path) -> tuple[tuple[Task, FolderStatus], ...]:
    """Return the runs of ``grid`` as workers know them, each with what its folder says.

    Raises UsageError if ``out`` holds other runs than a part of this sweep.
    """
    if (out / CALLS).is_dir():
        ledger.refuse_other_scale(out, SCALE)
        for call in ledger.read(out)["calls"]:
            _refuse_other(grid, call, out)
    made = tuple((task, existing.status(out / RUNS / task.key, task.config)) for task in grid.tasks)
    if not any(key.startswith("data.") for key in grid.axes):
        folders = sorted(path.parent for path in (out / RUNS).glob("*/seed*/config.toml"))
        existing.refuse_other_data(grid.data, folders, out)
    return made


def _refuse_other(grid: Grid, call: Mapping[str, Any], out: Path) -> None:
    """Raise UsageError if ``call`` asked for other axes, or for points that share other values."""
    if set(call["axes"]) != set(grid.axes):
        raise UsageError(
            f"{out}: holds a sweep over {' and '.join(call['axes'])}, asked for is one over "
            f"{' and '.join(grid.axes)}: name another folder with --out"
        )
    wanted = grid.record()["base"]
    there = call["base"]
    for key in wanted:
        if key in there and wanted[key] != there[key]:
            raise UsageError(
                f"{out}: holds a sweep with {key} = {_shown(there[key])}, asked for is "
                f"{_shown(wanted[key])}: name another folder with --out"
            )


def _shown(value: object) -> str:
    return "none" if value is None else config_io.show(value)
