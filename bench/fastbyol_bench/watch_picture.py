"""The picture of ``fastbyol ablate status DIR --watch`` in docs/fleet.md, of workers at work.

fastbyol ablate run ... --out DIR --launcher none
python -m fastbyol_bench.watch_picture DIR bench/results/fleet/watch.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from fastbyol.fleet.board import MOST_ROWS, drawing
from fastbyol.fleet.node import Node
from fastbyol.fleet.slots import slots
from fastbyol.fleet.survey import Survey, Surveyor
from fastbyol.fleet.worker import Options
from fastbyol.output import say
from fastbyol.runs.durable import write_text

WIDTH = 104


def svg(survey: Survey, title: str) -> str:
    """Return what a terminal shows of ``survey``, as an SVG that needs no network."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(drawing(survey, MOST_ROWS))
    text = console.export_svg(title=title, unique_id="watch")
    return re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)


def record(out: Path, picture: Path) -> None:
    """Train the runs of ``out`` with two workers, and draw the display when half of it is done."""
    surveyor, drawn = Surveyor(out), False

    def tick() -> None:
        nonlocal drawn
        survey = surveyor.look()
        if not drawn and 2 * survey.epochs_done >= survey.epochs:
            picture.parent.mkdir(parents=True, exist_ok=True)
            write_text(picture, svg(survey, f"fastbyol ablate status {out.name} --watch"))
            drawn = True

    Node(Options(str(out)), slots("cpu", 2), say).run(tick)


if __name__ == "__main__":
    record(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
