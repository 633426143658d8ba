"""Kernel tests run on the GPU where there is one and through Triton's interpreter elsewhere, unchanged."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run. On a CPU the interpreter is on: tests/conftest.py sets it before triton is imported."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
