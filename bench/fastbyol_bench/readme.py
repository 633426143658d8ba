"""The README's performance table, generated from kept results.

    python -m fastbyol_bench.readme           # write it
    python -m fastbyol_bench.readme --check   # exit code 1 where it is stale

stands between the marks ``<!-- bench FILE ... -->`` and ``<!-- end of bench -->``, FILEs below bench/results. On a CPU
ratios and rates count; times are shown for a GPU alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fastbyol_bench import results
from fastbyol_bench.results import Result, Row
from fastbyol_bench.table import seconds

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- bench ([^>]+?) -->\n).*?(<!-- end of bench -->)", re.DOTALL)


def refreshed(text: str, folder: Path) -> str:
    """``text`` with every marked block generated anew from the files it names in ``folder``."""

    def block(match: re.Match[str]) -> str:
        tables = [table(results.read(folder / name)) for name in match[2].split()]
        return match[1] + "\n\n".join(tables) + "\n" + match[3]

    return BLOCK.sub(block, text)


def table(result: Result) -> str:
    """One result as a sentence and a Markdown table."""
    on_gpu = result.machine.device == "cuda"
    heads = ["what", "variant", "time" if on_gpu else "threads", "images/s", "ours is faster by", "of the device's limit"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(_cells(row, on_gpu)) + " |" for row in _shown(result, on_gpu)]
    return _sentence(result) + "\n\n" + "\n".join(lines)


def _shown(result: Result, on_gpu: bool) -> Iterator[Row]:
    """What was measured; on a CPU the single kernels say little, since they are the references there."""
    for row in result.rows:
        if row.timing is not None and (on_gpu or row.suite != "kernels"):
            yield row


def _cells(row: Row, on_gpu: bool) -> Iterator[str]:
    yield row.name
    yield row.variant
    assert row.timing is not None
    yield seconds(row.timing.median_s) if on_gpu else str(row.threads or "")
    yield "" if row.img_s is None else f"{row.img_s:,.0f}"
    yield "" if row.ratio is None else f"{row.ratio.median:.2f}x"
    yield "" if row.share is None or row.share < 0.005 else f"{100 * row.share:.0f} %"


def _sentence(result: Result) -> str:
    machine = result.machine
    versions = f"torch {machine.torch}" + (f", triton {machine.triton}, driver {machine.driver}" if machine.driver else "")
    busy = f"; the machine was busy (load {result.load:.1f})" if result.load > 1.0 else ""
    cut = "" if result.finished else "; unfinished: the run was cut off after these rows"
    cores = f", {machine.cores} cores" if machine.device == "cpu" else ""
    return f"{machine.device_name}{cores}, {versions}, {result.date[:10]}, commit {result.commit or 'unknown'}{busy}{cut}."


def main() -> int:
    """Write or check; returns the exit code."""
    path = ROOT / "README.md"
    old = path.read_text("utf-8")
    new = refreshed(old, ROOT / "bench" / "results")
    if "--check" in sys.argv[1:]:
        if new != old:
            print("README.md is stale: run python -m fastbyol_bench.readme", file=sys.stderr)
        return int(new != old)
    path.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
