"""The error of every kernel against float64 at the engine's shapes, and its time beside its floor.

python -m fastbyol_bench.gpu.exactness ROWS JOB [--small] [--untimed] [--dry]
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace

if __name__ == "__main__" and "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, which importing them does

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol import views
from fastbyol.data.loader import Batch
from fastbyol.engine.step import TrainState
from fastbyol_bench.gpu.engine import Stand
from fastbyol_bench.gpu.limits import Timer
from fastbyol_bench.gpu.rows import Rows
from fastbyol_bench.gpu.rows import parser as job_parser
from fastbyol_kernels import batch_norm, group_norm, lars_ema, max_pool, tf32x3
from fastbyol_kernels import views as view_kernels
from fastbyol_kernels import weight_standardization as ws

# ResNet-18's activations at 96 px: side, channels, with a residual.
NORMS = (
    (48, 64, False), (24, 64, False), (24, 64, True), (12, 128, True), (6, 256, True), (3, 512,
    True),
)  # fmt: skip
# bf16 keeps 8 bits: rounding a result costs 2e-3 of it, and two roundings and a residual stay below
# twice that. fp32 sums over up to 4,608 values stay far below 1e-5.
BF16, FP32 = 4e-3, 1e-5
# Features in and out of the heads' layers, blog's and paper's. Sums of up to 4,096 products of TF32
# values would be off by 3e-4.
HEADS = ((512, 512), (512, 128), (128, 512), (512, 4096), (4096, 256), (256, 4096))
SPLIT = 2e-6
SAMPLES = 32  # the compared part of a batch; more would show the same


class Bench:
    """The device, the sizes and the timing of one run."""

    def __init__(self, rows: Rows, arguments: argparse.Namespace) -> None:
        self.rows = rows
        self.small = arguments.small or arguments.dry
        self.stand = Stand("gn_ws", dry=arguments.dry, small=self.small)
        self.device = self.stand.device
        self._timer = None if arguments.untimed or arguments.dry else Timer(self.device)

    def report(
        self,
        name: str,
        errors: dict[str, float],
        most: float,
        call: Callable[[], object],
        moved: float,
    ) -> None:
        """Write a row with ``errors``, failed if one exceeds ``most``, and the time of ``call``.

        ``moved`` is the number of bytes that the call moves.
        """
        times = {}
        if self._timer is not None:
            seconds = self._timer(call)
            times = {"us": seconds * 1e6, "tb_s": moved / seconds / 1e12}
        self.rows.check(
            "kernel",
            name,
            holds=max(errors.values()) <= most,
            says=f"an error over {most:g}",
            **errors,
            **times,
        )


def off(got: Tensor, exact: Tensor) -> float:
    """Return |got - exact| / |exact|, or infinity if ``got`` is not finite."""
    if not bool(got.isfinite().all()):
        return math.inf
    return float(
        (got.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-300)
    )


def norms(bench: Bench) -> None:
    """Compare group norm with ReLU, bf16, in both directions at every size of the network."""
    for side, channels, residual in NORMS[-2:] if bench.small else NORMS:
        name = f"group norm {side}x{side}x{channels}" + (" + residual" if residual else "")
        with bench.rows.guarded("kernel", name):
            _norm(bench, name, (2 * bench.stand.batch, channels, side, side), residual=residual)


def _norm(bench: Bench, name: str, shape: tuple[int, int, int, int], *, residual: bool) -> None:
    x, added, dy = (_activation(bench.device, shape) for _ in range(3))
    weight, bias = (torch.randn(shape[1], device=bench.device).requires_grad_() for _ in range(2))
    inputs = [x, weight, bias, added][: 4 if residual else 3]

    def forward() -> Tensor:
        return group_norm.group_norm(
            x, 32, weight, bias, residual=added if residual else None, relu=True, kernels="triton"
        )

    y = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, dy.detach(), retain_graph=True)

    part = [t[:SAMPLES].detach().double().requires_grad_() for t in (x, added)]
    affine = weight.detach().double(), bias.detach().double()
    exact = group_norm.reference(part[0], 32, *affine, residual=part[1] if residual else None)
    # For a value near 0 rounding decides the ReLU's side, so the exact gradient follows the
    # kernel's.
    upstream = dy[:SAMPLES].detach().double() * (y[:SAMPLES] > 0)
    exact_dx = torch.autograd.grad(exact, part[0], upstream)[0]
    flags = {"residual": residual, "relu": True}
    errors = {"err_y": off(y[:SAMPLES], exact.relu())}
    moved = group_norm.bytes_moved(shape, 2, **flags)
    bench.report(f"{name}, forward", errors, BF16, torch.no_grad()(forward), moved)
    errors = {"err_dx": off(backward()[0][:SAMPLES], exact_dx)}
    bench.report(
        f"{name}, backward",
        errors,
        BF16,
        backward,
        group_norm.bytes_moved(shape, 2, **flags, backward=True),
    )


def batch_norms(bench: Bench) -> None:
    """Compare batch norm with ReLU, bf16, at every size of the network; at the stem it pools."""
    for side, channels, residual in NORMS[-2:] if bench.small else NORMS:
        pool = channels == 64 and side == NORMS[0][0]
        name = f"batch norm {side}x{side}x{channels}"
        name += " + residual" if residual else ", pooled" if pool else ""
        shape = (2 * bench.stand.batch, channels, side, side)
        with bench.rows.guarded("kernel", name):
            _batch_norm(bench, name, shape, residual=residual, pool=pool)


def _batch_norm(
    bench: Bench, name: str, shape: tuple[int, int, int, int], *, residual: bool, pool: bool
) -> None:
    x, added = (_activation(bench.device, shape) for _ in range(2))
    weight, bias = (torch.randn(shape[1], device=bench.device).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(2, shape[1], device=bench.device).unbind()
    inputs = [x, weight, bias, added][: 4 if residual else 3]
    momentum, eps = 0.1, 1e-5

    def forward() -> Tensor:
        return batch_norm.batch_norm(
            x, weight, bias, mean, var, 2, residual=added if residual else None, relu=True,
            pool=pool, kernels="triton", momentum=momentum, eps=eps,
        )  # fmt: skip

    y = forward()
    dy = _activation(bench.device, (*y.shape[:2], y.shape[2], y.shape[3])).detach()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    wide = [t.detach().double().requires_grad_() for t in (x, added)]
    exact = batch_norm.reference(
        wide[0], weight.detach().double(), bias.detach().double(), mean.double(), var.double(), 2,
        residual=wide[1] if residual else None, momentum=momentum, eps=eps,
    )  # fmt: skip
    # Rounding decides the ReLU's side of a value near 0, and which of two near values is the
    # maximum: the exact gradient follows it.
    upstream, rounded = dy.double(), exact.detach().relu().bfloat16().double().requires_grad_()
    result = max_pool.max_pool(rounded, kernels="reference") if pool else exact.relu()
    if pool:
        (upstream,) = torch.autograd.grad(result, rounded, upstream)
    kept = rounded if pool else y
    exact_dx = torch.autograd.grad(exact, wide[0], upstream * (kept > 0))[0]
    size = x.numel() * x.element_size()
    pooled = 3 / 8  # of x's bytes: y a quarter, taps half as wide
    moved = size * (2 + pooled if pool else 3 + residual)
    errors = {"err_y": off(y, result)}
    bench.report(f"{name}, forward", errors, 2 * BF16, torch.no_grad()(forward), moved)
    moved = size * (3 + 2 * pooled if pool else 5 + 2 * residual)
    errors = {"err_dx": off(backward()[0], exact_dx)}
    # A value between two bf16 numbers may tie with a neighbour here and not there: off by .04 in
    # Triton's interpreter, which truncates.
    bench.report(f"{name}, backward", errors, 0.1 if pool else BF16, backward, moved)


def _activation(device: torch.device, shape: tuple[int, int, int, int]) -> Tensor:
    x = torch.randn(shape, device=device).bfloat16()
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def heads(bench: Bench) -> None:
    """Compare the products of both presets' heads by split values; time torch's fp32 beside."""
    for features, out in HEADS[:1] if bench.small else HEADS:
        name = f"linear {features} to {out}"
        with bench.rows.guarded("kernel", name):
            _linear(bench, name, features, out)


def _linear(bench: Bench, name: str, features: int, out: int) -> None:
    sizes = ((2 * bench.stand.batch, features), (out, features), (out,))
    inputs = [torch.randn(size, device=bench.device).requires_grad_() for size in sizes]
    dy = torch.randn(sizes[0][0], out, device=bench.device)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = F.linear(*wide)
    exact_gradients = torch.autograd.grad(exact, wide, dy.double())
    moved = sum(t.nbytes for t in (*inputs, dy))
    for kernels, of, most in (
        ("triton", "of split values", SPLIT), ("reference", "of torch", FP32)
    ):  # fmt: skip

        def forward(kernels: str = kernels) -> Tensor:
            return tf32x3.linear(*inputs, kernels=kernels)

        y = forward()

        def backward(y: Tensor = y) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, inputs, dy, retain_graph=True)

        errors = {"err_y": off(y, exact)}
        bench.report(f"{name} {of}, forward", errors, most, torch.no_grad()(forward), moved)
        errors = {
            f"err_d{what}": off(*pair)
            for what, pair in zip("xw", zip(backward(), exact_gradients, strict=True), strict=False)
        }
        bench.report(f"{name} {of}, backward", errors, most, backward, 2 * moved)


def weights(bench: Bench, state: TrainState) -> None:
    """Compare the online network's standardized weights, bf16, and the gradient through them."""
    (group,) = (group for group in state.weights.groups if group.gradient is not None)
    assert group.gradient is not None
    group.renew()
    flat, exact, means, stds = (
        t.detach().double() for t in (group.flat, group.copy, group.means, group.stds)
    )
    ws.standardize_rows(exact, means, stds, flat, group.table, kernels="reference")
    moved = ws.bytes_moved(group.table, group.copy.itemsize)
    bench.report(
        "weight standardization, forward", {"err": off(group.copy, exact)}, BF16, group.renew, moved
    )
    group.gradient.normal_()
    out, exact_gradient = torch.zeros_like(group.flat), torch.zeros_like(flat)
    upstream = group.gradient.double()
    ws.standardize_rows_backward(
        exact_gradient, upstream, flat, means, stds, group.table, kernels="reference"
    )
    group.write_gradient(out)
    moved = ws.bytes_moved(group.table, group.copy.itemsize, backward=True)
    bench.report(
        "weight standardization, backward", {"err": off(out, exact_gradient)}, FP32,
        lambda: group.write_gradient(out), moved,
    )  # fmt: skip


