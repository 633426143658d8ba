"""Does r, measured before training, say which runs end collapsed? Against two simpler markers.

    python -m fastbyol_bench.science.marker_test measure FOLDER   # markers of every kept column
    python -m fastbyol_bench.science.marker_test judge            # fit, and judge on other data

FOLDER has the betons of ``fastbyol_bench.marker_data``. A logistic model of log marker and log
learning rate is fitted to the runs of one diagram, Fashion-MNIST's, and judged on the others': data
that r was not found on. Those of ``kinds`` and ``digits`` are ``fastbyol sweep`` of the files of
these names beside this one. Letters: N runs.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from fastbyol import config_io
from fastbyol.cli.data_marker import NETWORK, measured
from fastbyol.config_io import Setting
from fastbyol.data.embedded import BUILT_IN
from fastbyol.runs.durable import write_text
from fastbyol.sweeps.report import CSV
from fastbyol_bench.science import KEPT

FITTED = "fashion-mnist"
# What is kept, by name, and the images where all runs have the same.
DIAGRAMS = {FITTED: FITTED, "textures": "textures", "kinds": None, "digits": "digits"}
UNSEEN = "all but the fitted"
MARKERS = KEPT / "markers.json"
JUDGED = KEPT / "marker.json"
SEEDS, IMAGES = range(5), 1024
# What is tried: the marker's own number, and how it enters the model beside the learning rate.
COLUMNS: Mapping[str, Callable[[Mapping[str, float]], float]] = {
    "r": lambda row: math.log(row["r"]),
    "variance ratio": lambda row: math.log(max(row["variance_ratio"], 1e-3)),
    "neighbours' entropy": lambda row: row["knn_entropy"],
    "learning rate alone": lambda row: 0.0,
}


class Outcome(NamedTuple):
    """A finished run: its images, range of crops, learning rate, and whether it ends collapsed."""

    diagram: str
    data: str
    scale: str
    lr: float
    collapsed: bool


class Score(NamedTuple):
    """How a model does on runs: the area under its curve, share of right answers, Brier's score.

    ``most`` is the share of the more frequent end, which is right without any model.
    """

    auc: float
    right: float
    brier: float
    most: float
    runs: int


def outcomes(name: str) -> Iterator[Outcome]:
    """Yield the finished runs of a kept diagram; none if it is not kept."""
    file = KEPT / name / CSV
    if not file.exists():
        return
    with file.open(encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            if row["status"] == "done":
                data = DIAGRAMS[name] or Path(row["data.train"]).stem.removesuffix("-train")
                collapsed = float(row["collapsed"]) > 0
                yield Outcome(name, data, row["views.scale"], float(row["optim.lr"]), collapsed)


def fit(features: NDArray[np.float64], ends: NDArray[np.bool_]) -> Callable[..., Any]:
    """Return P(collapsed) as a function of features (N, 2), by logistic regression.

    Features are standardized by those of the fit. A weak penalty (C = 100) keeps the fit finite
    where a line separates the runs.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=100.0)).fit(features, ends)
    return lambda rows: model.predict_proba(rows)[:, 1]


def score(predicted: NDArray[np.float64], ends: NDArray[np.bool_]) -> Score:
    """Return how well probabilities (N,) go with ends (N,); no area (NaN) for ends of one kind."""
    from sklearn.metrics import roc_auc_score

    auc = roc_auc_score(ends, predicted) if ends.any() and not ends.all() else math.nan
    right, brier = ((predicted > 0.5) == ends).mean(), ((predicted - ends) ** 2).mean()
    most = max(ends.mean(), 1 - ends.mean())
    return Score(float(auc), float(right), float(brier), float(most), len(ends))


