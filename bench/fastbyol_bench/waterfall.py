"""Where the time of our step goes: the real step with a clock at the seams between its parts, and the picture of it.

The parts are found by the names that ``engine.step`` calls. What it does between them is "rest". On a GPU the step runs eagerly
for this, since a captured one has no seams, and each seam waits for the device.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from fastbyol import load_config
from fastbyol.engine import step
from fastbyol.views import two_views
from fastbyol_bench.results import Part

if TYPE_CHECKING:
    from fastbyol_bench.suite import Setting

VIEWS, ONLINE, TARGET, BACKWARD, OPTIMIZER, TELEMETRY, REST = (
    "views", "online forward", "target forward", "loss and backward", "optimizer and moving average", "telemetry", "rest",
)  # fmt: skip
PARTS = (VIEWS, ONLINE, TARGET, BACKWARD, OPTIMIZER, TELEMETRY, REST)
RUNS = 5


class Seams:
    """Seconds per part, gathered by wrapped calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time as ``name``'s."""
        began = self._now()
        yield
        self.seconds[name] += self._now() - began

    def wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time counted as ``name``'s."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed


def measured(setting: Setting, *, size: int, batch: int) -> tuple[Part, ...]:
    """Median seconds of each part over some steps of the blog preset with LARS in the fastest precision."""
    from fastbyol_bench.suite import fast_precision

    sets = [f"train.precision={fast_precision(setting.device)}", f"views.size={size}", "optim.name=lars", "engine.mode=eager"]
    config = load_config("blog", sets)
    state = step.TrainState.create(config, steps_per_epoch=1000, device=setting.device)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=setting.device)
    ids = torch.arange(batch, device=setting.device)
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16

    def views(epoch: int) -> Tensor:
        return two_views(config.views, images, ids, seed=0, epoch=epoch, dtype=dtype)

    step.train_step(state, views(0))
    runs = [_one(state, partial(views, epoch), setting.device) for epoch in range(1, 3 if setting.quick else RUNS + 1)]
    return tuple(Part(name=name, seconds=statistics.median(run[name] for run in runs)) for name in PARTS)


def _one(state: step.TrainState, views: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    seams = Seams(device)
    with ExitStack() as patched:
        for where, attribute, name in (
            (step, "byol_loss", BACKWARD),
            (step, "observe", TELEMETRY),
            (step, "lars_ema", OPTIMIZER),
            (torch.autograd, "backward", BACKWARD),
            (state.online, "forward", ONLINE),
            (state.target, "forward", TARGET),
        ):
            patched.enter_context(mock.patch.object(where, attribute, seams.wrapped(name, getattr(where, attribute))))
        with seams.part(REST):
            with seams.part(VIEWS):
                batch = views()
            step.train_step(state, batch)
    seams.seconds[REST] -= sum(seconds for name, seconds in seams.seconds.items() if name != REST)
    return seams.seconds | {REST: max(0.0, seams.seconds[REST])}


def available() -> bool:
    """Whether the picture can be drawn: matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(parts: tuple[Part, ...], title: str, path: Path) -> None:
    """Parts as bars that begin where the last ended, with their share of the whole, as PNG."""
    from matplotlib.figure import Figure

    whole = sum(part.seconds for part in parts)
    figure = Figure(figsize=(8.0, 0.42 * len(parts) + 1.1), layout="constrained")
    axes = figure.subplots()
    began = 0.0
    for row, part in enumerate(parts):
        axes.barh(row, part.seconds * 1e3, left=began * 1e3, color="#3b6ea5", height=0.62)
        began += part.seconds
        label = f" {part.seconds * 1e3:.3g} ms, {100 * part.seconds / whole:.1f} %"
        past = began < 0.7 * whole
        axes.annotate(
            label,
            (began * 1e3 if past else (began - part.seconds) * 1e3, row),
            va="center",
            ha="left" if past else "right",
            fontsize=8,
        )
    axes.set_yticks(range(len(parts)), [part.name for part in parts])
    axes.invert_yaxis()
    axes.set_xlim(0, whole * 1e3)
    axes.set_xlabel("milliseconds into the step")
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
