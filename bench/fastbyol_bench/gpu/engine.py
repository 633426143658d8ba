"""The engine's step on this GPU, eager, compiled and captured: agreement, speed and kernels.

python -m fastbyol_bench.gpu.engine ROWS JOB METHOD KERNELS
    [--cudnn DB] [--combo] [--timed] [--stem LAYOUT] [--overlap] [--heads tf32x3] [--dry]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbyol import load_config
from fastbyol.config import Resolved
from fastbyol.data.loader import Batch
from fastbyol.engine import capture
from fastbyol.engine.overlap import CudaSide, Side
from fastbyol.engine.step import METRICS, StepMetrics, TrainState
from fastbyol.model.standardizing import use_products
from fastbyol_bench.gpu.rows import Rows
from fastbyol_bench.gpu.rows import parser as job_parser
from fastbyol_bench.harness import clock_of
from fastbyol_bench.kernel_times import Kernel, recorded
from fastbyol_bench.own_step import METHODS
from fastbyol_bench.waterfall import of_kernels

STEPS = 3
REPLAYS, READINGS = 20, 5
SET_BATCHES = 4  # of the resident set
# Compiled and eager steps sum in a different order, in bf16. With the four images of a dry run
# batch norm magnifies that: 1 % was seen.
LOSS_TOLERANCE, DRY_LOSS_TOLERANCE = 0.02, 0.2


class Stand:
    """The configuration, states and batches of one method."""

    def __init__(
        self,
        method: str,
        *,
        dry: bool,
        small: bool = False,
        stem: str = "auto",
        heads: str = "fp32",
    ) -> None:
        self.device, self.heads = torch.device("cpu" if dry else "cuda"), heads
        self.batch, self.size = (4, 32) if dry or small else (256, 96)
        narrow = ("model.width=16", "model.groups=8") if dry or small else ()
        sets = ["train.precision=bf16", f"views.size={self.size}", f"engine.stem={stem}"]
        sets += [*METHODS[method], *narrow]
        self.config: Resolved = load_config("blog", sets)
        g = torch.Generator().manual_seed(0)
        shape = (SET_BATCHES * self.batch, self.size, self.size, 3)
        noise = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        self._set = noise.to(self.device)

    def state(self) -> TrainState:
        """Return a state before its first step. All such states are equal."""
        state = TrainState.create(self.config, steps_per_epoch=100, device=self.device)
        for net in (state.online, state.target):  # a configuration with tf32x3 needs a GPU
            use_products(net, self.heads)
        return state

    def images(self, seed: int) -> Batch:
        """Return a batch of rows of one resident set of noise, with ids of its own."""
        g = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self._set), generator=g)[: self.batch].to(self.device)
        return Batch(self._set, torch.arange(self.batch, device=self.device) + 1000 * seed, rows)


class NoStream:
    """A side that replaces ``CudaSide`` on a CPU."""

    def beside(self) -> nullcontext[None]:
        """Run the block in its turn."""
        return nullcontext()

    def join(self) -> None:
        """Wait for nothing."""


def re_run(work: Callable[[], StepMetrics]) -> tuple[StepMetrics, Callable[[], None]]:
    """Return the outputs of ``work`` and a function that repeats it into them.

    It replaces ``capture.record_cuda`` on a CPU.
    """
    kept = StepMetrics(*(tensor.clone() for tensor in work()))

    def play() -> None:
        for static, new in zip(kept, work(), strict=True):
            static.copy_(new)

    return kept, play


def steps(rows: Rows, stand: Stand, arguments: argparse.Namespace) -> capture.Captured:
    """Take the same steps in all three modes, compare them, and return the captured engine."""
    eager = stand.state()
    values = _taken(rows, "eager", stand, capture.Eager(eager, stand.config))
    capture.make_cudnn_deterministic(stand.device)
    if arguments.cudnn:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = (
            flag == "1" for flag in arguments.cudnn
        )
    # Inductor's code for a CPU takes a minute to compile and shows nothing here.
    backend = "aot_eager" if arguments.dry else "inductor"
    side: Side | None = None
    if arguments.overlap:
        side = NoStream() if arguments.dry else CudaSide()
    forward = capture.compiled_forward(backend, deterministic=not arguments.timed, side=side)
    compiled, graphed = stand.state(), stand.state()
    got = _taken(rows, "compiled", stand, capture.Eager(compiled, stand.config, forward))
    gap = max(
        abs(a / b - 1) for a, b in zip(_column(got, "loss"), _column(values, "loss"), strict=True)
    )
    most = DRY_LOSS_TOLERANCE if arguments.dry else LOSS_TOLERANCE
    rows.check(
        "engine", "compiled against eager", holds=gap < most, says="losses differ", loss_gap=gap
    )
    record = re_run if arguments.dry else capture.record_cuda
    graph = capture.Captured(capture.Eager(graphed, stand.config, forward), record)
    began = time.perf_counter()
    graph.prepare(stand.images(0), 0)
    rows.check(
        "engine", "captured", holds=graph.mode == "graph", says="the mode is not graph",
        seconds=time.perf_counter() - began, mode=graph.mode,
        **({} if arguments.dry else {"gib": torch.cuda.max_memory_reserved() / 2**30}),
    )  # fmt: skip
    for index in range(STEPS):
        graph(stand.images(index), 0)
    others = compiled.tensors()
    odd = [
        name for name, tensor in graphed.tensors().items() if not torch.equal(tensor, others[name])
    ]
    rows.check(
        "engine", "graph is the compiled step bit for bit", holds=not odd, says=f"odd: {odd[:3]}"
    )
    return graph


def _taken(rows: Rows, name: str, stand: Stand, engine: capture.Engine) -> list[Tensor]:
    began = time.perf_counter()
    values = [engine(stand.images(index), 0).values.cpu() for index in range(STEPS)]
    losses = [round(loss, 5) for loss in _column(values, "loss")]
    skipped = int(sum(_column(values, "skipped")))
    rows.check(
        "engine", f"{STEPS} steps {name}", holds=not skipped, says="gradients are not finite",
        seconds=time.perf_counter() - began, losses=losses, skipped=skipped,
    )  # fmt: skip
    return values


def _column(values: list[Tensor], name: str) -> list[float]:
    return [float(step[METRICS.index(name)]) for step in values]


def speed(rows: Rows, stand: Stand, graph: capture.Captured) -> None:
    """Time replays of the graph, alone and with the copies into its inputs."""
    batch = stand.images(7)
    for name, call in (
        ("graph alone", graph.replay),
        ("with its copies in", lambda: graph(batch, 0)),
    ):
        seconds = _seconds(call, stand.device)
        rows.add("speed", name, ms=seconds * 1e3, img_s=stand.batch / seconds)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median over ``READINGS`` of the seconds per call; a CPU makes a single call."""
    clock, num_readings = clock_of(device, REPLAYS), READINGS if device.type == "cuda" else 1
    return statistics.median(clock.time(call).wall_s for _ in range(num_readings))


