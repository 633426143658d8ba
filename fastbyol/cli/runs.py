"""The commands over many runs: list, compare, best, export, page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fastbyol.cli.options import Json
from fastbyol.errors import UsageError
from fastbyol.output import print_json, print_table, say
from fastbyol.text import printable

if TYPE_CHECKING:
    from fastbyol.registry.row import Row

_DEFAULT = "list"
# Those of a sweep or an ablation lie so deep: runs/POINT/SEED.
_DEPTH = 3
_COLUMNS = {
    "name": "run", "status": "status", "epochs": "epochs", "state": "state",
    "neg_cos": "neg cos", "accuracy": "accuracy",
}  # fmt: skip


class _Listing(TyperGroup):
    """A group whose first word, where it is none of its commands, belongs to ``list``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Listing,
    help="List runs with their state and accuracy (`runs [DIR] --sort accuracy --where "
    "optim.name=lars`, as `runs list`), compare, export, show them.",
)
Root = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder of runs; ./best for one that is named best."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="'KEY OP VALUE'",
        help="Of runs for which this holds, e.g. optim.name=lars or 'accuracy>=50'; = != < <= > "
        ">=. Several: all hold.",
    ),
]
Sort = Annotated[
    str | None,
    typer.Option(
        "--sort", metavar="KEY", help="A measure, best first, or a setting. Default: name."
    ),
]
Reverse = Annotated[bool, typer.Option("--reverse", help="The other way round.")]


def _chosen(
    root: Path, where: list[str] | None, sort: str | None, reverse: bool, option: str = "--sort"
) -> list[Row]:
    from fastbyol.registry import selection
    from fastbyol.registry.index import is_run, list_runs

    conditions = [selection.Condition.parse(typed) for typed in where or ()]
    every = list_runs(root, depth=_DEPTH)
    if not every:
        itself = f"is a run itself: name the folder above it, {root}/.."
        say(f"{root}: {itself if is_run(root) else 'no run in it'}", err=True)
    rows = selection.chosen(every, conditions)
    if sort is None:
        return rows[::-1] if reverse else rows
    return selection.ordered(rows, sort, option, reverse=reverse)


@app.command(_DEFAULT)
def list_(
    root: Root = Path("runs"),
    where: Where = None,
    sort: Sort = None,
    reverse: Reverse = False,
    show: Annotated[
        list[str] | None, typer.Option("--show", metavar="KEY", help="One more column.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first so many.")] = None,
    as_json: Json = False,
) -> None:
    """List runs with their state and accuracy, by name."""
    from fastbyol.registry import selection

    rows = _chosen(root, where, sort, reverse)[:limit]
    for key in show or ():
        selection.check_key(key, "--show", rows)
    if as_json:
        print_json([row.as_json() for row in rows])
        return
    if where and not rows:
        say(f"{root}: no run for which --where holds", err=True)
    named = [selection.Condition.parse(typed).key for typed in where or ()]
    keys = [*named, *([] if sort is None else [sort]), *(show or ())]
    titles = _COLUMNS | {key: key for key in keys if key not in _COLUMNS}
    print_table([list(titles.values()), *([_cell(row, key) for key in titles] for row in rows)])


def _cell(row: Row, key: str) -> str:
    from fastbyol.registry.row import in_words

    return f"{row.epochs_done}/{row.epochs}" if key == "epochs" else in_words(row, key)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Page. Default: compare.html beside the first."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the settings in which runs differ beside what they measured, and draw their curves."""
    from fastbyol.registry import comparison
    from fastbyol.show import compare_page, figures

    if out is not None:
        figures.demand()
    compared = comparison.of(runs)
    drawn = None
    if figures.available():
        drawn = compare_page.write(compared, out)
    else:
        say("no page: matplotlib is not installed: pip install 'fastbyol[report]'", err=True)
    if as_json:
        print_json({**compared.as_json(), "page": None if drawn is None else str(drawn)})
        return
    print_table(compared.table())
    if drawn is not None:
        say("", str(drawn))


@app.command()
def best(
    root: Root = Path("runs"),
    by: Annotated[str, typer.Option("--by", metavar="KEY", help="What is best.")] = "accuracy",
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Print the folder of the best run alone, for `$(fastbyol runs best)`."""
    from fastbyol.registry.row import in_words, is_number

    rows = [row for row in _chosen(root, where, by, False, "--by") if row.value(by) is not None]
    if not rows:
        that = " that --where asks for" if where else ""
        raise UsageError(f"{root}: no run{that} with a value of {by} here")
    row = rows[0]
    if not is_number(row.value(by)):
        raise UsageError(f"--by {by}: {in_words(row, by)} is no number: none is the best of them")
    if as_json:
        print_json(row.as_json())
        return
    if printable(row.path) != row.path:
        raise UsageError(f"{printable(row.path)}: no shell could read this name: rename the run")
    say(f"{by} {in_words(row, by)}: the best of {len(rows)} runs that have it", err=True)
    say(f"./{row.path}" if row.path.startswith("-") else row.path)


@app.command()
def export(
    root: Root = Path("runs"),
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE")] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="Needs the extra hf.")
    ] = None,
    where: Where = None,
    sort: Sort = None,
    reverse: Reverse = False,
    as_json: Json = False,
) -> None:
    """Write runs as a table, a line for each: fields, measures and all settings."""
    from fastbyol.registry import tables

    if csv is None and parquet is None:
        raise UsageError("runs export: name a file: --csv FILE or --parquet FILE")
    if csv is not None and parquet is not None and csv.resolve() == parquet.resolve():
        raise UsageError(f"{csv}: named by --csv and by --parquet: name two files")
    rows = _chosen(root, where, sort, reverse)
    written = []
    for path, write in ((csv, tables.write_csv), (parquet, tables.write_parquet)):
        if path is not None:
            write(rows, path)
            written.append(str(path))
    if as_json:
        print_json({"written": written, "runs": len(rows)})
    else:
        say(*(f"{path}: {len(rows)} runs" for path in written))


@app.command()
def page(
    root: Root = Path("runs"),
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: DIR/runs.html.")
    ] = None,
    where: Where = None,
    sort: Sort = None,
    reverse: Reverse = False,
    as_json: Json = False,
) -> None:
    """Write one page of runs to filter and sort in a browser; it needs no server."""
    from fastbyol.show import runs_page

    rows = _chosen(root, where, sort, reverse)
    path = runs_page.write(rows, root, out or root / runs_page.PAGE)
    if as_json:
        print_json({"written": [str(path)], "runs": len(rows)})
    else:
        say(f"{path}: {len(rows)} runs")
