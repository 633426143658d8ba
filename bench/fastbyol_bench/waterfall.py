"""The parts of our step's time, and their picture."""

from __future__ import annotations

import importlib.util
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastbyol import load_config
from fastbyol.engine import step
from fastbyol.views import two_views
from fastbyol_bench.kernel_times import Kernel, recorded
from fastbyol_bench.own_step import OwnStep
from fastbyol_bench.results import Part
from fastbyol_bench.suite import Setting, fast_precision

VIEWS, ONLINE, TARGET, BACKWARD, OPTIMIZER, TELEMETRY, REST = (
    "views", "online forward", "target forward", "loss and backward",
    "optimizer and moving average", "telemetry", "rest",
)  # fmt: skip
PARTS = (VIEWS, ONLINE, TARGET, BACKWARD, OPTIMIZER, TELEMETRY, REST)
RUNS = 5


# Kinds of kernels by name; the first match counts. Ours are those of kernels/fastbyol_kernels,
# where norms, pooling and weight standardization share names. Inductor's begin with triton_. cuDNN
# and cuBLAS have those of profiles on sm_80 and sm_90.
KINDS = (
    (
        "copies and fills",
        r"^Mem(cpy|set)|direct_copy_kernel|FillFunctor|CatArrayBatchedCopy|index_elementwise|gather",
    ),
    ("views", r"^_(draw|crop|contrast|blur)_kernel"),
    ("optimizer and moving average", r"^_(norms|sweep|telemetry)_kernel"),
    (
        "norms, pooling, weight standardization",
        r"^_(forward|backward|moments|normalise|pool|gradient|gradient_sums|sum_samples)_kernel",
    ),
    ("convolutions", r"fprop|dgrad|wgrad|conv(?!ert)|cudnn|nchwToNhwc|nhwcToNchw"),
    ("heads", r"^_product_kernel|gemm|nvjet|cublas|splitKreduce|gemv"),
    ("compiled elementwise", r"^triton_"),
)
OTHERS, GAPS = "other kernels", "between kernels"


def kind(name: str) -> str:
    """Return the part of a step that a kernel of this name belongs to: ``KINDS`` or ``OTHERS``."""
    return next((part for part, pattern in KINDS if re.search(pattern, name)), OTHERS)


def of_kernels(replays: Sequence[Sequence[Kernel]]) -> tuple[Part, ...]:
    """Return the median seconds over ``replays`` of each kind of kernel and between kernels.

    Parts without any time are left out.
    """
    names = (*(part for part, _ in KINDS), OTHERS, GAPS)
    runs = [_by_kind(kernels) for kernels in replays]
    parts = (
        Part(name=name, seconds=statistics.median(run.get(name, 0.0) for run in runs))
        for name in names
    )
    return tuple(part for part in parts if part.seconds > 0)


def _by_kind(kernels: Sequence[Kernel]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        seconds[kind(kernel.name)] += kernel.seconds
    whole = max(k.start_s + k.seconds for k in kernels) - min(k.start_s for k in kernels)
    # Kernels of two streams may overlap, which leaves no gap.
    seconds[GAPS] = max(0.0, whole - sum(seconds.values()))
    return seconds


class Seams:
    """The seconds of each part, collected by wrapped calls."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.idle = set[str]()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's time to the part ``name``."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with its time added to the part ``name``, ``idle`` until it is called."""
        self.idle.add(word := f"{call.__module__}.{call.__qualname__}")

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.idle.discard(word)
            with self.part(name):
                return call(*args, **kwargs)

        return timed


def measured(setting: Setting, *, size: int, batch: int) -> tuple[Part, ...]:
    """Return the median seconds of each part over some steps of the blog preset with LARS.

    On a CPU wrapped calls separate the parts. On a GPU a step is the replay of a graph, whose
    kernels are sorted by name.
    """
    sets = [f"train.precision={fast_precision(setting.device)}", "optim.name=lars"]
    num_runs = 2 if setting.quick else RUNS
    if setting.on_gpu:
        replay = OwnStep.create(sets, size=size, batch=batch, device=setting.device)
        replay()
        return of_kernels([recorded(replay) for _ in range(num_runs)])
    config = load_config("blog", [*sets, f"views.size={size}", "engine.mode=eager"])
    state = step.TrainState.create(config, steps_per_epoch=1000)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16

    def views(epoch: int) -> Tensor:
        return two_views(
            config.views, images, torch.arange(batch), seed=0, epoch=epoch, dtype=dtype
        )

    step.train_step(state, views(0))
    runs = [_one(state, partial(views, epoch)) for epoch in range(1, num_runs + 1)]
    return tuple(
        Part(name=name, seconds=statistics.median(run[name] for run in runs)) for name in PARTS
    )


def _one(state: step.TrainState, views: Callable[[], Tensor]) -> dict[str, float]:
    seams = Seams()
    with ExitStack() as patched:
        for where, attribute, name in (
            (step, "byol_loss", BACKWARD),
            (step, "observe", TELEMETRY),
            (step, "scheduled_step", OPTIMIZER),
            (torch.autograd, "grad", BACKWARD),
            (state.online, "forward", ONLINE),
            (state.target, "forward", TARGET),
        ):
            patched.enter_context(
                mock.patch.object(where, attribute, seams.wrapped(name, getattr(where, attribute)))
            )
        with seams.part(REST):
            with seams.part(VIEWS):
                batch = views()
            step.train_step(state, batch)
    if seams.idle:
        raise RuntimeError(f"a step no longer calls {', '.join(sorted(seams.idle))}")
    # The rest is the step's time between the wrapped calls.
    seams.seconds[REST] -= sum(seconds for name, seconds in seams.seconds.items() if name != REST)
    return seams.seconds | {REST: max(0.0, seams.seconds[REST])}


def available() -> bool:
    """Return True if matplotlib is installed, which draws the picture."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(parts: tuple[Part, ...], title: str, path: Path) -> None:
    """Draw the parts as consecutive bars with their shares of the whole, as PNG."""
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
