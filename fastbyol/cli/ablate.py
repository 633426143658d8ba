"""`fastbyol ablate`: the appendix's claims, listed, shown, run and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from fastbyol.cli import fleet, image_files, phase
from fastbyol.cli.image_files import Data, TestData
from fastbyol.cli.options import Json
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.fleet.launch import Launch
from fastbyol.output import console as make_console
from fastbyol.output import print_json, say

if TYPE_CHECKING:
    from fastbyol.ablations.arms import Arm, ScaleName
    from fastbyol.ablations.claims import Claim
    from fastbyol.ablations.suite import Suite
    from fastbyol.ablations.verdict import Verdict
    from fastbyol.config import Resolved

app = typer.Typer(
    help="Run the post's ablations and say, claim by claim, whether they hold.",
    no_args_is_help=True,
)

Scale = Annotated[
    Literal["full", "short", "long", "mini"],
    typer.Option(
        help="full: STL-10 as published; short: a GPU's hours; long: a narrow net for days; mini: "
        "the same net for an hour."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the runs. Default: ablations/SCALE."),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        help="Runs per arm, two or more of one whose rates are replayed. Default: what each "
        "claim's verdict wants, 1 to 5.",
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CLAIM|ARM]...", help="Such as C6 C7 gn-lars-0.2@exclude."),
]


Everything = Annotated[
    bool, typer.Option("--all", help="Every arm of the scale, open settings included.")
]
Stl10 = Annotated[
    Path | None,
    typer.Option("--stl10", metavar="DIR", help="STL-10's folder, converted on the first call."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Over the scale, under the arm."),
]
Check = Annotated[
    bool, typer.Option("--check", help="Exit with code 4 where a claim is not reproduced.")
]


app.command()(fleet.work)
app.command()(fleet.status)
app.command()(fleet.stop)
app.command()(fleet.retry)
app.command()(phase.phase)


class NotReproduced(FastbyolError):  # noqa: N818 - a verdict, and no fault
    """The verdict "not reproduced" under ``--check``."""

    exit_code = 4


@app.command("list")
def list_(scale: Scale = "mini", out: Out = None, as_json: Json = False) -> None:
    """List the claims and arms, and how far their runs in DIR are."""
    from fastbyol.ablations.arms import arms
    from fastbyol.ablations.claims import CLAIMS

    rows = [
        _arm_row(arm, scale, _folder(out, scale)) for arm in arms().values() if scale in arm.scales
    ]
    if as_json:
        claims = [
            {"id": claim.id, "says": claim.says, "arms": claim.arms, "controls": claim.controls}
            for claim in CLAIMS
        ]
        print_json(
            {"scale": scale, "out": str(_folder(out, scale)), "claims": claims, "arms": rows}
        )
        return
    console = make_console()
    here = {claim for row in rows for claim in row["claims"]}
    claims_table = Table("claim", "says", box=None)
    for claim in CLAIMS:
        elsewhere = "" if claim.id in here else f" (not at --scale {scale}: {_scales_of(claim)})"
        claims_table.add_row(claim.id, claim.says + elsewhere)
    names = ("claims", "seeds", "runs done", "what it is")
    arms_table = Table(Column("arm", overflow="fold"), *names, box=None)
    for row in rows:
        others = (f", {row[name]} {name}" for name in ("stopped", "damaged") if row[name])
        done, of = f"{row['done']}{''.join(others)}", " ".join(row["claims"])
        arms_table.add_row(row["arm"], of, str(row["seeds"]), done, row["about"])
    console.print(claims_table)
    console.print()
    console.print(arms_table)


@app.command()
def show(
    target: Annotated[str, typer.Argument(metavar="CLAIM|ARM", help="Such as C6 or gn-lars-0.2.")],
    scale: Scale = "mini",
    as_json: Json = False,
) -> None:
    """Show a claim or an arm.

    A claim has text, figure, published numbers, rules and settings; an arm has its configuration.
    """
    from fastbyol import config_io
    from fastbyol.ablations.arms import arm, load
    from fastbyol.ablations.claims import CLAIMS

    claim = next((claim for claim in CLAIMS if claim.id == target.upper()), None)
    if claim is not None:
        _show_claim(claim, as_json)
        return
    chosen = arm(target)
    loaded = load(chosen, scale, seed=0)
    if as_json:
        about = {"arm": chosen.name, "about": chosen.about, "claims": chosen.claims}
        print_json(about | {"scale": scale, "config": loaded.config.model_dump(mode="json")})
    else:
        say(f"# {chosen.name}: {chosen.about} ({', '.join(chosen.claims)})")
        say(*config_io.dump(loaded.config, loaded.origin).split("\n"))


@app.command()
@fleet.with_launch_options
def run(
    targets: Targets = None,
    everything: Everything = False,
    scale: Scale = "mini",
    seeds: Seeds = None,
    out: Out = None,
    data: Data = None,
    test_data: TestData = None,
    stl10: Stl10 = None,
    sets: Sets = None,
    *,
    launch: Launch,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Train what is missing, print the verdicts. After an interruption the next call goes on."""
    from fastbyol.ablations import plan
    from fastbyol.fleet import campaign, launchers

    launchers.check(launch)
    console = make_console(err=as_json)
    folder = _folder(out, scale).resolve()
    chosen = plan.chosen(targets or (), scale, everything=everything)
    files = _data_files(scale, folder, data, test_data, stl10, console)
    flags = image_files.flags(files, launch.device)
    make = partial(plan.make, chosen, scale, folder, seeds=seeds, sets=sets or (), flags=flags)
    num_images = image_files.check(files, make()[0].config.data)
    runs = make(num_images=num_images)
    asked = {"targets": targets or [], "all": everything, "seeds": seeds, "set": sets or []}
    share = _say_what_data(runs[0].config, num_images, launch, console)
    asked |= {"data": files, "image_share": share, "launch": asdict(launch)}
    how: dict[str, Any] = {"asked": asked, "launch": launch, "console": console}
    outcome = campaign.execute(plan.tasks(runs, folder), folder, scale, **how)
    verdicts = _read(folder).judged
    if as_json:
        print_json({"out": f"{folder}", "scale": scale} | asdict(outcome) | _verdict_rows(verdicts))
    else:
        _print_end(verdicts, fleet.in_words(outcome, folder, launch), console)
    fleet.finish(outcome)
    _check(verdicts, check=check)


