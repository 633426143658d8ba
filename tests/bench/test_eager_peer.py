"""The tuned peer trains as the post's path does, in float64, and its operations are counted."""

from __future__ import annotations

import copy

import pytest
import torch

from fastbyol.config import ModelConfig
from fastbyol.model.byol import Online
from fastbyol_bench.blog_path import BlogPath
from fastbyol_bench.eager_peer import EagerPeer, encoder, step_flop


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_trains_what_the_posts_path_trains(optimizer: str) -> None:
    torch.manual_seed(0)
    blog, tuned = (
        BlogPath.create(optimizer=optimizer),
        EagerPeer.create(optimizer=optimizer, bf16=False),
    )
    for mine, theirs in (
        (tuned.online, blog.online),
        (tuned.predictor, blog.predictor),
        (tuned.target, blog.online),
    ):
        mine.load_state_dict(theirs.state_dict())
    for module in (
        blog.online,
        blog.predictor,
        blog.target,
        tuned.online,
        tuned.predictor,
        tuned.target,
    ):
        module.double()
    if optimizer == "lars":
        for lars in (blog.optimizer, tuned.optimizer):
            lars.buffers = [buffer.double() for buffer in lars.buffers]
    for _ in range(2):
        views = torch.randn(2, 8, 3, 64, 64, dtype=torch.float64)
        # float64; sums in another order, since the memory formats differ.
        assert float(tuned.step(views)) == pytest.approx(blog.step(views[0], views[1]), rel=1e-9)
    for mine, theirs in ((tuned.online, blog.online), (tuned.target, blog.target)):
        for (name, a), b in zip(
            mine.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            # Relative to the tensor's largest element: batch norm over 32 rows magnifies the last
            # bits.
            worst = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
            assert worst < 1e-8, f"{name}: {worst}"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_standardized_encoder_is_ours(name: str) -> None:
    config = ModelConfig.model_validate({"encoder": name, "norm": "gn", "ws": True})
    peer, ours = encoder("gn", ws=True, name=name), Online(config).encoder
    peer.fc = torch.nn.Identity()
    ours.load_state_dict(copy.deepcopy(peer.state_dict()))
    x = torch.randn(2, 3, 32, 32)
    # float32 through twenty and fifty layers, both orders of summation.
    torch.testing.assert_close(peer(x), ours(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "per_view"), [("resnet18", 333.1e6), ("resnet50", 750.7e6)])
def test_operations_of_a_step(name: str, per_view: float) -> None:
    """333.1 M and 750.7 M multiply-adds a view at 96 px; two views, three passes of the online
    network and one of the target's.

    Per view the stem takes no gradient of its input: 48 x 48 x 64 x 147 fewer.
    """
    stem = 48 * 48 * 64 * 147
    assert step_flop(96, name) == pytest.approx(
        2 * 2 * (4 * per_view - stem), rel=0.005
    )  # 333.1 is rounded, heads differ in count
