"""Results and comparisons as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastbyol_bench.compare import Change
from fastbyol_bench.results import Ceiling, Result, Row

UNFINISHED = "unfinished: the run was cut off; these are the rows that it had measured"


def text(result: Result) -> str:
    """Return the whole result: ceilings, then a block per piece of work, ours first."""
    lines = [*(() if result.finished else (UNFINISHED,)), *_ceilings(result.ceilings)]
    for suite, name in dict.fromkeys((row.suite, row.name) for row in result.rows):
        rows = tuple(row for row in result.rows if (row.suite, row.name) == (suite, name))
        lines += ["", f"{suite}: {name}", *aligned(cells(rows))]
    if result.waterfall:
        whole = sum(part.seconds for part in result.waterfall)
        lines += ["", "where a step's time goes"]
        lines += aligned(
            [
                (p.name, seconds(p.seconds), f"{100 * p.seconds / whole:.1f} %")
                for p in result.waterfall
            ]
        )
    return "\n".join(lines)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return lines with columns two spaces apart, indented by two."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [("  " + "  ".join(map(str.ljust, row, widths))).rstrip() for row in rows]


def _ceilings(ceilings: tuple[Ceiling, ...]) -> Iterator[str]:
    for c in ceilings:
        yield (
            f"ceilings measured with {c.threads} host threads: copy {c.copy_bytes_s / 1e9:.4g} "
            "GB/s, "
            f"fp32 {c.fp32_flop_s / 1e9:.4g} GFLOP/s, bf16 {c.bf16_flop_s / 1e9:.4g} GFLOP/s"
        )


def cells_of(changes: list[Change]) -> list[tuple[str, ...]]:
    """Return the cells of a comparison, the head row first."""
    heads = ("suite", "what", "variant", "A", "B", "A / B", "B is")
    rows = [
        (
            c.suite,
            c.name,
            c.variant,
            seconds(c.a_s),
            seconds(c.b_s),
            "" if c.ratio is None else f"{c.ratio:.2f}",
            c.verdict,
        )
        for c in changes
    ]
    return [heads, *rows]


def seconds(value: float | None) -> str:
    """Return a time with three digits and a unit, or nothing for None."""
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def cells(rows: tuple[Row, ...]) -> list[tuple[str, ...]]:
    """Return the cells of a result's rows, the head row first."""
    heads = (
        "variant",
        "threads",
        "time",
        "spread",
        "runs",
        "img/s",
        "img/cpu-s",
        "of floor",
        "times ours",
        "in cpu-s",
        "",
    )
    return [heads, *(_cells(row) for row in rows)]


def _cells(row: Row) -> tuple[str, ...]:
    if row.timing is None:
        return (row.variant, *[""] * 9, f"needs {row.needs}")
    share = "" if row.share is None else f"{100 * row.share:.0f} % ({row.floor.bound})"  # type: ignore[union-attr]
    return (
        row.variant,
        "" if row.threads is None else str(row.threads),
        seconds(row.timing.median_s),
        f"{100 * row.timing.spread_s / row.timing.median_s:.0f} %",
        str(row.timing.runs),
        "" if row.img_s is None else f"{row.img_s:,.0f}",
        "" if row.img_cpu_s is None or row.threads is None else f"{row.img_cpu_s:,.0f}",
        share,
        "" if row.ratio is None else f"{row.ratio.median:.2f}",
        ""
        if row.ratio is None or row.ratio.cpu is None or row.threads is None
        else f"{row.ratio.cpu:.2f}",
        row.note,
    )