def profile(rows: Rows, stand: Stand, graph: capture.Captured, file: Path) -> None:
    """Write the kernels of a replay to ``file``, and their number and total time to a row."""
    kernels = recorded(graph.replay) if stand.device.type == "cuda" else ()
    file.write_text(listing(kernels), "utf-8")
    rows.add(
        "profile",
        "kernels of a replay",
        nodes=len(kernels),
        device_ms=sum(k.seconds for k in kernels) * 1e3,
    )
    if kernels:
        for part in of_kernels([kernels]):
            rows.add("profile", part.name, us=part.seconds * 1e6)


def listing(kernels: tuple[Kernel, ...]) -> str:
    """Return a line per kernel name, the longest first: microseconds and launches in one replay."""
    names = dict.fromkeys(kernel.name for kernel in kernels)
    sums = {name: [k.seconds for k in kernels if k.name == name] for name in names}
    ordered = sorted(sums.items(), key=lambda item: -sum(item[1]))
    return "".join(
        f"{sum(seconds) * 1e6:9.1f} us {len(seconds):4d}  {name}\n" for name, seconds in ordered
    )


def versions(rows: Rows, device: torch.device) -> None:
    """Write a row with the versions of torch, Triton, cuDNN and the name of the GPU."""
    import triton

    names: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        names |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    rows.add("env", "versions", **names)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = job_parser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("kernels", type=Path, help="the file for the list of a replay's kernels")
    # A setting needs a process of its own: cuDNN keeps its plans, whatever its switches are later.
    # Code that one process compiled is found on disk by the next.
    parser.add_argument(
        "--cudnn", help="two digits: deterministic, benchmark; default: as the engine sets them"
    )
    parser.add_argument(
        "--combo", action="store_true", help="let Inductor fuse small kernels side by side"
    )
    parser.add_argument(
        "--timed",
        action="store_true",
        help="let Inductor choose by timing, which the engine does not",
    )
    parser.add_argument(
        "--stem", default="auto", help="auto, plain or blocks; the engine takes blocks on a GPU"
    )
    parser.add_argument(
        "--overlap", action="store_true", help="run the target's pass on a stream of its own"
    )
    parser.add_argument(
        "--heads", choices=("fp32", "tf32x3"), default="fp32", help="the products of the heads"
    )
    return parser


def main() -> int:
    """Run all parts and return 1 if one failed."""
    arguments = parser().parse_args()
    rows = Rows(arguments.rows, arguments.job)
    if arguments.combo:
        import torch._inductor.config

        torch._inductor.config.combo_kernels = True
    stand = Stand(arguments.method, dry=arguments.dry, stem=arguments.stem, heads=arguments.heads)
    with rows.guarded("env", "versions"):
        versions(rows, stand.device)
    with rows.guarded("engine", "steps"):
        graph = steps(rows, stand, arguments)
        with rows.guarded("speed", "replays"):
            speed(rows, stand, graph)
        with rows.guarded("profile", "replay"):
            profile(rows, stand, graph, arguments.kernels)
    return int(rows.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
