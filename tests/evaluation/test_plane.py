"""Points of the plane against scikit-learn's PCA, and what UMAP is asked for."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from fastbyol.errors import UsageError
from fastbyol.evaluation.plane import check, lay_out, pca

NO_UMAP = importlib.util.find_spec("umap") is None


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 99), st.floats(-50, 50))
def test_is_scikit_learns_pca(samples: int, features: int, seed: int, mean: float) -> None:
    """Signs included, for which it has the same rule."""
    x = np.random.default_rng(seed).standard_normal((samples, features))
    x = x * np.linspace(3, 1, features) + mean
    plane = pca(torch.from_numpy(x))
    fit = PCA(min(2, samples - 1), svd_solver="full").fit(x)
    # Two rows differ in one direction.
    shown = fit.n_components_
    np.testing.assert_allclose(plane.shares[:shown], fit.explained_variance_ratio_, atol=1e-9)
    np.testing.assert_allclose(plane.points[:, :shown], fit.transform(x), atol=1e-7)


def test_float32_rows_keep_small_differences() -> None:
    """As after a collapse: a part in ten thousand of a mean that is a thousand times as large."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 32, generator=g) + 1e-4 * torch.randn(500, 32, generator=g)
    fit = PCA(2, svd_solver="full").fit(x.double().numpy())
    np.testing.assert_allclose(pca(x).points, fit.transform(x.double().numpy()), atol=1e-10)


@pytest.mark.parametrize("way", ["pca", pytest.param("umap", marks=pytest.mark.skipif(
    NO_UMAP, reason="umap-learn is not installed"))])  # fmt: skip
@pytest.mark.parametrize("samples", [1, 5])
def test_rows_that_are_equal_share_the_origin(way: str, samples: int) -> None:
    rows = torch.full((samples, 7), 3.5)
    if way == "umap" and samples < 4:
        with pytest.raises(UsageError, match="--by umap: needs 4 images, and there are 1: take"):
            lay_out(rows, way)
        return
    plane = lay_out(rows, way)
    assert not plane.points.any()
    assert plane.shares == (None if way == "umap" else (0.0, 0.0))


def test_one_feature_has_one_axis() -> None:
    plane = pca(torch.arange(5.0)[:, None])
    np.testing.assert_allclose(plane.points[:, 0], np.arange(5) - 2)
    assert not plane.points[:, 1].any()
    assert plane.shares == (1.0, 0.0)


@pytest.mark.slow
@pytest.mark.skipif(NO_UMAP, reason="umap-learn is not installed")
def test_umap_keeps_clusters_apart_and_repeats() -> None:
    g = torch.Generator().manual_seed(0)
    owners = torch.arange(60) % 3
    x = 10 * torch.eye(3, 16)[owners] + torch.randn(60, 16, generator=g)
    one, again = (lay_out(x, "umap", seed=3) for _ in range(2))
    assert np.array_equal(one.points, again.points)
    assert one.shares is None
    assert one.axes == ("UMAP 1", "UMAP 2")
    other = lay_out(x, "umap", seed=4)
    assert not np.array_equal(one.points, other.points)
    distances = np.linalg.norm(one.points[:, None] - one.points, axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (owners.numpy()[distances.argmin(1)] == owners.numpy()).all()
    # Fewer rows than neighbours.
    assert np.isfinite(lay_out(x[:5], "umap").points).all()


def test_a_way_that_is_none_and_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--by: 'tsne' is none of pca, umap"):
        check("tsne")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fastbyol\[umap\]'"):
        check("umap")
    check("pca")
