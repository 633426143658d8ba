"""The tables of docs/science.md, from what bench/results/science keeps.

    python -m fastbyol_bench.science.document collect DIR NAME    # keep a phase diagram's folder
    python -m fastbyol_bench.science.document docs                # write the tables

``collect`` copies ``sweep.csv`` and writes ``epochs.json``; of a diagram it also copies
``markers.json`` and draws both pictures.
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from scipy.stats import spearmanr

from fastbyol.config import IN_COLLAPSE
from fastbyol.data.embedded import BUILT_IN
from fastbyol.runs.durable import write_text
from fastbyol.runs.metrics import read_events
from fastbyol.sweeps import markers, phase, results
from fastbyol.sweeps.report import CSV
from fastbyol.sweeps.results import Sweep
from fastbyol_bench.readme import DOCS, filled, markdown
from fastbyol_bench.science import KEPT, forks, marker_test, mechanism

DOCUMENT = DOCS / "science.md"
DIAGRAMS = ("fashion-mnist", "textures")
EPOCHS = "epochs.json"


class Cell(NamedTuple):
    """The finished runs of a point: how many there are, collapse, and leave the collapse."""

    runs: int
    collapse: int
    leave: int

    def __str__(self) -> str:
        if not self.runs:
            return ""
        left = f", {self.leave}/{self.collapse}" if self.collapse else ""
        return f"{self.collapse}/{self.runs}{left}"


def cells(name: str) -> dict[tuple[str, str], Cell]:
    """Return the points of the kept diagram ``name`` by their two values, as ``CSV`` has them."""
    with (KEPT / name / CSV).open(encoding="utf-8") as file:
        reader = csv.DictReader(file)
        x, y = (reader.fieldnames or ())[:2]
        made: dict[tuple[str, str], Cell] = {}
        for row in reader:
            if row["status"] == "done":
                runs, collapse, leave = made.get((row[x], row[y]), Cell(0, 0, 0))
                is_collapsed, leaves = (float(row[key] or 0) for key in phase.MEASURES)
                made[row[x], row[y]] = Cell(
                    runs + 1, collapse + int(is_collapsed), leave + int(leaves)
                )
    return made


def diagram(name: str) -> str:
    """Return the table of the diagram ``name``: rows are learning rates, the last is r."""
    points = cells(name)
    xs, ys = (list(dict.fromkeys(values)) for values in zip(*points, strict=True))
    kept = json.loads((KEPT / name / markers.FILE).read_text("utf-8"))
    by_crop = {
        "+".join(map(str, json.loads(key)["views"]["scale"])): rs for key, rs in kept.items()
    }
    rows = [(y, *(str(points.get((x, y), "")) for x in xs)) for y in ys]
    rows.append(("marker r", *(f"{statistics.fmean(by_crop[x]):.3f}" for x in xs)))
    return markdown((f"{name}: learning rate", *map(_in_words, xs)), rows)


def endings(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of futures: who left, after how long, for how long, with what accuracy."""
    lines = []
    for name in forks.FUTURES:
        own = [row for row in rows if row["future"] == name]
        left = [row for row in own if row["left_at"] is not None]
        took = [row["left_at"] - row["step"] for row in left]
        relapsed = sum(row["state"] in IN_COLLAPSE for row in left)
        ends = [row["state"] for row in own]
        states = ", ".join(f"{ends.count(state)} {state}" for state in sorted(set(ends)))
        cosines, accuracies = ([row["neg_cos"][-1] for row in own], [r["accuracy"] for r in own])
        counts = (f"{len(left)} of {len(own)}", _span(took, 0), f"{relapsed} of {len(left)}")
        lines.append((name, *counts, states, _span(cosines, 2), _span(accuracies, 0)))
    heads = (
        "leave", "steps from the fork", "relapse", "at the end", "cosine of negative pairs",
        "accuracy, %",
    )  # fmt: skip
    return markdown(("future", *heads), lines)


def scores(judged: Mapping[str, Any]) -> str:
    """Return the table of markers: area under the curve, right answers, Brier score."""
    by_marker = judged["scores"]
    first = next(iter(by_marker.values()))
    rows = [(name, *(_score(own[group]) for group in first)) for name, own in by_marker.items()]
    most = (f"{own['most']:.0%}" for own in first.values())
    rows.append(("always the more frequent end", *most))
    return markdown(("known beside the rate", *first), rows)


def _score(own: Mapping[str, Any]) -> str:
    area = "" if own["auc"] is None else f"{own['auc']:.2f}, "
    return f"{area}{own['right']:.0%}, {own['brier']:.2f}"