def optimizer(bench: Bench, state: TrainState) -> None:
    """Compare one update of LARS and the moving average, fp32: all buffers and the telemetry."""
    arena, recipe = state.arena, state.recipe
    for segment in arena.segments:  # between segments all stays zero, as the operation expects
        segment.view(arena.gradient).normal_(std=1e-3)
        segment.view(arena.momentum).normal_(std=1e-3)
    arena.target.mul_(0.9)  # else it equals the online weights and does not move
    flats = (arena.online, arena.gradient, arena.momentum, arena.target)
    exact = (
        arena.online.double(),
        arena.gradient.double(),
        arena.momentum.double(),
        arena.target.double(),
    )
    lr, tau = state.lr[0].clone(), state.tau[0].clone()
    table = replace(
        arena.table, decay=arena.table.decay.double(), lr_mult=arena.table.lr_mult.double()
    )
    exact_layers = lars_ema.reference(
        *exact, table, lr.double(), tau.double(),
        rule=recipe.rule, eta=recipe.eta, mu=recipe.momentum, ema_first=recipe.ema_first,
    )  # fmt: skip

    def update() -> Tensor:
        return lars_ema.lars_ema(
            *flats, arena.table, lr, tau,
            rule=recipe.rule, eta=recipe.eta, mu=recipe.momentum, ema_first=recipe.ema_first,
            kernels="triton",
        )  # fmt: skip

    layers = update()
    names = ("online", "gradient", "momentum", "target")
    errors = {name: off(flat, truth) for name, flat, truth in zip(names, flats, exact, strict=True)}
    moved = lars_ema.bytes_moved(len(arena.online), len(arena.target))
    bench.report(
        "LARS and moving average",
        errors | {"layers": off(layers, exact_layers)},
        FP32,
        update,
        moved,
    )


