"""The embeddings of a set of images, by a run: into a file, and into a picture of the plane."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config import DataConfig, Resolved
from fastbyol.data import beton, embedded, loader
from fastbyol.data.beton import BetonInfo
from fastbyol.data.beton_write import check_output
from fastbyol.data.contents import Contents
from fastbyol.data.order import subset
from fastbyol.errors import UsageError, check_choice
from fastbyol.evaluation import plane
from fastbyol.evaluation.features import BATCH, check_finite, embed
from fastbyol.evaluation.rank import effective_rank, relative_spread
from fastbyol.exports import embedding_files
from fastbyol.exports.embedding_files import Floats, Table
from fastbyol.exports.parity import data_name
from fastbyol.model.byol import Online, Target
from fastbyol.runs import inputs
from fastbyol.runs.checkpoint import Checkpoint
from fastbyol.runs.environment import package_version
from fastbyol.show import embedding_picture

# More points cover one another.
PICTURED = 4000
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Wishes:
    """What a caller wants. ``data`` None is the run's own; a ``limit`` of 0 is no limit."""

    out: Path | None
    picture: Path | None
    by: str
    data: str | None
    split: str | None
    weights: str
    projections: bool
    limit: int
    image_field: str | None
    label_field: str | None
    overwrite: bool

    def check(self) -> None:
        """Raise UsageError for what cannot be written, before any work."""
        if self.out is None and self.picture is None:
            raise UsageError(
                "nothing to write: name a file with --out, or a picture with --picture"
            )
        if self.limit < 0:
            raise UsageError(f"--limit {self.limit}: must be at least 1, or 0 for all images")
        check_choice("--by", self.by, plane.WAYS)
        if self.out is not None:
            embedding_files.check_name(self.out)
            check_output(self.out, overwrite=self.overwrite)
        if self.picture is not None:
            embedding_picture.check_name(self.picture)
            plane.check(self.by)
            check_output(self.picture, overwrite=self.overwrite)


