"""The command ``embed``: a run's embeddings as a file, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastbyol.cli.options import Device, ImageField, Json, LabelField, RunOrFile, Weights
from fastbyol.output import print_result

Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="Images to embed. Default: the run's own."),
]
Split = Annotated[
    str | None,
    typer.Option("--split", metavar="NAME", help="Of the images, such as train. Default: test."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Ends in .npz or .parquet.")
]
Projections = Annotated[
    bool, typer.Option("--projections", help="Projections z instead of embeddings y.")
]
Limit = Annotated[
    int, typer.Option("--limit", metavar="N", help="At most N images, the same for all runs.")
]
Picture = Annotated[
    Path | None,
    typer.Option("--picture", metavar="FILE", help="Draw them; ends in .png or .html."),
]
By = Annotated[Literal["pca", "umap"], typer.Option("--by", help="How the picture is laid out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]


def embed(
    run: RunOrFile,
    data: Data = None,
    split: Split = None,
    out: Out = None,
    picture: Picture = None,
    by: By = "pca",
    weights: Weights = "trained",
    projections: Projections = False,
    limit: Limit = 0,
    image_field: ImageField = None,
    label_field: LabelField = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a run's embeddings of images, and draw them in the plane."""
    from fastbyol import api

    result = api.embed(
        run, out, data=data, split=split, weights=weights, projections=projections, limit=limit,
        picture=picture, by=by, image_field=image_field, label_field=label_field, device=device,
        overwrite=overwrite,
    )  # fmt: skip
    print_result(result, in_words, as_json=as_json)


def in_words(result: dict[str, Any]) -> list[str]:
    """Return the result of ``api.embed`` in lines."""
    what = "projections z" if result["column"] == "z" else "embeddings y"
    rows = (
        f"{what} of {result['num_images']} images ({result['data']}), {result['dim']} numbers each"
    )
    lines = [] if result["out"] is None else [f"{result['out']}: {rows}"]
    if result["picture"] is not None:
        shares = result["variance_shares"]
        shown = "" if shares is None else f", {100 * sum(shares):.1f} % of the variance"
        lines.append(f"{result['picture']}: by {result['by']}{shown}")
    return lines
