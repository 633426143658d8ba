"""The check of an export: the same embeddings of the same images as the run's own encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbyol import views
from fastbyol.config import Resolved
from fastbyol.data import embedded, loader, sources, textures
from fastbyol.errors import FastbyolError
from fastbyol.model.adapter import Adapter
from fastbyol.model.resnet import ResNet
from fastbyol.process import full_precision
from fastbyol.runs import inputs

NUM_IMAGES = 64
# Of the largest number in the embeddings, or of 1: float32 through twenty layers, summed in other
# orders, was off by up to 2e-6 of it.
TOLERANCE = 1e-5
# Where a network amplifies rounding, two correct programs are so many times as far from one another
# as one is from float64.
OWN_ERRORS = 4.0
# Images a pass: activations of 64 of them would take gigabytes at large sizes.
_BATCH = 16


class Images(NamedTuple):
    """Normalised images (N, 3, S, S), their name, and a note if they are not the run's own."""

    tensor: Tensor
    words: str
    note: str = ""


class Parity(NamedTuple):
    """The largest difference from the run's encoder on ``num_images`` images of ``data``."""

    max_difference: float
    tolerance: float
    num_images: int
    data: str

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**self._asdict(), "in_words": self.in_words()}

    def in_words(self) -> str:
        """Return a line."""
        return (
            f"at most {self.max_difference:.1e} from the run's own encoder on {self.num_images} "
            f"images ({self.data}); refused above {self.tolerance:.1e}"
        )


def data_name(name: str) -> str:
    """Return the name of data for others, who need not see in which folder they lie."""
    return (Path(name).name if sources.is_path(name) else "") or name


def images_of(run: Path, config: Resolved) -> Images:
    """Return images of the run's own test data, else of its training data, else textures.

    ``run`` is a run folder or a checkpoint.
    """
    data, pinned, size = config.data, inputs.of_run(run), config.data.size or config.views.size
    fields = {"image_field": data.image_field, "label_field": data.label_field}
    reason = "the run has no data"
    for name, find, named in (
        ("test", embedded.held_out_file, data.test or data.train),
        ("train", embedded.training_file, data.train),
    ):
        try:
            file = find(data)
            if file is None:
                continue
            own = inputs.own_data(run, pinned, name, file, **fields)
            decoded = loader.read_all(
                own, workers=data.workers, size=size, limit=NUM_IMAGES,
                image_field=fields["image_field"], label_field=fields["label_field"],
            )  # fmt: skip
        except FastbyolError as error:
            reason = str(error).partition(": put it back")[0]
            continue
        shown = views.plain(decoded.images, config.views).contiguous()
        return Images(shown, f"{data_name(named)}, {name}")
    made = torch.from_numpy(textures.make(NUM_IMAGES, max(8, config.views.size), 0)[0])
    note = f"compared on textures, because the run's own images cannot be read: {reason}"
    return Images(views.plain(made, config.views).contiguous(), "textures, not the run's", note)


def compare(
    model: Callable[[Any], Any], encoder: ResNet | Adapter, images: Images, *, of_arrays: bool
) -> Parity:
    """Return how far ``model`` is from the engine's ``encoder``, both in eval mode.

    ``model`` is called with tensors, or with numpy's arrays if it is ``of_arrays``. Raises
    FastbyolError beyond the tolerance, and for numbers that are not finite.
    """

    def own(batch: Tensor) -> Tensor:
        return encoder(batch)  # type: ignore[no-any-return]

    def exported(batch: Tensor) -> Tensor:
        y = model(batch.numpy()) if of_arrays else model(batch)
        return torch.from_numpy(y) if isinstance(y, np.ndarray) else y

    with torch.no_grad(), full_precision():
        y, wanted = (_embed(each, images.tensor) for each in (exported, own))
        if y.shape != wanted.shape:
            raise FastbyolError(
                f"the export gives {tuple(y.shape)}, the run's encoder {tuple(wanted.shape)}: "
                "nothing was written"
            )
        if not wanted.isfinite().all():
            raise FastbyolError(
                "the run's encoder gives numbers that are not finite, so it has diverged: nothing "
                "was written; export an earlier checkpoint file"
            )
        difference = float((y - wanted).abs().max())
        tolerance = TOLERANCE * max(1.0, float(wanted.abs().max()))
        if not difference <= tolerance:
            exact = copy.deepcopy(encoder).double()
            error = (_embed(exact, images.tensor.double()) - wanted).abs().max()
            tolerance = max(tolerance, OWN_ERRORS * float(error))
    parity = Parity(difference, tolerance, len(images.tensor), images.words)
    if not difference <= tolerance:
        raise FastbyolError(
            f"the export is up to {difference:.1e} from the run's own encoder on "
            f"{parity.num_images} images, more than {tolerance:.1e}: nothing was written"
        )
    return parity


def _embed(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat(list(map(model, _batches(images))))


def _batches(images: Tensor) -> Iterator[Tensor]:
    for first in range(0, len(images), _BATCH):
        yield images[first : first + _BATCH]
