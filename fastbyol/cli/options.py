"""Options that several commands share, and those of ``train``, from the fields of config.py."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from fastbyol import config_io
from fastbyol.config import Option
from fastbyol.config_io import Flag
from fastbyol.errors import UsageError

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object on standard output, everything else on standard error.",
    ),
]
BetonPath = Annotated[Path, typer.Argument(metavar="FILE", help="A beton file.")]
ImageField = Annotated[
    str | None, typer.Option("--image-field", metavar="NAME", help="Default: the only image field.")
]
LabelField = Annotated[
    str | None,
    typer.Option(
        "--label-field", metavar="NAME", help="Default: label, or the only one of a usual name."
    ),
]
LogTo = Annotated[
    list[str] | None,
    typer.Option(
        "--log", metavar="NAME", help="Log to these from now on; '' to none. Default: as before."
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
RunOrFile = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint file.")
]
Weights = Annotated[
    Literal["trained", "target", "random"],
    typer.Option(help="Of the online network, of the target network, or as the seed drew them."),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file over the preset.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key, e.g. views.size=32."),
]

Gpus = Annotated[
    int | None, typer.Option("--gpus", min=1, help="Train on as many GPUs, a process for each.")
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Processes for the ranks on this machine. Default on a cpu: as many."),
]
Nodes = Annotated[
    int | None, typer.Option("--nnodes", min=1, help="Machines that run this same command.")
]
Endpoint = Annotated[
    str | None,
    typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Where several machines meet."),
]

# Sections of config.py in the order in which ``train --help`` lists their options.
SECTIONS = ("data", "train", "engine", "method", "model", "views", "optim", "log")


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace ``**values`` of ``command`` by an option for each ``Option`` of config.py.

    Options of the section ``data`` come first; the last own option of ``command`` stays the last.
    """
    parameters: dict[str, inspect.Parameter] = {}
    num_data = 0
    for key, field, option in declared():
        name = _argument(option)
        help_text = option.about or field.description
        default = typer.Option(
            None, option.name, metavar=option.metavar or _choices(field), help=help_text
        )
        parameters[name] = inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=_parsed_type(field) | None,
        )
        num_data = len(parameters) if key.startswith("data.") else num_data
    signature = inspect.signature(command, eval_str=True)
    *own, last, _ = signature.parameters.values()
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, last)]
    made = list(parameters.values())
    arranged = [*made[:num_data], *own[:-1], *made[num_data:], own[-1]]
    command.__signature__ = signature.replace(parameters=arranged)  # type: ignore[attr-defined]
    return command


def config_flags(values: Mapping[str, Any]) -> dict[str, Flag]:
    """Return the flags in ``values`` by the dotted key that they set.

    ``values`` are options by argument name.
    """
    flags = {}
    for key, field, option in declared():
        value = values[_argument(option)]
        if value is not None:
            name = option.name.partition("/")[0]
            flags[key] = Flag(
                name, _items(name, field, value) if isinstance(value, list) else value
            )
    return flags


def declared() -> Iterator[tuple[str, FieldInfo, Option]]:
    """Yield key, field and option of each option, its name whole, in the order of ``SECTIONS``."""
    fields = [
        (key, field)
        for key, field in config_io.keys().items()
        if any(map(_is_option, field.metadata))
    ]
    for key, field in sorted(fields, key=lambda item: SECTIONS.index(item[0].partition(".")[0])):
        for option in filter(_is_option, field.metadata):
            name = option.name.format(head=key.split(".")[-2])
            yield key, field, Option(name, option.metavar, option.about)


def _is_option(marker: object) -> bool:
    return isinstance(marker, Option)


def _argument(option: Option) -> str:
    return option.name.partition("/")[0].removeprefix("--").replace("-", "_")


def _kind(field: FieldInfo) -> Any:
    return next(kind for kind in config_io.alternatives(field) if kind is not types.NoneType)


def _parsed_type(field: FieldInfo) -> Any:
    """Return the type that typer parses.

    config.py checks the values, so that messages name the key.
    """
    kind = _kind(field)
    if typing.get_origin(kind) is tuple:
        return list[str]
    return type(typing.get_args(kind)[0]) if typing.get_origin(kind) is Literal else kind


def _choices(field: FieldInfo) -> str | None:
    """Return the words of a field as ``a|b``, or None for a field of another type."""
    kind = _kind(field)
    return "|".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else None


def _items(name: str, field: FieldInfo, values: list[str]) -> list[Any] | None:
    """Return the items of a repeatable option: ``PATTERN=FACTOR`` pairs, or texts with commas."""
    if _kind(field) == tuple[tuple[str, float], ...]:
        return [_pair(name, value) for value in values] or None
    return [part for value in values for part in value.split(",") if part] if values else None


def _pair(name: str, value: str) -> tuple[str, float]:
    pattern, _, factor = value.rpartition("=")
    try:
        number = float(factor)
    except ValueError:
        pattern = ""
    if not pattern:
        raise UsageError(f"{name} {value}: write PATTERN=FACTOR, for example encoder.layer1=4")
    return pattern, number
