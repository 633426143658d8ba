"""The environment that a run was made in: versions, machine, command line."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.files import open_regular

if TYPE_CHECKING:
    import torch

ENV = "env.json"
# Packages that a run's numbers may depend on.
_PACKAGES = ("triton", "numpy", "ffcv", "torchvision")


def environment() -> dict[str, Any]:
    """Return versions, machine and command line, to be recorded. Imports torch."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        **_versions(),
        "cuda": torch.version.cuda,
        "gpus": devices,
        # Not platform.platform(), which starts `uname -p`: a child that Ctrl-C may leave behind.
        "platform": "-".join(
            (platform.system(), platform.release(), platform.machine(), *platform.libc_ver())
        ),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def made_by(device: torch.device) -> dict[str, str | None]:
    """Return the versions and the name of the device that a run's numbers may depend on."""
    import torch

    return {
        **_versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
    }


def _versions() -> dict[str, str | None]:
    import torch

    return {
        "fastbyol": package_version("fastbyol"),
        "python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
        "torch": torch.__version__,  # with the build, which the package's version may leave out
    }


def env_of(run: Path) -> dict[str, Any]:
    """Return the content of a run folder's env.json, empty where the file is missing or damaged."""
    try:
        with open_regular(run / ENV) as file:
            env = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return env if isinstance(env, dict) else {}


def package_version(name: str) -> str | None:
    """Return the version of an installed package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the system's name of the cpu."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.machine()