def judge(runs: Sequence[Outcome], markers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what each of ``COLUMNS`` predicts of each cell, and its scores on each diagram.

    Scores are also of all diagrams but ``FITTED``, and of two that fit anew: to the other crops of
    ``FITTED`` for each of its crops, and to all runs on other images for each kind of images.
    """
    by_column = {(row["data"], row["scale"]): row for row in markers}
    ends = np.array([run.collapsed for run in runs])
    diagrams, crops, images = (
        np.array([getattr(run, name) for run in runs]) for name in ("diagram", "scale", "data")
    )
    fitted = diagrams == FITTED
    groups = {name: diagrams == name for name in DIAGRAMS if name in diagrams} | {UNSEEN: ~fitted}
    scores, predictions = {}, {}
    for name, of in COLUMNS.items():
        rows = np.array([[of(by_column[r.data, r.scale]), math.log(r.lr)] for r in runs])
        predictions[name] = fit(rows[fitted], ends[fitted])(rows)
        of_crops = _left_out(crops[fitted], rows[fitted], ends[fitted])
        # No area: it would order runs by different models of kinds that end differently.
        of_images = score(_left_out(images, rows, ends), ends)._replace(auc=math.nan)
        scores[name] = {
            where: _plain(score(predictions[name][own], ends[own])) for where, own in groups.items()
        } | {
            f"{FITTED}, a crop left out": _plain(score(of_crops, ends[fitted])),
            "all, images left out": _plain(of_images),
        }
    return {"scores": scores, "cells": _cells(runs, predictions)}


def _cells(
    runs: Sequence[Outcome], predictions: Mapping[str, NDArray[np.float64]]
) -> list[dict[str, Any]]:
    """Return a row a point: how many of its runs end collapsed, and each P(collapsed)."""
    cells: dict[tuple[str, str, float], dict[str, Any]] = {}
    for index, run in enumerate(runs):
        cell = cells.setdefault(
            (run.data, run.scale, run.lr),
            {
                "data": run.data, "scale": run.scale, "lr": run.lr, "runs": 0, "collapsed": 0,
                "predicted": {name: float(each[index]) for name, each in predictions.items()},
            },
        )  # fmt: skip
        cell["runs"] += 1
        cell["collapsed"] += run.collapsed
    return list(cells.values())


def _left_out(
    groups: NDArray[np.str_], features: NDArray[np.float64], ends: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return P(collapsed) of each run by a fit to the runs of the other groups."""
    predicted = np.empty(len(ends))
    for group in np.unique(groups):
        own = groups == group
        predicted[own] = fit(features[~own], ends[~own])(features[own])
    return predicted


def _plain(each: Score) -> dict[str, float | int | None]:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in each._asdict().items()
    }


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def measure(folder: Annotated[Path, typer.Argument(metavar="FOLDER")]) -> None:
    """Measure the markers of the images and crops of all kept diagrams."""
    columns = dict.fromkeys((r.data, r.scale) for name in DIAGRAMS for r in outcomes(name))
    rows = []
    for data, scale in columns:
        file = data if data in BUILT_IN else str(folder / f"{data}-train.beton")
        low, high = scale.split("+")
        base = {key: Setting(value, "marker_test") for key, value in NETWORK.items()}
        sets = [f"data.train={file}", f"views.scale=[{low}, {high}]"]
        config = config_io.load(sets=sets, base=base, default="demo").config
        made = measured(config, SEEDS, IMAGES)
        ratios = made["variance_ratio"]
        rows.append(
            {
                "data": data, "scale": scale, "r": made["y"]["r_mean"], "r_sd": made["y"]["r_sd"],
                "variance_ratio": sum(ratios) / len(ratios), "knn_entropy": made["knn_entropy"],
            }
        )  # fmt: skip
    write_text(MARKERS, json.dumps(rows, indent=1) + "\n")


@app.command("judge")
def write_judgement() -> None:
    """Fit on one diagram, and write how each marker does on the others."""
    runs = [run for name in DIAGRAMS for run in outcomes(name)]
    judged = judge(runs, json.loads(MARKERS.read_text("utf-8")))
    write_text(JUDGED, json.dumps(judged, indent=1) + "\n")


if __name__ == "__main__":
    app()
