"""The peer trains as we do: in float64 the same views give the same losses and weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastbyol import load_config
from fastbyol.engine.step import TrainState, train_step
from fastbyol_bench import blog_path
from fastbyol_bench.blog_path import BlogPath


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def ours(peer: BlogPath) -> dict[str, Tensor]:
    """Return the peer's tensors by our names."""
    heads = {"0": "linear1", "1": "norm", "3": "linear2"}

    def named(module: nn.Module) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, tensor in module.state_dict().items():
            part, _, rest = name.partition(".")
            if part == "fc":
                index, leaf = rest.split(".")
                tensors[f"projector.{heads[index]}.{leaf}"] = tensor
            else:
                tensors[f"encoder.{name}"] = tensor
        return tensors

    predictor = {}
    for name, tensor in peer.predictor.state_dict().items():
        index, leaf = name.split(".")
        predictor[f"predictor.{heads[index]}.{leaf}"] = tensor
    return {f"online.{k}": v for k, v in (named(peer.online) | predictor).items()} | {
        f"target.{k}": v for k, v in named(peer.target).items()
    }


def state_dict(state: TrainState) -> dict[str, Tensor]:
    return {f"online.{k}": v for k, v in state.online.state_dict().items()} | {
        f"target.{k}": v for k, v in state.target.state_dict().items()
    }


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("mlp_norm", [True, False])
def test_is_the_blog_preset_step_for_step(optimizer: str, mlp_norm: bool) -> None:
    norm = "bn" if mlp_norm else "none"
    sets = [
        f"optim.name={optimizer}",
        f"model.projector.norm={norm}",
        f"model.predictor.norm={norm}",
    ]
    state = TrainState.create(
        load_config("blog", ["train.precision=fp64", *sets]), steps_per_epoch=100
    )
    torch.manual_seed(0)
    with float64():
        peer = BlogPath.create(optimizer=optimizer, mlp_norm=mlp_norm)
        views = torch.randn(3, 2, 4, 3, 32, 32)
    with torch.no_grad():
        mine = state_dict(state)
        for name, tensor in ours(peer).items():
            tensor.copy_(mine[name])
    for pair in views:
        expected = peer.step(pair[0], pair[1])
        # StepMetrics are float32.
        assert float(train_step(state, pair).values[0]) == pytest.approx(expected, rel=1e-6)
    mine = state_dict(state)
    for name, tensor in ours(peer).items():
        # float64, three steps, sums in another order; relative to the tensor's largest element.
        worst = float((tensor - mine[name]).abs().max()) / max(float(tensor.abs().max()), 1e-30)
        assert worst < 1e-8, name


def test_views_and_probe_are_what_they_say() -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 40, 48, 3), dtype=np.uint8)
    batches = list(blog_path.loader(images, size=32, batch_size=5, workers=0))
    assert [[tuple(view.shape) for view in pair] for pair in batches] == [[(5, 3, 32, 32)] * 2] * 2
    first, second = batches[0]
    assert not torch.equal(first, second)
    whole = torch.cat(list(blog_path.plain(images, 5)))
    mean, std = (np.array(v)[:, None, None] for v in (blog_path.MEAN, blog_path.STD))
    expected = (images.transpose(0, 3, 1, 2) / 255.0 - mean) / std
    np.testing.assert_allclose(whole.numpy(), expected, atol=1e-5)  # float32
    peer = BlogPath.create()
    features = peer.embed(blog_path.plain(images, 5))
    assert features.shape == (12, 512)
    assert peer.online.training
    labels = np.arange(100) % 2
    separable = np.random.default_rng(1).normal(size=(100, 8)) + 4 * labels[:, None]
    assert blog_path.probe(separable, labels) == 100.0
