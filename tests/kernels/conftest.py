"""Fixtures of the kernel tests: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the Triton kernels. tests/conftest.py turns the interpreter on for a CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["triton", "cpu"])
def kernels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kernel_device(kernels: str, device: torch.device) -> torch.device:
    """The device of ``kernels``."""
    return torch.device("cpu") if kernels == "cpu" else device


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore torch's number of threads after each test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, the highest level or 0 flags, so that unwritten elements show."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(
                math.nan if out.is_floating_point() else 65535 if out.dtype == torch.uint16 else 0
            )

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
