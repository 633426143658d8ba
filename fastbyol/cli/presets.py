"""The commands for presets: list, show, copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastbyol import config_io
from fastbyol.cli.options import Json
from fastbyol.errors import UsageError
from fastbyol.output import print_json, say

app = typer.Typer(help="The settings that ship with fastbyol.", no_args_is_help=True)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Name the presets."""
    rows = {name: config_io.preset_summary(name) for name in config_io.presets()}
    if as_json:
        print_json(rows)
    else:
        say(*(f"{name:8s}{text}" for name, text in rows.items()))


@app.command()
def show(name: str, as_json: Json = False) -> None:
    """Print every value of a preset, and where it comes from."""
    loaded = config_io.load(preset=name)
    if as_json:
        print_json(loaded.config.model_dump(mode="json"))
    else:
        say(*config_io.dump(loaded.config, loaded.origin).split("\n"))


@app.command()
def copy(name: str, out: Annotated[Path, typer.Argument(help="TOML file to write.")]) -> None:
    """Write a preset's file, comments and all, to edit and pass with --config."""
    text = config_io.preset_text(name)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(
            f"{out}: {error.strerror}: name a new file in a folder that can be written"
        ) from None
    say(str(out))
