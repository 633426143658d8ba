"""The commands about this machine: doctor, which checks what fastbyol needs, and bench."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from fastbyol import build_ffcv
from fastbyol.cli.options import Device, Json
from fastbyol.files import cache_folder
from fastbyol.output import console as make_console
from fastbyol.output import print_json, say

BUILD_FFCV = f"{sys.executable} -m fastbyol.build_ffcv"


class Check(NamedTuple):
    """One line of the examination.

    ``remedy`` is a command or advice, empty where nothing is missing.

    ``found``, a key of ``doctor --json``, describes the state.
    """

    name: str
    ok: bool
    needed: bool
    found: str
    remedy: str


Suites = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SUITES]...",
        help="kernels, views, loader, optimizer, step, train; all, the default.",
    ),
]
ResultPath = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE|DIR", help="Keep the result: a .json file, or a folder for one."
    ),
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--compare", metavar="A B", help="Measure nothing: compare two kept results."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Tiny sizes: shows that all of it works, not how fast.")
]


def doctor(as_json: Json = False) -> None:
    """Say what is missing and the exact command that brings it."""
    checks = examine()
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        width = 2 + max(len(check.name) for check in checks)
        for check in checks:
            mark = "ok  " if check.ok else ("MISSING" if check.needed else "none")
            remedy = [f"{'':{8 + width}s}-> {check.remedy}"] if check.remedy else []
            say(f"{mark:8s}{check.name:{width}s}{check.found}", *remedy)
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(1)


def bench(
    suites: Suites = None,
    out: ResultPath = None,
    compare: Compare = None,
    device: Device = "auto",
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Measure this machine's speed against its own limits and plain PyTorch, side by side."""
    from fastbyol_bench import command

    console = make_console(err=True)

    def note(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    text = command.main(
        suites or (),
        out=out,
        compare=compare,
        device=device,
        quick=quick,
        as_json=as_json,
        note=note,
    )
    say(*text.split("\n"))


def examine() -> list[Check]:
    """Return all checks, in the order in which to act on them."""
    ffcv, gpu = _ffcv(), _device()
    return [
        _python(),
        *(
            _package(name, needed=True)
            for name in ("numpy", "torch", "torchvision", "triton", "safetensors", "numba")
        ),
        _package("cv2", needed=True, distribution="opencv-python-headless"),
        ffcv,
        *(_package(name, needed=False) for name in ("matplotlib", "scikit-learn", "timm")),
        *([_threading_layer()] if ffcv.ok else []),
        gpu,
        _compiler(gpu.ok),
        *_choices(),
        _cores(),
        _cache(),
    ]


def _python() -> Check:
    version, ok = ".".join(map(str, sys.version_info[:3])), sys.version_info >= (3, 11)
    return Check("python", ok, True, version, "" if ok else "install Python 3.11")


def _package(name: str, *, needed: bool, distribution: str | None = None) -> Check:
    distribution = distribution or name
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Check(
            distribution,
            False,
            needed,
            "not installed",
            f"{' '.join(build_ffcv.installer())} {distribution}",
        )
    return Check(distribution, True, needed, version, "")


def _ffcv() -> Check:
    """Check FFCV, which is optional: its package, its extension, and the libraries it needs."""
    without = "torchvision decodes"
    if importlib.util.find_spec("ffcv") is None:
        missing = build_ffcv.lacking()
        first = f", after `apt-get install {' '.join(missing)}`" if missing else ""
        what = f"not installed, {without}; `{BUILD_FFCV}` builds it{first}"
        return Check("ffcv", False, False, what, "")
    folder = Path(importlib.util.find_spec("ffcv").origin or "").parent  # type: ignore[union-attr]
    extensions = sorted(folder.glob("_libffcv*.so"))
    if not extensions:
        return Check(
            "ffcv", False, False, f"installed without its compiled extension, {without}", BUILD_FFCV
        )
    import ctypes

    try:
        ctypes.CDLL(str(extensions[0]))
    except OSError as error:
        return Check(
            "ffcv", False, False, f"its extension does not load: {error}; {without}", BUILD_FFCV
        )
    return Check("ffcv", True, False, importlib.metadata.version("ffcv"), "")


def _threading_layer() -> Check:
    """Check for OpenMP or TBB: numba's own layer aborts a process with two of FFCV's loaders."""
    import ctypes.util

    library = next((lib for lib in ("gomp", "omp", "tbb") if ctypes.util.find_library(lib)), None)
    remedy = "" if library else "apt-get install libgomp1"
    return Check(
        "threading layer", library is not None, False, library or "neither OpenMP nor TBB", remedy
    )


def _device() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("gpu", False, False, "unknown without torch", "")
    import torch

    if not torch.cuda.is_available():
        return Check(
            "gpu", False, False, "no CUDA device: runs take the CPU and the demo preset", ""
        )
    return Check("gpu", True, False, torch.cuda.get_device_name(0), "")


def _compiler(gpu: bool) -> Check:
    """Check for what Triton compiles the launchers of its kernels with, on a GPU alone."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    what = "Triton needs it to launch kernels" if gpu else "only Triton needs it, on a GPU"
    if compiler is None:
        return Check("c compiler", False, gpu, f"no gcc; {what}", "apt-get install gcc" * gpu)
    if not header.exists():
        what = f"{compiler}, but no Python.h; {what}"
        return Check("c compiler", False, gpu, what, "apt-get install python3-dev" * gpu)
    return Check("c compiler", True, gpu, compiler, "")


def _choices() -> list[Check]:
    """Report what ``auto`` means here, and why.

    The network is that of the defaults, which is the post's.
    """
    try:
        from fastbyol.config import Config
        from fastbyol.engine import capture, precision
        from fastbyol.engine.device import pick_device
    except ImportError as error:
        return [
            Check(name, False, False, f"unknown: {error}", "")
            for name in ("engine auto", "precision auto")
        ]
    config, device = Config(), pick_device("auto")
    mode, unit = capture.choose(config.engine, device), precision.decide(config, device)
    kept = ""
    if precision.native_unit(device) is not None:  # else there is nothing to measure and keep
        there = precision.kept_answer(precision.question(config, device)) is not None
        kept = (
            "; kept for the next run" if there else "; not kept, the cache folder cannot be written"
        )
    return [
        Check("engine auto", True, False, f"{mode.mode}: {mode.why}", ""),
        Check("precision auto", True, False, f"{unit.value}: {unit.why}{kept}", ""),
    ]


def _cores() -> Check:
    return Check("cores", True, False, str(len(os.sched_getaffinity(0))), "")


def _cache() -> Check:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    ok = os.access(existing, os.W_OK)
    remedy = "" if ok else f"FASTBYOL_CACHE=DIR, a folder that can be written ({existing} cannot)"
    return Check("cache folder", ok, True, str(folder), remedy)
