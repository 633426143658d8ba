"""Does r, measured before training, say which runs end collapsed? Against two simpler markers.

    python -m fastbyol_bench.science.marker_test measure FOLDER   # markers of every kept column
    python -m fastbyol_bench.science.marker_test judge            # fit, and judge on other data

FOLDER has the betons of ``fastbyol_bench.marker_data``. A logistic model of log marker and log
learning rate is fitted to the runs of one diagram, Fashion-MNIST's, and judged on the others': data
that r was not found on. Letters: N runs.
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
from fastbyol_bench.science.document import CSV, KEPT

FITTED = "fashion-mnist"
# Diagrams of two keys, and what a key that is not crossed has for all runs.
DIAGRAMS: Mapping[str, Mapping[str, str]] = {
    FITTED: {"data.train": FITTED},
    "textures": {"data.train": "textures"},
    "kinds": {"optim.lr": "0.2"},
    "digits": {"data.train": "digits", "optim.lr": "0.2"},
}
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
    """How a model does on runs: the area under its curve, share of right answers, Brier's score."""

    auc: float
    right: float
    brier: float
    runs: int


def outcomes(name: str) -> Iterator[Outcome]:
    """Yield the finished runs of a kept diagram; none if it is not kept."""
    file = KEPT / name / CSV
    if not file.exists():
        return
    with file.open(encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            if row["status"] == "done":
                whole = {**DIAGRAMS[name], **row}
                data = Path(whole["data.train"]).stem.removesuffix("-train")
                collapsed = float(whole["collapsed"]) > 0
                yield Outcome(name, data, whole["views.scale"], float(whole["optim.lr"]), collapsed)


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
    right = float(((predicted > 0.5) == ends).mean())
    return Score(float(auc), right, float(((predicted - ends) ** 2).mean()), len(ends))


def judge(
    runs: Mapping[str, Sequence[Outcome]], markers: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return the score of each of ``COLUMNS`` on each diagram, and on crops that a fit left out.

    The latter is of ``FITTED`` itself: for each of its crops the model is fitted to the others.
    """
    by_column = {(row["data"], row["scale"]): row for row in markers}
    result: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for name, of in COLUMNS.items():
        features = {
            diagram: np.array([[of(by_column[r.data, r.scale]), math.log(r.lr)] for r in rows])
            for diagram, rows in runs.items()
        }
        ends = {diagram: np.array([r.collapsed for r in rows]) for diagram, rows in runs.items()}
        predict = fit(features[FITTED], ends[FITTED])
        scores = {diagram: score(predict(features[diagram]), ends[diagram]) for diagram in runs}
        scores[f"{FITTED}, crops left out"] = score(
            _left_out(runs[FITTED], features[FITTED], ends[FITTED]), ends[FITTED]
        )
        result[name] = {where: _plain(each) for where, each in scores.items()}
    return result


def _left_out(
    runs: Sequence[Outcome], features: NDArray[np.float64], ends: NDArray[np.bool_]
) -> NDArray[np.float64]:
    predicted = np.empty(len(runs))
    scales = np.array([run.scale for run in runs])
    for scale in np.unique(scales):
        own = scales == scale
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
    runs = {name: rows for name in DIAGRAMS if (rows := list(outcomes(name)))}
    judged = judge(runs, json.loads(MARKERS.read_text("utf-8")))
    write_text(JUDGED, json.dumps(judged, indent=1) + "\n")


if __name__ == "__main__":
    app()
