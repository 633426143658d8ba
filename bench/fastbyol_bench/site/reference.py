"""The reference pages, made of the code when the site is built.

Each function returns Markdown. Words of the code are escaped, so that none of them becomes markup.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import fastbyol
from fastbyol import config_io
from fastbyol.ablations.arms import arm
from fastbyol.ablations.claims import CLAIMS
from fastbyol.ablations.rules import in_words
from fastbyol.cli import options
from fastbyol.cli.ablate import NotReproduced
from fastbyol.cli.main import app
from fastbyol.config import Config
from fastbyol.engine.step import METRIC_MEANINGS
from fastbyol.errors import CollapsedError, FastbyolError, UsageError
from fastbyol.runs.metrics import EVENTS
from fastbyol_kernels.lars_ema import LAYER_METRIC_MEANINGS

COMMANDS_FOLDER = "reference/commands"
# The errors with which commands end, and the option without which one does not.
_EXITS: Mapping[type[FastbyolError], str | None] = {
    FastbyolError: None,
    UsageError: None,
    CollapsedError: "--stop-on-collapse",
    NotReproduced: "--check",
}
_BOUNDS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
_PYTHON_GROUPS = {
    "Runs": ("load_config", "train", "resume", "fork", "evaluate"),
    "Encoders": ("load_encoder", "embed", "export"),
    "Images": ("convert",),
    "One step": ("TrainState", "train_step"),
    "Configurations": ("Config", "Resolved", "resolve"),
    "Errors": ("FastbyolError", "UsageError", "CollapsedError", "NoGraphError"),
}


def escaped(text: str) -> str:
    """Return ``text`` as Markdown that shows it in a line, also in a table's cell.

    What stands in backticks becomes code.
    """
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0:  # a backtick without another
        return _entities(" ".join(text.split()))
    return "".join(code(part) if k % 2 else _entities(part) for k, part in enumerate(parts))


def code(text: str, anchor: str = "") -> str:
    """Return ``text`` as code, also in a table's cell, or nothing if there is none."""
    name = f' id="{anchor}"' if anchor else ""
    return f"<code{name}>{_entities(text)}</code>" if text else ""


def _entities(text: str) -> str:
    """Return ``text`` with its punctuation as entities of HTML, which no markup is made of."""
    return re.sub(r"[^\w\s.,;()-]|_|^-", lambda match: f"&#{ord(match[0])};", text)


def table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# Commands


def command_pages() -> dict[str, str]:
    """Return the pages of all commands by the words that are typed, in the order of ``--help``."""
    return dict(_pages(typer.main.get_command(app), "fastbyol"))


def command_uri(words: str) -> str:
    """Return where the page of a command lies in the site's sources."""
    return f"{COMMANDS_FOLDER}/{words.replace(' ', '-')}.md"


def _pages(command: Any, words: str) -> Iterator[tuple[str, str]]:
    context = command.context_class(command, info_name=words)
    parts = [f"# {words}", escaped(command.help or ""), f"```text\n{_usage(command, context)}\n```"]
    below = dict(getattr(command, "commands", {}))
    if below:
        rows = (
            (f"[{code(f'{words} {name}')}]({command_uri(f'{words} {name}').rpartition('/')[2]})",
             escaped(part.help or ""))
            for name, part in below.items()
        )  # fmt: skip
        parts += ["## Commands", table(("command", "what it does"), rows)]
    parts += list(_parameters(command, context))
    if not below:
        parts += ["## Exit codes", _exit_codes(command, context)]
    yield words, "\n\n".join(parts) + "\n"
    for name, part in below.items():
        yield from _pages(part, f"{words} {name}")


def _usage(command: Any, context: Any) -> str:
    return " ".join(command.get_usage(context).removeprefix("Usage:").split())


def _parameters(command: Any, context: Any) -> Iterator[str]:
    parameters = [
        parameter for parameter in command.get_params(context) if "--help" not in parameter.opts
    ]
    keys = option_keys() if context.command_path == "fastbyol train" else {}
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        rows = [
            _row(parameter, context, keys)
            for parameter in parameters
            if parameter.param_type_name == kind and not getattr(parameter, "hidden", False)
        ]
        if rows:
            yield f"## {title}"
            yield table((kind, "default", "meaning"), iter(rows))


