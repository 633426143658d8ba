"""Where a run was made: versions, machine, command line."""

from __future__ import annotations

import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, machine and command line, for the record. Imports torch."""
    import torch

    names = ("torchvision", "triton", "numpy", "ffcv")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "fastbyol": package_version("fastbyol"),
        "python": platform.python_version(),
        **{name: package_version(name) for name in names},
        "torch": torch.__version__,  # with the build, which the package's version may leave out
        "cuda": torch.version.cuda,
        "gpus": devices,
        # Not platform.platform(), which starts `uname -p`: a child that Ctrl-C may leave behind.
        "platform": "-".join((platform.system(), platform.release(), platform.machine(), *platform.libc_ver())),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def package_version(name: str) -> str | None:
    """Return the version of an installed package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the cpu's name as the system has it."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.machine()
