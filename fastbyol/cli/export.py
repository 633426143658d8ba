"""The command ``export``: an encoder for torchvision, timm, ONNX Runtime and others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastbyol.cli.options import Json, RunOrFile, Weights
from fastbyol.errors import size_text
from fastbyol.output import print_result

Format = Annotated[
    Literal["torchvision", "timm", "safetensors", "onnx", "torch-export"],
    typer.Option("--format", help="What is to load the encoder."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="PATH", help="Default: a name in RUN/exports."),
]
Classes = Annotated[
    int | None,
    typer.Option(
        "--num-classes", metavar="N", help="Add an untrained classifier (state dicts only)."
    ),
]
Licence = Annotated[
    str | None, typer.Option("--license", metavar="TEXT", help="Of the weights, for the card.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier export of the same name.")
]


def export(
    run: RunOrFile,
    name: Format = "torchvision",
    out: Out = None,
    weights: Weights = "trained",
    num_classes: Classes = None,
    licence: Licence = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a run's encoder for other libraries, check it, and write a model card."""
    from fastbyol import api

    result = api.export(
        run,
        out,
        format=name,
        weights=weights,
        num_classes=num_classes,
        license=licence,
        overwrite=overwrite,
    )
    print_result(result, in_words, as_json=as_json)


def in_words(result: dict[str, Any]) -> list[str]:
    """Return the result of ``api.export`` in lines."""
    return [
        f"{result['out']}: {size_text(result['num_bytes'])}, {result['format']}, "
        f"{result['weights']} weights after step {result['step']}",
        f"{result['card']}: the model card",
        f"parity: {result['parity']['in_words']}",
        "load it with",
        "",
        *(f"    {line}".rstrip() for line in result["load"].splitlines()),
    ]
