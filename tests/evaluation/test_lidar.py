"""LiDAR against the paper's equations in numpy and scipy, and where its value is known."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastbyol import views as view_ops
from fastbyol.cli import evaluate as command
from fastbyol.config import ViewsConfig
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.evaluation import lidar
from fastbyol.evaluation.lidar import DELTA, Scatter, measure
from fastbyol.evaluation.rank import EPSILON

VIEWS = ViewsConfig(size=8, blur_kernel=3)


def by_formula(e: np.ndarray, delta: float = DELTA) -> float:
    """Compute the paper's equations by loops and a generalized eigenproblem; ``e`` is (n, q, D)."""
    n, q, dim = e.shape
    mean = e.reshape(-1, dim).mean(0)
    between, within = np.zeros((dim, dim)), np.zeros((dim, dim))
    for image in e:
        centre = image.mean(0)
        between += np.outer(centre - mean, centre - mean) / n
        for view in image:
            within += np.outer(view - centre, view - centre) / (n * q)
    within += delta * np.trace(within) / dim * np.eye(dim)
    # S_b v = lambda S_w v has the eigenvalues of S_w^-1/2 S_b S_w^-1/2.
    values = scipy.linalg.eigh(between, within, eigvals_only=True).clip(0)
    p = values / values.sum() + EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))


def ours(e: np.ndarray, delta: float = DELTA, pieces: int = 1) -> float:
    scatter = Scatter()
    for part in np.array_split(e, pieces):
        scatter.add(torch.from_numpy(part).transpose(0, 1))
    return scatter.lidar(delta)


def classes(n: int, q: int, dim: int, seed: int, noise: float = 0.5) -> np.ndarray:
    """Return points of ``n`` images, whose views differ by ``noise`` in a basis of their own."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n, 1, dim)) * rng.uniform(0.1, 2, dim)
    return centres + noise * rng.standard_normal((n, q, dim)) @ rng.standard_normal((dim, dim)) + 3


@settings(max_examples=50)
@given(
    st.integers(2, 30), st.integers(2, 6), st.integers(1, 20), st.integers(0, 99),
    st.sampled_from([1e-6, DELTA, 1e-2]), st.integers(1, 2),
)  # fmt: skip
def test_is_the_papers_formula(
    n: int, q: int, dim: int, seed: int, delta: float, pieces: int
) -> None:
    """With fewer images than features, too, and however the images come."""
    e = classes(n, q, dim, seed)
    # A share of 0 counts, too, by EPSILON, and there are as many as eigenvalues.
    assert ours(e, delta, pieces) == pytest.approx(by_formula(e, delta), rel=1e-4)


@pytest.mark.parametrize(("n", "dim", "rank"), [(200, 16, 5), (12, 64, 12)])
def test_directions_that_differ_alike_between_images_count_each(
    n: int, dim: int, rank: int
) -> None:
    """Isotropic views; centring takes one of as many directions as there are images."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((dim, rank)))[0].T
    weights = rng.standard_normal((n, rank))
    weights = np.linalg.qr(weights - weights.mean(0))[0][:, : min(rank, n - 1)]
    centres = weights @ directions[: weights.shape[1]]
    spread = np.concatenate([np.eye(dim), -np.eye(dim)]) * 1e-3
    assert ours(centres[:, None] + spread) == pytest.approx(min(rank, n - 1), rel=1e-3)


def test_noise_counts_every_direction_and_rankme_would_not_tell() -> None:
    """Means of q views of no image's own still differ, alike in all directions."""
    e = np.random.default_rng(0).standard_normal((2000, 4, 16))
    assert ours(e) > 15.8


@given(st.integers(0, 99), st.floats(1e-5, 1e5), st.floats(-10, 10))
def test_basis_length_and_mean_do_not_matter(seed: int, factor: float, shift: float) -> None:
    e = classes(20, 3, 8, seed)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((8, 8)))[0]
    assert ours(factor * (e @ basis + shift)) == pytest.approx(ours(e), rel=1e-6)


@given(st.integers(0, 99))
def test_an_invertible_map_does_not_matter_as_delta_goes_to_zero(seed: int) -> None:
    e, rng = classes(20, 4, 6, seed), np.random.default_rng(seed + 1000)
    u, v = (np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(2))
    mapped = e @ (u * rng.uniform(0.2, 5, 6) @ v)
    gaps = [abs(ours(mapped, delta) - ours(e, delta)) for delta in (1e-1, 1e-5, 1e-9)]
    assert gaps[2] < 1e-5
    assert gaps[2] <= gaps[1] + 1e-9
    assert gaps[1] <= gaps[0] + 1e-3


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_collapse_has_no_direction(value: float) -> None:
    assert ours(np.full((10, 4, 5), value)) == 0.0


