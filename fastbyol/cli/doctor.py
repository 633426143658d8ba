"""What this machine has of what fastbyol needs, and the exact command that brings the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from fastbyol.files import cache_folder

SETUP = "make setup"


class Check(NamedTuple):
    """One line of the examination. ``remedy`` is a command or advice, empty where nothing is to be done."""

    name: str
    ok: bool
    needed: bool
    found: str
    remedy: str


def examine() -> list[Check]:
    """All checks, in the order in which one would mend them."""
    return [
        _python(),
        *(_package(name, needed=True) for name in ("numpy", "torch", "torchvision", "triton", "safetensors", "numba")),
        _package("cv2", needed=True, distribution="opencv-python-headless"),
        _ffcv(),
        *(_package(name, needed=False) for name in ("matplotlib", "scikit-learn")),
        _threading_layer(),
        _device(),
        *_choices(),
        _cores(),
        _cache(),
    ]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check(
        "python", sys.version_info >= (3, 11), True, version, "" if sys.version_info >= (3, 11) else "install Python 3.11"
    )


def _package(name: str, *, needed: bool, distribution: str | None = None) -> Check:
    distribution = distribution or name
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Check(distribution, False, needed, "not installed", f"{sys.executable} -m pip install {distribution}")
    return Check(distribution, True, needed, version, "")


def _ffcv() -> Check:
    """FFCV may be left out. Its package may be there without its extension, or that without the libraries it was linked to."""
    without = "torchvision decodes"
    if importlib.util.find_spec("ffcv") is None:
        return Check("ffcv", False, False, f"not installed, {without}{_missing_for_build()}", "")
    folder = Path(importlib.util.find_spec("ffcv").origin or "").parent  # type: ignore[union-attr]
    extensions = sorted(folder.glob("_libffcv*.so"))
    if not extensions:
        return Check("ffcv", False, False, f"installed without its compiled extension, {without}", SETUP)
    import ctypes

    try:
        ctypes.CDLL(str(extensions[0]))
    except OSError as error:
        return Check("ffcv", False, False, f"its extension does not load: {error}; {without}", SETUP)
    return Check("ffcv", True, False, importlib.metadata.version("ffcv"), "")


def _missing_for_build() -> str:
    need = {
        "g++": shutil.which("g++"),
        "pkg-config": shutil.which("pkg-config"),
        "libturbojpeg0-dev": Path("/usr/include/turbojpeg.h").exists(),
        "libopencv-imgproc-dev": Path("/usr/include/opencv4/opencv2/imgproc.hpp").exists(),
    }
    missing = [name for name, found in need.items() if not found]
    return f"; `{SETUP}` builds it" + (f" and installs for that: {' '.join(missing)}" if missing else "")


def _threading_layer() -> Check:
    """numba's fallback layer, workqueue, aborts the process when two loaders work at once."""
    import ctypes.util

    found = next((lib for lib in ("gomp", "omp", "tbb") if ctypes.util.find_library(lib)), None)
    remedy = "" if found else "apt-get install libgomp1"
    return Check("threading layer", found is not None, False, found or "neither OpenMP nor TBB", remedy)


def _device() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("gpu", False, False, "unknown without torch", "")
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", False, False, "no CUDA device: runs take the CPU and the demo preset", "")
    return Check("gpu", True, False, torch.cuda.get_device_name(0), "")


def _choices() -> list[Check]:
    """What ``auto`` would be here for the network of the defaults, the post's: the engine's mode and the precision, and why."""
    try:
        from fastbyol.config import Config
        from fastbyol.engine import capture, precision
        from fastbyol.engine.device import pick_device
    except ImportError as error:
        return [Check(name, False, False, f"unknown: {error}", "") for name in ("engine auto", "precision auto")]
    config, device = Config(), pick_device("auto")
    mode, unit = capture.choose(config.engine, device), precision.decide(config, device)
    kept = ""
    if precision.native_unit(device) is not None:  # else there is nothing to measure, and to keep
        there = precision.kept_answer(precision.question(config, device)) is not None
        kept = "; kept for the next run" if there else "; not kept, the cache folder cannot be written"
    return [
        Check("engine auto", True, False, f"{mode.mode}: {mode.why}", ""),
        Check("precision auto", True, False, f"{unit.value}: {unit.why}{kept}", ""),
    ]


def _cores() -> Check:
    return Check("cores", True, False, str(len(os.sched_getaffinity(0))), "")


def _cache() -> Check:
    folder = cache_folder()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    ok = os.access(nearest, os.W_OK)
    return Check(
        "cache folder",
        ok,
        True,
        str(folder),
        "" if ok else f"FASTBYOL_CACHE=DIR, a folder that can be written ({nearest} cannot)",
    )
