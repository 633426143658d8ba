"""The tables of docs/science.md, from what bench/results/science keeps.

    python -m fastbyol_bench.science.document collect DIR NAME    # keep a phase diagram's folder
    python -m fastbyol_bench.science.document docs                # write the tables

``collect`` copies ``sweep.csv``, and of a diagram ``markers.json``, and draws both pictures.
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from fastbyol.data.embedded import BUILT_IN
from fastbyol.runs.durable import write_text
from fastbyol.sweeps import markers, phase, results
from fastbyol.sweeps.report import CSV
from fastbyol_bench.readme import DOCS, filled
from fastbyol_bench.science import KEPT, forks, marker_test

DOCUMENT = DOCS / "science.md"
DIAGRAMS = ("fashion-mnist", "textures")


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


def diagram(name: str) -> Iterator[str]:
    """Yield the lines of the table of the diagram ``name``: rows are learning rates, and r."""
    points = cells(name)
    xs, ys = (list(dict.fromkeys(values)) for values in zip(*points, strict=True))
    yield f"| {name}: learning rate | {' | '.join(x.replace('+', ' to ') for x in xs)} |"
    yield "|---" * (1 + len(xs)) + "|"
    for y in ys:
        yield f"| {y} | {' | '.join(str(points.get((x, y), '')) for x in xs)} |"
    kept = json.loads((KEPT / name / markers.FILE).read_text("utf-8"))
    by_crop = {
        "+".join(map(str, json.loads(key)["views"]["scale"])): rs for key, rs in kept.items()
    }
    shown = (f"{statistics.fmean(by_crop[x]):.3f}" for x in xs)
    yield f"| marker r | {' | '.join(shown)} |"


def endings(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table of futures: who left, after how long, and with what accuracy."""
    yield "| future | leave | steps from the fork | at the end | negative cosine | accuracy, % |"
    yield "|---|---|---|---|---|---|"
    for name in forks.FUTURES:
        own = [row for row in rows if row["future"] == name]
        took = [row["left_at"] - row["step"] for row in own if row["left_at"] is not None]
        ends = [row["state"] for row in own]
        counts = ", ".join(f"{ends.count(state)} {state}" for state in sorted(set(ends)))
        cells = [
            f"{len(took)} of {len(own)}",
            _span(took, 0),
            counts,
            _span([row["neg_cos"][-1] for row in own], 2),
            _span([row["accuracy"] for row in own], 0),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def scores(judged: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of markers: area under the curve, right answers, Brier score."""
    groups = list(next(iter(judged["scores"].values())))
    yield f"| known beside the rate | {' | '.join(groups)} |"
    yield "|---" * (1 + len(groups)) + "|"
    for name, by_group in judged["scores"].items():
        cells = []
        for group in groups:
            own = by_group[group]
            # An area orders the runs of one model. Each part that was left out has its own.
            is_one = own["auc"] is not None and "left out" not in group
            area = f"{own['auc']:.2f}, " if is_one else ""
            cells.append(f"{area}{own['right']:.0%}, {own['brier']:.2f}")
        yield f"| {name} | {' | '.join(cells)} |"


def cells_of_kinds(
    judged: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield the lines of the table of the other kinds: runs that end collapsed, and predicted."""
    rates = (0.1, 0.2)
    by_point = {(cell["data"], cell["scale"], cell["lr"]): cell for cell in judged["cells"]}
    yield f"| images | crops | r | variance ratio | {' | '.join(f'{lr:g}' for lr in rates)} |"
    yield "|---" * (4 + len(rates)) + "|"
    for row in measured:
        own = [by_point.get((row["data"], row["scale"], lr)) for lr in rates]
        if row["data"] not in BUILT_IN:
            ends = (
                f"{cell['collapsed']}/{cell['runs']}, {cell['predicted']['r']:.2f}" if cell else ""
                for cell in own
            )
            yield (
                f"| {row['data']} | {row['scale'].replace('+', ' to ')} | {row['r']:.3f} "
                f"| {row['variance_ratio']:.2f} | {' | '.join(ends)} |"
            )


def _span(values: Sequence[float], digits: int) -> str:
    """Return the least and the most of ``values``, or nothing where there are none."""
    ends = (f"{end:.{digits}f}" for end in (min(values), max(values))) if values else ()
    return " to ".join(ends)


def blocks() -> dict[str, list[str]]:
    """Return the lines of each block of the document, by its name."""
    made = {name: list(diagram(name)) for name in DIAGRAMS if (KEPT / name / CSV).exists()}
    if forks.ROWS.exists():
        made["forks"] = list(endings(json.loads(forks.ROWS.read_text("utf-8"))))
    if marker_test.JUDGED.exists():
        judged = json.loads(marker_test.JUDGED.read_text("utf-8"))
        measured = json.loads(marker_test.MARKERS.read_text("utf-8"))
        made |= {"marker": list(scores(judged)), "kinds": list(cells_of_kinds(judged, measured))}
    return made


def fresh(text: str) -> str:
    """Return the document's ``text`` with its blocks made anew."""
    for name, lines in blocks().items():
        begin, end = f"<!-- {name}: made by fastbyol_bench.science -->", f"<!-- {name}: end -->"
        text = filled(text, begin, end, "\n".join([begin, *lines, end]))
    return text


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
) -> None:
    """Keep the table of a sweep; of a phase diagram, also the markers and the pictures."""
    out = KEPT / name
    out.mkdir(parents=True, exist_ok=True)
    if name not in DIAGRAMS:
        shutil.copy(folder / CSV, out / CSV)
        return
    sweep = results.read(folder)
    below = markers.under(markers.of(sweep))
    for path in phase.write(sweep, below, out):
        if path.suffix == ".png":
            path.replace(out / path.name.removeprefix(f"{folder.name}-"))
    for kept in (CSV, markers.FILE):
        shutil.copy(folder / kept, out / kept)


@app.command()
def docs() -> None:
    """Write the tables."""
    write_text(DOCUMENT, fresh(DOCUMENT.read_text("utf-8")))


if __name__ == "__main__":
    app()