def other_images(judged: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of images that are not built in: runs that end collapsed, and predicted."""
    rates = (0.1, 0.2)
    by_point = {(cell["data"], cell["scale"], cell["lr"]): cell for cell in judged["cells"]}
    rows = []
    for row in (row for row in measured if row["data"] not in BUILT_IN):
        own = (by_point[row["data"], row["scale"], lr] for lr in rates)
        ends = (f"{c['collapsed']}/{c['runs']}, {c['predicted']['r']:.2f}" for c in own)
        markers_of_row = (f"{row['r']:.3f}", f"{row['variance_ratio']:.2f}")
        rows.append((row["data"], _in_words(row["scale"]), *markers_of_row, *ends))
    return markdown(("images", "crops", "r", "variance ratio", *map(str, rates)), rows)


def counts(name: str) -> str:
    """Return how many steps the kept runs of ``name`` took, and when they were first collapsed."""
    runs = json.loads((KEPT / name / EPOCHS).read_text("utf-8")).values()
    first = [run["collapsed_in"] for run in runs if run["collapsed_in"] is not None]
    ends = " to ".join(map(str, sorted({min(first), max(first)}))) if first else ""
    return (
        f"{len(runs)} runs, {sum(run['steps'] for run in runs):,} steps. "
        f"{len(first)} are ever collapsed" + (f", first in epoch {ends}." if first else ".")
    )


def epochs_of(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Return the steps, the first epoch that ends collapsed (from 1 on) and 1 - cosine of each run.

    The cosine is that of negative pairs, an epoch's mean.
    """
    made = {}
    for run in (run for run in sweep.runs if run.is_done):
        ends = [event for event in read_events(run.path) if event["event"] == "epoch"]
        collapsed = (event["epoch"] + 1 for event in ends if event["state"] in IN_COLLAPSE)
        made[str(run.path.relative_to(sweep.out))] = {
            "steps": ends[-1]["step"],
            "collapsed_in": next(collapsed, None),
            "distance": [float(f"{1 - event['neg_cos']:.3g}") for event in ends],
        }
    return made


def inside(seen: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what was seen inside runs, at the checkpoints where they are collapsed.

    The deepest is the one with the least spread of z. A line below has the rank correlations
    of this spread and the early gradient's signal / noise.
    """
    lines = []
    pairs: dict[str, list[tuple[float, float]]] = {}
    for run in seen:
        states = {row["step"]: row for row in run["curves"] if row["state"] in IN_COLLAPSE}
        looks = [look for look in run["looks"] if look["step"] in states]
        deepest = min(looks, key=lambda look: look["spread"]["z"])
        least = [f"{deepest['spread'][part]:.2g}" for part in ("layer2", "layer3", "layer4", "z")]
        early = [look["gradient"]["early"] for look in looks]
        clear = [own["signal"] / own["noise"] for own in early]
        spans = (
            _span([row["early_rate"] for row in states.values()], 0),
            _span([10_000 * row["early_move"] for row in states.values()], 1),
            _span(clear, 1),
        )
        ends = run["curves"][-1]["state"]
        about = (run["data"], f"{run['lr']:g}", str(run["seed"]), ends, str(deepest["step"]))
        lines.append((*about, *least, *spans))
        spread = [look["spread"]["z"] for look in looks]
        group = f"{run['data']} at {run['lr']:g}"
        pairs.setdefault(group, []).extend(zip(spread, clear, strict=True))
    pairs = {"all": [pair for own in pairs.values() for pair in own], **pairs}
    of = ", ".join(f"{_rank_correlation(own):.2f} on {group}" for group, own in pairs.items())
    spreads = (f"spread after {part}" for part in ("layer2", "layer3", "layer4"))
    gradient = ("early rate", "move, 1e-4", "early signal / noise")
    heads = ("images", "LARS", "seed", "ends", "deepest at step", *spreads, "of z", *gradient)
    return (
        f"{markdown(heads, lines)}\n\nOver these {len(pairs['all'])} checkpoints the ranks "
        f"of the spread of z and of signal / noise correlate: {of}."
    )


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's correlation of both columns."""
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _in_words(scale: str) -> str:
    return scale.replace("+", " to ")


def _span(values: Sequence[float], digits: int) -> str:
    """Return the least and the most of ``values``, or nothing where there are none."""
    ends = (f"{end:.{digits}f}" for end in (min(values), max(values))) if values else ()
    return " to ".join(ends)


def blocks() -> dict[str, str]:
    """Return the content of each block of the document, by its name."""
    made = {name: diagram(name) for name in DIAGRAMS if (KEPT / name / CSV).exists()}
    made |= {
        f"{file.parent.name} counts": counts(file.parent.name) for file in KEPT.glob(f"*/{EPOCHS}")
    }
    if forks.ROWS.exists():
        rows = json.loads(forks.ROWS.read_text("utf-8"))
        for moment in forks.MOMENTS:
            made[f"forks {moment}"] = endings([row for row in rows if row["moment"] == moment])
    if mechanism.SEEN.exists():
        made["mechanism"] = inside(json.loads(mechanism.SEEN.read_text("utf-8")))
    if marker_test.JUDGED.exists():
        judged = json.loads(marker_test.JUDGED.read_text("utf-8"))
        measured = json.loads(marker_test.MARKERS.read_text("utf-8"))
        made |= {"marker": scores(judged), "kinds": other_images(judged, measured)}
    return made


def fresh(text: str) -> str:
    """Return the document's ``text`` with its blocks made anew."""
    for name, block in blocks().items():
        begin, end = f"<!-- {name}: made by fastbyol_bench.science -->", f"<!-- {name}: end -->"
        text = filled(text, begin, end, f"{begin}\n{block}\n{end}")
    return text


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
) -> None:
    """Keep the tables of a sweep; of a phase diagram, also the markers and the pictures."""
    out = KEPT / name
    out.mkdir(parents=True, exist_ok=True)
    sweep = results.read(folder)
    runs = (f"{json.dumps(run)}: {json.dumps(row)}" for run, row in epochs_of(sweep).items())
    write_text(out / EPOCHS, "{\n" + ",\n".join(runs) + "\n}\n")
    shutil.copy(folder / CSV, out)
    if name in DIAGRAMS:
        below = markers.under(markers.of(sweep))
        for path in phase.write(sweep, below, out):
            if path.suffix == ".png":
                path.replace(out / path.name.removeprefix(f"{folder.name}-"))
        shutil.copy(folder / markers.FILE, out)


@app.command()
def docs() -> None:
    """Write the tables."""
    write_text(DOCUMENT, fresh(DOCUMENT.read_text("utf-8")))


if __name__ == "__main__":
    app()