def _row(parameter: Any, context: Any, keys: Mapping[str, Sequence[str]]) -> tuple[str, str, str]:
    record = parameter.get_help_record(context)
    name, text = record if record else (parameter.make_metavar(context), parameter.help or "")
    text = re.sub(r"\s*\[(?:default|required)[^\]]*\]", "", text)
    text = re.sub(r"\s*\[x>=(\d+)\]", r" At least \1.", text)
    text = re.sub(r"\s*\[(\d+)<=x<=(\d+)\]", r" From \1 to \2.", text)
    default = parameter.default
    if parameter.required:
        shown = "required"
    elif default is None or default is False or callable(default) or default in ("", (), []):
        shown = ""
    else:
        shown = code(str(getattr(default, "value", default)))
    meaning = escaped(text)
    if set_by_it := keys.get(parameter.opts[0]):
        shown = _defaults(set_by_it[0])
        links = " and ".join(f"[{code(key)}](../configuration.md#{key})" for key in set_by_it)
        meaning = f"{meaning} Sets {links}.".strip()
    return code(name), shown, meaning


def option_keys() -> dict[str, list[str]]:
    """Return the configuration keys that each option of ``train`` sets."""
    keys: dict[str, list[str]] = {}
    for key, _, option in options.declared():
        keys.setdefault(option.name.partition("/")[0], []).append(key)
    return keys


def _exit_codes(command: Any, context: Any) -> str:
    names = {name for parameter in command.get_params(context) for name in parameter.opts}
    rows = [("0", "Done.")]
    for error, option in _EXITS.items():
        if option is None or option in names:
            about = (inspect.getdoc(error) or "").partition("\n\n")[0]
            rows.append((str(error.exit_code), escaped(about)))
    more = "A signal that ends the command adds those of [Stopping](../../commands.md#stopping)."
    return f"{table(('code', 'meaning'), iter(rows))}\n\n{more}"


# Configuration


