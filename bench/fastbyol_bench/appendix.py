"""How the post's claims came out: the tables of docs/appendix.md and README.md.

They are made of the verdicts that ``fastbyol ablate report --png`` writes:

    python -m fastbyol_bench.appendix [FOLDER ...]   # default: FOLDERS

Of folders with the same images, the one with the longer runs comes last.
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
from fastbyol_bench.readme import DOCS, README, RESULTS, filled

BEGIN, END = "<!-- appendix: made by fastbyol_bench.appendix -->", "<!-- appendix: end -->"
SHORT_BEGIN, SHORT_END = (
    "<!-- appendix-short: made by fastbyol_bench.appendix -->",
    "<!-- appendix-short: end -->",
)
DOCUMENT = DOCS / "appendix.md"
VERDICTS = "verdicts.json"
FOLDERS = tuple(RESULTS / "ablations" / name for name in ("mini", "long", "long-mlps", "textures"))
# The claims in the README's table: at least one of every outcome.
SHORT = ("C1", "C5", "C6", "C7", "C8", "M1")
PICTURES = {
    "timing.png": "Rate of layer1 and loss at learning rates .5 and .1, ours over the published "
    "curves",
    "cosines.png": "Distance of negative pairs in each arm, with a band over seeds",
    "recoveries.png": "Distance of negative pairs over the steps of long runs, ours over the "
    "published curves",
}
NAMES = {"fashion-mnist": "Fashion-MNIST"}


@dataclass(frozen=True)
class Result:
    """The verdicts of one folder.

    ``verdicts`` is its verdicts.json, ``link`` the path to the folder in a document.
    """

    folder: Path
    link: str
    verdicts: Mapping[str, Any]

    @property
    def images(self) -> str:
        """Name the runs' images. Older verdicts do not name them; their folder does."""
        names = self.verdicts.get("data", [self.folder.name])
        return " and ".join(NAMES.get(name, name) for name in names)

    @property
    def old(self) -> bool:
        """Return whether it was judged before shares had intervals."""
        return "account" not in self.verdicts

    def claim(self, name: str) -> Mapping[str, Any]:
        """Return the verdict on a claim. Raises UsageError where there is none."""
        try:
            return next(row for row in self.verdicts["claims"] if row["id"] == name)
        except StopIteration:
            raise UsageError(
                f"{self.folder / VERDICTS}: nothing on {name}: write it anew with `fastbyol "
                "ablate report`"
            ) from None


def section(folders: Sequence[Path], start: Path) -> str:
    """Return the full section as Markdown, marks included, with links relative to ``start``.

    Folders without verdicts are left out. The images of the first folder get a column on what
    decides. Raises UsageError where no folder has verdicts.
    """
    by_images = _read_all(folders, start)
    results = [result for group in by_images.values() for result in group]
    first, *others = by_images
    lines = [
        BEGIN,
        *(_counts(images, group) for images, group in by_images.items()),
        "",
        "```",
        *dict.fromkeys(command for result in results for command in _commands(result)),
        "```",
        "",
        *_table(("claim", "the post", first, "what decides", *others)),
        *(
            _row(claim["id"], claim["says"], by_images, full=True)
            for claim in results[0].verdicts["claims"]
        ),
        "",
        *(
            f"![{alt}]({result.link}/{name})\n"
            for result in by_images[first]
            for name, alt in PICTURES.items()
            if (result.folder / name).exists()
        ),
        END,
    ]
    return "\n".join(lines)


def summary(folders: Sequence[Path], start: Path) -> str:
    """Return the README's block: the counts of all claims' outcomes, and a table of ``SHORT``."""
    by_images = _read_all(folders, start)
    first = next(iter(by_images.values()))[0]
    lines = [
        SHORT_BEGIN,
        *(_counts(images, group) for images, group in by_images.items()),
        "",
        *_table(("claim", "the post", *by_images)),
        *(
            _row(claim["id"], claim["says"], by_images)
            for claim in first.verdicts["claims"]
            if claim["id"] in SHORT
        ),
        SHORT_END,
    ]
    return "\n".join(lines)


def _table(heads: Sequence[str]) -> tuple[str, str]:
    return f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"


