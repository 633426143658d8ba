"""One training step on views that are there: ours in both precisions, tuned eager PyTorch, torch.compile, the post's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from fastbyol import load_config
from fastbyol.engine.allocator import keep_freed_memory
from fastbyol.engine.capture import compiled_forward
from fastbyol.engine.step import Forward, TrainState, forward, train_step
from fastbyol_bench import waterfall
from fastbyol_bench.blog_path import BlogPath
from fastbyol_bench.blog_process import BlogProcess
from fastbyol_bench.ceilings import floor
from fastbyol_bench.eager_peer import EagerPeer, step_flop
from fastbyol_bench.harness import Variant
from fastbyol_bench.pictures import pictures
from fastbyol_bench.results import Row
from fastbyol_bench.suite import Setting, fast_precision, missing

SUITE = "step"
EAGER = "tuned eager PyTorch, bf16, channels-last, foreach"
COMPILED = "torch.compile of the same, bf16"
BLOG = "the post's code path, fp32, a pass per view"
FAST = "ours, fastest"
FP32 = "ours, fp32"
OURS_COMPILED = "ours, torch.compile"
APART = "in a process of its own"


def rows(setting: Setting) -> list[Row]:
    """Steps of both methods, and where the time of ours goes."""
    keep_freed_memory()
    size, batch = (32, 2) if setting.quick else (96, 256 if setting.on_gpu else 64)
    views = [torch.randn(2, batch, 3, size, size, device=setting.device) for _ in range(3)]
    found = [*_bn(setting, views), *_gn(setting, views)]
    setting.note("step: waterfall")
    setting.waterfall = waterfall.measured(setting, size=size, batch=batch)
    return found


def ours(setting: Setting, sets: list[str], precision: str, size: int) -> TrainState:
    """The blog preset's state on the setting's device."""
    config = load_config("blog", [f"train.precision={precision}", f"views.size={size}", *sets])
    return TrainState.create(config, steps_per_epoch=1000, device=setting.device)


def _endless(views: list[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from views


def _stepper(state: TrainState, views: list[Tensor], forward: Forward = forward) -> Callable[[], object]:
    batches = _endless(views)
    return lambda: train_step(state, next(batches), forward)


def _bn(setting: Setting, views: list[Tensor]) -> list[Row]:
    _, batch, _, size, _ = views[0].shape
    name = f"BN, SGD: step of {batch} images of {size} px"
    on, fast = setting.device, fast_precision(setting.device)
    eager = EagerPeer.create(device=on)
    mine = {FAST: ours(setting, [], fast, size), FP32: ours(setting, [], "fp32", size)}
    batches = _endless(views)
    variants = [Variant(key, _stepper(state, views), batch) for key, state in mine.items()]
    absent = _no_compiler(setting)
    if not absent:
        # Ours first: it forgets what was compiled before.
        again, compiled = ours(setting, [], fast, size), compiled_forward()
        peer = EagerPeer.create(device=on, compiled=True)
        variants += [
            Variant(OURS_COMPILED, _stepper(again, views, compiled), batch),
            Variant(COMPILED, lambda: peer.step(next(batches)), batch),
        ]
    variants += [
        Variant(EAGER, lambda: eager.step(next(batches)), batch),
    ]
    flop = step_flop(size) * batch
    floors = {v.name: floor(setting.ceiling(), flop=flop, bf16=v.name != FP32) for v in variants}
    floors[BLOG] = floor(setting.ceiling(), flop=flop, bf16=False)
    notes = {FAST: f"precision {fast}; the floor counts operations alone", BLOG: "" if setting.on_gpu else APART}
    with ExitStack() as opened:
        variants.append(Variant(BLOG, _post(setting, batch, size, batches, opened), batch))
        found = setting.rows(SUITE, name, variants, setting.plan(8, 60.0, warmup=2), floors=floors, notes=notes)
    return [*found, *(missing(SUITE, name, variant, absent) for variant in (OURS_COMPILED, COMPILED) if absent)]


def _post(setting: Setting, batch: int, size: int, batches: Iterator[Tensor], opened: ExitStack) -> Callable[[], object]:
    """The post's step. A GPU's clock sees this process alone."""
    if setting.on_gpu:
        blog = BlogPath.create(device=setting.device)
        return lambda: blog.step(*next(batches))
    return opened.enter_context(BlogProcess(pictures(batch, size)[0], batch_size=batch, workers=None)).step


def _gn(setting: Setting, views: list[Tensor]) -> list[Row]:
    _, batch, _, size, _ = views[0].shape
    name = f"GN + WS, LARS: step of {batch} images of {size} px"
    fast = fast_precision(setting.device)
    state = ours(setting, ["model.norm=gn", "model.ws=true", "optim.name=lars"], fast, size)
    eager = EagerPeer.create(norm="gn", ws=True, optimizer="lars", device=setting.device)
    batches = _endless(views)
    variants = [
        Variant(FAST, _stepper(state, views), batch),
        Variant(EAGER, lambda: eager.step(next(batches)), batch),
    ]
    least = floor(setting.ceiling(), flop=step_flop(size) * batch)
    floors = {variant.name: least for variant in variants}
    return setting.rows(SUITE, name, variants, setting.plan(8, 30.0, warmup=2), floors=floors)


def _no_compiler(setting: Setting) -> str | None:
    """Why torch.compile is not measured, or None."""
    if setting.quick:
        return "a run without --quick: it compiles for half a minute"
    if not setting.on_gpu and not shutil.which("g++"):
        return "g++"
    return None
