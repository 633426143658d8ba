"""The C library's allocator, told to keep what a step frees for the next one."""

from __future__ import annotations

import ctypes
import platform

# glibc's <malloc.h>
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# Beyond any activation of a run that fits a CPU's memory (batch 256, width 64, 96 px: 151 MB). glibc's own limit for
# growing the threshold by itself is 32 MB.
KEPT_BYTES = 1 << 30
INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Serve blocks up to 1 GiB from the heap and never give the heap's end back; whether that could be set. Process-wide.

    By default glibc maps each block over 32 MB anew, and the kernel fills its pages with zeros at every step: 15 % of the
    CPU time of a bf16 step of ResNet-18 at 96 px (bench/LOG.md, "page faults"). The process keeps the largest amount
    of memory that it ever needed. Does nothing where the C library is not glibc.

    For a process that only trains: what was set before cannot be asked for, and glibc, once told, no longer adapts by itself.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, INT_MAX))