@app.command()
def report(
    scale: Scale = "mini",
    out: Out = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Default: DIR/report.html.")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png", metavar="DIR", help="Write two pictures and verdicts.json there too."
        ),
    ] = None,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Judge the runs that lie in DIR.

    The verdict of every claim is shown with its evidence, and all is written as one HTML file.
    """
    from fastbyol.ablations import report as reports

    folder = _folder(out, scale)
    suite = _read(folder)
    if as_json:
        print_json({"out": str(folder), "scale": suite.scale, **_verdict_rows(suite.judged)})
    else:
        _print_verdicts(suite.judged, make_console())
    page = html or folder / "report.html"
    reports.write_report(suite, page)
    for path in (page, *(reports.write_pictures(suite, png) if png else [])):
        say(str(path), err=as_json)
    _check(suite.judged, check=check)


def _read(folder: Path) -> Suite:
    """Read the ablations in ``folder``, and print which runs cannot be read."""
    from fastbyol.ablations.suite import Suite

    suite = Suite.read(folder)
    for why in suite.left_out:
        say(f"not judged: {why}", err=True)
    return suite


def _folder(out: Path | None, scale: str) -> Path:
    return out if out is not None else Path("ablations") / scale


def _data_files(
    scale: ScaleName,
    folder: Path,
    data: str | None,
    test_data: str | None,
    stl10: Path | None,
    console: Console,
) -> dict[str, str]:
    """Return the files to train and score on by dotted key; none for the scale's own textures."""
    if stl10 is not None:
        if data or test_data:
            raise UsageError("--stl10 names both sets: leave out --data and --test-data")
        return {key: str(path) for key, path in _convert_stl10(stl10, folder, console).items()}
    if scale == "full" and not (data and test_data):
        raise UsageError(
            "--scale full is of STL-10: name its folder with --stl10, or two betons with --data "
            "and --test-data"
        )
    return image_files.named(data, test_data)


def _say_what_data(
    config: Resolved, num_images: int | None, launch: Launch, console: Console
) -> float:
    """Print what the runs train on, and its image share; return that share.

    ``num_images``: how many the named file has, None for a built-in set.
    """
    from fastbyol.ablations.arms import arm, load
    from fastbyol.ablations.image_share import image_share

    # The network of the recoveries, whatever arms are asked for.
    network = load(arm("gn-lars-0.2"), "mini", seed=0).config.model
    # A cluster's login node has not the device of its machines.
    device = config.train.device if launch.launcher == "local" else "auto"
    train = config.train.model_copy(update={"device": device})
    share = image_share(config.model_copy(update={"model": network, "train": train}))
    limit = config.data.limit
    if num_images is None:
        images = f"{limit} images at most" if limit else "all images"
    elif num_images < limit:
        images = f"{num_images} images, as many steps in {config.train.epochs} epochs"
    else:
        images = f"{limit or num_images} images"
    console.print(
        f"data {config.data.train}, {images}: image share r = {share:.3f}, the part of what two "
        "views differ in "
        "that is the image (textures 0.010, where no recovery shows; Fashion-MNIST 0.078, where "
        "LARS recovers)",
        markup=False,
        soft_wrap=True,
    )
    return share


