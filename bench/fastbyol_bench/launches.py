"""Every Triton kernel launch of a training step on a GPU, and its cost, determined without a GPU.

    python -m fastbyol_bench.launches            # print both tables
    python -m fastbyol_bench.launches --write    # renew them in kernels/

Launches of torch itself, and of Inductor in compiled steps, are not listed.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastbyol import load_config
from fastbyol.data.loader import Batch
from fastbyol.engine.capture import Eager
from fastbyol.engine.step import TrainState
from fastbyol_kernels import ahead_of_time
from fastbyol_kernels.ahead_of_time import Launch, Resources, resources

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FLOOR = "3.6"  # of Triton, in pyproject.toml
ARCHITECTURES = (80, 90)
# The architecture whose launches are listed: the steps' sizes are an H100's.
LISTED = 90
WIDE_BITS = 128  # the most that an instruction moves for a thread
MINOR = ".".join(triton.__version__.split(".")[:2])

Made = TypeVar("Made")


@dataclass(frozen=True)
class Step:
    """A configuration, and its batch of ``num_images`` images of ``height`` x ``width`` pixels.

    They are rows of a resident set.
    """

    title: str
    sets: str
    num_images: int = 256
    height: int = 96
    width: int = 96

    def launches(self, architecture: int) -> list[Launch]:
        """Return the launches of a step on ``sm_<architecture>`` in order, views included.

        The engine takes a whole step on a CPU, at a GPU's sizes, under ``ahead_of_time.recording``:
        no kernel runs, and torch's operations on large tensors return unfilled memory.
        """
        config = load_config("blog", ["engine.kernels=triton", *self.sets.split()])
        images = torch.zeros(self.num_images, self.height, self.width, 3, dtype=torch.uint8)
        ids = torch.arange(self.num_images)
        with ahead_of_time.recording(architecture) as launches:
            step = Eager(TrainState.create(config, steps_per_epoch=10), config)
            with Unfilled():  # type: ignore[no-untyped-call]
                step(Batch(images, ids, ids), 0)
        return launches


# The two methods that the bench measures, with layers of up to 512 and up to 2,048 channels, then
# the other cases of the kernels: fp32, the other rules and blur, heads of split values and all of
# their tiles, samples that group norm cuts, bf16 views that are not in blocks.
BN = "train.precision=bf16"
GN = "train.precision=bf16 model.norm=gn model.ws=true optim.name=lars"
STEPS = (
    Step("BN, SGD, bf16", BN),
    Step("GN, WS, LARS, bf16", GN),
    Step("ResNet-50, BN, SGD, bf16", f"{BN} model.encoder=resnet50"),
    Step("ResNet-50, GN, WS, LARS, bf16", f"{GN} model.encoder=resnet50"),
    Step(
        "GN, WS in the heads too, tf32x3, LARS as DeepMind's, target after the step, Gaussian "
        "blur, fp32",
        "train.precision=fp32 views.blur=gaussian model.norm=gn model.ws=true "
        "model.projector.norm=gn model.projector.ws=true model.predictor.norm=brn "
        "model.predictor.ws=true engine.heads=tf32x3 model.projector.hidden=4096 "
        "model.projector.out=256 model.predictor.out=256 "
        "optim.name=lars optim.dialect=deepmind schedule.ema_order=after",
    ),
    Step(
        "LN, LARS as Bolts', views of 224 px from larger images, bf16",
        "train.precision=bf16 views.size=224 model.norm=ln model.projector.norm=ln "
        "optim.name=lars optim.dialect=bolts engine.stem=plain",
        num_images=64,
        height=320,
        width=256,
    ),
)


class Unfilled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which operations on large tensors compute nothing.

    They return tensors of the right shape, strides and dtype. Views remain views, and operations of
    ``fastbyol_kernels`` run, since their launches are the point.
    """

    LARGE = 1 << 18  # elements; smaller operations compute as fast as they find their shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func.namespace != "aten" or not any(tensor.numel() >= self.LARGE for tensor in tensors):
            return func(*args, **kwargs)
        # The meta functions lose the memory format, which cuDNN takes from its input.
        if func is torch.ops.aten.convolution_backward.default:
            (_, x, weight), wanted = args[:3], args[10]
            assert not wanted[2], "no convolution of the engine has a bias"
            layout = suggest_memory_format(x)
            likes = zip((x, weight), wanted, strict=False)
            return *(
                torch.empty_like(t, memory_format=layout) if w else None for t, w in likes
            ), None
        schema = func._schema
        if all(result.alias_info for result in schema.returns):
            passed = {
                argument.name: value
                for argument, value in zip(schema.arguments, args, strict=False)
            } | kwargs
            written = [
                passed[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write
            ]
            if not written:
                return func(*args, **kwargs)
            if not schema.returns:
                return None
            return written[0] if len(schema.returns) == 1 else tuple(written)
        made = func(*_on_meta(args), **_on_meta(kwargs))
        if func is torch.ops.aten.convolution.default:
            layout = suggest_memory_format(args[0])
            return torch.empty(made.shape, dtype=made.dtype, memory_format=layout)
        return tree_map_only(torch.Tensor, _unfilled, made)


def _on_meta(arguments: Any) -> Any:
    meta = torch.device("meta")
    arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(meta), arguments)
    return tree_map_only(torch.device, lambda _: meta, arguments)


