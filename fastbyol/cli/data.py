"""The commands for data sets: convert, and ``data`` info, verify, preview."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Column, Table

from fastbyol.cli.options import BetonPath, ConfigFile, ImageField, Json, LabelField, Sets
from fastbyol.cli.train import load
from fastbyol.output import bar, print_json, say
from fastbyol.output import console as make_console

app = typer.Typer(help="Look into a beton file.", no_args_is_help=True)

Source = Annotated[
    str,
    typer.Argument(
        help="'fashion-mnist', 'textures', a folder of images or of STL-10, CIFAR, SVHN, idx or "
        ".npy files, an .npz, a tar or zip of images, WebDataset's shard-{000..099}.tar, parquet "
        "files, a saved set of `datasets`, 'torchvision:CIFAR10'."
    ),
]
Split = Annotated[
    str | None, typer.Option(help="train, test, unlabeled, train+unlabeled; or a subfolder.")
]
Resize = Annotated[
    Literal["resize", "centre", "none"] | None,
    typer.Option(
        help="resize: stretch to SIZE x SIZE; centre: short side to SIZE, then the middle; none: "
        "as it is."
    ),
]


Kind = Annotated[
    str | None, typer.Option(help="What SOURCE is, where it cannot be told from its files.")
]
Fold = Annotated[int | None, typer.Option(min=0, max=9, help="One of STL-10's ten folds of train.")]
Size = Annotated[
    int | None, typer.Option(min=8, max=4096, help="Side of the written images, pixels.")
]
Mode = Annotated[
    Literal["raw", "jpg"], typer.Option(help="raw is the fastest to read, jpg the smallest.")
]
Quality = Annotated[int, typer.Option(min=1, max=100, help="Of JPEG.")]
Count = Annotated[int, typer.Option(min=1, help="Images of 'textures'.")]
Seed = Annotated[int, typer.Option(min=0, help="Of 'textures'.")]
Workers = Annotated[int, typer.Option(min=0, help="Writing processes; 0: one per core.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")]


def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The beton file to write.")],
    kind: Kind = None,
    split: Split = None,
    fold: Fold = None,
    size: Size = None,
    resize: Resize = None,
    mode: Mode = "raw",
    quality: Quality = 90,
    count: Count = 4096,
    seed: Seed = 0,
    workers: Workers = 0,
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert images to a beton file."""
    from fastbyol.data.convert import convert as run

    options: dict[str, Any] = (
        {"kind": kind, "split": split, "fold": fold, "size": size, "resize": resize}
        | {"mode": mode, "quality": quality, "count": count, "seed": seed}
        | {"workers": workers, "strict": strict, "overwrite": overwrite}
    )
    console = make_console(err=as_json)
    with bar(console, "converting") as progress:
        report = run(source, out, progress=progress, **options)
    for line in report.in_words():
        console.print(line, markup=False, soft_wrap=True)
    if as_json:
        print_json(
            {"out": str(out), "images": report.num_written, "labelled": report.labelled}
            | {"classes": report.class_names}
            | {"split": report.split, "skipped": report.skipped, "notes": report.notes}
            | {"ignored": {kind: len(names) for kind, names in report.ignored_by_kind().items()}}
        )


@app.command()
def verify(
    file: BetonPath,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every sample, and look at its label.")
    ] = False,
    image_field: ImageField = None,
    label_field: LabelField = None,
    as_json: Json = False,
) -> None:
    """Prove that a beton file is whole: its structure, and the checksums that convert wrote."""
    from fastbyol.data.verify import verify as examine

    with bar(make_console(err=as_json), "verifying") as progress:
        verdict = examine(
            file, deep=deep, image_field=image_field, label_field=label_field, progress=progress
        )
    if as_json:
        damaged = [{"sample": sample, "what": what} for sample, what in verdict.damaged]
        print_json(
            {
                "path": str(file),
                "num_samples": verdict.info.num_samples,
                "sealed": verdict.sealed,
                "deep": deep,
            }
            | {"whole": not damaged, "damaged": damaged}
        )
    verdict.demand_whole()
    if not as_json:
        proved = (
            "structure and checksums"
            if verdict.sealed
            else "structure (no checksums: not written by fastbyol)"
        )
        say(
            f"{file}: {verdict.info.num_samples} samples, "
            f"{proved}{', every image decoded' if deep else ''}: whole"
        )


@app.command()
def info(
    file: BetonPath,
    image_field: ImageField = None,
    label_field: LabelField = None,
    as_json: Json = False,
) -> None:
    """Describe the content of a beton file."""
    from fastbyol.data import beton

    values = beton.info_dict(beton.inspect(file, image_field=image_field, label_field=label_field))
    if as_json:
        print_json(values)
        return
    table = Table(Column(), Column(overflow="fold"), box=None, show_header=False)
    for key, value in values.items():
        text = (
            ", ".join(f"{k}: {v}" for k, v in value.items())
            if isinstance(value, dict)
            else str(value)
        )
        table.add_row(key.replace("_", " "), text)
    make_console().print(table)


@app.command()
def preview(
    file: BetonPath,
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="The picture to write.")] = Path(
        "preview.png"
    ),
    count: Annotated[int, typer.Option(help="Samples, spread evenly over the file.")] = 24,
    preset: Annotated[str, typer.Option(help="Whose views to show: demo, blog or paper.")] = "blog",
    config: ConfigFile = None,
    sets: Sets = None,
    image_field: ImageField = None,
    label_field: LabelField = None,
    as_json: Json = False,
) -> None:
    """Draw images of a beton file, each with its two views of epoch 0."""
    from fastbyol.show import contact_sheet

    flags = {
        "data.image_field": ("--image-field", image_field),
        "data.label_field": ("--label-field", label_field),
    }
    ids = contact_sheet.write(
        file, out, load(preset, config, sets or (), flags).config, count=count
    )
    if as_json:
        print_json({"written": str(out), "samples": ids})
    else:
        say(f"{out}: {len(ids)} samples of {file}: image, view 1, view 2")
