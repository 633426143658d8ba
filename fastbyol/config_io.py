"""Configurations from presets, TOML files, ``--set`` and flags, and back to TOML.

The origin of every value is kept. Precedence, weakest first: the defaults of config.py, the preset,
the file, ``--set``, flags. Every mistake is a ``UsageError`` of one line: the key, where its value
comes from, what is allowed.
"""

from __future__ import annotations

import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fastbyol.config import ENCODERS, OF_OWN_ENCODERS, Config, Resolved, derived
from fastbyol.errors import UsageError, nearest
from fastbyol.files import open_regular
from fastbyol.text import printable

DEFAULT_PRESET = "blog"
_PACKAGE = Path(__file__).resolve().parent
_Configuration = TypeVar("_Configuration", bound=Config)


class Flag(NamedTuple):
    """A command-line flag as typed (``--norm``) and its value, None if it was not typed."""

    name: str
    value: object


class Setting(NamedTuple):
    """The value of one key and where it comes from."""

    value: object
    origin: str


@dataclass(frozen=True)
class Loaded:
    """A configuration, the origin of each dotted key, and remarks for the user."""

    config: Resolved
    origin: dict[str, str]
    notes: tuple[str, ...] = ()


def load(
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, tuple[str, object]] | None = None,
    base: Mapping[str, Setting] | None = None,
    default: str = DEFAULT_PRESET,
) -> Loaded:
    """Build a resolved configuration.

    Args:
        preset: the value of ``--preset``. Without it the file's ``preset`` key counts, then
            ``default``.
        file: a TOML file (``--config``), any part of a configuration.
        sets: ``key=value`` texts. A value is read as TOML, else as a bare word. ``a,b`` is a list,
            and ``none`` clears a key that may be absent.
        flags: dotted key -> ``Flag(name, value)``. Flags with the value None were not typed.
        base: settings between preset and file, such as those that ``settings_of`` returns.

    Raises:
        UsageError: an unknown key, a value out of range, a file that cannot be read.
    """
    return _checked(_layered(default, preset=preset, file=file, sets=sets, flags=flags, base=base))


def revise(config: Resolved, sets: Sequence[str], where: str) -> Loaded:
    """Return ``config``, a run's in ``where``, with the ``key=value`` texts ``sets`` over it.

    Numbers that were derived stay; only what ``sets`` clears is derived anew. Raises UsageError as
    ``load`` does.
    """
    settings = {key: Setting(value, where) for key, value in flatten(config).items()}
    return _checked(settings | requested(sets=sets))


def load_unresolved(
    *,
    sets: Sequence[str] = (),
    flags: Mapping[str, tuple[str, object]] | None = None,
    base: Mapping[str, Setting] | None = None,
    default: str = DEFAULT_PRESET,
) -> Config:
    """Build a configuration as ``load`` does, with the values as asked for: None where none was."""
    return _validated(Config, _layered(default, sets=sets, flags=flags, base=base))


def _layered(default: str, **layers: Any) -> dict[str, Setting]:
    """Return all settings: the preset's, and over them those of ``layers``, as ``requested``."""
    settings = requested(**layers)
    chosen = settings.get("preset", Setting(default, "default"))
    preset = _from_preset(chosen)
    if "model.encoder" in settings and settings["model.encoder"].value not in ENCODERS:
        # A preset's width and norm are of the encoder that it names.
        for name in OF_OWN_ENCODERS:
            preset.pop(f"model.{name}", None)
    return preset | settings | {"preset": chosen}


def requested(
    *,
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, tuple[str, object]] | None = None,
    base: Mapping[str, Setting] | None = None,
) -> dict[str, Setting]:
    """Return what the caller sets by dotted key, without defaults and preset.

    Keys are checked, values are not.
    """
    settings = dict(base or {}) | (_from_file(file) if file else {})
    settings |= _from_sets(sets) | _from_flags(flags or {})
    return settings | ({"preset": Setting(preset, "--preset")} if preset is not None else {})


def parse(text: str, where: str) -> Resolved:
    """Return the configuration in a run's ``text``, which is complete: its preset is only a name.

    Messages name ``where``.
    """
    return _resolved(_from_text(text, where)).config


