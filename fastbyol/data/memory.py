"""Free memory of a device, within the limits of containers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MEMINFO = Path("/proc/meminfo")
OWN_CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Return the bytes that CUDA reports as free, or ``cpu_bytes`` for the cpu."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return cpu_bytes()


def cpu_bytes() -> int:
    """Return the bytes that the system and its control groups still give."""
    return min(_system_bytes(), *_cgroup_bytes())


def _system_bytes() -> int:
    """Read ``MemAvailable``: free without swapping, the page cache counted as free."""
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _cgroup_bytes() -> list[int]:
    """Return what each control group (version 2) of this process has left; 2**62 without limits."""
    left = [2**62]
    own = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.exists() else []
    for line in own:
        if line.startswith("0::"):
            folder = CGROUPS / line[3:].lstrip("/")
            left += [
                _left(group) for group in (folder, *folder.parents) if group.is_relative_to(CGROUPS)
            ]
    return left


def _left(group: Path) -> int:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 2**62
    # The group's page cache counts as used and is given back on demand.
    return 2**62 if limit == "max" else max(0, int(limit) - used + int(stat["inactive_file"]))
