"""From images to a trained network: batches, views, steps and the probe, ours against the post's path, side by side.

Ours takes its steps as ``fastbyol train`` does (``--engine auto``). On a processor the post's path has a process of its own,
and runs once more in ours, whose allocator spares it the pages that large blocks cost. A step of either side includes its batch
and its views: ours from a loader over a resident beton, the post's from a DataLoader whose worker processes make views with
Pillow. While our steps run its workers have nothing to do, for their queue is full.
An epoch is put together from the measured step and the measured probe.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbyol import load_config, views
from fastbyol.config import Config
from fastbyol.data.loader import Batch, Images, Loader, open_loader
from fastbyol.engine import capture
from fastbyol.engine.allocator import keep_freed_memory
from fastbyol.engine.step import TrainState
from fastbyol.evaluation import protocol
from fastbyol_bench import blog_path
from fastbyol_bench.blog_path import BlogPath
from fastbyol_bench.blog_process import BlogProcess
from fastbyol_bench.ceilings import floor
from fastbyol_bench.eager_peer import EagerPeer, step_flop
from fastbyol_bench.harness import Variant
from fastbyol_bench.pictures import beton, pictures
from fastbyol_bench.results import Ratio, Row, Timing
from fastbyol_bench.step import APART, BLOG, EAGER, FAST, FP32
from fastbyol_bench.suite import Setting, fast_precision, missing

SUITE = "train"
BLOG_KEPT = "the same with our allocator"
NEEDS_SKLEARN = "scikit-learn (the dev extra)"
NEEDS_FFCV = "ffcv (make setup)"
# The post trained on STL-10's 105,000 images without test labels; 5,000 are its labelled ones alone.
EPOCHS = (105_000, 5_000)


def rows(setting: Setting) -> list[Row]:
    """Step with data, probe, and epochs of both sizes with both."""
    size, batch, count, probed = (32, 4, 32, 64) if setting.quick else (96, 256, 2048, 4096)
    name = f"batches of {batch} images of {size} px: data, views, step"
    if importlib.util.find_spec("ffcv") is None:
        return [missing(SUITE, name, variant, NEEDS_FFCV) for variant in (FAST, FP32, EAGER, BLOG, BLOG_KEPT)]
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(setting, beton(Path(folder), count, size), size, batch, count)
        try:
            steps = sides.steps(name)
            probes = sides.probes(probed)
        finally:
            sides.close()
    return [*steps, *probes, *epochs(steps, probes, batch)]


class Sides:
    """Everything that is compared, opened once."""

    def __init__(self, setting: Setting, path: Path, size: int, batch: int, count: int) -> None:
        self.setting, self.size, self.batch = setting, size, batch
        fast = fast_precision(setting.device)
        self.configs = {
            name: load_config("blog", [f"train.precision={precision}", f"views.size={size}", f"train.batch_size={batch}"])
            for name, precision in ((FAST, fast), (FP32, "fp32"))
        }
        common: dict[str, Any] = {"batch_size": batch, "seed": 0, "workers": 0, "size": size, "cache": "device"}
        self.loader = open_loader(path, device=setting.device, **common)
        self.states = {
            name: TrainState.create(config, steps_per_epoch=1000, device=setting.device)
            for name, config in self.configs.items()
        }
        choice = capture.choose(self.configs[FAST].engine, setting.device)
        self.note = f"precision {fast}; steps by {choice.mode}; resident beton"
        self.engines = {
            name: capture.engine(state, self.configs[name], choice, setting.note) for name, state in self.states.items()
        }
        self.eager, self.blog = EagerPeer.create(device=setting.device), BlogPath.create(device=setting.device)
        self.workers = 0 if setting.quick else max(1, (torch.get_num_threads() if not setting.on_gpu else 16))
        self.images = pictures(count, size)[0]

    def steps(self, name: str) -> list[Row]:
        """Batch, views and step of every side, interleaved."""
        setting, batch = self.setting, self.batch
        eager_views = _views(self.configs[FAST], self.loader)
        peers = _peer_views(self.images, self.size, batch, self.workers, setting.device)
        variants = [
            Variant(key, partial(_advance, engine, _batches(self.loader)), batch) for key, engine in self.engines.items()
        ]
        variants += [
            Variant(EAGER, lambda: self.eager.step(next(eager_views)), batch),
        ]
        blog = Variant(BLOG if setting.on_gpu else BLOG_KEPT, lambda: self.blog.step(*next(peers)), batch)
        flop = step_flop(self.size) * batch
        names = (FAST, FP32, EAGER, BLOG, BLOG_KEPT)
        floors = {variant: floor(setting.ceiling(), flop=flop, bf16=variant in (FAST, EAGER)) for variant in names}
        loader = f"DataLoader with {self.workers} workers"
        notes = {FAST: self.note, BLOG: loader if setting.on_gpu else f"{loader}; {APART}", BLOG_KEPT: loader}
        notes[EAGER] = "our data and views"
        with ExitStack() as opened:
            if not setting.on_gpu:
                apart = opened.enter_context(BlogProcess(self.images, batch_size=batch, workers=self.workers))
                variants.append(Variant(BLOG, apart.step, batch))
            found = setting.rows(SUITE, name, [*variants, blog], setting.plan(5, 120.0), floors=floors, notes=notes)
        peers.close()
        return found

    def probes(self, count: int) -> list[Row]:
        """The post's protocol on ``count`` labelled images: embedding, fit and score."""
        images, labels = pictures(count, self.size, seed=1)
        name = f"probe on {count:,} labelled images: embed, fit, score"
        test = Images(torch.from_numpy(images), torch.from_numpy(labels))
        views_config, device = self.configs[FAST].views, self.setting.device

        def ours() -> object:
            encoder = self.states[FP32].online.encoder
            return protocol.evaluate("blog", encoder, test=test, train=None, views=views_config, device=device)

        def theirs() -> object:
            features = self.blog.embed(batch.to(device) for batch in blog_path.plain(images))
            return blog_path.probe(features, labels)

        variants = [Variant("ours", ours, count)]
        if importlib.util.find_spec("sklearn") is not None:
            variants.append(Variant("scikit-learn's liblinear, one-vs-rest", theirs, count))
        plan = self.setting.plan(2, 60.0, warmup=1 if self.setting.quick else 0)
        self.setting.note(f"{SUITE}: {name}")
        found = self.setting.rows(SUITE, name, variants, plan)
        if len(variants) == 1:
            found.append(missing(SUITE, name, "scikit-learn's liblinear, one-vs-rest", NEEDS_SKLEARN))
        return found

    def close(self) -> None:
        """Let go of the loader."""
        self.loader.close()


