"""The figures of docs/embeddings.md, of the runs that ``fastbyol demo DIR`` leaves.

    python -m fastbyol_bench.embedding_figures measure DIR   # ranks, times, picture and table
    python -m fastbyol_bench.embedding_figures docs          # the table alone

Measuring takes some minutes on one core.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbyol.demo import PAIR
from fastbyol.runs.durable import write_text
from fastbyol_bench.readme import DOCS, RESULTS, filled

DOCUMENT = DOCS / "embeddings.md"
KEPT, PICTURE = RESULTS / "embeddings" / "ranks.json", RESULTS / "embeddings" / "collapse.png"
BEGIN, END = (
    "<!-- embeddings: made by fastbyol_bench.embedding_figures -->",
    "<!-- embeddings: end -->",
)
DATA, ROWS = "fashion-mnist", 1500
# The demonstration's runs, in its folder.
RUNS = {
    **{name: f"lars/runs/{name}/seed0" for name in PAIR},
    "with BatchNorm": "run",
}


def measure(folder: Path) -> dict[str, Any]:
    """Return the measures of each run, and draw the first and the last of them."""
    import numpy as np
    import torch

    from fastbyol import api
    from fastbyol.evaluation.rank import relative_spread
    from fastbyol.show import run_report

    rows, drawn = {}, {}
    # What is compiled once is not counted.
    api.evaluate(folder / RUNS[PAIR[0]], "knn", lidar=True, lidar_images=2, lidar_views=2)
    for name, where in RUNS.items():
        run, began = folder / where, time.perf_counter()
        plain = api.evaluate(run, "knn", test_data=DATA)
        between = time.perf_counter()
        result = api.evaluate(run, "knn", test_data=DATA, lidar=True)
        ended = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            api.embed(run, Path(temporary) / "y.npz", data=DATA)
            with np.load(Path(temporary) / "y.npz") as file:
                y, labels, names = (file[key] for key in ("y", "labels", "class_names"))
        drawn[name] = torch.from_numpy(y[:ROWS]), labels[:ROWS], names.tolist()
        curves = run_report.read(run)
        rows[name] = {
            "state": curves.epoch_events[-1]["state"],
            "blog": curves.accuracies.last,
            "linear": api.evaluate(run, "linear", test_data=DATA)["accuracy"],
            "knn": plain["accuracy"],
            "spread": relative_spread(torch.from_numpy(y)),
            "dim": result["dim"],
            "embedded": plain["num_train"] + plain["num_test"],
            **{key: result[key] for key in _KEYS},
            "times": (ended - between - (between - began)) / (between - began),
        }
    draw({name: drawn[name] for name in (PAIR[0], "with BatchNorm")}, PICTURE)
    return {"data": DATA, "runs": rows}


_KEYS = (
    *("rank", "alpha", "alpha_r2", "alpha_range", "lidar_y", "lidar_z"),
    *("lidar_images", "lidar_views"),
)


def draw(runs: Mapping[str, tuple[Any, Any, list[str]]], path: Path) -> None:
    """Draw two runs' embeddings by PCA, in lengths of their mean: the first on both scales."""
    from fastbyol.evaluation import plane
    from fastbyol.show import embedding_picture, figures

    (first, (y, labels, names)), (second, other) = runs.items()
    panels = (
        (first, y, labels),
        (f"{first}, on the other's scale", y, labels),
        (second, *other[:2]),
    )
    with figures.settings():
        made = figures.blank(10.4, 3.4)
        every = made.subplots(1, len(panels))
        for axes, (title, rows, owners) in zip(every, panels, strict=True):
            laid = plane.pca(rows.double() / rows.double().mean(0).norm())
            entries = embedding_picture.draw(axes, laid, owners, names, named=False)
            axes.locator_params(nbins=5)
            axes.set_title(title, fontsize=9)
        every[1].set(xlim=every[2].get_xlim(), ylim=every[2].get_ylim())
        embedding_picture.add_legend(every[-1], entries)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, dpi=90, facecolor="white", metadata={"Software": None})


def block(record: Mapping[str, Any]) -> str:
    """Return the block, marks included, from ``measure``'s record."""
    runs = record["runs"]
    cells = {
        "state at the end": [row["state"] for row in runs.values()],
        "accuracy, `blog`": [f"{row['blog']:.1f} %" for row in runs.values()],
        "accuracy, `linear`": [f"{row['linear']:.1f} %" for row in runs.values()],
        "nearest neighbours": [f"{row['knn']:.1f} %" for row in runs.values()],
        "distance from the mean / the mean's length": [
            f"{row['spread']:.2g}" for row in runs.values()
        ],
        "RankMe of y": [f"{row['rank']:.1f} of {row['dim']}" for row in runs.values()],
        "alpha-ReQ of y (eigenvalues, R2)": [_alpha(row) for row in runs.values()],
        "LiDAR of y, of z": [
            f"{row['lidar_y']:.1f}, {row['lidar_z']:.1f}" for row in runs.values()
        ],
    }
    first = next(iter(runs.values()))
    ratios = [row["times"] for row in runs.values()]
    return "\n".join(
        [
            BEGIN,
            f"| | {' | '.join(runs)} |",
            "|---" * (1 + len(runs)) + "|",
            *(f"| {name} | {' | '.join(values)} |" for name, values in cells.items()),
            "",
            f"LiDAR of {first['lidar_images']} images and {first['lidar_views']} views of each "
            f"took {min(ratios):.1f} to {max(ratios):.1f} times as long as the rest of "
            f"`eval --protocol knn`, which embedded {first['embedded']} images.",
            END,
        ]
    )


def _alpha(row: Mapping[str, Any]) -> str:
    if row["alpha"] is None:
        return "none"
    first, last = row["alpha_range"]
    return f"{row['alpha']:.2f} ({first} to {last}, {row['alpha_r2']:.2f})"


def fresh(text: str) -> str:
    """Return the document's ``text`` with its block made anew from bench/results."""
    return filled(text, BEGIN, END, block(json.loads(KEPT.read_text("utf-8"))))


def main() -> None:
    """Do what the first word of the command line says."""
    word, *where = sys.argv[1:]
    if word == "measure":
        write_text(KEPT, json.dumps(measure(Path(*where)), indent=1) + "\n")
    if word in ("measure", "docs"):
        write_text(DOCUMENT, fresh(DOCUMENT.read_text("utf-8")))


if __name__ == "__main__":
    main()