def configuration_page() -> str:
    """Return the page of all keys: type, range, default, the presets' values, flag and meaning."""
    flags: dict[str, list[str]] = {}
    for key, _, option in options.declared():
        flags.setdefault(key, []).append(option.name)
    parts = [
        "# Configuration",
        "Every key of a run: `--set section.name=value`, a section of a TOML file for `--config`, "
        "or its flag. [Commands](../commands.md#where-a-value-comes-from) says which of them "
        "counts. Below a default stand the values of presets that differ from it. An empty default "
        "is none: the meaning says what is used then.",
        "`fastbyol presets show blog` prints the values of a preset with their origins, "
        "`fastbyol explain --diff blog paper` those in which two differ.",
    ]
    for title, model, keys in _sections():
        parts += [f"## {title}", escaped(inspect.getdoc(model) or "")]
        rows = (
            (
                "<br>".join((code(key, key), *map(code, flags.get(key, [])))),
                _type(config_io.keys()[key]),
                _defaults(key),
                escaped(config_io.keys()[key].description or ""),
            )
            for key in keys
        )
        parts.append(table(("key", "type", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _sections() -> Iterator[tuple[str, type[BaseModel], list[str]]]:
    """Yield a title, the model and the dotted keys of each section, the whole's own last."""
    keys = list(config_io.keys())
    own = {name: field.annotation for name, field in Config.model_fields.items()}
    for name, model in own.items():
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        direct = [key for key in keys if key.startswith(f"{name}.") and key.count(".") == 1]
        yield name, model, direct
        for part, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                prefix = f"{name}.{part}"
                yield prefix, field.annotation, [k for k in keys if k.startswith(f"{prefix}.")]
    yield "preset", Config, [key for key in keys if "." not in key]


@cache
def _presets() -> dict[str, dict[str, object]]:
    """Return every value of every preset."""
    return {
        name: config_io.flatten(config_io.load(preset=name).config) for name in config_io.presets()
    }


def _defaults(key: str) -> str:
    """Return a key's default, and below it the presets' values that differ from it."""
    default = config_io.flatten(Config())[key]
    differing = {
        name: values[key]
        for name, values in _presets().items()
        if values[key] != default and key != "preset"
    }
    shown = [_value(default), *(f"{name} {_value(value)}" for name, value in differing.items())]
    return "<br>".join(filter(None, shown))


def _value(value: object) -> str:
    return "" if value is None else code(config_io.toml_value(value))


def _type(field: FieldInfo) -> str:
    """Return a field's type in words, and the range that it checks."""
    kinds = [kind for kind in config_io.alternatives(field) if kind is not types.NoneType]
    words = " or ".join(_type_words(kind) for kind in kinds)
    limits = [
        f"{word} {_number(getattr(limit, name))}"
        for name, word in _BOUNDS.items()
        for limit in field.metadata
        if getattr(limit, name, None) is not None
    ]
    return " ".join([words, *limits])


def _number(value: float) -> str:
    """Return a bound as people write it: 1,000,000, 0.5 or 2^40."""
    if value >= 2**31 and math.log2(value).is_integer():
        return f"2^{math.log2(value):.0f}"
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _type_words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        inner = FieldInfo.from_annotation(kind)
        return _type(inner)
    if origin is typing.Literal:
        return ", ".join(code(str(word)) for word in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type_words(arguments[0])}"
        words = [_type_words(argument) for argument in arguments]
        return f"{len(words)} x {words[0]}" if len(set(words)) == 1 else f"({'; '.join(words)})"
    return {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}[
        kind.__name__
    ]


# Metrics


def metrics_page() -> str:
    """Return the page of what a run measures: per step, per epoch, per layer, and its events."""
    parts = [
        "# Metrics",
        "What a run writes down while it trains. [The run folder](../commands.md#the-run-folder) "
        "lists the files, [How to read a run's files](../notebooks/run_files.ipynb) reads them.",
        "## Per step",
        "One line of `metrics.jsonl` for each step, with `step` and `epoch`, both counted from 0. "
        "The event of an epoch has the mean of each over the epoch's steps.",
        table(("name", "meaning"), _meanings(METRIC_MEANINGS)),
        "## Per layer",
        "One row of `layers.npy` for each recorded step, with a column for each parameter.",
        table(("name", "meaning"), _meanings(LAYER_METRIC_MEANINGS)),
        "## Events",
        "Lines of `metrics.jsonl` with `event`, the kind, and `step`, the number of steps done.",
        table(("event", "meaning"), _meanings(EVENTS)),
        "The states are described under [States](../commands.md#states).",
    ]
    return "\n\n".join(parts) + "\n"


def _meanings(meanings: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((code(name), escaped(text)) for name, text in meanings.items())


# Claims


def claims_page() -> str:
    """Return the page of the post's claims: sentence, statements that a rule decides, runs."""
    parts = [
        "# Claims and rules",
        "The post's claims, the statements by which runs are judged, and the settings of these "
        "runs. [The post's appendix, reproduced](../appendix.md) has the verdicts. "
        "`fastbyol ablate show C6` prints one claim, `fastbyol ablate run C6` trains what it "
        "needs.",
        "An *arm* is a setting that the claim is about, run with several seeds; a *control* is "
        "what it is compared with. A claim stands or falls with its statements. One that *refines* "
        "makes it hold partly where it fails, and one that is *told* is shown and does not count. "
        "The scales, from `mini` to `full`, say how many images and epochs a run has "
        "(`fastbyol ablate run --help`).",
    ]
    for claim in CLAIMS:
        title = f"{claim.id} {claim.name}"
        rules = [f"- {escaped(line.strip())}" for line in in_words(claim.id).splitlines()]
        rows = (
            (
                code(name),
                "control" if name in claim.controls else "arm",
                escaped(arm(name).about),
                "<br>".join(code(f"{key} = {value}") for key, value in arm(name).settings.items()),
            )
            for name in (*claim.arms, *claim.controls)
        )
        parts += [
            f"## {escaped(title)}",
            escaped(claim.says),
            f"Judged from {claim.needs} seeds or more:",
            "\n".join(rules),
            table(("run", "kind", "what it is", "settings"), rows),
        ]
    return "\n\n".join(parts) + "\n"


# Python


def python_page() -> str:
    """Return the page of what ``import fastbyol`` offers, for mkdocstrings to fill.

    Names that are in no group come last.
    """
    grouped = {name for names in _PYTHON_GROUPS.values() for name in names} | {"__version__"}
    others = tuple(name for name in fastbyol.__all__ if name not in grouped)
    groups = {**_PYTHON_GROUPS, **({"Others": others} if others else {})}
    parts = [
        "# Python API",
        "Everything that `import fastbyol` offers. [From Python](../python.md) shows how it is "
        "used.",
    ]
    for title, names in groups.items():
        parts += [f"## {title}", *(f"::: fastbyol.{name}" for name in names)]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Return every page of the reference by its place in the site's sources."""
    return {
        **{command_uri(words): text for words, text in command_pages().items()},
        "reference/configuration.md": configuration_page(),
        "reference/metrics.md": metrics_page(),
        "reference/claims.md": claims_page(),
        "reference/python.md": python_page(),
    }
