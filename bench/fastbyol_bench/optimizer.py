"""The suite of the optimizers: LARS or SGD with the moving average over a whole network."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastbyol import load_config
from fastbyol.engine.step import TrainState
from fastbyol_bench.blog_path import BlogPath
from fastbyol_bench.ceilings import floor
from fastbyol_bench.eager_peer import EagerPeer
from fastbyol_bench.harness import Variant
from fastbyol_bench.results import Row
from fastbyol_bench.suite import NEEDS_GPU, Setting, missing
from fastbyol_kernels.lars_ema import bytes_moved, lars_ema

SUITE = "optimizer"
LOOP = "per-tensor loop, as the post's"
FOREACH = "torch's multi-tensor operations"


def rows(setting: Setting) -> Iterator[Row]:
    """Measure both optimizers on ResNet-18 with its heads, caches cold as after a backward pass."""
    for name in ("lars", "sgd"):
        yield from _measured(setting, name)
        if not setting.on_gpu:
            yield missing(SUITE, _title(name), "three kernels, Triton", NEEDS_GPU)


def _title(optimizer: str) -> str:
    return f"{optimizer.upper()} and moving average, ResNet-18"


def _measured(setting: Setting, optimizer: str) -> list[Row]:
    device = setting.device
    config = load_config("blog", [f"optim.name={optimizer}", "train.precision=fp32"])
    state = TrainState.create(config, steps_per_epoch=100, device=device)
    arena, recipe = state.arena, state.recipe
    arena.gradient.normal_(std=1e-3)
    lr, tau = state.lr[0].clone(), state.tau[0].clone()

    def ours() -> object:
        return lars_ema(
            arena.online, arena.gradient, arena.momentum, arena.target, arena.table, lr, tau,
            rule=recipe.rule, eta=recipe.eta, mu=recipe.momentum, ema_first=recipe.ema_first,
        )  # fmt: skip

    blog = BlogPath.create(optimizer=optimizer, device=device)
    tuned = EagerPeer.create(optimizer=optimizer, device=device)
    for peer in (blog, tuned):
        for p in (*peer.online.parameters(), *peer.predictor.parameters()):
            p.grad = torch.randn_like(p) * 1e-3

    def step(peer: BlogPath | EagerPeer) -> None:
        peer.follow()
        peer.optimizer.step()

    variants = [
        Variant("three kernels, Triton" if setting.on_gpu else "ours", ours),
        Variant(FOREACH, lambda: step(tuned)),
        Variant(LOOP, lambda: step(blog)),
    ]
    moved = bytes_moved(len(arena.online), len(arena.target))
    floors = {variant.name: floor(setting.ceiling(), num_bytes=moved) for variant in variants}
    return setting.kernel_rows(
        SUITE,
        _title(optimizer),
        variants,
        setting.plan(20, 15.0, warmup=3),
        floors=floors,
        cold=True,
    )
