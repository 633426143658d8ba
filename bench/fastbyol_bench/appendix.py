"""The README's section "The appendix, reproduced", from the verdicts and pictures that `fastbyol ablate report --png` left.

    python -m fastbyol_bench.appendix bench/results/ablations README.md

writes it between the two marks in the README; where there are none, before the heading "## By example", or at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fastbyol.engine.durable import write_text
from fastbyol.errors import UsageError

BEGIN, END = "<!-- appendix: made by fastbyol_bench.appendix -->", "<!-- appendix: end -->"
TITLE = "## The appendix, reproduced"
BEFORE = "## By example"
VERDICTS = "verdicts.json"
PICTURES = {
    "timing.png": "Rate of layer1 and loss at learning rates .5 and .1, ours over the published curves",
    "cosines.png": "How far negative pairs are apart in each arm, a band over seeds",
}


def section(folder: Path, link: str) -> str:
    """The section's markdown, marks included. ``link`` is how the README reaches ``folder``. Raises UsageError: no verdicts."""
    told = _read(folder / VERDICTS)
    counts: dict[str, int] = {}
    for claim in told["claims"]:
        counts[claim["outcome"]] = counts.get(claim["outcome"], 0) + 1
    lines = [
        BEGIN,
        TITLE,
        f"The post's fourteen claims at {told['scale']} scale, {told['runs']} runs: "
        + ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        + ". A claim is judged by rules in words and code",
        "(`fastbyol ablate show C6`), seed by seed; what decides it is in the table, everything else in the report.",
        "",
        "```",
        *(told["commands"] or ["fastbyol ablate report"]),
        "```",
        "",
        "| claim | the post | verdict | seeds | what decides |",
        "|---|---|---|---|---|",
        *(_row(claim) for claim in told["claims"]),
        "",
        *(f"![{alt}]({link}/{name})\n" for name, alt in PICTURES.items()),
        END,
    ]
    return "\n".join(lines) + "\n"


def filled(readme: str, made: str) -> str:
    """``readme`` with the section ``made`` in the place of its own, or new. Raises UsageError for one mark alone."""
    if (BEGIN in readme) != (END in readme):
        raise UsageError(f"the README has one of the two marks alone: {BEGIN} and {END}")
    if BEGIN in readme:
        return readme[: readme.index(BEGIN)] + made.rstrip("\n") + readme[readme.index(END) + len(END) :]
    before, heading, after = readme.partition(f"\n{BEFORE}\n")
    return f"{before.rstrip()}\n\n{made}{heading}{after}"


def _row(claim: dict[str, Any]) -> str:
    """What decides, and where that gave *partly* what took from it."""
    roles = {"main", "other"} if claim["outcome"] == "partly" else {"main"}
    deciding = (row for row in claim["statements"] if row["role"] == "main" or (row["role"] in roles and not row["held"]))
    decided = "<br>".join(f"{row['text']} {row['evidence'].partition('. seed ')[0]}" for row in deciding)
    cells = (claim["id"], claim["says"], claim["outcome"], claim["seeds"], decided)
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _read(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no verdicts: `fastbyol ablate report --png {path.parent}` writes them ({error})") from None
    return told


def main() -> None:
    """Fill the README named second on the command line from the folder named first."""
    folder, readme = Path(sys.argv[1]), Path(sys.argv[2])
    link = Path(os.path.relpath(folder, readme.parent)).as_posix()
    write_text(readme, filled(readme.read_text("utf-8"), section(folder, link)))


if __name__ == "__main__":
    main()
