"""The command explain:

LARS's dialects in numbers, or the differences between two configurations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastbyol.cli.options import Json
from fastbyol.errors import UsageError
from fastbyol.output import print_json, say
from fastbyol.text import printable

Dialects = Annotated[
    str,
    typer.Option(
        "--compare", metavar="DIALECTS", help="blog, deepmind, bolts, sgd; several with commas."
    ),
]
NormsOf = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="Take the norms that this run recorded."),
]
Step = Annotated[
    int | None,
    typer.Option("--step", help="Of --run. Default: where the highest rate was recorded."),
]
Diff = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--diff",
        metavar="A B",
        help="Presets, TOML files or run folders: what differs, key by key.",
    ),
]


def explain(
    topic: Annotated[str | None, typer.Argument(metavar="[lars]", help="What to explain.")] = None,
    compare: Dialects = "blog,deepmind,bolts",
    run: NormsOf = None,
    step: Step = None,
    lr: Annotated[float, typer.Option(help="Of the examples.")] = 0.2,
    wd: Annotated[float, typer.Option("--wd", help="Of the examples.")] = 1.5e-6,
    eta: Annotated[float, typer.Option(help="Of the examples.")] = 1e-3,
    diff: Diff = None,
    as_json: Json = False,
) -> None:
    """Explain LARS's dialects in numbers (`lars`), or how two configurations differ (`--diff`)."""
    if diff is not None:
        _explain_diff(*diff, as_json=as_json)
        return
    if topic != "lars":
        what = "say what" if topic is None else f"nothing on {topic!r}; the nearest is lars"
        raise UsageError(
            f"explain: {what}: `fastbyol explain lars --compare blog,deepmind` or `fastbyol "
            "explain --diff blog paper`"
        )
    from fastbyol.cli import dialects

    rules = dialects.parse_rules(compare)
    if run:
        result, in_text = dialects.of_run(run, rules, step), run_in_words
    else:
        result, in_text = dialects.lars(rules, lr=lr, weight_decay=wd, eta=eta), in_words
    if as_json:
        print_json(result)
    else:
        say(*in_text(result).split("\n"))


def _explain_diff(a: str, b: str, *, as_json: bool) -> None:
    from fastbyol.runs import differences

    rows = differences.between(differences.named(a), differences.named(b))
    if as_json:
        print_json({"a": a, "b": b, "differences": [row._asdict() for row in rows]})
        return
    if not rows:
        say(f"{a} and {b}: no key differs")
        return
    texts = [("key", a, b, "from", "from")]
    texts += [
        (row.key, differences.text(row.a), differences.text(row.b), row.a_origin, row.b_origin)
        for row in rows
    ]
    cells = [tuple(map(printable, row)) for row in texts]
    # Not a rich table: it would cut keys and values to the terminal's width.
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    say(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells))


def in_words(result: dict[str, Any]) -> str:
    """Return the result of ``dialects.lars`` as text."""
    numbers = "lr {lr:g}, weight decay wd {weight_decay:g}, eta {eta:g}".format_map(result)
    head = f"  {'example':34s}{'|w|':>8s}{'|g|':>10s}{'trust':>12s}{'rate':>12s}{'|update|':>12s}"
    cells = "{weight_norm:8.3g}{grad_norm:10.3g}{trust_ratio:12.5g}{rate:12.5g}{update_norm:12.3g}"
    lines = [f"{numbers}, one step from zero momentum"]
    for rule, facts in result["dialects"].items():
        lines += ["", rule, *(f"  {line}" for line in facts["formula"])]
        lines += [f"  {_ceiling_in_words(rule, facts['ceiling'])}", "", head]
        rows = facts["examples"].items()
        lines += [f"  {name:34s}{cells.format_map(row)}" for name, row in rows]
    return "\n".join([*lines, "", *_peak_in_words(result["published_peak"])])


def run_in_words(result: dict[str, Any]) -> str:
    """Return the result of ``dialects.of_run`` as text.

    ``a..b`` are bounds, and ``-`` marks a layer that does not adapt in the run.
    """
    rules = list(result["ceilings"])
    wide = max(len(row["name"]) for row in result["layers"]) + 2
    title = "{run}: step {step}, lr {lr:.5g}, weight decay {weight_decay:g}, eta {eta:g}"
    ceilings = result["ceilings"].items()
    lines = [
        f"{title.format_map(result)}, trained by {result['rule']}",
        *(f"{rule}: {_ceiling_in_words(rule, bound)}" for rule, bound in ceilings),
        "rates of each layer, as recorded and as they would be if it adapted by each dialect; - "
        "does not adapt in this run",
        "",
        f"{'layer':{wide}s}{'|w|':>10s}{'|g|':>10s}{'recorded':>12s}"
        + "".join(f"{rule:>20s}" for rule in rules),
    ]
    for row in result["layers"]:
        norms = "{weight_norm:10.3g}{grad_norm:10.3g}{recorded[rate]:12.4g}".format_map(row)
        rates = "".join(f"{_shown(row[rule]['rate']):>20s}" for rule in rules)
        lines.append(f"{row['name']:{wide}s}{norms}{rates}{'' if row['adapts'] else ' -'}")
    return "\n".join(lines)


def _ceiling_in_words(rule: str, bound: float | None) -> str:
    if rule == "sgd":
        return f"the rate is lr: {bound:g}"
    if bound is not None:
        where = "where |w| and |g| are above 0, " if rule == "bolts" else ""
        return f"{where}the rate is at most lr eta / wd = {bound:.5g}, whatever the gradient"
    return "no ceiling: " + (
        "|g + wd w| may vanish" if rule == "deepmind" else "without weight decay |g| may vanish"
    )


def _peak_in_words(peak: dict[str, Any]) -> list[str]:
    text = "The published peak: {rate:.1f} at lr {lr:g} (epoch {epoch}) needs wd <= lr eta / rate"
    lines = [f"{text.format_map(peak)} = {peak['most_weight_decay']:.2g} with blog or bolts:"]
    for row in peak["ceilings"]:
        bound = "none" if row["ceiling"] is None else f"{row['ceiling']:.3g}"
        answer = "possible" if row["possible"] else "ruled out"
        start = "  wd {weight_decay:<8g}{source:36s}ceiling".format_map(row)
        lines.append(f"{start} {bound}: {answer}")
    return lines


def _shown(value: float | list[float]) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value[0]:.3g}..{value[1]:.3g}"
