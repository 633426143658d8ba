"""The image files that commands which train many runs name: options, paths, checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastbyol.errors import UsageError

if TYPE_CHECKING:
    from fastbyol.config import DataConfig
    from fastbyol.config_io import Flag

Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", help="Beton, what `convert` reads, fashion-mnist or textures."
    ),
]
TestData = Annotated[
    str | None,
    typer.Option("--test-data", metavar="DATA", help="Labelled images for the probe."),
]


def named(data: str | None, test_data: str | None) -> dict[str, str]:
    """Return the files that were named by dotted key: absolute paths, or built-in sets."""
    from fastbyol.data.source_torchvision import absolute
    from fastbyol.data.sources import is_path

    files = {"data.train": data, "data.test": test_data}
    return {
        key: str(Path(name).resolve()) if is_path(name) else absolute(name)
        for key, name in files.items()
        if name
    }


def flags(files: Mapping[str, str], device: str) -> dict[str, Flag]:
    """Return the flags of ``files``, which ``named`` returned, and of ``--device``."""
    from fastbyol.config_io import Flag

    names = {"data.train": "--data", "data.test": "--test-data"}
    made = {key: Flag(names[key], value) for key, value in files.items()}
    # Of several GPUs the worker sees its own alone.
    kind = device.partition(":")[0]
    return made if device == "auto" else {**made, "train.device": Flag("--device", kind)}


def check(files: Mapping[str, str], data: DataConfig) -> int | None:
    """Check both files; return how many images the training file has, None for a built-in set.

    What is no beton is converted as runs on ``data`` read it. Raises UsageError for what cannot be
    read, and for test data without labels.
    """
    from fastbyol.data import beton
    from fastbyol.data.embedded import BUILT_IN, file_of

    test, train = files.get("data.test"), files.get("data.train")
    if test and test not in BUILT_IN:
        labels = beton.inspect(file_of(test, "test", data)).labels
        if labels is None or len(set(labels[labels >= 0].tolist())) < 2:
            raise UsageError(
                f"{test}: the probe needs labels of two classes or more: name a labelled file "
                "with --test-data"
            )
    if train is None or train in BUILT_IN:
        return None
    return beton.inspect(file_of(train, "train", data), may_lack_labels=True).num_samples