def _counts(images: str, results: Sequence[Result]) -> str:
    """Say in a line how the claims came out on some images, and from how many runs."""
    claims = [
        _showing(row["id"], results).claim(row["id"]) for row in results[0].verdicts["claims"]
    ]
    outcomes = ["not run" if claim["seeds"] == "0" else claim["outcome"] for claim in claims]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    return f"- {images}: {counts}; from {' and '.join(map(_runs, results))}."


def _runs(result: Result) -> str:
    """Say how many requested runs finished, what became of the others, and which rule judged."""
    report = f"{result.verdicts['scale']} scale, [report]({result.link}/report.html)"
    if result.old:
        return (
            f"{result.verdicts['runs']} runs ({report}), judged by the rule of its time: two "
            "thirds of two or three seeds"
        )
    account = result.verdicts["account"]
    lost = "".join(
        f", {len(account[key])} {key}" for key in ("failed", "stopped", "left") if account[key]
    )
    return f"{len(account['done'])} of {len(account['asked'])} runs ({report}{lost})"


def _commands(result: Result) -> tuple[str, ...]:
    """Return the calls that made its runs. A comment says what an old call would need today."""
    today = f"  # as typed then; today with --data {result.images}" if result.old else ""
    return tuple(f"{command}{today}" for command in result.verdicts["commands"])


def _row(
    name: str, says: str, by_images: Mapping[str, Sequence[Result]], *, full: bool = False
) -> str:
    """Return a claim's row; ``full`` adds what decides."""
    first, *others = (_showing(name, results) for results in by_images.values())
    claim = first.claim(name)
    outcome = f"{claim['outcome']} ({first.verdicts['scale']}, seeds: {claim['seeds']})"
    deciding = [_deciding(claim)] if full else []
    cells = (name, says, outcome, *deciding, *(result.claim(name)["outcome"] for result in others))
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _showing(name: str, results: Sequence[Result]) -> Result:
    """Return the last result that has decided a claim, else the last that has run it."""

    def rank(result: Result) -> tuple[bool, bool]:
        claim = result.claim(name)
        return claim["outcome"] != "undetermined", claim["seeds"] != "0"

    return max(reversed(results), key=rank)


def _deciding(claim: Mapping[str, Any]) -> str:
    """Return the statements that decide a claim; of a *partly* reproduced one also those that
    failed.
    """
    failing = "other" if claim["outcome"] == "partly" else "main"
    rows = (
        row
        for row in claim["statements"]
        if row["role"] == "main" or (row["role"] == failing and not row["held"])
    )
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


def _read_all(folders: Sequence[Path], start: Path) -> dict[str, list[Result]]:
    """Read the folders with verdicts, grouped by their images. Raises UsageError where none has."""
    by_images: dict[str, list[Result]] = {}
    for folder in folders:
        if (folder / VERDICTS).exists():
            result = _read(folder, start)
            by_images.setdefault(result.images, []).append(result)
    if not by_images:
        where = folders[0] if folders else "DIR"
        raise UsageError(
            f"{where}: no verdicts: `fastbyol ablate report --png {where}` writes them"
        )
    return by_images


def _read(folder: Path, start: Path) -> Result:
    path = folder / VERDICTS
    try:
        verdicts: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: damaged: `fastbyol ablate report --png {folder}` writes it anew ({error})"
        ) from None
    return Result(folder, Path(os.path.relpath(folder, start)).as_posix(), verdicts)


def fresh(folders: Sequence[Path] = FOLDERS) -> dict[Path, str]:
    """Return both documents' texts with their blocks made anew."""
    return {
        DOCUMENT: filled(DOCUMENT.read_text("utf-8"), BEGIN, END, section(folders, DOCS)),
        README: filled(
            README.read_text("utf-8"), SHORT_BEGIN, SHORT_END, summary(folders, README.parent)
        ),
    }


def main() -> None:
    """Write both documents from the folders named on the command line."""
    for path, text in fresh([Path(name).resolve() for name in sys.argv[1:]] or FOLDERS).items():
        write_text(path, text)


if __name__ == "__main__":
    main()