def test_views_that_do_not_differ_leave_the_rank_of_the_means() -> None:
    """As of an encoder that does not see the augmentations: S_w is nothing but rounding."""
    corners = np.repeat(np.concatenate([np.eye(4), -np.eye(4)])[:, None], 3, axis=1)
    assert ours(corners) == pytest.approx(4, rel=1e-4)
    constant = np.concatenate([corners, np.full((8, 3, 1), 7.0), np.zeros((8, 3, 2))], axis=2)
    assert ours(constant) == pytest.approx(4, rel=1e-4)


@pytest.fixture
def encoder() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def projector() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(12, 5)


def images(num: int = 40) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 10, 10, 3), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("num_views", [2, 5])
@pytest.mark.parametrize("batch", [7, 256])
def test_views_are_those_of_training_and_each_is_its_images_own(
    encoder: nn.Module,
    projector: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    num_views: int,
    batch: int,
) -> None:
    """Image by image and view by view, in whatever batches."""
    monkeypatch.setattr(lidar, "_BATCH", batch)
    result = measure(
        encoder, projector, images(), VIEWS, device="cpu", num_images=100, num_views=num_views,
        seed=9,
    )  # fmt: skip
    y = np.empty((40, num_views, 12))
    with torch.no_grad():
        for number, image in enumerate(images()):
            for view in range(num_views):
                ids = torch.tensor([number])
                both = view_ops.two_views(VIEWS, image[None], ids, seed=9, epoch=view // 2)
                y[number, view] = encoder(both[view % 2])[0]
        z = projector(torch.from_numpy(y).float()).double().numpy()
    assert result["lidar_y"] == pytest.approx(by_formula(y), rel=1e-4)
    assert result["lidar_z"] == pytest.approx(by_formula(z), rel=1e-4)
    assert (result["lidar_images"], result["lidar_views"]) == (40, num_views)
    assert result["lidar_notes"] == []


def test_a_part_of_the_images_is_the_same_part_for_every_run(
    encoder: nn.Module, projector: nn.Module
) -> None:
    def of(num_images: int, seed: int = 0) -> dict[str, float]:
        return measure(
            encoder, projector, images(), VIEWS, device="cpu", num_images=num_images, num_views=3,
            seed=seed,
        )  # fmt: skip

    assert of(10) == of(10)
    assert of(10)["lidar_images"] == 10
    assert of(10)["lidar_y"] != of(40)["lidar_y"]
    assert of(10)["lidar_y"] != of(10, seed=1)["lidar_y"]
    notes = of(10)["lidar_notes"]
    assert len(notes) == 1  # 12 embeddings, 5 projections
    assert "LiDAR of 12 embeddings" in notes[0]
    assert "cannot exceed 9" in notes[0]
    collapsed = measure(encoder, projector, images(), VIEWS, device="cpu", num_views=2, rank=1.038)
    (note,) = collapsed["lidar_notes"]
    assert "RankMe 1.04" in note


def test_modes_come_back(encoder: nn.Module, projector: nn.Module) -> None:
    encoder.train()
    projector.eval()
    measure(encoder, projector, images(4), VIEWS, device="cpu", num_views=2)
    assert encoder.training
    assert not projector.training


def test_refusals(encoder: nn.Module, projector: nn.Module) -> None:
    for sizes, word in (((1, 5), "--lidar-images 1"), ((5, 1), "--lidar-views 1")):
        with pytest.raises(UsageError, match=word):
            lidar.check(*sizes)
    with pytest.raises(UsageError, match="there is 1"):
        measure(encoder, projector, images(1), VIEWS, device="cpu")
    with torch.no_grad():
        encoder[0].bias[0] = float("nan")
    with pytest.raises(FastbyolError, match="80 of 80 rows hold NaN"):
        measure(encoder, projector, images(), VIEWS, device="cpu", num_views=2)


def test_the_commands_defaults_are_the_papers() -> None:
    defaults = {name: p.default for name, p in signature(command.evaluate).parameters.items()}
    assert defaults["lidar_images"] == lidar.IMAGES == 1000
    assert defaults["lidar_views"] == lidar.VIEWS == 50