def read_run(path: Path) -> Resolved:
    """Return the configuration in a run's ``config.toml``."""
    return parse(read_text(path), str(path))


def dump(config: Config, origin: Mapping[str, str] | None = None) -> str:
    """Return TOML that ``parse`` reads back to an equal configuration.

    Keys with the value None are left out, and origins become comments. Raises UsageError for a name
    that is not UTF-8, which TOML cannot hold.
    """
    sections: dict[str, list[str]] = {"": []}
    for key, value in flatten(config).items():
        section, _, leaf = key.rpartition(".")
        if value is not None:
            _refuse_unwritable(key, Setting(value, (origin or {}).get(key, "configuration")))
            sections.setdefault(section, []).append(
                f"{leaf} = {toml_value(value)}{_comment(key, origin)}"
            )
    blocks = ["\n".join([f"[{name}]"] * bool(name) + lines) for name, lines in sections.items()]
    return "\n\n".join(blocks) + "\n"


def origins(text: str) -> dict[str, str]:
    """Return the comments that ``dump`` wrote after values, by key."""
    comments: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\[([\w.]+)\]", line.strip()):
            section = f"{header[1]}."
        elif pair := re.match(r"(\w+) = .*  # (.+)$", line):
            comments[section + pair[1]] = pair[2]
    return comments


def flatten(config: Config) -> dict[str, object]:
    """Return the value of every field by dotted key, in the order of config.py."""
    return {key: _get(config, key) for key in keys()}


