"""The GPU's ceilings and cuDNN's rate at each of the network's convolutions, also with wider stems.

python -m fastbyol_bench.gpu.limits ROWS JOB [--cudnn DB] [--dry]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol_bench.ceilings import ceiling
from fastbyol_bench.gpu.rows import Rows
from fastbyol_bench.gpu.rows import parser as job_parser
from fastbyol_bench.harness import Flush, clock_of
from fastbyol_bench.kernel_times import recorded

RUNS = 15


@dataclass(frozen=True)
class Layer:
    """A convolution without bias. ``count`` is the number of its occurrences in a step."""

    name: str
    channels_in: int
    channels_out: int
    side: int
    kernel: int
    stride: int
    padding: int
    count: int


# torchvision's ResNet-18 at 96 px.
NETWORK = (
    Layer("stem 7x7/2", 3, 64, 96, 7, 2, 3, 1),
    Layer("layer1 3x3", 64, 64, 24, 3, 1, 1, 4),
    Layer("layer2.0 3x3/2", 64, 128, 24, 3, 2, 1, 1),
    Layer("layer2.0 1x1/2", 64, 128, 24, 1, 2, 0, 1),
    Layer("layer2 3x3", 128, 128, 12, 3, 1, 1, 3),
    Layer("layer3.0 3x3/2", 128, 256, 12, 3, 2, 1, 1),
    Layer("layer3.0 1x1/2", 128, 256, 12, 1, 2, 0, 1),
    Layer("layer3 3x3", 256, 256, 6, 3, 1, 1, 3),
    Layer("layer4.0 3x3/2", 256, 512, 6, 3, 2, 1, 1),
    Layer("layer4.0 1x1/2", 256, 512, 6, 1, 2, 0, 1),
    Layer("layer4 3x3", 512, 512, 3, 3, 1, 1, 3),
)  # fmt: skip
# The stem with channels of zeros, or with 2x2 pixels as channels and the kernel's taps moved
# accordingly.
STEMS = (
    Layer("stem of 4 channels", 4, 64, 96, 7, 2, 3, 0),
    Layer("stem of 8 channels", 8, 64, 96, 7, 2, 3, 0),
    Layer("stem of 2x2 pixels", 12, 64, 51, 4, 1, 0, 0),
    Layer("stem of 2x2 pixels, 16 channels", 16, 64, 51, 4, 1, 0, 0),
)
PASSES = ("forward", "input's gradient", "weight's gradient")


class Timer:
    """A timer of calls by their kernels on the device with cold caches; on a CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = Flush(device) if device.type == "cuda" else None

    def __call__(self, call: Callable[[], object]) -> float:
        """Return the median time of ``RUNS`` calls, in seconds, after two to warm up."""
        if self._flush is None:
            return clock_of(self._device).time(call).wall_s
        for _ in range(2):
            call()
        readings = []
        for _ in range(RUNS):
            self._flush()
            readings.append(sum(kernel.seconds for kernel in recorded(call)))
        return statistics.median(readings)


def passes(
    layer: Layer, num_views: int, device: torch.device
) -> tuple[dict[str, Callable[[], object]], float]:
    """Return the passes of ``layer`` over bf16 channels-last views, and the operations of each."""
    shape = (num_views, layer.channels_in, layer.side, layer.side)
    x = _random(shape, device)
    weight = _random((layer.channels_out, layer.channels_in, layer.kernel, layer.kernel), device)

    def forward() -> Tensor:
        return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)

    y = forward()
    dy = torch.randn_like(y)
    where = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], 1)

    def backward(mask: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(dy, x, weight, None, *where, mask)

    every = (forward, backward([True, False, False]), backward([False, True, False]))
    calls = dict(zip(PASSES, every, strict=True))
    if layer.channels_in < 64:  # images need no gradient
        del calls["input's gradient"]
    return calls, 2.0 * y.numel() * layer.channels_in * layer.kernel**2


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return (
        torch.randn(shape, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
    )


def convolutions(rows: Rows, device: torch.device, num_views: int) -> None:
    """Time every convolution of a step and each alternative stem; write the sum over a step."""
    timer, step_s, step_flop = Timer(device), 0.0, 0.0
    for layer in (*NETWORK, *STEMS):
        with rows.guarded("conv", layer.name):
            calls, flop = passes(layer, num_views, device)
            for name, call in calls.items():
                seconds = timer(call)
                rows.add(
                    "conv", f"{layer.name}, {name}", us=seconds * 1e6, tflops=flop / seconds / 1e12
                )
                times = layer.count * (2 if name == "forward" else 1)  # also the target's forward
                step_s, step_flop = step_s + times * seconds, step_flop + times * flop
    rows.add("conv", "all of a step", ms=step_s * 1e3, tflops=step_flop / step_s / 1e12)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = job_parser()
    # A setting needs a process of its own: cuDNN keeps its plans, whatever its switches are later.
    parser.add_argument("--cudnn", default="10", help="two digits: deterministic, benchmark")
    return parser


def main() -> int:
    """Measure ceilings and convolutions and return 1 if a part failed."""
    arguments = parser().parse_args()
    rows = Rows(arguments.rows, arguments.job)
    device = torch.device("cpu" if arguments.dry else "cuda")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = (
        d == "1" for d in arguments.cudnn
    )
    with rows.guarded("ceiling", "copy and products"):
        best = ceiling(device, quick=arguments.dry)
        tflops = {"fp32_tflops": best.fp32_flop_s / 1e12, "bf16_tflops": best.bf16_flop_s / 1e12}
        rows.add("ceiling", "copy and products", copy_tb_s=best.copy_bytes_s / 1e12, **tflops)
    convolutions(rows, device, 4 if arguments.dry else 512)
    return int(rows.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
