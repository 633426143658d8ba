"""Exports of encoders that timm or torchvision build: their own state dicts and constructors."""

from __future__ import annotations

from fastbyol.errors import FastbyolError, UsageError, one_line
from fastbyol.exports.formats import Format
from fastbyol.model.adapter import LIBRARIES, Adapter, Recipe, library_network


def construction(name: str, recipe: Recipe, num_classes: int | None) -> tuple[str, str]:
    """Return the imports and the construction of the library's network, for the format ``name``.

    Raises UsageError for the other library's format, and for a classifier.
    """
    if name in LIBRARIES and name != recipe.library:
        raise UsageError(
            f"--format {name}: the encoder is {recipe.name} of {recipe.library}: take --format "
            f"{recipe.library}, safetensors, onnx or torch-export"
        )
    if num_classes is not None:
        raise UsageError(
            f"--num-classes: is of fastbyol's own encoders, this one is {recipe.name} of "
            f"{recipe.library}: put a classifier behind its embeddings"
        )
    options = ", ".join([f'"{recipe.name}"', *(f"{k}={v!r}" for k, v in recipe.options.items())])
    if recipe.library == "timm":
        return "import timm\n", f"model = timm.create_model({options})\n"
    return "from torchvision import models\n", (
        f"model = models.get_model({options})\n"
        f'model.set_submodule("{recipe.classifier}", nn.Identity())\n'
    )


def content(kind: Format, name: str, encoder: Adapter, size: int) -> bytes:
    """Return the bytes of ``encoder`` in the format ``name``.

    Raises UsageError for a network that torch cannot trace.
    """
    net = library_network(encoder)
    try:
        return kind.content(net, size)
    except FastbyolError:
        raise
    except Exception as error:
        raise UsageError(
            f"--format {name}: torch cannot trace {encoder.recipe.name} of "
            f"{encoder.recipe.library} ({one_line(error)}): take --format "
            f"{encoder.recipe.library} or safetensors"
        ) from error
