"""The study of docs/science.md: what decides whether a collapsed network recovers."""

from fastbyol_bench.readme import RESULTS

KEPT = RESULTS / "science"
