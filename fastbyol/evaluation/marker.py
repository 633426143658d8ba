"""The image share r of a data set, known before any training, and two simpler markers beside it.

r is the part of what differs between two views that is due to the image and not to the
augmentation, as an untrained network sees it. It goes with whether LARS pulls a collapsed network
out; that it is a cause is not proven. Letters: V views, B and N images, C channels, S side, D
features.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbyol import views
from fastbyol.config import Resolved
from fastbyol.data import beton, embedded, loader
from fastbyol.data.loader import Images
from fastbyol.data.order import subset
from fastbyol.errors import UsageError
from fastbyol.evaluation.features import check_finite
from fastbyol.model.byol import NUM_VIEWS, Online, draw_networks
from fastbyol.model.norm import use_kernels
from fastbyol.model.objective import unit
from fastbyol.process import full_precision
from fastbyol_kernels import dispatch

# Images of a pass where a row depends on its image alone.
CHUNK = 256
# Norms that mix the images of a batch.
BATCH_NORMS = {"bn", "brn"}
# Negative cosines closer to 1 are rounding: fp32 embeddings have errors of 1e-7, squared.
LEAST_DIFFERENCE = 1e-12
NEIGHBOURS = 20


@dataclass(frozen=True)
class Cosines:
    """Mean cosines of a network's output over pairs of views, a number for each seed.

    ``pos`` is over two views of the same image, ``neg`` over views of different images.
    """

    pos: tuple[float, ...]
    neg: tuple[float, ...]

    @property
    def r(self) -> tuple[float, ...]:
        """The image share (pos - neg) / (1 - neg) of each seed."""
        return tuple((p - n) / (1.0 - n) for p, n in zip(self.pos, self.neg, strict=True))

    @property
    def mean(self) -> float:
        """The mean of r over seeds."""
        return statistics.fmean(self.r)

    @property
    def spread(self) -> float:
        """The unbiased standard deviation of r over seeds; NaN for one seed."""
        return statistics.stdev(self.r) if len(self.r) > 1 else math.nan


@dataclass(frozen=True)
class Marker:
    """The cosines of embeddings y and of projections z, and what they were measured on."""

    y: Cosines
    z: Cosines
    seeds: tuple[int, ...]
    num_images: int
    seconds: float


def images_of(config: Resolved, most: int) -> tuple[Images, Tensor | None, int]:
    """Return ``most`` images of the training file, their sample ids and how many the file has.

    They are those of a run with a ``data.limit`` of ``most``; ids are None for all of them. Raises
    UsageError for a file that is missing or damaged, and for a single image.
    """
    data = config.data
    fields = {"image_field": data.image_field, "label_field": data.label_field}
    info = beton.inspect(embedded.training_file(data), **fields, may_lack_labels=True)
    if info.num_samples < 2:
        raise UsageError(f"{info.path}: 1 image, and a marker compares different images: add some")
    read = loader.read_all(
        info, workers=data.workers, size=data.size or config.views.size, limit=most,
        decoder=data.decoder, labels="optional",
    )  # fmt: skip
    return read, subset(info.num_samples, most), info.num_samples


def measure(
    images: Tensor,
    config: Resolved,
    seeds: Sequence[int],
    *,
    ids: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Marker:
    """Measure the image share of uint8 ``images`` (N, H, W, 3) for the network of ``config``.

    For each of ``seeds`` the network has the weights, and ``view_batches`` the views, with which a
    run of that seed begins. The cosines are means over the N pairs (view 1 of i, view 2 of i) and
    the N (N - 1) pairs (view 1 of i, view 2 of j), in float64 from embeddings in float32, or in
    float64 under that precision. Raises UsageError for fewer than two images or if all views look
    alike, FastbyolError for embeddings that are not finite.

    Batch norms take their statistics over a batch of each view, as in a run's first steps: r is
    then of batches of ``train.batch_size`` images (``view_batches``) and depends on that number.
    Without them it does not, beyond rounding.
    """
    if len(images) < 2:
        raise UsageError(f"images: {len(images)}, and pairs of different images need 2 or more")
    if not seeds:
        raise UsageError("seeds: none; name one or more")
    begun = time.perf_counter()
    pairs = [_cosines_of_seed(images, config, seed, ids, torch.device(device)) for seed in seeds]
    y, z = (Cosines(*zip(*rows, strict=True)) for rows in zip(*pairs, strict=True))
    return Marker(y, z, tuple(seeds), len(images), time.perf_counter() - begun)


def view_batches(
    images: Tensor,
    config: Resolved,
    seed: int,
    *,
    ids: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield the two views of each image in epoch 0 of a run of ``seed``: (V, B, C, S, S).

    ``ids`` are the images' sample ids, int64 (N,); by default 0, 1 and so on. Images come in the
    order of their ids. B is ``CHUNK`` or a little more; for networks with batch norm it is
    ``train.batch_size`` or a little more, so that no batch is smaller than a run's.
    """
    norms = {config.model.norm, config.model.projector.norm}
    size = config.train.batch_size if norms & BATCH_NORMS else CHUNK
    ids = torch.arange(len(images)) if ids is None else ids
    for rows in torch.tensor_split(ids.argsort(), max(1, len(ids) // size)):
        yield views.two_views(
            config.views,
            images[rows].to(device),
            ids[rows].to(device),
            seed=seed,
            epoch=0,
            dtype=_dtype(config),
            kernels=config.engine.kernels,
        )


def cosines(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the mean cosine of rows i of two (N, D) over pairs (i, i), and over (i, j), i != j."""
    first, second = unit(first.double()), unit(second.double())
    count = len(first)
    positive = float((first * second).sum(1).mean())
    # The mean over all pairs is the product of the means.
    every = float(first.mean(0) @ second.mean(0))
    return positive, (every * count - positive) / (count - 1)


def variance_ratio(batches: Iterable[Tensor]) -> float | None:
    """Return the variance of pixels between images over that within an image, between its views.

    ``batches`` are views (2, B, C, S, S) of ``view_batches``, N >= 2 images in all. The two are the
    unbiased components of a one-way analysis of variance with two views x1, x2 an image, each
    averaged over pixels and channels: within = mean of (x1 - x2)^2 / 2, between = variance of
    (x1 + x2) / 2 over images, by N - 1, minus within / 2. Sampling may put it below 0. None if
    views of an image never differ. Source: Searle, Casella and McCulloch, "Variance Components",
    1992, chapter 3.
    """
    count, within, total, squares = 0, 0.0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        first, second = batch.double()
        mean = (first + second) / 2
        count += len(mean)
        within += float(((first - second) ** 2 / 2).sum(0).mean())
        total = total.to(mean) + mean.sum(0)
        squares = squares.to(mean) + (mean**2).sum(0)
    if count < 2:
        raise ValueError(f"{count} images have no variance between them")
    within /= count
    between = float(((squares - total**2 / count) / (count - 1)).mean()) - within / 2
    return between / within if within else None


def knn_entropy(images: Tensor, labels: Tensor | None) -> float | None:
    """Return how mixed the labels (N,) are among the nearest neighbours of ``images`` (N, C, S, S).

    Images are standardized by each channel's mean and deviation over all of them, neighbours are
    the ``NEIGHBOURS`` others of highest cosine of pixels. It is the mean over images of
    -sum p log2(p) / log2(K) with p the shares of the K classes among the neighbours: 0 if
    neighbours share a label, 1 if pixels say nothing about it. None without labels or for one
    class. Source: Shannon's entropy of the nearest-neighbour estimate of Cover and Hart, 1967.
    """
    if labels is None:
        return None
    classes, index = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        return None
    deviation, mean = torch.std_mean(images.float(), dim=(0, 2, 3), correction=0, keepdim=True)
    standardized = (images.float() - mean) / deviation.masked_fill(deviation == 0, 1.0)
    rows = unit(standardized.flatten(1))
    count, entropy = min(NEIGHBOURS, len(rows) - 1), 0.0
    for part in torch.split(torch.arange(len(rows)), CHUNK):
        likeness = rows[part] @ rows.T
        likeness[torch.arange(len(part)), part] = -math.inf  # not its own neighbour
        nearest = index[likeness.topk(count, dim=1).indices]
        shares = torch.stack([(nearest == c).double().mean(1) for c in range(len(classes))])
        entropy += float(torch.special.entr(shares).sum())
    return entropy / len(rows) / math.log(len(classes))


@torch.no_grad()
def _cosines_of_seed(
    images: Tensor, config: Resolved, seed: int, ids: Tensor | None, device: torch.device
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (pos, neg) of y, and of z."""
    net = _network(config, seed, device)
    embeddings: list[Tensor] = []
    projections: list[Tensor] = []
    with torch.autocast(device.type, enabled=False), full_precision():
        for batch in view_batches(images, config, seed, ids=ids, device=device):
            y = net.encoder(batch.flatten(0, 1))
            for outputs, rows in ((embeddings, y), (projections, net.projector(y))):
                outputs.append(rows.view(NUM_VIEWS, -1, rows.shape[1]))
    results = []
    for name, outputs in (("embeddings", embeddings), ("projections", projections)):
        first, second = torch.cat(outputs, dim=1)
        for rows in (first, second):
            check_finite(rows, f"{name} of the untrained network")
        results.append(cosines(first, second))
        if 1.0 - results[-1][1] < LEAST_DIFFERENCE:
            raise UsageError(
                f"images: all views have the same {name} for seed {seed}, so that nothing has a "
                "share in their difference; take images that differ"
            )
    return results[0], results[1]


def _network(config: Resolved, seed: int, device: torch.device) -> Online:
    """Return the online network of a run of ``seed`` before its first step, in train mode."""
    net, _, _ = draw_networks(config.model, seed, image_size=config.views.size)
    net.to(device, _dtype(config))
    try:
        use_kernels(net, dispatch.resolve(config.engine.kernels, device, _dtype(config)))
    except ValueError as error:
        raise UsageError(f"engine.{error}") from None
    return net


def _dtype(config: Resolved) -> torch.dtype:
    return torch.float64 if config.train.precision == "fp64" else torch.float32