def _convert_stl10(source: Path, folder: Path, console: Console) -> dict[str, Path]:
    from fastbyol.data import beton
    from fastbyol.data.convert import convert

    files = {}
    for key, split in (("data.train", "train+unlabeled"), ("data.test", "test")):
        path = files[key] = folder / "data" / f"stl10-{split.replace('+', '-')}.beton"
        if path.exists():
            beton.inspect(path)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"converting {source}, {split}, to {path}", markup=False, soft_wrap=True)
        convert(str(source), path, kind="stl10", split=split, strict=True)
    return files


def _scales_of(claim: Claim) -> str:
    """Return the scales that have the arms of ``claim``."""
    from fastbyol.ablations.arms import SCALES, arm

    return ", ".join(
        scale for scale in SCALES if all(scale in arm(name).scales for name in claim.arms)
    )


def _arm_row(arm: Arm, scale: ScaleName, folder: Path) -> dict[str, Any]:
    from fastbyol.ablations.plan import run_path, seeds_of
    from fastbyol.config_io import read_run
    from fastbyol.fleet.survey import is_done

    counts = Counter(done=0, stopped=0, damaged=0)
    for path in sorted(run_path(folder, arm.name, 0).parent.glob("seed*/config.toml")):
        try:
            whole = is_done(path.parent, read_run(path).train.epochs)
            counts["done" if whole else "stopped"] += 1
        except FastbyolError:
            counts["damaged"] += 1
    about = {"arm": arm.name, "about": arm.about, "claims": arm.claims}
    return about | {"seeds": seeds_of(arm, None), **counts}


def _show_claim(claim: Claim, as_json: bool) -> None:
    from fastbyol.ablations.arms import arm
    from fastbyol.ablations.rules import in_words

    settings = {name: dict(arm(name).settings) for name in (*claim.arms, *claim.controls)}
    if as_json:
        print_json(
            {
                "id": claim.id, "name": claim.name, "says": claim.says, "figures": claim.figures,
                "arms": settings, "controls": claim.controls, "published": dict(claim.numbers),
                "rule": in_words(claim.id).splitlines(), "seeds": claim.needs,
            }
        )  # fmt: skip
        return
    say(f"{claim.id} {claim.name}: {claim.says}", "")
    say(f"figures: {', '.join(claim.figures) or 'none'}")
    if claim.numbers:
        say("published:", *(f"  {key}: {value}" for key, value in claim.numbers.items()))
    say("", f"verdict, from {claim.needs} seeds or more:")
    say(*(f"  {line}" for line in in_words(claim.id).splitlines()), "")
    for name, values in settings.items():
        say(f"{'control' if name in claim.controls else 'arm'} {name}: {arm(name).about}")
        for key, value in values.items():
            say(f"  {key} = {value}")


def _print_end(verdicts: Sequence[Verdict], counts: str, console: Console) -> None:
    """Print the verdicts, if there are any, and what became of the runs."""
    if verdicts:
        _print_verdicts(verdicts, console)
    console.print(counts, markup=False, soft_wrap=True)


def _print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    table = Table("claim", "verdict", "statement", "held", "evidence", box=None)
    for verdict in verdicts:
        for index, row in enumerate(verdict.statements):
            answer = "told" if row.role == "told" else row.answer
            first = (verdict.claim, verdict.outcome) if index == 0 else ("", "")
            table.add_row(*first, row.text, answer, row.evidence.partition(". ")[0])
    console.print(table)


def _verdict_rows(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the entry ``verdicts`` of a command's JSON."""
    rows = [
        {"claim": v.claim, "outcome": v.outcome, "statements": [s._asdict() for s in v.statements]}
        for v in verdicts
    ]
    return {"verdicts": rows}


def _check(verdicts: Sequence[Verdict], *, check: bool) -> None:
    lost = [verdict.claim for verdict in verdicts if verdict.outcome == "not reproduced"]
    if check and lost:
        raise NotReproduced(f"not reproduced: {', '.join(lost)}")
