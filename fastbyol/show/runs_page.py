"""One page over many runs, to filter and sort in a browser that opens it from disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from fastbyol.registry.row import DESCENDING, Row, differing, in_words, is_number
from fastbyol.runs.durable import write_output
from fastbyol.show import figures

PAGE = "runs.html"
# Key and title of the columns that every page has before the settings that differ.
_COLUMNS = {
    "accuracy": "accuracy", "state": "state", "neg_cos": "neg cos", "epochs_done": "epochs",
    "status": "status",
}  # fmt: skip
# And behind them.
_LAST = {"best_accuracy": "best", "loss": "loss", "rank_y": "rank", "started": "started"}
# More would be no list to choose from: the field for words does that.
_MOST_CHOICES = 40
_WIDTH, _HEIGHT = 120, 28


def page(rows: Sequence[Row], title: str, folder: Path) -> str:
    """Return the page as HTML; links to reports are relative to ``folder``."""
    titles = _COLUMNS | {key: key for key in differing(rows)} | _LAST
    keys = list(titles)
    cells = {key: [in_words(row, key) for row in rows] for key in keys}
    numbers = {
        key
        for key in keys
        if all(is_number(value) for row in rows if (value := row.value(key)) is not None)
    }
    columns = [("name", "run", False, False, False)] + [
        (
            key,
            titles[key],
            key in numbers,
            key in DESCENDING,
            (key in ("status", "state") or "." in key)
            and 1 < len(set(cells[key])) <= _MOST_CHOICES,
        )
        for key in keys
    ]
    script = (Path(__file__).parent / "templates" / "runs.js").read_text("utf-8")
    return figures.page(
        "runs.html.j2",
        title=title,
        policy=_policy(script),
        script=Markup(script),
        columns=columns,
        rows=[
            (
                in_words(row, "name"),
                _link(row, folder),
                list(_curves(row)),
                [
                    (key in numbers, cells[key][index], _exact(row, key) if key in numbers else "")
                    for key in keys
                ],
            )
            for index, row in enumerate(rows)
        ],
    )


def _exact(row: Row, key: str) -> str:
    """Return a number by which to sort and choose; empty where its text says as much."""
    value = row.value(key)
    return "" if value is None or in_words(row, key) == repr(value) else repr(value)


def _policy(script: str) -> str:
    """Return a policy by which a browser runs this ``script`` alone, and loads nothing."""
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {figures.source_of(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _link(row: Row, folder: Path) -> str:
    """Return the address of a run's report from ``folder``, empty where there is none."""
    report = Path(row.path).absolute() / "report.html"
    if not report.is_file():
        return ""
    return quote(os.fsencode(os.path.relpath(report, folder.absolute())))


def _curves(row: Row) -> Iterator[tuple[str, str]]:
    """Yield the class and the points of each curve, in the units of the picture."""
    longest = max(row.epochs, row.epochs_done, 1)
    for kind, key, most in (("a", "accuracy", 100.0), ("g", "neg_cos", 1.0)):
        heights = ((x, min(max(y / most, 0.0), 1.0)) for x, y in row.curves.get(key, ()))
        points = [
            f"{x / longest * _WIDTH:.0f},{_HEIGHT - 2 - y * (_HEIGHT - 4):.1f}" for x, y in heights
        ]
        if points:
            yield kind, " ".join(points if len(points) > 1 else points * 2)


def write(rows: Sequence[Row], root: Path, out: Path) -> Path:
    """Write the page of the runs in ``root`` to ``out``, and return that.

    Raises FastbyolError where it cannot be written.
    """
    title = f"Runs in {root.absolute().name or root}"
    write_output(out, page(rows, title, out.parent).encode())
    return out
