"""Configurations from presets, TOML files, ``--set`` and flags, with the origin of every value; and back to TOML.

Precedence, weakest first: the defaults of config.py, the preset, the file, ``--set``, flags. Whatever is wrong is a
``UsageError`` of one line: the key, where it was said, what is allowed.
"""

from __future__ import annotations

import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fastbyol.config import Config, resolve
from fastbyol.errors import UsageError, nearest
from fastbyol.files import open_regular
from fastbyol.text import printable

DEFAULT_PRESET = "blog"
_PACKAGE = Path(__file__).resolve().parent


class Flag(NamedTuple):
    """A command-line flag as typed (``--norm``) and its value; None means that it was not given."""

    name: str
    value: object


class Setting(NamedTuple):
    """One key's value and where it was said."""

    value: object
    origin: str


@dataclass(frozen=True)
class Loaded:
    """A resolved configuration, the origin of each dotted key, and remarks that are worth a line to the user."""

    config: Config
    origin: dict[str, str]
    notes: tuple[str, ...] = ()


def load(
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, tuple[str, object]] | None = None,
    default: str = DEFAULT_PRESET,
) -> Loaded:
    """Build a resolved configuration.

    Args:
        preset: what ``--preset`` says. Without it the file's own ``preset`` key counts, then ``default``.
        file: a TOML file (``--config``), any part of a configuration.
        sets: ``key=value`` texts. A value is read as TOML, else as a bare word; a list may be given as ``a,b``; ``none``
            clears a key that may be absent.
        flags: dotted key -> ``Flag(name, value)``. Values of None are flags that were not given.

    Raises:
        UsageError: an unknown key, a value out of range, a file that cannot be read.
    """
    settings = said(preset=preset, file=file, sets=sets, flags=flags)
    chosen = settings.get("preset", Setting(default, "default"))
    settings = _from_preset(chosen) | settings | {"preset": chosen}
    loaded = _resolved(_validated(settings), settings)
    _check(loaded.config, loaded.origin)
    return Loaded(loaded.config, loaded.origin, tuple(_notes(loaded)))


def said(
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, tuple[str, object]] | None = None,
) -> dict[str, Setting]:
    """What the caller set, dotted key -> ``Setting``, without defaults or preset; keys are checked, values not yet."""
    settings = (_from_file(file) if file else {}) | _from_sets(sets) | _from_flags(flags or {})
    return settings | ({"preset": Setting(preset, "--preset")} if preset is not None else {})


def parse(text: str, where: str) -> Config:
    """The configuration that ``text`` alone describes: no preset beneath it, nothing resolved. ``where`` is for messages."""
    return _validated(_from_text(text, where))


def read_run(path: Path) -> Config:
    """The resolved configuration in a run's ``config.toml``, which is complete: its preset is a word, not a layer."""
    settings = _from_file(path)
    return _resolved(_validated(settings), settings).config


def dump(config: Config, origin: Mapping[str, str] | None = None) -> str:
    """TOML that ``parse`` reads back to an equal configuration. None is a key left out; origins become comments.

    Raises UsageError: a name that is not UTF-8, which TOML cannot hold.
    """
    sections: dict[str, list[str]] = {"": []}
    for key, value in flatten(config).items():
        section, _, leaf = key.rpartition(".")
        if value is not None:
            _refuse_unwritable(key, Setting(value, (origin or {}).get(key, "configuration")))
            sections.setdefault(section, []).append(f"{leaf} = {toml_value(value)}{_comment(key, origin)}")
    blocks = ["\n".join([f"[{name}]"] * bool(name) + lines) for name, lines in sections.items()]
    return "\n\n".join(blocks) + "\n"


def origins(text: str) -> dict[str, str]:
    """The comments that ``dump`` left behind values, by key."""
    found: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\[([\w.]+)\]", line.strip()):
            section = f"{header[1]}."
        elif pair := re.match(r"(\w+) = .*  # (.+)$", line):
            found[section + pair[1]] = pair[2]
    return found


def flatten(config: Config) -> dict[str, object]:
    """Dotted key -> value of every field, in the order of config.py."""
    return {key: _get(config, key) for key in keys()}


