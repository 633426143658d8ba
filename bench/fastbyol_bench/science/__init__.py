"""The study of docs/science.md: what decides whether a collapsed network recovers."""

import json
from collections.abc import Iterable

from fastbyol_bench.readme import RESULTS

KEPT = RESULTS / "science"


def lines(rows: Iterable[object]) -> str:
    """Return ``rows`` as a JSON list, a line each: a change is seen by its lines."""
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
