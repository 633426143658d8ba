"""glibc's allocator, set to keep the memory that a step frees for the next one."""

from __future__ import annotations

import ctypes
import platform

# glibc's <malloc.h>
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# Above any activation of a run that fits a CPU's memory (batch 256, width 64, 96 px: 151 MB). glibc
# raises its own threshold up to 32 MB.
KEPT_BYTES = 1 << 30
INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Serve blocks up to 1 GiB from the heap and never shrink it. Return whether that worked.

    By default glibc maps each block over 32 MB anew and the kernel zeroes its pages at every step:
    15 % of the CPU time of a bf16 step of ResNet-18 at 96 px (bench/LOG.md, "page faults"). Only
    for a process that trains: the setting is process-wide and cannot be taken back, and the process
    keeps the most memory that it ever needed. Does nothing without glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, INT_MAX))
