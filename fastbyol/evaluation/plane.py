"""Points of the plane for embeddings: PCA and UMAP."""

from __future__ import annotations

import importlib.util
import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.errors import UsageError, check_choice

WAYS = ("pca", "umap")
# UMAP's own default.
_NEIGHBOURS = 15
# Its graph of fewer has no two dimensions.
_FEWEST = 4


class Plane(NamedTuple):
    """A point for each row, (N, 2), and what the two axes are.

    ``shares`` are the parts of the variance that the axes show, None of UMAP.
    """

    points: NDArray[np.float64]
    axes: tuple[str, str]
    shares: tuple[float, float] | None


def check(way: str) -> None:
    """Raise UsageError for a word that is not in ``WAYS``, and where umap-learn is missing."""
    check_choice("--by", way, WAYS)
    if way == "umap" and importlib.util.find_spec("umap") is None:
        raise UsageError("--by umap: umap-learn is not installed: pip install 'fastbyol[umap]'")


def lay_out(features: Tensor, way: str, *, seed: int = 0) -> Plane:
    """Lay out ``features`` (N, D), which are finite, in the plane by one of ``WAYS``.

    The same rows and seed give the same points on the same machine. Rows that are all equal share
    the origin. Raises UsageError as ``check``, and for fewer rows than UMAP can lay out.
    """
    check(way)
    flat = pca(features)
    if way == "pca":
        return flat
    axes = ("UMAP 1", "UMAP 2")
    if len(features) < _FEWEST:
        raise UsageError(
            f"--by umap: needs {_FEWEST} images, and there are {len(features)}: take --by pca"
        )
    if not flat.points.any():
        return Plane(flat.points, axes, None)
    with warnings.catch_warnings():  # of a graph in several parts, which is a fact of the data
        warnings.simplefilter("ignore")
        from umap import UMAP

        fit = UMAP(
            n_neighbors=min(_NEIGHBOURS, len(features) - 1), init="pca", random_state=seed, n_jobs=1
        )
        points = fit.fit_transform(features.float().cpu().numpy())
    return Plane(np.asarray(points, np.float64), axes, None)


def pca(features: Tensor) -> Plane:
    """Map ``features`` (N, D) to their two directions of the largest variance.

    In fp64. The largest weight of a direction is positive, as in scikit-learn.
    """
    x = features.double().cpu()
    x = x - x.mean(0)
    _, singular, directions = torch.linalg.svd(_square_root(x), full_matrices=False)
    two = torch.zeros(2, x.shape[1], dtype=torch.float64)
    two[: len(directions)] = directions[:2]
    largest = two.gather(1, two.abs().argmax(1, keepdim=True))
    two = two * torch.where(largest < 0, -1.0, 1.0)
    variances, total = singular.square(), float(singular.square().sum())
    shares = [float(v) / total if total else 0.0 for v in variances[:2]] + [0.0, 0.0]
    points = (x @ two.T).numpy()
    return Plane(points, ("PC 1", "PC 2"), (shares[0], shares[1]))


def _square_root(x: Tensor) -> Tensor:
    """Return R (min(N, D), D) with R^T R = x^T x, whose decomposition is quick for many rows."""
    return torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x