def flatten_table(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted key -> value of a TOML document; a table where no section belongs stays a value."""
    flat: dict[str, object] = {}
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and (value or _first_within(key)):
            flat |= flatten_table(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def presets() -> tuple[str, ...]:
    """Names of the presets, sorted."""
    return tuple(sorted(path.stem for path in config_folder().glob("*.toml")))


def preset_text(name: str, origin: str = "preset") -> str:
    """A preset's file as it is, comments included. Raises UsageError for a name that is none."""
    if name not in presets():
        raise UsageError(f"{origin} {show(name)}: no such preset; there are {', '.join(presets())}")
    return (config_folder() / f"{name}.toml").read_text("utf-8")


def preset_summary(name: str) -> str:
    """The comment on a preset's first line: what it is, in one sentence."""
    return preset_text(name).partition("\n")[0].lstrip("# ").rstrip()


@cache
def keys() -> Mapping[str, FieldInfo]:
    """Dotted key -> pydantic field of everything that can be set, in the order of config.py."""
    return types.MappingProxyType(dict(_walk(Config, "")))


def nearest_key(key: str) -> str:
    """Return the key that ``key`` is most like, or the one that ``key`` tries to look into."""
    inside = next((parent for parent in _parents(key) if parent in keys()), None)
    return inside or nearest(key, keys(), least=0.0, dotted=True)[0]


def toml_value(value: object) -> str:
    """One value in TOML: text, bool, int, float, or a (nested) list of these."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    return repr(value)


def show(value: object) -> str:
    """A value for a message: one line, not too long."""
    text = printable(toml_value(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _get(config: BaseModel, key: str) -> object:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _comment(key: str, origin: Mapping[str, str] | None) -> str:
    return f"  # {printable(origin[key])}" if origin and key in origin else ""


def config_folder() -> Path:
    """Where presets and the settings of ablations lie."""
    packaged = _PACKAGE / "configs"  # in a wheel; a checkout has them beside the package
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


# Layers: each gives dotted key -> Setting, its keys known.


def _from_preset(chosen: Setting) -> dict[str, Setting]:
    name = str(chosen.value)
    settings = _from_text(preset_text(name, origin=chosen.origin.replace("default", "preset")), f"preset {name}")
    return {key: Setting(setting.value, f"preset {name}") for key, setting in settings.items()}


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises UsageError where it cannot be read, is no file, or is not UTF-8."""
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot read this configuration: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a TOML file: byte {error.start} is not UTF-8") from None


def _from_file(path: Path) -> dict[str, Setting]:
    return _from_text(read_text(path), str(path))


def _from_text(text: str, name: str) -> dict[str, Setting]:
    try:
        table = tomllib.loads(text)
    except ValueError as error:  # of which TOMLDecodeError is one; numbers of over 4,300 digits are refused by another
        raise UsageError(_syntax_error(str(error), name)) from None
    lines = _line_numbers(text)
    settings = {}
    for key, value in flatten_table(table).items():
        line = next((f":{lines[part]}" for part in _parents(key) if part in lines), "")
        known = _known(key, name + line)
        settings[known] = Setting(_cleared(known, value), name + line)
    return settings


def _from_sets(sets: Sequence[str]) -> dict[str, Setting]:
    settings = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {show(text)}: expected key=value, such as --set optim.lr=0.1")
        key = _known(key.strip(), "--set")
        settings[key] = Setting(_cleared(key, _read(keys()[key], value.strip())), "--set")
    return settings


def _from_flags(flags: Mapping[str, tuple[str, object]]) -> dict[str, Setting]:
    settings = {}
    for key, (name, value) in flags.items():
        if value is None:
            continue
        value = str(value) if isinstance(value, Path) else value
        value = _read(keys()[_known(key, name)], value) if isinstance(value, str) else value
        settings[key] = Setting(_cleared(key, value), name)
    return settings


def _known(key: str, origin: str) -> str:
    if key in keys():
        return key
    inside = _first_within(key)
    if inside:
        raise UsageError(f"{key} ({origin}): this is a section; set a key in it, such as {inside}")
    raise UsageError(f"{printable(key)} ({origin}): no such key; the nearest is {nearest_key(key)}")


def _first_within(section: str) -> str | None:
    return next((key for key in keys() if key.startswith(f"{section}.")), None)


def _parents(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _line_numbers(text: str) -> dict[str, int]:
    """Dotted key -> line, for keys and table headers written plainly; good enough for messages."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\[\]#]+?)\s*\]", line):
            section = re.sub(r"[\s\"']", "", header[1])
            found.setdefault(section, number)
        elif pair := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
            found.setdefault(".".join(filter(None, (section, re.sub(r"[\s\"']", "", pair[1])))), number)
    return found


def _syntax_error(message: str, name: str) -> str:
    what, _, where = " ".join(message.split()).partition(" (at ")
    place = re.match(r"line (\d+), column (\d+)", where)
    return f"{name}{f':{place[1]}:{place[2]}' if place else ''}: not valid TOML: {printable(what[:1].lower() + what[1:])}"


# Values.


def _options(field: FieldInfo) -> tuple[Any, ...]:
    union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
    return typing.get_args(field.annotation) if union else (field.annotation,)


def _cleared(key: str, value: object) -> object:
    return None if value == "none" and type(None) in _options(keys()[key]) else value


def _read(field: FieldInfo, text: str) -> object:
    """A typed-in value: bare words for text fields, commas for lists, TOML otherwise."""
    kinds = _options(field)
    if any(typing.get_origin(kind) is tuple for kind in kinds) and not text.startswith("["):
        return [_toml(part.strip()) if part.strip()[:1] in "\"'" else part.strip() for part in text.split(",") if part.strip()]
    is_text = any(kind is str or str in map(type, typing.get_args(kind)) for kind in kinds)
    return text if is_text and text[:1] not in ('"', "'") else _toml(text)


def _toml(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    return table["value"] if table.keys() == {"value"} else text


def _validated(settings: Mapping[str, Setting]) -> Config:
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        if isinstance(setting.value, bool) and bool not in _options(keys()[key]):
            raise UsageError(f"{key} = {show(setting.value)} ({setting.origin}): should not be true or false")
        _refuse_unwritable(key, setting)
        table = nested
        *sections, leaf = key.split(".")
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = setting.value
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        raise UsageError(_explain(error, settings)) from None


def _refuse_unwritable(key: str, setting: Setting) -> None:
    try:
        toml_value(setting.value).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{key} = {show(setting.value)} ({setting.origin}): its name is not UTF-8, which config.toml cannot hold: "
            "rename it, or name a link to it"
        ) from None


def _explain(error: ValidationError, settings: Mapping[str, Setting]) -> str:
    """One line from pydantic's first complaint."""
    first = error.errors(include_url=False)[0]
    message = " ".join(first["msg"].removeprefix("Value error, ").removeprefix("Input ").split())
    if first["type"] == "missing":  # of a tuple's items: every key has a default
        message = "should hold more values"
    key = ".".join(str(part) for part in first["loc"])
    key = next((known for known in _parents(key) if known in keys()), "")
    if not key:  # a validator over several fields: its message names them
        places = {name: settings[name].origin for name in settings if re.search(rf"{re.escape(name)}\b", message)}
        return message + "".join(f" ({name}: {origin})" for name, origin in places.items())
    return f"{key} = {show(settings[key].value)} ({settings[key].origin}): {message[:1].lower()}{message[1:]}"


def _resolved(config: Config, settings: Mapping[str, Setting]) -> Loaded:
    origin = {key: settings[key].origin if key in settings else "default" for key in keys()}
    resolved = resolve(config)
    before = flatten(config)
    changed = {key: value for key, value in flatten(resolved).items() if value != before[key]}
    origin |= {key: _derivation(key, config, origin) for key in changed}
    _validated({key: Setting(value, origin[key]) for key, value in flatten(resolved).items()})
    return Loaded(resolved, origin)


def _derivation(key: str, config: Config, origin: Mapping[str, str]) -> str:
    """Where a number comes from that ``config.resolve`` filled in or changed."""
    optim = config.optim
    scaled = ", times train.batch_size / 256" if optim.lr_scaling == "linear" else ""
    return {
        "optim.lr": (f"optim.{optim.name}_lr" if optim.lr is None else origin["optim.lr"]) + scaled,
        "optim.weight_decay": f"optim.{optim.name}_weight_decay",
        "optim.lr_scaling": "applied to optim.lr",
        "schedule.horizon_epochs": "train.epochs",
        "data.textures_size": "views.size",
    }.get(key, "derived")


def _check(config: Config, origin: Mapping[str, str]) -> None:
    """What no slice can see alone."""
    batch, data = config.train.batch_size, config.data
    limits = ({"data.limit": data.limit} if data.limit else {}) | (
        {"data.textures_count": data.textures_count} if data.train == "textures" else {}
    )
    for key, count in limits.items():
        if batch > count:
            raise UsageError(
                f"train.batch_size = {batch} ({origin['train.batch_size']}): more than the {count} images to train on "
                f"({key}: {origin[key]}), so an epoch would hold no step"
            )
    method = config.method
    if method.name == "contrastive" and 0 < method.queue < batch:
        raise UsageError(
            f"method.queue = {method.queue} ({origin['method.queue']}): holds fewer keys than the {batch} of a batch "
            f"(train.batch_size: {origin['train.batch_size']}): take {batch} or more, or 0 for the batch's own"
        )


def _notes(loaded: Loaded) -> Iterator[str]:
    config, origin = loaded.config, loaded.origin
    epochs, schedule = config.train.epochs, config.schedule
    if schedule.warmup_epochs > epochs:
        yield f"the warm-up of {schedule.warmup_epochs:g} epochs outlasts the run's {epochs}: the lr never reaches optim.lr"
    if schedule.horizon_epochs is not None and epochs > schedule.horizon_epochs:
        yield f"the run's {epochs} epochs outlast the schedules' horizon of {schedule.horizon_epochs}"
    if origin["optim.name"].startswith("--") and ".toml" in origin["optim.lr"]:
        yield f"optim.lr = {config.optim.lr:g} comes from {origin['optim.lr']}, the optimizer from {origin['optim.name']}"