def epochs(steps: list[Row], probes: list[Row], batch: int) -> list[Row]:
    """Whole epochs, put together: the step as often as it fits, and a probe; the post's path against ours."""
    found: list[Row] = []
    of = {row.variant: row for row in steps}
    pairs = [(FAST, of[FAST], probes[0]), (BLOG, of[BLOG], probes[-1])]
    for images in EPOCHS:
        name = f"epoch of {images:,} images, batches of {batch}, with a probe"
        if probes[-1].timing is None:
            found += [missing(SUITE, name, variant, NEEDS_SKLEARN) for variant, _, _ in pairs]
            continue
        whole = {variant: _epoch(step.timing, probe.timing, images // batch) for variant, step, probe in pairs}
        for variant, timing in whole.items():
            ratio = None
            if variant != FAST:
                ratio = Ratio(
                    median=timing.median_s / whole[FAST].median_s,
                    # To first order the relative spreads add.
                    spread=timing.median_s / whole[FAST].median_s * (_relative(timing) + _relative(whole[FAST])),
                    cpu=timing.cpu_s / whole[FAST].cpu_s if whole[FAST].cpu_s else None,
                )
            num_images = images // batch * batch
            note = f"{images // batch} steps and one probe, from the measured parts"
            row = Row(
                suite=SUITE, name=name, variant=variant, timing=timing, images=num_images, derived=True, ratio=ratio, note=note
            )
            found.append(row)
    return found


def _epoch(step: Timing | None, probe: Timing | None, num_steps: int) -> Timing:
    assert step is not None
    assert probe is not None
    return Timing(
        median_s=num_steps * step.median_s + probe.median_s,
        spread_s=num_steps * step.spread_s + probe.spread_s,
        runs=min(step.runs, probe.runs),
        cpu_s=num_steps * step.cpu_s + probe.cpu_s,
    )


def _relative(timing: Timing) -> float:
    return timing.spread_s / timing.median_s


def _batches(loader: Loader) -> Iterator[tuple[Batch, int]]:
    """Our batches with their epoch, epoch after epoch."""
    for epoch in range(2**31):
        for batch in loader.epoch(epoch):
            yield batch, epoch


def _views(config: Config, loader: Loader) -> Iterator[Tensor]:
    """Our batches as views."""
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    for batch, epoch in _batches(loader):
        yield views.two_views(config.views, batch.images, batch.ids, seed=0, epoch=epoch, dtype=dtype)


def _advance(engine: capture.Engine, batches: Iterator[tuple[Batch, int]]) -> None:
    engine(*next(batches))


def _peer_views(images: np.ndarray, size: int, batch: int, workers: int, device: torch.device) -> Any:
    """The post's batches of two views, epoch after epoch, on ``device``."""
    loader = blog_path.loader(images, size=size, batch_size=batch, workers=workers)
    while True:
        for view, other in loader:
            yield view.to(device), other.to(device)
