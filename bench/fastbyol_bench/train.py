"""The suite of training: batches, views, steps, probe and whole epochs, against the peers.

A step of either side includes its batch and its views.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastbyol import load_config
from fastbyol.config import Config
from fastbyol.data.loader import Images, open_loader
from fastbyol.data.order import permutation
from fastbyol.engine import capture
from fastbyol.engine.step import TrainState
from fastbyol.evaluation import protocol
from fastbyol_bench import real_epochs
from fastbyol_bench.ceilings import floor
from fastbyol_bench.eager_peer import step_flop
from fastbyol_bench.harness import HostClock, Variant, clock_of, timing
from fastbyol_bench.own_step import batches_of
from fastbyol_bench.peer_process import PeerProcess, Recipe
from fastbyol_bench.peers import Post, Tuned
from fastbyol_bench.pictures import beton, pictures
from fastbyol_bench.results import Ratio, Row, Timing
from fastbyol_bench.step import APART, BLOG, EAGER, FAST, FP32
from fastbyol_bench.suite import Setting, fast_precision, missing, use_training_switches

SUITE = "train"
LIBLINEAR = "scikit-learn's liblinear, one-vs-rest"
NEEDS_SKLEARN = "scikit-learn (the dev extra)"
# The DataLoader's workers in the post's code. On a cpu, where they compete with the step, one per
# core.
POST_WORKERS = 8
# The post trained on STL-10's 105,000 images without test labels; 5,000 are its labelled ones
# alone.
EPOCHS = (105_000, 5_000)
# The post probed on STL-10's 8,000 test images and fitted to half of them. As many as in the
# probe's row.
TEXTURES_TEST = 4096
# One epoch precedes the first measured one. A probe takes seconds on a cpu.
WHOLE_EPOCHS, ENDED_EPOCHS = 4, 3
END = "end of an epoch: probe, next order, files and checkpoint"


def rows(setting: Setting) -> Iterator[Row]:
    """Measure the step with data, the probe, an epoch's end, and epochs of both sizes."""
    size, batch, count, probed = (32, 4, 32, 64) if setting.quick else (96, 256, 2048, 4096)
    name = f"batches of {batch} images of {size} px: data, views, step"
    use_training_switches()
    setting.ceiling()  # before the peers start and use cores
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as opened:
        folder = Path(temporary)
        train = beton(folder, count, size)
        workers = (
            0
            if setting.quick
            else POST_WORKERS
            if setting.on_gpu
            else max(1, torch.get_num_threads())
        )
        recipes: dict[str, Recipe] = {
            EAGER: Tuned(size, batch, beton=train),
            BLOG: Post(size, batch, count, workers, probed),
        }
        peers = {
            key: opened.enter_context(PeerProcess(key, peer, setting.device))
            for key, peer in recipes.items()
        }
        sides = Sides(setting, train, size, batch)
        opened.callback(sides.loader.close)
        steps = sides.steps(name, peers, workers)
        yield from steps
        probes = sides.probes(probed, peers[BLOG])
        yield from probes
        opened.close()  # the peers are done, and a GPU's memory is free again
        # Our epochs are real: whole ones on a GPU, on a cpu sums of measured steps and a measured
        # end.
        fast, num_epochs = (
            fast_precision(setting.device),
            WHOLE_EPOCHS if setting.on_gpu else ENDED_EPOCHS,
        )
        config = real_epochs.config(fast, setting.device, size=size, batch=batch, epochs=num_epochs)
        if setting.on_gpu:
            ours = ((images, _whole(setting, config, folder, images)) for images in EPOCHS)
        else:
            end = _end(setting, config, folder, size=size, batch=batch, probed=probed)
            yield end
            ours = ((images, _assembled(steps[0], end, images, batch)) for images in EPOCHS)
        for images, row in ours:
            yield row
            yield _posts_epoch(row, steps, probes, images // batch)


class Sides:
    """Our side of the comparison: a loader of a resident beton, and an engine per precision."""

    def __init__(self, setting: Setting, path: Path, size: int, batch: int) -> None:
        self.setting, self.size, self.batch = setting, size, batch
        fast = fast_precision(setting.device)
        self.configs = {
            name: load_config(
                "blog",
                [f"train.precision={precision}", f"views.size={size}", f"train.batch_size={batch}"],
            )
            for name, precision in ((FAST, fast), (FP32, "fp32"))
        }
        common: dict[str, Any] = {
            "batch_size": batch,
            "seed": 0,
            "workers": 0,
            "size": size,
            "cache": "device",
        }
        self.loader = open_loader(path, device=setting.device, **common)
        self.states = {
            name: TrainState.create(config, steps_per_epoch=1000, device=setting.device)
            for name, config in self.configs.items()
        }
        choice = capture.choose(self.configs[FAST].engine, setting.device)
        self.engines: dict[str, capture.Engine] = {}
        for name, state in self.states.items():
            engine = capture.engine(state, self.configs[name], choice)
            with closing(self.loader.epoch(0)) as upcoming:
                engine.prepare(next(upcoming), 0)
            self.engines[name] = engine
        self.note = f"precision {fast}; steps by {self.engines[FAST].mode}; resident beton"

    def steps(self, name: str, peers: dict[str, PeerProcess], workers: int) -> list[Row]:
        """Measure batch, views and step of every side, in turns."""
        setting, batch, calls = self.setting, self.batch, self.setting.calls_per_reading
        variants = [Variant(key, partial(self._advance, key), batch) for key in self.engines]
        variants += [Variant(key, peer.caller("step", calls), batch) for key, peer in peers.items()]
        flop = step_flop(self.size) * batch
        floors = {
            v.name: floor(setting.ceiling(), flop=flop, bf16=v.name in (FAST, EAGER))
            for v in variants
        }
        if setting.on_gpu:
            floors.pop(BLOG, None)  # see step.py
        notes = {
            FAST: self.note,
            EAGER: f"our data and views; {APART}",
            BLOG: f"DataLoader with {workers} workers; {APART}",
        }
        clock, plan = clock_of(setting.device, calls), setting.plan(5, 120.0)
        self.batches = {key: batches_of(self.loader) for key in self.engines}
        return setting.rows(SUITE, name, variants, plan, floors=floors, notes=notes, clock=clock)

    def _advance(self, key: str) -> None:
        self.engines[key](*next(self.batches[key]))

    def probes(self, count: int, post: PeerProcess) -> list[Row]:
        """Measure the post's protocol on ``count`` labelled images: embedding, fit and score."""
        images, labels = pictures(count, self.size, seed=1)
        name = f"probe on {count:,} labelled images: embed, fit, score"
        test = Images(torch.from_numpy(images), torch.from_numpy(labels))
        views_config, device = self.configs[FAST].views, self.setting.device

        def ours() -> object:
            encoder = self.states[FP32].online.encoder
            return protocol.evaluate(
                "blog", encoder, test=test, train=None, views=views_config, device=device
            )

        variants, notes = [Variant("ours", ours, count)], {LIBLINEAR: APART}
        if importlib.util.find_spec("sklearn") is not None:
            variants.append(Variant(LIBLINEAR, post.caller("probe"), count))
        plan = self.setting.plan(2, 60.0, warmup=1 if self.setting.quick else 0)
        rows = self.setting.rows(SUITE, name, variants, plan, notes=notes)
        if len(variants) == 1:
            rows.append(missing(SUITE, name, LIBLINEAR, NEEDS_SKLEARN))
        return rows


def _epoch_name(images: int, batch: int) -> str:
    return f"epoch of {images:,} images, batches of {batch}, with a probe"


def _whole(setting: Setting, config: Config, folder: Path, images: int) -> Row:
    """Measure our epochs of ``images`` embedded textures in a real run, without its first epoch."""
    name, batch = _epoch_name(images, config.train.batch_size), config.train.batch_size
    setting.note(f"{SUITE}: {name}")
    readings = real_epochs.whole(
        real_epochs.on_textures(config, images, TEXTURES_TEST), folder / f"run-{images}"
    )
    note = "whole epochs of a training run on the embedded textures"
    return Row(
        suite=SUITE,
        name=name,
        variant=FAST,
        timing=timing(readings),
        images=images // batch * batch,
        note=note,
    )


def _end(
    setting: Setting, config: Config, folder: Path, *, size: int, batch: int, probed: int
) -> Row:
    """Measure our training run from an epoch's last step to the next epoch's first."""
    setting.note(f"{SUITE}: {END}")
    files = (beton(folder, batch, size), beton(folder, probed, size))
    readings = real_epochs.ends(real_epochs.on_files(config, *files), folder / "run")
    note = f"of a training run with {probed:,} test images"
    return Row(
        suite=SUITE,
        name=END,
        variant="ours",
        timing=timing(readings),
        threads=torch.get_num_threads(),
        note=note,
    )


def _assembled(step: Row, end: Row, images: int, batch: int) -> Row:
    """Return our epoch of ``images``, computed from the measured step, end and order."""
    order = timing(
        [HostClock().time(partial(permutation, images, seed=0, epoch=epoch)) for epoch in range(3)]
    )
    num_steps = images // batch
    return Row(
        suite=SUITE,
        name=_epoch_name(images, batch),
        variant=FAST,
        timing=_sum((num_steps, step.timing), (1, end.timing), (1, order)),
        images=num_steps * batch,
        derived=True,
        note=f"{num_steps} steps, the end of an epoch and an order of {images:,} "
        f"({order.median_s * 1e3:.3g} ms), measured",
    )


def _posts_epoch(ours: Row, steps: Sequence[Row], probes: Sequence[Row], num_steps: int) -> Row:
    """Return the post's epoch from its measured step and probe, without logging and saving."""
    step, probe = (
        next(r for r in rows if r.variant == name)
        for rows, name in ((steps, BLOG), (probes, LIBLINEAR))
    )
    if step.timing is None or probe.timing is None:
        return missing(SUITE, ours.name, BLOG, step.needs or probe.needs or "")
    whole = _sum((num_steps, step.timing), (1, probe.timing))
    assert ours.timing is not None
    times = whole.median_s / ours.timing.median_s
    ratio = Ratio(
        median=times,
        # To first order the relative spreads add up.
        spread=times
        * (whole.spread_s / whole.median_s + ours.timing.spread_s / ours.timing.median_s),
        cpu=whole.cpu_s / ours.timing.cpu_s if ours.timing.cpu_s else None,
    )
    note = f"{num_steps} steps and one probe, from the measured parts"
    return Row(
        suite=SUITE,
        name=ours.name,
        variant=BLOG,
        timing=whole,
        images=ours.images,
        derived=True,
        ratio=ratio,
        note=note,
    )


def _sum(*parts: tuple[int, Timing | None]) -> Timing:
    """Return the sum of ``parts``, each a number of repetitions and a timing."""
    timed = [(times, part) for times, part in parts if part is not None]
    assert len(timed) == len(parts)
    return Timing(
        median_s=sum(times * part.median_s for times, part in timed),
        spread_s=sum(times * part.spread_s for times, part in timed),
        runs=min(part.runs for _, part in timed),
        cpu_s=sum(times * part.cpu_s for times, part in timed),
    )