def _unfilled(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


class Row(NamedTuple):
    """A launch as the tables show it."""

    op: str
    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared_bytes: int
    build: str

    @staticmethod
    def of(launch: Launch) -> Row:
        """Return the row of ``launch``."""
        return Row(
            op=launch.module.split(".")[1],
            kernel=launch.name.removeprefix("_").removesuffix("_kernel"),
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            shared_bytes=launch.shared_bytes,
            build=launch.build,
        )


class Cost(NamedTuple):
    """A kernel with the grid of its first launch, its cost, and the reason for its flaws."""

    row: Row
    resources: Resources
    why: str


def listed(step: Step, architecture: int) -> list[Row]:
    """Return the rows of ``step``'s launches on ``sm_<architecture>`` in order."""
    return [Row.of(launch) for launch in step.launches(architecture)]


def costed(step: Step, architecture: int) -> list[Cost]:
    """Return the cost of every kernel of ``step`` on ``sm_<architecture>``."""
    kernels: dict[int, Launch] = {}
    for launch in step.launches(architecture):
        kernels.setdefault(id(launch.compiled), launch)
    costs = []
    for launch in kernels.values():
        cost = resources(launch.compiled.asm["ptx"])
        costs.append(Cost(Row.of(launch), cost, _why(launch, cost)))
    return costs


def _why(launch: Launch, cost: Resources) -> str:
    """Return the reason that the op's module states if the kernel spills or moves narrow words."""
    narrow = min(cost.load_bits, cost.store_bits) < WIDE_BITS
    flaws = {"SPILLS": cost.spill_bytes > 0, "NARROW": narrow}
    module = import_module(launch.module)
    reasons = [
        getattr(module, flaw, {}).get(launch.name) for flaw, present in flaws.items() if present
    ]
    return "; ".join(filter(None, reasons))


def _of_steps(
    work: Callable[[Step, int], list[Made]], architectures: Sequence[int]
) -> dict[tuple[int, int], list[Made]]:
    """Return ``work`` of all steps by number and architecture, computed in a process per cpu."""
    # The long ones first.
    keys = list(itertools.product(reversed(range(len(STEPS))), architectures))
    num_processes = min(os.cpu_count() or 1, len(keys))
    with ProcessPoolExecutor(
        num_processes, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        made = pool.map(work, [STEPS[number] for number, _ in keys], [sm for _, sm in keys])
        return dict(sorted(zip(keys, made, strict=True)))


def launch_table() -> str:
    """Return the text of LAUNCHES: the launches of each step in order, for sm_90.

    ``times`` counts equal consecutive launches.
    """
    lines = [f"triton {MINOR}", f"sm_{LISTED}"]
    for (number, _), rows in _of_steps(listed, (LISTED,)).items():
        step = STEPS[number]
        images = f"{step.num_images} images of {step.height} x {step.width}"
        head = ("op", "kernel", "grid", "times", "warps", "stages", "shared B", "build")
        lines += ["", f"{step.title}; {images}: {len(rows)} launches", _LAUNCH.format(*head)]
        for row, equal in itertools.groupby(rows):
            grid = " x ".join(map(str, row.grid)).removesuffix(" x 1").removesuffix(" x 1")
            figures = (len(list(equal)), row.num_warps, row.num_stages, row.shared_bytes)
            lines.append(_LAUNCH.format(row.op, row.kernel, grid, *figures, row.build))
    return "\n".join(lines) + "\n"


_LAUNCH = "{:23}{:14}{:>11}{:>6}{:>6}{:>7}{:>9}  {}"


def resource_table() -> str:
    """Return the text of RESOURCES: registers, spills and widest accesses of every kernel.

    Each kernel has a line for sm_80 and one for sm_90.
    """
    lines: dict[tuple[str, str, str], dict[str, None]] = {}
    for (_, architecture), costs in _of_steps(costed, ARCHITECTURES).items():
        for row, cost, why in costs:
            figures = (row.num_warps, row.num_stages, cost.registers, cost.spill_bytes)
            widths = (row.shared_bytes, cost.load_bits, cost.store_bits)
            build = f"{row.build} ({why})" if why else row.build
            line = _RESOURCES.format(
                row.op, row.kernel, f"sm_{architecture}", *figures, *widths, build
            )
            lines.setdefault((row.op, row.kernel, row.build), {})[line] = None
    head = ("warps", "stages", "regs", "spill B", "shared B", "load b", "store b")
    title = _RESOURCES.format(
        "op", "kernel", "arch", *head, "build (why it spills or moves narrow words)"
    )
    # Kernel by kernel, its builds in the order of the steps.
    body = [line for key in sorted(lines, key=lambda key: key[:2]) for line in lines[key]]
    return "\n".join([f"triton {MINOR}", title, *body]) + "\n"


_RESOURCES = "{:23}{:14}{:6}{:>6}{:>7}{:>5}{:>8}{:>9}{:>7}{:>8}  {}"


def kept(table: str) -> Path:
    """Return the file of ``table``, LAUNCHES or RESOURCES, for the installed version of Triton.

    The code depends on that version: the tested one and the oldest admitted one have files of their
    own.
    """
    return KERNELS / (f"{table}-triton-{FLOOR}.txt" if MINOR == FLOOR else f"{table}.txt")


def main() -> None:
    """Print both tables and, with ``--write``, store them."""
    parser = argparse.ArgumentParser(prog="python -m fastbyol_bench.launches")
    parser.add_argument("--write", action="store_true", help="renew the tables in kernels/")
    write = parser.parse_args().write
    for table, text in (("LAUNCHES", launch_table()), ("RESOURCES", resource_table())):
        print(text)
        if write:
            kept(table).write_text(text)


if __name__ == "__main__":
    main()