def flatten_table(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the values of a TOML document by dotted key.

    A table that is no section stays a value.
    """
    flat: dict[str, object] = {}
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and (value or _first_within(key)):
            flat |= flatten_table(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def presets() -> tuple[str, ...]:
    """Return the names of the presets, sorted."""
    return tuple(sorted(path.stem for path in config_folder().glob("*.toml")))


def preset_text(name: str, origin: str = "preset") -> str:
    """Return the text of a preset's file, comments included.

    Raises UsageError for an unknown name.
    """
    if name not in presets():
        raise UsageError(f"{origin} {show(name)}: no such preset; there are {', '.join(presets())}")
    return (config_folder() / f"{name}.toml").read_text("utf-8")


def preset_summary(name: str) -> str:
    """Return the comment on a preset's first line, a sentence that describes it."""
    return preset_text(name).partition("\n")[0].lstrip("# ").rstrip()


@cache
def keys() -> Mapping[str, FieldInfo]:
    """Return every field that can be set by dotted key, in the order of config.py."""
    return types.MappingProxyType(dict(_walk(Config, "")))


def nearest_key(key: str) -> str:
    """Return the key that ``key`` is most like, or the one that ``key`` tries to look into."""
    inside = next((parent for parent in _parents(key) if parent in keys()), None)
    return inside or nearest(key, keys(), least=0.0, dotted=True)[0]


def toml_value(value: object) -> str:
    """Return a text, bool, int, float, or (nested) list of these in TOML."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    return repr(value)


def show(value: object) -> str:
    """Return a value for a message: one line of at most 80 characters."""
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
    """Return the folder of the presets and of the settings of ablations."""
    packaged = _PACKAGE / "configs"  # in a wheel; a checkout has them beside the package
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


# Layers: each returns settings by dotted key, and every key is one of ``keys``.


def _from_preset(chosen: Setting) -> dict[str, Setting]:
    name = str(chosen.value)
    settings = _from_text(
        preset_text(name, origin=chosen.origin.replace("default", "preset")), f"preset {name}"
    )
    return {key: Setting(setting.value, f"preset {name}") for key, setting in settings.items()}


def read_text(path: Path) -> str:
    """Return the text of a configuration file.

    Raises UsageError if it cannot be read, is not a regular file, or is not UTF-8.
    """
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
    return settings_of(*read_document(text, name))


def read_document(text: str, name: str) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return a TOML document, and a function of a dotted key: ``NAME:LINE``, where it is set.

    Raises UsageError for text that is no TOML.
    """
    try:
        table = tomllib.loads(text)
    except (
        ValueError
    ) as error:  # TOMLDecodeError, or a plain ValueError for a number of over 4,300 digits
        raise UsageError(_syntax_error(str(error), name)) from None
    lines = _line_numbers(text)

    def where(key: str) -> str:
        return name + next((f":{lines[part]}" for part in _parents(key) if part in lines), "")

    return table, where


def settings_of(table: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Setting]:
    """Return the settings in a TOML document by dotted key, each from ``where(key)``.

    Raises UsageError for an unknown key.
    """
    settings = {}
    for key, value in flatten_table(table).items():
        _check_key(key, where(key))
        settings[key] = Setting(_cleared(key, value), where(key))
    return settings


def _from_sets(sets: Sequence[str]) -> dict[str, Setting]:
    settings = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {show(text)}: expected key=value, such as --set optim.lr=0.1")
        key = key.strip()
        _check_key(key, "--set")
        settings[key] = Setting(_cleared(key, _read(keys()[key], value.strip())), "--set")
    return settings


def _from_flags(flags: Mapping[str, tuple[str, object]]) -> dict[str, Setting]:
    settings = {}
    for key, (name, value) in flags.items():
        if value is None:
            continue
        _check_key(key, name)
        value = str(value) if isinstance(value, Path) else value
        value = _read(keys()[key], value) if isinstance(value, str) else value
        settings[key] = Setting(_cleared(key, value), name)
    return settings


def _check_key(key: str, origin: str) -> None:
    if key in keys():
        return
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
    """Return the line of each dotted key and table header that is written plainly, for messages."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\[\]#]+?)\s*\]", line):
            section = re.sub(r"[\s\"']", "", header[1])
            lines.setdefault(section, number)
        elif pair := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
            lines.setdefault(
                ".".join(filter(None, (section, re.sub(r"[\s\"']", "", pair[1])))), number
            )
    return lines


def _syntax_error(message: str, name: str) -> str:
    what, _, where = " ".join(message.split()).partition(" (at ")
    at = re.match(r"line (\d+), column (\d+)", where)
    return (
        f"{name}{f':{at[1]}:{at[2]}' if at else ''}: not valid TOML: "
        f"{printable(what[:1].lower() + what[1:])}"
    )


# Values.


def alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """Return the types of a field, one by one where it is a union."""
    union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
    return typing.get_args(field.annotation) if union else (field.annotation,)


def _cleared(key: str, value: object) -> object:
    return None if value == "none" and type(None) in alternatives(keys()[key]) else value


def _read(field: FieldInfo, text: str) -> object:
    """Return the value of a typed ``text``.

    Text fields take bare words, lists take commas, and the others take TOML.
    """
    kinds = alternatives(field)
    if any(typing.get_origin(kind) is tuple for kind in kinds) and not text.startswith("["):
        return [
            value_of(part.strip()) if part.strip()[:1] in "\"'" else part.strip()
            for part in text.split(",")
            if part.strip()
        ]
    is_text = any(kind is str or str in map(type, typing.get_args(kind)) for kind in kinds)
    return text if is_text and text[:1] not in ('"', "'") else value_of(text)


def value_of(text: str) -> object:
    """Return the value of ``text`` as TOML, or the text itself where it is none."""
    try:
        table = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    return table["value"] if table.keys() == {"value"} else text


def _validated(model: type[_Configuration], settings: Mapping[str, Setting]) -> _Configuration:
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        if isinstance(setting.value, bool) and bool not in alternatives(keys()[key]):
            raise UsageError(
                f"{key} = {show(setting.value)} ({setting.origin}): should not be true or false"
            )
        _refuse_unwritable(key, setting)
        table = nested
        *sections, leaf = key.split(".")
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = setting.value
    try:
        return model.model_validate(nested)
    except ValidationError as error:
        raise UsageError(_explain(error, settings)) from None


def _refuse_unwritable(key: str, setting: Setting) -> None:
    try:
        toml_value(setting.value).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{key} = {show(setting.value)} ({setting.origin}): its name is not UTF-8, which "
            "config.toml cannot hold: "
            "rename it, or name a link to it"
        ) from None


def _explain(error: ValidationError, settings: Mapping[str, Setting]) -> str:
    """Return pydantic's first complaint in one line."""
    first = error.errors(include_url=False)[0]
    message = " ".join(first["msg"].removeprefix("Value error, ").removeprefix("Input ").split())
    if first["type"] == "missing":  # of a tuple's items: every key has a default
        message = "should hold more values"
    key = ".".join(str(part) for part in first["loc"])
    key = next((parent for parent in _parents(key) if parent in keys()), "")
    if not key:  # a validator over several fields: its message names them
        named = [name for name in settings if re.search(rf"{re.escape(name)}\b", message)]
        return message + "".join(f" ({name}: {settings[name].origin})" for name in named)
    return (
        f"{key} = {show(settings[key].value)} ({settings[key].origin}): "
        f"{message[:1].lower()}{message[1:]}"
    )


def _checked(settings: Mapping[str, Setting]) -> Loaded:
    loaded = _resolved(settings)
    _check(loaded.config, loaded.origin)
    return Loaded(loaded.config, loaded.origin, tuple(_notes(loaded)))


def _resolved(settings: Mapping[str, Setting]) -> Loaded:
    config = _validated(Config, settings)
    values = flatten(config)
    origin = {key: settings[key].origin if key in settings else "default" for key in keys()}
    changed = {key: value for key, value in derived(config).items() if value != values[key]}
    origin |= {key: _derivation(key, config, origin) for key in changed}
    whole = {key: Setting(value, origin[key]) for key, value in (values | changed).items()}
    return Loaded(_validated(Resolved, whole), origin)


def _derivation(key: str, config: Config, origin: Mapping[str, str]) -> str:
    """Return the origin of a value that ``config.derived`` filled in or changed."""
    optim = config.optim
    scaled = ", times train.batch_size / 256" if optim.lr_scaling == "linear" else ""
    return {
        "optim.lr": (f"optim.{optim.name}_lr" if optim.lr is None else origin["optim.lr"]) + scaled,
        "optim.weight_decay": f"optim.{optim.name}_weight_decay",
        "optim.lr_scaling": "applied to optim.lr",
        "schedule.horizon_epochs": "train.epochs",
        "data.textures_size": "views.size",
        "data.size": "views.size",
    }[key]


def _check(config: Config, origin: Mapping[str, str]) -> None:
    """Raise UsageError for values of two slices that contradict each other."""
    batch, data = config.train.batch_size, config.data
    limits = ({"data.limit": data.limit} if data.limit else {}) | (
        {"data.textures_count": data.textures_count} if data.train == "textures" else {}
    )
    for key, count in limits.items():
        if batch > count:
            raise UsageError(
                f"train.batch_size = {batch} ({origin['train.batch_size']}): more than the "
                f"{count} images to train on "
                f"({key}: {origin[key]}), so an epoch would hold no step"
            )
    method = config.method
    if method.name == "contrastive" and 0 < method.queue < batch:
        raise UsageError(
            f"method.queue = {method.queue} ({origin['method.queue']}): holds fewer keys than the "
            f"{batch} of a batch "
            f"(train.batch_size: {origin['train.batch_size']}): take {batch} or more, or 0 for "
            "the batch's own"
        )


def _notes(loaded: Loaded) -> Iterator[str]:
    config, origin = loaded.config, loaded.origin
    epochs, schedule = config.train.epochs, config.schedule
    if schedule.warmup_epochs > epochs:
        yield (
            f"the warm-up of {schedule.warmup_epochs:g} epochs outlasts the run's {epochs}: the "
            "lr never reaches optim.lr"
        )
    if schedule.horizon_epochs is not None and epochs > schedule.horizon_epochs:
        yield (
            f"the run's {epochs} epochs outlast the schedules' horizon of {schedule.horizon_epochs}"
        )
    if origin["optim.name"].startswith("--") and ".toml" in origin["optim.lr"]:
        yield (
            f"optim.lr = {config.optim.lr:g} comes from {origin['optim.lr']}, the optimizer "
            f"from {origin['optim.name']}"
        )
