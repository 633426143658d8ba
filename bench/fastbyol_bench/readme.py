"""The performance tables of README.md and docs/speed.md, generated from bench/results.

    python -m fastbyol_bench.readme           # write both documents
    python -m fastbyol_bench.readme --check   # exit with code 1 where one of them is stale

A block stands between the marks ``<!-- bench FILE ... -->`` and ``<!-- end of bench -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastbyol_bench import results
from fastbyol_bench.results import Result, Row
from fastbyol_bench.table import seconds

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
DOCS = ROOT / "docs"
DOCUMENTS = (README, DOCS / "speed.md")
# A block names its result files; ``bench-short`` asks for the table of SHORT alone.
BLOCK = re.compile(
    r"(<!-- (bench|bench-short) ([^>]+?) -->\n).*?(<!-- end of bench -->)", re.DOTALL
)
# The README's rows: a name of a piece of work, and the peer that stands for it.
TUNED = "tuned eager PyTorch, bf16, channels-last, foreach"
SHORT = (
    ("two views of 96 px, one core", "Pillow and torchvision, one process"),
    ("raw 96 px, batches of 256, one thread", "torch's DataLoader over an array"),
    ("BN, SGD: step of 64 images of 96 px", TUNED),
    ("GN + WS, LARS: step of 64 images of 96 px", TUNED),
    ("batches of 256 images of 96 px: data, views, step", TUNED),
    (
        "epoch of 105,000 images, batches of 256, with a probe",
        "the post's code path, fp32, a pass per view",
    ),
)


def filled(text: str, begin: str, end: str, block: str) -> str:
    """Return ``text`` with ``block`` in place of what stands between two marks, marks included.

    Raises ValueError where one of the marks is missing.
    """
    start, stop = text.index(begin), text.index(end) + len(end)
    return text[:start] + block + text[stop:]


def refreshed(text: str, folder: Path) -> str:
    """Return ``text`` with every block made anew from the files that it names in ``folder``."""

    def block(match: re.Match[str]) -> str:
        make = short_table if match[2] == "bench-short" else table
        return (
            match[1]
            + "\n\n".join(make(results.read(folder / name)) for name in match[3].split())
            + "\n"
            + match[4]
        )

    return BLOCK.sub(block, text)


def table(result: Result) -> str:
    """Return a sentence on the machine and a Markdown table of every row that was measured.

    A GPU's rows show times; a CPU's show threads instead, since ratios and rates alone carry over
    to other CPUs.
    """
    on_gpu = result.machine.device == "cuda"
    heads = (
        "what",
        "variant",
        "time" if on_gpu else "threads",
        "images/s",
        "speed, ours : theirs",
        "of the device's limit",
    )
    return (
        sentence(result)
        + "\n\n"
        + markdown(heads, (tuple(_cells(row, on_gpu)) for row in _shown(result, on_gpu)))
    )


def short_table(result: Result) -> str:
    """Return a sentence on the machine and a Markdown table of the comparisons in ``SHORT``.

    Comparisons that were not measured are left out.
    """
    ratios = {
        (row.name, row.variant): row.ratio.median for row in result.rows if row.ratio is not None
    }
    rows = (
        (name, peer, f"{ratios[name, peer]:.2f}x") for name, peer in SHORT if (name, peer) in ratios
    )
    heads = ("what", "compared with", "speed, ours : theirs")
    return f"{sentence(result)}\n\n{markdown(heads, rows)}"


def markdown(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _shown(result: Result, on_gpu: bool) -> Iterator[Row]:
    for row in result.rows:
        # On a CPU the suite of single kernels compares references with themselves.
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


def sentence(result: Result) -> str:
    """Return a sentence on the machine, its software, the day and the commit."""
    machine = result.machine
    versions = f"torch {machine.torch}" + (
        f", triton {machine.triton}, driver {machine.driver}" if machine.driver else ""
    )
    busy = f"; the machine was busy (load {result.load:.1f})" if result.load > 1.0 else ""
    cut = "" if result.finished else "; unfinished: the run was cut off after these rows"
    cores = f", {machine.cores} cores" if machine.device == "cpu" else ""
    return (
        f"{machine.device_name}{cores}, {versions}, {result.date[:10]}, commit "
        f"{result.commit or 'unknown'}{busy}{cut}."
    )


def main() -> int:
    """Write the documents, or check them; return the exit code."""
    stale = 0
    for path in DOCUMENTS:
        old = path.read_text("utf-8")
        new = refreshed(old, RESULTS)
        if "--check" not in sys.argv[1:]:
            path.write_text(new, "utf-8")
        elif new != old:
            print(
                f"{path.relative_to(ROOT)} is stale: run python -m fastbyol_bench.readme",
                file=sys.stderr,
            )
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