def pixels(bench: Bench) -> None:
    """Compare a batch's drawn table bit for bit, and its views, bf16, with both kinds of blur."""
    stand, size = bench.stand, bench.stand.size
    batch = stand.images(1)
    where = {"seed": 3, "epoch": 5, "height": size, "width": size}
    table, exact = (
        views.draw(stand.config.views, batch.ids, **where, kernels=kernels)
        for kernels in ("triton", "reference")
    )
    bench.rows.check(
        "kernel", "parameters of views", holds=torch.equal(table, exact), says="other bits"
    )
    for blur in ("gaussian", "pil"):
        with bench.rows.guarded("kernel", f"two views, blur {blur}"):
            _pixels(bench, batch, table, blur)


def _pixels(bench: Bench, batch: Batch, table: Tensor, blur: str) -> None:
    stand, size = bench.stand, bench.stand.size
    config = stand.config.views.model_copy(update={"blur": blur})

    assert batch.rows is not None
    part = slice(0, SAMPLES)
    few, rows = table[:, part].contiguous(), batch.rows[part]
    for layout in ("plain", "blocks"):

        def make(layout: str = layout) -> Tensor:
            return views.apply(
                batch.images, table, config, torch.bfloat16, rows=batch.rows, layout=layout,
                kernels="triton",
            )  # fmt: skip

        exact = views.apply(
            batch.images, few, config, torch.float64, rows=rows, layout=layout, kernels="reference"
        )
        got = make()
        moved = view_kernels.bytes_moved(2, stand.batch, size, size, size, 0) + got.nbytes
        name = f"two views, blur {blur}, {layout}"
        bench.report(name, {"err": off(got[:, part], exact)}, BF16, make, moved)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = job_parser()
    parser.add_argument(
        "--small", action="store_true", help="for tools that slow a program down a hundred times"
    )
    parser.add_argument(
        "--untimed", action="store_true", help="for tools that use the profiler themselves"
    )
    return parser


def main() -> int:
    """Compare all kernels and return 1 if one is wrong."""
    arguments = parser().parse_args()
    torch.manual_seed(0)
    rows = Rows(arguments.rows, arguments.job)
    bench = Bench(rows, arguments)
    norms(bench)
    batch_norms(bench)
    heads(bench)
    state = bench.stand.state()
    with rows.guarded("kernel", "weight standardization"):
        weights(bench, state)
    with rows.guarded("kernel", "LARS and moving average"):
        optimizer(bench, state)
    with rows.guarded("kernel", "views"):
        pixels(bench)
    return int(rows.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
