"""The command line: parse, delegate, print. torch is imported inside commands only, so that --help is quick."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table

from fastbyol.cli import ablate
from fastbyol.engine import interrupt
from fastbyol.engine.allocator import keep_freed_memory
from fastbyol.errors import FastbyolError, NoGraphError, UsageError
from fastbyol.output import console as make_console
from fastbyol.output import guarded, is_live, print_json, say
from fastbyol.text import printable

if TYPE_CHECKING:
    from fastbyol.config_io import Loaded
    from fastbyol.engine.trainer import Summary

app = typer.Typer(
    help="Train BYOL, watch it collapse or not, and measure what it learned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
presets_app = typer.Typer(help="The settings that ship with fastbyol.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")
data_app = typer.Typer(help="Look into a beton file.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(ablate.app, name="ablate")

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, everything else on standard error.")
]
BetonPath = Annotated[Path, typer.Argument(metavar="FILE", help="A beton file.")]
ImageField = Annotated[str | None, typer.Option("--image-field", metavar="NAME", help="Default: the only image field.")]
LabelField = Annotated[
    str | None, typer.Option("--label-field", metavar="NAME", help="Default: label, or the only one of a usual name.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Protocol = Annotated[Literal["blog", "linear", "knn"], typer.Option(help="How accuracy is measured.")]
TRAIN = "Training"
MODEL = "Model"
OPTIM = "Optimizer"


def _progress(console: Console, what: str) -> tuple[Any, Callable[[int, int], None]]:
    """A bar, and the function that moves it; in a log, nothing is drawn."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=console, disable=not is_live(console))
    task = bar.add_task(what, total=None)
    return bar, lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="'fashion-mnist', 'textures', a folder of images or of STL-10, CIFAR, SVHN, idx or .npy files, an .npz."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The beton file to write.")],
    kind: Annotated[str | None, typer.Option(help="What SOURCE is, where it cannot be told from its files.")] = None,
    split: Annotated[str | None, typer.Option(help="train, test, unlabeled, train+unlabeled; or a subfolder.")] = None,
    fold: Annotated[int | None, typer.Option(min=0, max=9, help="One of STL-10's ten folds of train.")] = None,
    size: Annotated[int | None, typer.Option(min=8, max=4096, help="Side of the written images, pixels.")] = None,
    resize: Annotated[
        Literal["resize", "centre", "none"] | None,
        typer.Option(help="resize: stretch to SIZE x SIZE; centre: short side to SIZE, then the middle; none: as it is."),
    ] = None,
    mode: Annotated[Literal["raw", "jpg"], typer.Option(help="raw is the fastest to read, jpg the smallest.")] = "raw",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG.")] = 90,
    count: Annotated[int, typer.Option(min=1, help="Images of 'textures'.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Of 'textures'.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Writing processes; 0: one per core.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Convert images to a beton file."""
    from fastbyol.data.convert import convert as run

    console = make_console(err=as_json)
    bar, progress = _progress(console, "converting")
    with bar:
        report = run(
            source,
            out,
            kind=kind,
            split=split,
            fold=fold,
            size=size,
            resize=resize,
            mode=mode,
            quality=quality,
            count=count,
            seed=seed,
            workers=workers,
            strict=strict,
            overwrite=overwrite,
            progress=progress,
        )
    for line in report.in_words():
        console.print(line, markup=False, soft_wrap=True)
    if as_json:
        print_json(
            {"out": str(out), "images": report.num_written, "labelled": report.labelled, "classes": report.class_names}
            | {"split": report.split, "skipped": report.skipped, "notes": report.notes}
            | {"ignored": {kind: len(names) for kind, names in report.ignored_by_kind().items()}}
        )


@app.command()
def train(
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="Beton, fashion-mnist or textures.")] = None,
    test_data: Annotated[str | None, typer.Option("--test-data", metavar="FILE", help="Labelled beton for the probe.")] = None,
    image_field: ImageField = None,
    label_field: LabelField = None,
    preset: Annotated[str | None, typer.Option(help="demo, blog or paper. Default: blog on a GPU, demo on a CPU.")] = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file over the preset.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, e.g. optim.momentum=0.8.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder. Default: a new one under runs/.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(rich_help_panel=TRAIN)] = None,
    batch_size: Annotated[int | None, typer.Option(rich_help_panel=TRAIN)] = None,
    precision: Annotated[str | None, typer.Option(metavar="fp32|bf16|auto", rich_help_panel=TRAIN)] = None,
    seed: Annotated[int | None, typer.Option(rich_help_panel=TRAIN)] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda[:N]", rich_help_panel=TRAIN)] = None,
    engine: Annotated[str | None, typer.Option(metavar="auto|eager|compile|graph", rich_help_panel=TRAIN)] = None,
    stop_on_collapse: Annotated[bool | None, typer.Option("--stop-on-collapse", rich_help_panel=TRAIN)] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from", metavar="RUN", help="Start from this run's or checkpoint's weights.", rich_help_panel=TRAIN
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="byol|contrastive|simsiam", rich_help_panel=MODEL)] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the contrastive loss.", rich_help_panel=MODEL)] = None,
    queue: Annotated[
        int | None, typer.Option(help="Past keys that are negatives; 0: the batch's others.", rich_help_panel=MODEL)
    ] = None,
    norm: Annotated[str | None, typer.Option(metavar="bn|gn|ln|none", help="Encoder's norm.", rich_help_panel=MODEL)] = None,
    mlp_norm: Annotated[
        str | None, typer.Option(metavar="bn|gn|ln|none|brn", help="Norm of both MLPs.", rich_help_panel=MODEL)
    ] = None,
    projector_norm: Annotated[str | None, typer.Option(metavar="bn|gn|ln|none|brn", rich_help_panel=MODEL)] = None,
    predictor_norm: Annotated[str | None, typer.Option(metavar="bn|gn|ln|none|brn", rich_help_panel=MODEL)] = None,
    predictor_layers: Annotated[int | None, typer.Option(metavar="0|2", help="0: no predictor.", rich_help_panel=MODEL)] = None,
    ws: Annotated[
        bool | None, typer.Option("--ws/--no-ws", help="Standardize convolution weights.", rich_help_panel=MODEL)
    ] = None,
    mlp_ws: Annotated[
        bool | None, typer.Option("--mlp-ws/--no-mlp-ws", help="The same for the MLPs' first linears.", rich_help_panel=MODEL)
    ] = None,
    res: Annotated[int | None, typer.Option(help="Side of the views, pixels.", rich_help_panel=MODEL)] = None,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage.", rich_help_panel=MODEL)] = None,
    stem: Annotated[str | None, typer.Option(metavar="torchvision|small", rich_help_panel=MODEL)] = None,
    opt: Annotated[str | None, typer.Option("--opt", metavar="sgd|lars", rich_help_panel=OPTIM)] = None,
    lr: Annotated[float | None, typer.Option(rich_help_panel=OPTIM)] = None,
    wd: Annotated[float | None, typer.Option("--wd", help="Weight decay.", rich_help_panel=OPTIM)] = None,
    lars_on: Annotated[
        list[str] | None,
        typer.Option(
            "--lars-on", metavar="PATTERN", help="Which parameters adapt: prefix or glob, repeatable.", rich_help_panel=OPTIM
        ),
    ] = None,
    lars_dialect: Annotated[str | None, typer.Option(metavar="blog|deepmind|bolts", rich_help_panel=OPTIM)] = None,
    lr_mult: Annotated[
        list[str] | None,
        typer.Option(
            "--lr-mult", metavar="PATTERN=FACTOR", help="Rate factor of some parameters, repeatable.", rich_help_panel=OPTIM
        ),
    ] = None,
    replay_rates: Annotated[
        Path | None,
        typer.Option("--replay-rates", metavar="RUN", help="LARS: take the rates that RUN recorded.", rich_help_panel=OPTIM),
    ] = None,
    rate_cap: Annotated[
        float | None, typer.Option("--rate-cap", help="LARS: no rate above this.", rich_help_panel=OPTIM)
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a network; without --data on textures that are made for it."""
    console = make_console(err=as_json)
    flags = {
        "data.train": ("--data", data),
        "data.test": ("--test-data", test_data),
        "data.image_field": ("--image-field", image_field),
        "data.label_field": ("--label-field", label_field),
        "train.epochs": ("--epochs", epochs),
        "train.batch_size": ("--batch-size", batch_size),
        "train.precision": ("--precision", precision),
        "train.seed": ("--seed", seed),
        "train.device": ("--device", device),
        "engine.mode": ("--engine", engine),
        "train.stop_on_collapse": ("--stop-on-collapse", stop_on_collapse),
        "train.init_from": ("--init-from", init_from),
        "method.name": ("--method", method),
        "method.temperature": ("--temperature", temperature),
        "method.queue": ("--queue", queue),
        "model.norm": ("--norm", norm),
        "model.projector.norm": ("--projector-norm", projector_norm) if projector_norm else ("--mlp-norm", mlp_norm),
        "model.predictor.norm": ("--predictor-norm", predictor_norm) if predictor_norm else ("--mlp-norm", mlp_norm),
        "model.ws": ("--ws", ws),
        "model.projector.ws": ("--mlp-ws", mlp_ws),
        "model.predictor.ws": ("--mlp-ws", mlp_ws),
        "model.predictor.layers": ("--predictor-layers", predictor_layers),
        "views.size": ("--res", res),
        "model.width": ("--width", width),
        "model.stem": ("--stem", stem),
        "optim.name": ("--opt", opt),
        "optim.lr": ("--lr", lr),
        "optim.weight_decay": ("--wd", wd),
        "optim.lars_on": ("--lars-on", _patterns(lars_on)),
        "optim.dialect": ("--lars-dialect", lars_dialect),
        "optim.lr_mult": ("--lr-mult", _factors(lr_mult)),
        "optim.replay_rates": ("--replay-rates", replay_rates),
        "optim.rate_cap": ("--rate-cap", rate_cap),
    }
    loaded = _load(preset, config, sets or (), flags)
    for line in (_what_data(loaded), *loaded.notes):
        console.print(line, markup=False, soft_wrap=True)
    summary = _run(console, as_json, lambda observer: _train(loaded, out, observer))
    _finish(summary, console, as_json)


def _train(loaded: Loaded, out: Path | None, observer: Any) -> Summary:
    from fastbyol import api

    return api.train(loaded.config, out, observer=observer, origin=loaded.origin)


def _load(preset: str | None, file: Path | None, sets: Sequence[str], flags: Mapping[str, tuple[str, object]]) -> Loaded:
    """Where nobody names a preset, the device decides: blog needs a GPU, demo is made for two cores."""
    from fastbyol import config_io

    said = config_io.said(preset=preset, file=file, sets=sets, flags=flags)
    device = said["train.device"].value if "train.device" in said else "auto"
    default = "blog" if "preset" in said or _has_gpu(str(device)) else "demo"
    return config_io.load(preset=preset, file=file, sets=sets, flags=flags, default=default)


def _has_gpu(device: str) -> bool:
    if device != "auto":
        return device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


def _what_data(loaded: Loaded) -> str:
    data, preset = loaded.config.data, loaded.config.preset
    limit = "" if not data.limit else f", {data.limit} of its images at most (data.limit)"
    if data.train != "textures":
        return f"preset {preset}, data {data.train}{limit}"
    said = "data textures" if loaded.origin["data.train"] == "--data" else "no --data given, so the embedded textures set"
    return f"preset {preset}, {said}: {data.textures_count} images of {data.textures_size} px, seed {data.textures_seed}"


def _patterns(values: list[str] | None) -> list[str] | None:
    return [part for value in values for part in value.split(",") if part] if values else None


def _factors(values: list[str] | None) -> list[tuple[str, float]] | None:
    if not values:
        return None
    pairs = []
    for value in values:
        pattern, _, factor = value.rpartition("=")
        try:
            pairs.append((pattern, float(factor)))
        except ValueError:
            pattern = ""
        if not pattern:
            raise UsageError(f"--lr-mult {value}: write PATTERN=FACTOR, for example encoder.layer1=4")
    return pairs


def _run(console: Console, as_json: bool, work: Callable[[Any], Summary]) -> Summary:
    """What ``work`` returns; where its process can do no more, a fresh one goes on with the run and prints the rest."""
    from fastbyol.show.screen import display

    try:
        with display(console) as shown:
            return work(shown)
    except NoGraphError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        _start_again("resume", str(error.run), *(["--json"] if as_json else []))


def _start_again(*arguments: str) -> NoReturn:
    """Become a fresh process of the same program with other ``arguments``.

    Not a child: the GPU's memory is free again, and process number, terminal, signals and exit code stay what they were for
    whoever started this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's flags and the script or module, as they were given.
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    os.execv(sys.executable, [sys.executable, *program, *arguments])


def _finish(summary: Summary, console: Console, as_json: bool) -> None:
    from dataclasses import asdict

    from fastbyol.show import figures, run_report

    if figures.available() and summary.finished:  # a run that was stopped is to end now
        run_report.write(Path(summary.run))
    if as_json:
        print_json(asdict(summary))
        return
    words = ", ".join(filter(None, (f"step {summary.step}", summary.state, summary.accuracies.in_words())))
    console.print(f"{summary.run}: {words}", markup=False, soft_wrap=True)


@app.command()
def resume(
    run: RunPath,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Where the run's training data lie now, unchanged.")
    ] = None,
    test_data: Annotated[
        str | None, typer.Option("--test-data", metavar="FILE", help="Where its test data lie now, unchanged.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped, bit for bit."""
    from fastbyol import api

    console = make_console(err=as_json)
    summary = _run(console, as_json, lambda observer: api.resume(run, data=data, test_data=test_data, observer=observer))
    _finish(summary, console, as_json)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint file.")],
    protocol: Protocol = "blog",
    train_data: Annotated[Path | None, typer.Option("--train-data", metavar="FILE", help="Fit on this (linear, knn).")] = None,
    test_data: Annotated[Path | None, typer.Option("--test-data", metavar="FILE", help="Score on this.")] = None,
    weights: Annotated[
        Literal["trained", "target", "random"],
        typer.Option(help="Of the online network, of the target network, or as the seed drew them."),
    ] = "trained",
    image_field: ImageField = None,
    label_field: LabelField = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a run's encoder."""
    from fastbyol import api

    if protocol == "blog" and train_data is not None:
        say("--train-data: not looked at, the blog protocol fits within the test set; linear and knn take it", err=True)
    result = api.evaluate(
        run,
        protocol,
        train_data=train_data,
        test_data=test_data,
        weights=weights,
        device=device,
        image_field=image_field,
        label_field=label_field,
    )
    for note in result["notes"]:
        say(note, err=True)
    if as_json:
        print_json(result)
    else:
        say(
            f"{run}: {result['accuracy']:.2f}% ({protocol}, {result['num_train']} fitted, {result['num_test']} scored, "
            f"{result['num_classes']} classes)"
        )


@app.command()
def report(
    run: RunPath,
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Write the pictures as PNG files too.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a run: loss, cosines, accuracy, rates per layer, in RUN/report.html."""
    from fastbyol.show import run_report as reports

    paths = reports.write(run, png=png)
    if as_json:
        print_json({"written": [str(path) for path in paths]})
    else:
        say(*map(str, paths))


@app.command()
def explain(
    topic: Annotated[str | None, typer.Argument(metavar="[lars]", help="What to explain.")] = None,
    compare: Annotated[
        str, typer.Option("--compare", metavar="DIALECTS", help="blog, deepmind, bolts, sgd; several with commas.")
    ] = "blog,deepmind,bolts",
    run: Annotated[Path | None, typer.Option("--run", metavar="RUN", help="Take the norms that this run recorded.")] = None,
    step: Annotated[int | None, typer.Option("--step", help="Of --run. Default: where the highest rate was recorded.")] = None,
    lr: Annotated[float, typer.Option(help="Of the examples.")] = 0.2,
    wd: Annotated[float, typer.Option("--wd", help="Of the examples.")] = 1.5e-6,
    eta: Annotated[float, typer.Option(help="Of the examples.")] = 1e-3,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option("--diff", metavar="A B", help="Presets, TOML files or run folders: what differs, key by key."),
    ] = None,
    as_json: Json = False,
) -> None:
    """LARS's dialects in numbers (`explain lars`), or what differs between two configurations (`explain --diff A B`)."""
    if diff is not None:
        _explain_diff(*diff, as_json=as_json)
        return
    if topic != "lars":
        what = "say what" if topic is None else f"nothing on {topic!r}; the nearest is lars"
        raise UsageError(
            f"explain: {what}: `fastbyol explain lars --compare blog,deepmind` or `fastbyol explain --diff blog paper`"
        )
    from fastbyol.cli import explain as explains

    rules = explains.dialects(compare)
    found = explains.of_run(run, rules, step) if run else explains.lars(rules, lr=lr, weight_decay=wd, eta=eta)
    if as_json:
        print_json(found)
    else:
        say(*(explains.run_in_words(found) if run else explains.in_words(found)).split("\n"))


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
    texts += [(row.key, differences.text(row.a), differences.text(row.b), row.a_origin, row.b_origin) for row in rows]
    cells = [tuple(map(printable, row)) for row in texts]
    # Not a rich table: it would cut keys and values to the terminal's width.
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    say(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells))


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder of runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs with their state and accuracy."""
    from dataclasses import asdict

    from fastbyol.runs.folder import list_runs

    rows = list_runs(root)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = Table(Column("run", overflow="fold"), "epochs", "state", "neg cos", "accuracy", box=None)
    for row in rows:
        neg = "" if row.neg_cos is None else f"{row.neg_cos:.4f}"
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.1f}%"
        table.add_row(row.name, f"{row.epochs_done}/{row.epochs}", row.state or "", neg, accuracy)
    make_console().print(table)


@data_app.command("verify")
def data_verify(
    file: BetonPath,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every sample, and look at its label.")] = False,
    image_field: ImageField = None,
    label_field: LabelField = None,
    as_json: Json = False,
) -> None:
    """Prove that a beton file is whole: its structure, and the checksums that convert wrote."""
    from fastbyol.data.verify import verify

    bar, progress = _progress(make_console(err=as_json), "verifying")
    with bar:
        verdict = verify(file, deep=deep, image_field=image_field, label_field=label_field, progress=progress)
    if as_json:
        damaged = [{"sample": sample, "what": what} for sample, what in verdict.damaged]
        print_json(
            {"path": str(file), "num_samples": verdict.info.num_samples, "sealed": verdict.sealed, "deep": deep}
            | {"whole": not damaged, "damaged": damaged}
        )
    verdict.demand_whole()
    if not as_json:
        proved = "structure and checksums" if verdict.sealed else "structure (no checksums: not written by fastbyol)"
        say(f"{file}: {verdict.info.num_samples} samples, {proved}{', every image decoded' if deep else ''}: whole")


@data_app.command("info")
def data_info(file: BetonPath, image_field: ImageField = None, label_field: LabelField = None, as_json: Json = False) -> None:
    """What a beton file holds."""
    from fastbyol.data import beton

    info = beton.info_dict(beton.inspect(file, image_field=image_field, label_field=label_field))
    if as_json:
        print_json(info)
        return
    table = Table(Column(), Column(overflow="fold"), box=None, show_header=False)
    for key, value in info.items():
        text = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key.replace("_", " "), text)
    make_console().print(table)


@data_app.command("preview")
def data_preview(
    file: BetonPath,
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="The picture to write.")] = Path("preview.png"),
    count: Annotated[int, typer.Option(help="Samples, spread evenly over the file.")] = 24,
    preset: Annotated[str, typer.Option(help="Whose views to show: demo, blog or paper.")] = "blog",
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file over the preset.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, e.g. views.size=32.")] = None,
    image_field: ImageField = None,
    label_field: LabelField = None,
    as_json: Json = False,
) -> None:
    """Draw images of a beton file, each with its two views of epoch 0."""
    from fastbyol.show import contact_sheet

    flags = {"data.image_field": ("--image-field", image_field), "data.label_field": ("--label-field", label_field)}
    ids = contact_sheet.write(file, out, _load(preset, config, sets or (), flags).config, count=count)
    if as_json:
        print_json({"written": str(out), "samples": ids})
    else:
        say(f"{out}: {len(ids)} samples of {file}: image, view 1, view 2")


@presets_app.command("list")
def presets_list(as_json: Json = False) -> None:
    """Name the presets."""
    from fastbyol import config_io

    rows = {name: config_io.preset_summary(name) for name in config_io.presets()}
    if as_json:
        print_json(rows)
    else:
        for name, text in rows.items():
            say(f"{name:8s}{text}")


@presets_app.command("show")
def presets_show(
    name: str,
    as_json: Json = False,
) -> None:
    """Every value of a preset, and where it comes from."""
    from fastbyol import config_io

    loaded = config_io.load(preset=name, file=None, sets=(), flags={})
    if as_json:
        print_json(loaded.config.model_dump(mode="json"))
    else:
        say(*config_io.dump(loaded.config, loaded.origin).split("\n"))


@presets_app.command("copy")
def presets_copy(name: str, out: Annotated[Path, typer.Argument(help="TOML file to write.")]) -> None:
    """Write a preset's file, comments and all, to edit and pass with --config."""
    from fastbyol import config_io

    text = config_io.preset_text(name)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}: name a new file in a folder that can be written") from None
    say(str(out))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is missing and the exact command that brings it."""
    from fastbyol.cli import doctor as doctors

    checks = doctors.examine()
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        width = 2 + max(len(check.name) for check in checks)
        for check in checks:
            mark = "ok  " if check.ok else ("MISSING" if check.needed else "none")
            remedy = [f"{'':{8 + width}s}-> {check.remedy}"] if check.remedy else []
            say(f"{mark:8s}{check.name:{width}s}{check.found}", *remedy)
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SUITES]...", help="kernels, views, loader, optimizer, step, train; all, the default."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE|DIR", help="Keep the result: a .json file, or a folder for one.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="A B", help="Measure nothing: compare two kept results.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that all of it works, not how fast.")] = False,
    as_json: Json = False,
) -> None:
    """Measure this machine's speed against its own limits and against plain PyTorch, side by side."""
    from fastbyol_bench import command

    console = make_console(err=True)

    def note(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    text = command.main(suites or (), out=out, compare=compare, device=device, quick=quick, as_json=as_json, note=note)
    say(*text.split("\n"))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for data, run and pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Compare random, BYOL and supervised encoders, and let one network stay collapsed and another recover."""
    from fastbyol import demo as demos

    console = make_console(err=as_json)
    try:
        result = demos.run(out, seed=seed, console=console)
    except NoGraphError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        _start_again(*sys.argv[1:])  # which goes on with the run
    if as_json:
        print_json(result)


def main() -> None:
    """Entry point: every foreseen failure is one line on standard error and an exit code of ``errors``.

    A command whose output cannot be written does its work to the end, and then fails for it.
    """
    # Read when torch is imported. Threads that spin while they wait take the cores from whatever else runs: beside another
    # process on two cores an epoch of the demo ran at 193 images/s spinning and at 320 sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    try:
        with guarded() as failures:
            code = _run_command()
            if failures and not code:
                code = 1
                if words := failures.in_words():
                    _say_error(words)
        sys.exit(code)
    except interrupt.Ended as error:  # all is cleaned up: end as the signal would have ended us
        signal.signal(error.number, signal.SIG_DFL)
        os.kill(os.getpid(), error.number)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be saved: Python's own would print a trace


def _run_command() -> int:
    """Run the command line; returns its exit code, its error said. Raises ``Ended`` where a signal ended it."""
    try:
        with interrupt.ending():
            _demand_working_folder()
            code = app(standalone_mode=False, prog_name="fastbyol")
        return code if isinstance(code, int) else 0
    except FastbyolError as error:
        _say_error(str(error))
        return error.exit_code
    except typer.TyperException as error:
        message = error.format_message() or "say what to do: see fastbyol --help"
        if message.startswith("Usage: "):  # a group of commands without one: its help, which is no one-line error
            say(*message.split("\n"), err=True)
        else:
            _say_error(" ".join(message.split()))
        return error.exit_code
    except (KeyboardInterrupt, interrupt.Ended, Exception) as error:
        told = interrupt.behind(error)
        if isinstance(told, interrupt.Ended):
            _say_error(f"ended by {told}")
            raise told from None
        if told:
            _say_error("interrupted")
            return 130
        if not isinstance(error, OSError):
            raise
        # Of the machine, and not foreseen: a folder that went away, a disk that fails.
        _say_error(f"{error.filename or 'system'}: {error.strerror or error}")
        return 1


def _demand_working_folder() -> None:
    """Raise UsageError where the folder that the command was called in was removed: torch's libraries end a process there."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(f"the working folder: {error.strerror}: cd to one that is there") from None


def _say_error(message: str) -> None:
    say(f"fastbyol: error: {message.strip()}", err=True)


if __name__ == "__main__":
    main()