def write(
    run: Path,
    config: Resolved,
    net: Online | Target,
    loaded: Checkpoint | None,
    wishes: Wishes,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Embed images with ``net``, of ``run``, and write what ``wishes`` name.

    Images are not augmented; ``features.embed`` of all of them at once has the same bits, but only
    a few batches are in memory. Returns what the command prints as JSON.
    """
    info, name, limit = _images(run, config.data, wishes)
    chosen = subset(info.num_samples, wishes.limit or limit)
    ids = torch.arange(info.num_samples) if chosen is None else chosen
    decoder = inputs.decoder_of(run, config.data)
    module: nn.Module = net.encoder
    if wishes.projections:
        module = nn.Sequential(net.encoder, net.projector)
    kept = _Kept(subset(len(ids), PICTURED), len(ids), wishes.picture is not None)

    def rows() -> Iterator[Floats]:
        batches = loader.read_in_order(
            info, ids, batch_size=BATCH, workers=config.data.workers,
            size=config.data.size or config.views.size, decoder=decoder,
        )  # fmt: skip
        for images in batches:
            y = embed(module, images, config.views, device=device).cpu()
            check_finite(y, name)
            kept.add(y)
            yield y.numpy()

    about = {
        "run": run.resolve().name,
        "step": 0 if loaded is None else int(loaded.meta["step"]),
        "checkpoint": None if loaded is None else loaded.digest,
        "weights": wishes.weights,
        "data": name,
        **Contents.of(info)._asdict(),
        "decoder": decoder,
        "size": config.views.size,
        "mean": list(config.views.mean),
        "std": list(config.views.std),
        "fastbyol": package_version("fastbyol"),
    }
    dim = config.model.projector.out if wishes.projections else net.encoder.embedding_dim
    table = Table(
        "z" if wishes.projections else "y", dim, ids.numpy(),
        None if info.labels is None else info.labels[ids.numpy()], info.class_names, about,
    )  # fmt: skip
    if wishes.out is not None:
        embedding_files.write(wishes.out, table, rows(), overwrite=wishes.overwrite)
    else:
        for _ in rows():
            pass
    shares = None
    if wishes.picture is not None:
        shares = _draw(wishes.picture, kept, table, wishes)
    return {
        **about,
        "run": str(run), "out": None if wishes.out is None else str(wishes.out),
        "num_images": len(ids), "dim": dim, "column": table.column,
        "labels": info.label_field, "class_names": list(info.class_names),
        "picture": None if wishes.picture is None else str(wishes.picture),
        "by": wishes.by, "variance_shares": shares, "notes": list(_notes(info)),
    }  # fmt: skip


class _Kept:
    """The rows that a picture shows of those that pass by, chosen by ``order.subset``."""

    def __init__(self, chosen: Tensor | None, total: int, wanted: bool) -> None:
        self.positions = torch.arange(total) if chosen is None else chosen
        self._wanted, self._parts, self._seen = wanted, list[Tensor](), 0

    def add(self, rows: Tensor) -> None:
        here = self.positions - self._seen
        if self._wanted:
            self._parts.append(rows[here[(here >= 0) & (here < len(rows))]])
        self._seen += len(rows)

    def rows(self) -> Tensor:
        return torch.cat(self._parts)


def _images(run: Path, data: DataConfig, wishes: Wishes) -> tuple[BetonInfo, str, int]:
    """Return the inspected file, its name for others, and the run's limit on its images."""
    asked = {"image_field": wishes.image_field, "label_field": wishes.label_field}
    if wishes.data is None:
        part = wishes.split or "test"
        check_choice("--split of the run's own data", part, SPLITS)
        is_test = part == "test"
        file = embedded.held_out_file(data) if is_test else embedded.training_file(data)
        if file is None:
            raise UsageError(
                f"{run}: the run has no test data: name images with --data, or take --split train"
            )
        own = {"image_field": data.image_field, "label_field": data.label_field}
        fields = {name: value or own[name] for name, value in asked.items()}
        # What is pinned is the content of the run's own fields.
        pinned = inputs.of_run(run) if fields == own else None
        info = inputs.own_data(run, pinned, part, file, **fields)
        named = (data.test or data.train) if is_test else data.train
        return info, f"{data_name(named)}, {part}", data.test_limit if is_test else data.limit
    split = wishes.split
    if wishes.data in embedded.BUILT_IN:
        check_choice(f"--split of {wishes.data}", split or "test", SPLITS)
        plain = data.model_copy(update={"split": None, "test_split": None})
        file = embedded.file_of(wishes.data, "train" if split == "train" else "test", plain)
    else:
        file = embedded.file_of(wishes.data, "test", data.model_copy(update={"test_split": split}))
    info = beton.inspect(file, **asked, may_lack_labels=True)
    return info, ", ".join(filter(None, (data_name(wishes.data), split))), 0


def _draw(path: Path, kept: _Kept, table: Table, wishes: Wishes) -> tuple[float, float] | None:
    rows, labels = kept.rows(), table.labels
    points = plane.lay_out(rows, wishes.by)
    labels = None if labels is None else labels[kept.positions.numpy()]
    about = table.about
    title = f"{about['run']}, step {about['step']}"
    what = "projections z" if wishes.projections else "embeddings y"
    spread, total = relative_spread(rows), len(table.ids)
    count = total if len(rows) == total else f"{len(rows)} of {total}"
    facts = [
        f"{what} of {count} images ({about['data']})",
        f"RankMe {effective_rank(rows):.1f} of {table.dim}; distance from the mean {spread:.2g} of "
        "the mean's length",
    ]
    content = embedding_picture.content(
        path.suffix, points, labels, table.class_names, facts, title
    )
    embedding_files.put(path, lambda file: file.write(content), overwrite=wishes.overwrite)
    return points.shares


def _notes(info: BetonInfo) -> Iterator[str]:
    if info.labels is None:
        names = [field.name for field in info.fields if field.type_name == "int"]
        which = f" ({', '.join(names)}: --label-field names one)" if names else ""
        yield f"{info.path}: no labels{which}"
