"""LiDAR: the number of directions in which images differ by more than their views do.

Source: Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL
Architectures", arXiv:2312.04000 (ICLR 2024), equations 1 to 4. Every image is a class, and its
augmented views are the class's samples:

    S_b     = E_x (mu_x - mu) (mu_x - mu)^T           mu_x: mean over the views of image x
    S_w     = E_x E_v (e_xv - mu_x) (e_xv - mu_x)^T + delta I
    S_lidar = S_w^-1/2 S_b S_w^-1/2,  of whose eigenvalues LiDAR is the smooth rank (``rank``)

The paper gives delta no number. Here it is a share of the mean variance within images, so that the
length of embeddings does not matter, and neither do the denominators of the two means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol import views
from fastbyol.config import ViewsConfig
from fastbyol.data.order import subset
from fastbyol.errors import UsageError
from fastbyol.evaluation.collapse import RANK_RECOVERING
from fastbyol.evaluation.features import check_finite, inference
from fastbyol.evaluation.rank import ROUNDING, smooth_rank

# The paper's n and q.
IMAGES, VIEWS = 1000, 50
DELTA = 1e-4
# Images a pass, of each of which two views are drawn.
_BATCH = 256


class Scatter:
    """The sums of which ``S_b`` and ``S_w`` are made, in fp64, from embeddings image by image."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []
        self._within: Tensor | float = 0.0
        self._square, self._rows = 0.0, 0

    def add(self, embeddings: Tensor) -> None:
        """Add the embeddings of some images, (q, B, D): view by view."""
        e = embeddings.double()
        means = e.mean(0)
        rest = (e - means).flatten(0, 1)
        self._means.append(means)
        self._within = self._within + rest.T @ rest
        self._square, self._rows = self._square + float(e.square().sum()), self._rows + len(rest)

    def lidar(self, delta: float = DELTA) -> float:
        """Return LiDAR: at most min(D, images - 1) but for ``EPSILON``, 0 if no two images differ.

        Where views do not differ at all, float32's rounding stands for ``S_w``.
        """
        if self._square == 0.0:
            return 0.0
        assert isinstance(self._within, Tensor)
        means, within = torch.cat(self._means), self._within / self._rows
        between = (means - means.mean(0)) / len(means) ** 0.5
        shift = delta * within.diagonal().mean() + ROUNDING**2 * self._square / self._rows
        factor = torch.linalg.cholesky(within + shift * torch.eye(len(within)).to(within))
        whitened = torch.linalg.solve_triangular(factor, between.T, upper=False)
        # S_lidar's eigenvalues other than 0, from the smaller of the two products.
        small = whitened.shape[0] <= whitened.shape[1]
        product = whitened @ whitened.T if small else whitened.T @ whitened
        return smooth_rank(torch.linalg.eigvalsh(product).clamp_min(0.0))


def check(images: int, num_views: int) -> None:
    """Raise UsageError for numbers of images and views that leave nothing to compare."""
    for name, value in (("images", images), ("views", num_views)):
        if value < 2:
            raise UsageError(f"--lidar-{name} {value}: must be at least 2")


def measure(
    encoder: nn.Module,
    projector: nn.Module,
    images: Tensor,
    config: ViewsConfig,
    *,
    device: torch.device | str,
    num_images: int = IMAGES,
    num_views: int = VIEWS,
    seed: int = 0,
    rank: float | None = None,
) -> dict[str, Any]:
    """Measure LiDAR of the embeddings y and of the projections z of views as training draws them.

    ``images`` are uint8 (N, H, W, 3), of which ``num_images`` are chosen as ``order.subset`` does,
    or all. Views 2e and 2e + 1 of an image are those of epoch e under ``seed``: each is a function
    of seed, image and view, so that two runs with the same views see the same. ``lidar_notes`` say
    what limits the meaning; ``rank`` is RankMe of the images, if it was measured. Raises UsageError
    for fewer than two images or views, and FastbyolError for embeddings that are not finite.
    """
    check(num_images, num_views)
    rows = subset(len(images), num_images)
    rows = torch.arange(len(images)) if rows is None else rows
    if len(rows) < 2:
        raise UsageError(f"LiDAR: compares images, and there is {len(rows)}: name a larger set")
    scatters = {"lidar_y": Scatter(), "lidar_z": Scatter()}
    device = torch.device(device)
    with inference(encoder, device), inference(projector, device):
        for ids in torch.split(rows, _BATCH):
            y = _embedded(encoder, images[ids].to(device), ids.to(device), config, num_views, seed)
            check_finite(y.flatten(0, 1))
            z = torch.stack([projector(each) for each in y])
            for scatter, values in zip(scatters.values(), (y, z), strict=True):
                scatter.add(values)
    dims = {"embeddings": y.shape[-1], "projections": z.shape[-1]}
    return {
        **{name: scatter.lidar() for name, scatter in scatters.items()},
        "lidar_images": len(rows),
        "lidar_views": num_views,
        "lidar_notes": [*_notes(len(rows), dims, rank)],
    }


def _embedded(
    encoder: nn.Module,
    images: Tensor,
    ids: Tensor,
    config: ViewsConfig,
    num_views: int,
    seed: int,
) -> Tensor:
    """Embed ``num_views`` views of each image: (q, B, D)."""
    parts = []
    for epoch in range(-(-num_views // 2)):
        both = views.two_views(config, images, ids, seed=seed, epoch=epoch)
        both = both[: num_views - 2 * epoch]
        y = encoder(both.flatten(0, 1))
        parts.append(y.float().unflatten(0, both.shape[:2]))
    return torch.cat(parts)


def _notes(num_images: int, dims: Mapping[str, int], rank: float | None) -> Iterator[str]:
    """Yield a line for each of ``dims`` that the images are too few for (section 3)."""
    for name, dim in dims.items():
        if num_images <= dim:
            yield (
                f"LiDAR of {dim} {name} wants more images than that, and there are {num_images}: "
                f"it cannot exceed {num_images - 1}"
            )
    if rank is not None and rank < RANK_RECOVERING:
        yield (
            f"all embeddings lie along one direction (RankMe {rank:.2f}): LiDAR compares what "
            "small differences are left"
        )
