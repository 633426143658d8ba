"""The markers of a data set: against sums pair by pair and other libraries, and at their ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from fastbyol import views
from fastbyol.config import Resolved
from fastbyol.config_io import load
from fastbyol.data import textures
from fastbyol.engine.step import TrainState
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.evaluation import marker
from tiny import TINY

GN = ("model.norm=gn", "model.projector.norm=none", "model.predictor.norm=none")
UNCHANGED = (
    "views.scale=1,1",
    "views.ratio=1,1",
    "views.jitter_p=0",
    "views.grayscale_p=0",
    "views.flip_p=0",
)
SEEDS = (0, 3)


def config(*sets: str) -> Resolved:
    return load(preset="demo", sets=[*TINY, *GN, *sets]).config


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(textures.make(24, 16, 0)[0])


@pytest.mark.parametrize(
    "sets", [(), ("model.norm=bn", "model.projector.norm=bn"), ("model.ws=1",)]
)
def test_weights_are_those_of_a_run_before_its_first_step(sets: tuple[str, ...]) -> None:
    chosen = config(*sets, "train.seed=3")
    of_run = TrainState.create(chosen, steps_per_epoch=1).online.state_dict()
    torch.rand(7)  # whatever was drawn before
    own = marker._network(chosen, 3, torch.device("cpu")).state_dict()
    assert own.keys() == of_run.keys()
    assert all(torch.equal(own[name], of_run[name]) for name in own)
    other = marker._network(chosen, 4, torch.device("cpu")).state_dict()
    assert not torch.equal(own["encoder.conv1.weight"], other["encoder.conv1.weight"])


def test_is_the_formula_over_all_pairs_one_by_one(images: Tensor) -> None:
    """In float64, with a run's own state and each pair's cosine by numpy."""
    chosen, few = config("train.precision=fp64"), images[:6]
    measured = marker.measure(few, chosen, SEEDS)
    for at, seed in enumerate(SEEDS):
        train = chosen.train.model_copy(update={"seed": seed})
        state = TrainState.create(chosen.model_copy(update={"train": train}), steps_per_epoch=1)
        pair = views.two_views(
            chosen.views, few, torch.arange(6), seed=seed, epoch=0, dtype=torch.float64
        )
        with torch.no_grad():
            outputs = [state.online(view.contiguous()) for view in pair]
        for got, name in ((measured.y, "y"), (measured.z, "z")):
            first, second = (getattr(output, name).numpy() for output in outputs)
            by_pair = np.array(
                [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in second] for a in first]
            )
            pos = np.mean([by_pair[i, i] for i in range(6)])
            neg = np.mean([by_pair[i, j] for i in range(6) for j in range(6) if i != j])
            # The kernels' fp64 sums are in another order, and 1 - neg is as small as 1e-3.
            assert got.pos[at] == pytest.approx(pos, rel=1e-12)
            assert got.neg[at] == pytest.approx(neg, rel=1e-12)
            assert got.r[at] == pytest.approx((pos - neg) / (1 - neg), abs=1e-9)
    assert measured.y.mean == pytest.approx(np.mean(measured.y.r))
    assert measured.y.spread == pytest.approx(np.std(measured.y.r, ddof=1))
    assert (measured.seeds, measured.num_images) == (SEEDS, 6)


def test_a_seed_of_one_has_no_spread(images: Tensor) -> None:
    assert math.isnan(marker.measure(images, config(), (0,)).y.spread)


def test_is_one_without_augmentation(images: Tensor) -> None:
    measured = marker.measure(images, config(*UNCHANGED), SEEDS)
    assert measured.y.r == pytest.approx((1.0, 1.0), abs=1e-6)
    assert measured.z.r == pytest.approx((1.0, 1.0), abs=1e-4)  # 1 - neg is smaller


def test_is_nothing_where_all_images_are_one(images: Tensor) -> None:
    """All its draws differ, so that positive pairs are as unlike as negative ones."""
    same = images[:1].expand(256, -1, -1, -1)
    measured = marker.measure(same, config(), range(8))
    # Of 256 pairs the mean is off by a 16th of their deviation, which is about 1 - neg.
    assert abs(measured.y.mean) < 3 * measured.y.spread / math.sqrt(8)
    assert max(map(abs, measured.y.r)) < 3 / 16


def test_more_augmentation_leaves_less_to_the_image(images: Tensor) -> None:
    shares = [
        marker.measure(images, config(f"views.scale={low},1"), SEEDS).y.mean
        for low in (0.1, 0.5, 0.9)
    ]
    assert shares == sorted(shares)


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_does_not_depend_on_the_order_of_images(images: Tensor, norm: str) -> None:
    """Not even in rounding, because images come in the order of their ids."""
    chosen, order = config(f"model.norm={norm}"), torch.randperm(24)
    first = marker.measure(images, chosen, SEEDS)
    second = marker.measure(images[order], chosen, SEEDS, ids=order)
    assert (first.y, first.z) == (second.y, second.z)


def test_does_not_depend_on_the_batch(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = marker.measure(images, config(), SEEDS)
    monkeypatch.setattr(marker, "CHUNK", 5)
    parts = marker.measure(images, config(), SEEDS)
    # Products of other shapes round otherwise, by 1e-7 of a cosine, and 1 - neg is about 1e-2.
    assert parts.y.r == pytest.approx(whole.y.r, abs=1e-4)
    assert parts.y.pos == pytest.approx(whole.y.pos, rel=1e-6)


def test_batch_norms_see_batches_of_a_run(images: Tensor) -> None:
    bn = ("model.norm=bn", "train.batch_size=8")
    assert [b.shape[1] for b in marker.view_batches(images, config(*bn), 0)] == [8, 8, 8]
    assert [b.shape[1] for b in marker.view_batches(images[:23], config(*bn), 0)] == [12, 11]
    assert [b.shape[1] for b in marker.view_batches(images[:5], config(*bn), 0)] == [5]
    assert [b.shape[1] for b in marker.view_batches(images, config(), 0)] == [24]
    chosen = config(*bn, "train.seed=3")
    state = TrainState.create(chosen, steps_per_epoch=1)
    with torch.no_grad():
        y = [state.online(b.flatten(0, 1)).y for b in marker.view_batches(images, chosen, 3)]
    first, second = torch.cat([rows.view(2, 8, -1) for rows in y], dim=1)
    pos = torch.nn.functional.cosine_similarity(first.double(), second.double()).mean()
    assert marker.measure(images, chosen, (3,)).y.pos[0] == pytest.approx(float(pos), rel=1e-6)


def test_refuses_what_has_no_share(images: Tensor) -> None:
    with pytest.raises(UsageError, match="images: 1, and"):
        marker.measure(images[:1], config(), (0,))
    with pytest.raises(UsageError, match="seeds: none"):
        marker.measure(images, config(), ())
    with pytest.raises(UsageError, match="all views have the same embeddings for seed 0"):
        marker.measure(torch.zeros_like(images), config(), (0,))
    with pytest.raises(UsageError, match=r"engine\.kernels"):
        marker.measure(images, config("engine.kernels=triton", "train.precision=fp64"), (0,))
    assert issubclass(UsageError, FastbyolError)


@pytest.mark.parametrize("num_batches", [1, 3])
def test_variance_ratio_is_an_analysis_of_variance(num_batches: int) -> None:
    """By its sums of squares, of each pixel alone."""
    random = np.random.default_rng(0)
    of_image = random.normal(2.0, 3.0, (1, 30, 3, 4, 4))
    x = of_image + random.normal(0.0, 1.0, (2, 30, 3, 4, 4))
    between, within = [], []
    for pixel in x.reshape(2, 30, -1).transpose(2, 1, 0):  # 30 groups of two
        means = pixel.mean(axis=1)
        square_within = ((pixel - means[:, None]) ** 2).sum() / (30 * (2 - 1))
        square_between = 2 * ((means - pixel.mean()) ** 2).sum() / (30 - 1)
        within.append(square_within)
        between.append((square_between - square_within) / 2)
    ratio = marker.variance_ratio(torch.from_numpy(x).chunk(num_batches, dim=1))
    assert ratio == pytest.approx(np.mean(between) / np.mean(within), rel=1e-10)
    # 48 pixels of 30 images: the true 9 comes out within a few percent.
    assert ratio == pytest.approx(9.0, rel=0.15)


def test_variance_ratio_at_its_ends(images: Tensor) -> None:
    assert marker.variance_ratio(marker.view_batches(images, config(*UNCHANGED), 0)) is None
    same = images[:1].expand(256, -1, -1, -1)
    ratio = marker.variance_ratio(marker.view_batches(same, config(), 0))
    assert ratio is not None
    assert abs(ratio) < 0.2
    with pytest.raises(ValueError, match="0 images"):
        marker.variance_ratio([])


@pytest.mark.parametrize("count", [12, 150])
def test_knn_entropy_is_that_of_sklearns_neighbours(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marker, "CHUNK", 64)
    random = np.random.default_rng(1)
    labels = random.choice([2, 5, 9], count)  # labels need not be 0, 1 and so on
    x = random.normal(size=(count, 3, 4, 4)) * [[[[1.0]], [[5.0]], [[0.1]]]] + labels[
        :, None, None, None
    ] * random.normal(0, 0.2, (3, 4, 4))
    standardized = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    rows = standardized.reshape(count, -1)
    search = NearestNeighbors(n_neighbors=min(20, count - 1), metric="cosine").fit(rows)
    entropies = []
    for neighbours in search.kneighbors(return_distance=False):  # of all rows, without themselves
        p = np.unique(labels[neighbours], return_counts=True)[1] / len(neighbours)
        entropies.append(-(p * np.log2(p)).sum() / np.log2(3))
    got = marker.knn_entropy(torch.from_numpy(x), torch.from_numpy(labels))
    assert got == pytest.approx(np.mean(entropies), rel=1e-9)


def test_knn_entropy_at_its_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 3, 4, 4, generator=generator)
    labels = torch.arange(400) % 2
    mixed = marker.knn_entropy(noise, labels)
    # Twenty fair coins have an entropy of 1 - 1 / (2 * 20 * ln 2) bits, to first order.
    assert mixed == pytest.approx(1 - 1 / (40 * math.log(2)), abs=0.02)
    apart = noise * 0.1 + (2.0 * labels - 1)[:, None, None, None]
    assert marker.knn_entropy(apart, labels) == 0.0
    assert marker.knn_entropy(noise, None) is None
    assert marker.knn_entropy(noise, torch.ones(400, dtype=torch.int64)) is None
