"""The command ``eval``: how good a run's encoder is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

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
LidarToo = Annotated[
    bool, typer.Option("--lidar", help="Measure LiDAR, too, on views of the test images.")
]
LidarImages = Annotated[
    int, typer.Option("--lidar-images", metavar="N", help="Images that LiDAR compares.")
]
LidarViews = Annotated[
    int, typer.Option("--lidar-views", metavar="N", help="Views of each of these images.")
]


def evaluate(
    run: RunOrFile,
    protocol: Protocol = "blog",
    train_data: TrainData = None,
    test_data: TestData = None,
    weights: Weights = "trained",
    image_field: ImageField = None,
    label_field: LabelField = None,
    lidar: LidarToo = False,
    lidar_images: LidarImages = 1000,
    lidar_views: LidarViews = 50,
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
        run, protocol, train_data=train_data, test_data=test_data, weights=weights, device=device,
        image_field=image_field, label_field=label_field,
        lidar=lidar, lidar_images=lidar_images, lidar_views=lidar_views,
    )  # fmt: skip
    for note in result["notes"]:
        say(note, err=True)
    if as_json:
        print_json(result)
    else:
        say(*in_words(result))


def in_words(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the result of ``api.evaluate`` in lines."""
    counts = (
        f"{result['num_train']} fitted, {result['num_test']} scored, {result['num_classes']} "
        "classes"
    )
    yield f"{result['run']}: {result['accuracy']:.2f}% ({result['protocol']}, {counts})"
    line = f"RankMe {result['rank']:.1f} of {result['dim']}"
    if result["alpha"] is not None:
        first, last = result["alpha_range"]
        line += (
            f", alpha-ReQ {result['alpha']:.2f} (eigenvalues {first} to {last}, "
            f"R2 {result['alpha_r2']:.2f})"
        )
    yield line
    if "lidar_y" in result:
        yield (
            f"LiDAR {result['lidar_y']:.1f} of embeddings, {result['lidar_z']:.1f} of projections "
            f"({result['lidar_images']} images, {result['lidar_views']} views of each)"
        )
