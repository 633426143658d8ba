"""The README's section "The appendix, reproduced", from what `fastbyol ablate report --png` left in one or several folders.

    python -m fastbyol_bench.appendix README.md bench/results/ablations/{mini,long,textures}

writes it between the two marks in the README; where there are none, before the heading "## By example", or at the end. Folders
without verdicts are left out. Of folders with the same images a claim is told at the scale that has decided it, the later one
named where several have: the longer runs come last. The first images named are told with what decides, others by outcome alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol.errors import UsageError
from fastbyol.runs.durable import write_text

BEGIN, END = "<!-- appendix: made by fastbyol_bench.appendix -->", "<!-- appendix: end -->"
TITLE = "## The appendix, reproduced"
BEFORE = "## By example"
VERDICTS = "verdicts.json"
FOLDERS = tuple(f"bench/results/ablations/{name}" for name in ("mini", "long", "textures"))
PICTURES = {
    "timing.png": "Rate of layer1 and loss at learning rates .5 and .1, ours over the published curves",
    "cosines.png": "How far negative pairs are apart in each arm, a band over seeds",
    "recoveries.png": "How far negative pairs are apart over the steps of long runs, ours over the published curves",
}
NAMES = {"fashion-mnist": "Fashion-MNIST"}


@dataclass(frozen=True)
class Result:
    """What lies in one folder: ``told`` is its verdicts.json, ``link`` how the README reaches it."""

    folder: Path
    link: str
    told: Mapping[str, Any]

    @property
    def images(self) -> str:
        """Name the runs' images. Verdicts that do not say so are older, and of the folder's name."""
        names = self.told.get("data", [self.folder.name])
        return " and ".join(NAMES.get(name, name) for name in names)

    @property
    def old(self) -> bool:
        """Return whether it was judged before shares had intervals."""
        return "account" not in self.told

    def claim(self, name: str) -> Mapping[str, Any]:
        """Return the verdict on a claim. Raises UsageError: there is none."""
        try:
            return next(row for row in self.told["claims"] if row["id"] == name)
        except StopIteration:
            raise UsageError(
                f"{self.folder / VERDICTS}: nothing on {name}: write it anew with `fastbyol ablate report`"
            ) from None


def section(folders: Sequence[Path], start: Path) -> str:
    """Return the section's markdown, marks included, with links from ``start``. Raises UsageError: no verdicts anywhere."""
    results = [_read(folder, start) for folder in folders if (folder / VERDICTS).exists()]
    if not results:
        where = folders[0] if folders else "DIR"
        raise UsageError(f"{where}: no verdicts: `fastbyol ablate report --png {where}` writes them")
    by_images: dict[str, list[Result]] = {}
    for result in results:
        by_images.setdefault(result.images, []).append(result)
    first, *others = by_images
    rows = [_row(claim["id"], claim["says"], by_images) for claim in results[0].told["claims"]]
    lines = [
        BEGIN,
        TITLE,
        "A claim is judged by rules in words and code (`fastbyol ablate show C6`), seed by seed. The table says for how many",
        "of the seeds each statement that decides held, with the 95 % interval of that share; all else is in the reports.",
        "",
        *(_counts(images, found) for images, found in by_images.items()),
        "",
        "```",
        *dict.fromkeys(command for result in results for command in _commands(result)),
        "```",
        "",
        f"| {' | '.join(('claim', 'the post', first, 'what decides', *others))} |",
        "|---" * (4 + len(others)) + "|",
        *rows,
        "",
        *(
            f"![{alt}]({result.link}/{name})\n"
            for result in by_images[first]
            for name, alt in PICTURES.items()
            if (result.folder / name).exists()
        ),
        END,
    ]
    return "\n".join(lines) + "\n"


def filled(readme: str, made: str) -> str:
    """Return ``readme`` with the section ``made`` in the place of its own, or new. Raises UsageError for one mark alone."""
    if (BEGIN in readme) != (END in readme):
        raise UsageError(f"the README has one of the two marks alone: {BEGIN} and {END}")
    if BEGIN in readme:
        return readme[: readme.index(BEGIN)] + made.rstrip("\n") + readme[readme.index(END) + len(END) :]
    before, heading, after = readme.partition(f"\n{BEFORE}\n")
    return f"{before.rstrip()}\n\n{made}{heading}{after}"


def _counts(images: str, results: Sequence[Result]) -> str:
    """Say in a line how the claims came out with some images, and from how many runs."""
    claims = [_showing(row["id"], results).claim(row["id"]) for row in results[0].told["claims"]]
    outcomes = ["not run" if claim["seeds"] == "0" else claim["outcome"] for claim in claims]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    return f"- {images}: {counts}; from {' and '.join(map(_runs, results))}."


def _runs(result: Result) -> str:
    """Say how many of the runs asked for are there, what became of the others, and by which rule they were judged."""
    report = f"{result.told['scale']} scale, [report]({result.link}/report.html)"
    if result.old:
        return f"{result.told['runs']} runs ({report}), judged by the rule of its time: two thirds of two or three seeds"
    account = result.told["account"]
    lost = "".join(f", {len(account[key])} {key}" for key in ("failed", "stopped", "left") if account[key])
    return f"{len(account['done'])} of {len(account['asked'])} runs ({report}{lost})"


def _commands(result: Result) -> tuple[str, ...]:
    """The calls that made its runs, those of old runs with what the same call would take today said."""
    today = f"  # as typed then; today with --data {result.images}" if result.old else ""
    return tuple(f"{command}{today}" for command in result.told["commands"])


def _row(name: str, says: str, by_images: Mapping[str, Sequence[Result]]) -> str:
    first, *others = (_showing(name, results) for results in by_images.values())
    claim = first.claim(name)
    outcome = f"{claim['outcome']} ({first.told['scale']}, seeds: {claim['seeds']})"
    cells = (name, says, outcome, _deciding(claim), *(result.claim(name)["outcome"] for result in others))
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _showing(name: str, results: Sequence[Result]) -> Result:
    """Return the result that can show a claim: one that has decided it, else one that has run it, the last of these."""

    def rank(result: Result) -> tuple[bool, bool]:
        claim = result.claim(name)
        return claim["outcome"] != "undetermined", claim["seeds"] != "0"

    return max(reversed(results), key=rank)


def _deciding(claim: Mapping[str, Any]) -> str:
    """Tell what decides, and where that gave *partly* what took from it."""
    taking = {"main", "other"} if claim["outcome"] == "partly" else {"main"}
    rows = (row for row in claim["statements"] if row["role"] == "main" or (row["role"] in taking and not row["held"]))
    return "<br>".join(f"{row['text'].rstrip('.')}: {_share(row)}" for row in rows)


def _share(row: Mapping[str, Any]) -> str:
    if "asked" not in row:
        return str(row["evidence"].partition(". seed ")[0])
    if not row["asked"]:
        return "not run"
    if row["open"]:
        return f"{row['yes']} of {row['asked']}, {row['open']} open"
    low, high = (f"{end:.2f}".removeprefix("0") for end in row["interval"])
    return f"{row['yes']} of {row['asked']} ({low} to {high})"


def _read(folder: Path, start: Path) -> Result:
    path = folder / VERDICTS
    try:
        told: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged: `fastbyol ablate report --png {folder}` writes it anew ({error})") from None
    return Result(folder, Path(os.path.relpath(folder, start)).as_posix(), told)


def main() -> None:
    """Fill the README named first on the command line from the folders named after it."""
    readme, *folders = map(Path, sys.argv[1:])
    write_text(readme, filled(readme.read_text("utf-8"), section(folders, readme.parent)))


if __name__ == "__main__":
    main()
