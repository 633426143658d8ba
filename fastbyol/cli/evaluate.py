"""The command ``eval``: how good a run's encoder is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastbyol.cli.options import Device, ImageField, Json, LabelField, RunOrFile, Weights
from fastbyol.evaluation.intervals import accuracy_text
from fastbyol.output import print_json, print_table, say

Protocol = Annotated[
    Literal["blog", "linear", "knn", "finetune"],
    typer.Option(help="How accuracy is measured; finetune trains all layers with labels."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", metavar="NAME", help="Another data set, with a training and a test part; several."
    ),
]
TrainData = Annotated[
    Path | None, typer.Option("--train-data", metavar="FILE", help="Fit on this (not blog).")
]
TestData = Annotated[
    Path | None, typer.Option("--test-data", metavar="FILE", help="Score on this.")
]
Labels = Annotated[
    float, typer.Option(metavar="SHARE", help="Fit on this share of each class, e.g. 0.1.")
]
Epochs = Annotated[int | None, typer.Option(help="Of finetune. Default: 30.")]
Lr = Annotated[
    list[float] | None,
    typer.Option(
        help="Of finetune; of several the best on held-out training images. Default: 0.05."
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Of finetune. Default: 64.")]
Seed = Annotated[int, typer.Option(help="Of finetune and --labels.")]
PerClass = Annotated[
    bool, typer.Option("--per-class", help="Show a table of the classes, too; in --json, classes.")
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
    data: Data = None,
    train_data: TrainData = None,
    test_data: TestData = None,
    labels: Labels = 1.0,
    weights: Weights = "trained",
    epochs: Epochs = None,
    lr: Lr = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    per_class: PerClass = False,
    image_field: ImageField = None,
    label_field: LabelField = None,
    lidar: LidarToo = False,
    lidar_images: LidarImages = 1000,
    lidar_views: LidarViews = 50,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a run's encoder, on its own data or on others."""
    from fastbyol import api

    _note(*_unused(protocol, train_data))
    results: list[dict[str, Any]] = []
    names: Sequence[str | None] = data or [None]
    for name in names:
        result = api.evaluate(
            run, protocol, data=name, train_data=train_data, test_data=test_data, weights=weights,
            device=device, image_field=image_field, label_field=label_field, labels=labels,
            epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, note=_note,
            lidar=lidar, lidar_images=lidar_images, lidar_views=lidar_views,
        )  # fmt: skip
        _note(*(f"{name}: {line}" if name else line for line in result["notes"]))
        results.append(result if per_class or not as_json else _without_classes(result))
    if as_json:
        print_json(results[0] if len(results) == 1 else {"run": str(run), "results": results})
    else:
        _show(run, results, per_class=per_class)


def _note(*lines: str) -> None:
    if lines:
        say(*lines, err=True)


def _unused(protocol: str, train_data: Path | None) -> Iterator[str]:
    if protocol == "blog" and train_data is not None:
        yield (
            "--train-data: not looked at, the blog protocol fits within the test set; linear, knn "
            "and finetune take it"
        )


def _without_classes(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "classes"}


def _show(run: Path, results: Sequence[Mapping[str, Any]], *, per_class: bool) -> None:
    """Print one result in a line, several as a table, and then those of the classes."""
    if len(results) == 1:
        (result,) = results
        counts = (
            f"{result['num_train']} fitted, {result['num_test']} scored, {result['num_classes']} "
            "classes"
        )
        top = f", top-5 {text}" if (text := _shown(result, "top5_accuracy")) else ""
        say(f"{run}: {_shown(result)}{top} ({result['protocol']}, {counts})", *_ranks(result))
    else:
        print_table([*_table(results)])
        say(*(f"{row['test_data']}: {line}" for row in results for line in _ranks(row)))
    for result in results if per_class else ():
        if len(results) > 1:
            say(result["test_data"])
        print_table([*_class_table(result["classes"])])


def _ranks(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on how many directions the embeddings use."""
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


def _table(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    yield ["data", "protocol", "fitted", "scored", "classes", "accuracy", "top-5"]
    for result in results:
        counts = (str(result[key]) for key in ("num_train", "num_test", "num_classes"))
        shown = (_shown(result), _shown(result, "top5_accuracy"))
        yield [result["test_data"], result["protocol"], *counts, *shown]


def _class_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    yield ["class", "images", "accuracy", "mostly mistaken for"]
    for row in rows:
        mistaken = row["mistaken_for"]
        most = "" if mistaken is None else f"{mistaken} ({row['num_mistaken']})"
        yield [row["name"], str(row["num_test"]), _shown(row), most]


def _shown(row: Mapping[str, Any], key: str = "accuracy") -> str:
    return "" if row[key] is None else accuracy_text(row[key], row["num_test"])
