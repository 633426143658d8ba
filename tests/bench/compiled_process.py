"""Processes whose Triton kernels are compiled: tests themselves interpret them."""

from __future__ import annotations

import os
import subprocess
import sys


def printed(code: str) -> str:
    """Return the output of Python ``code``, which runs with warnings as errors."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
