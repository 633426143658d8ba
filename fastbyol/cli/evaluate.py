"""The command ``eval``: how good a run's encoder is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastbyol.cli.options import Device, ImageField, Json, LabelField, RunOrFile, Weights
from fastbyol.output import print_json, say

Protocol = Annotated[
    Literal["blog", "linear", "knn"], typer.Option(help="How accuracy is measured.")
]
TrainData = Annotated[
    Path | None, typer.Option("--train-data", metavar="FILE", help="Fit on this (linear, knn).")
]
TestData = Annotated[
    Path | None, typer.Option("--test-data", metavar="FILE", help="Score on this.")
]


def evaluate(
    run: RunOrFile,
    protocol: Protocol = "blog",
    train_data: TrainData = None,
    test_data: TestData = None,
    weights: Weights = "trained",
    image_field: ImageField = None,
    label_field: LabelField = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a run's encoder."""
    from fastbyol import api

    if protocol == "blog" and train_data is not None:
        say(
            "--train-data: not looked at, the blog protocol fits within the test set; linear and "
            "knn take it",
            err=True,
        )
    result = api.evaluate(
        run,
        protocol,
        train_data=train_data,
        test_data=test_data,
        weights=weights,
        device=device,
        image_field=image_field,
        label_field=label_field,
    )
    for note in result["notes"]:
        say(note, err=True)
    if as_json:
        print_json(result)
        return
    counts = (
        f"{result['num_train']} fitted, {result['num_test']} scored, {result['num_classes']} "
        "classes"
    )
    say(f"{run}: {result['accuracy']:.2f}% ({protocol}, {counts})")
