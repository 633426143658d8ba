"""What all tests share: a cache folder that is nobody's, signals as Python has them, and Triton's interpreter without a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# That a machine is busy, or that the first example waits for a compiler, is no fault of what is tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Read when a kernel is defined, so it has to stand before the first import of fastbyol_kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes the GPU where there is one by its fixture, and leave out what can run nowhere else."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        needs_gpu = any(mark.kwargs.get("only") for mark in item.iter_markers("gpu"))
        if needs_gpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_ctrl_c() -> Iterator[None]:
    """A command line that has done its work lets Ctrl-C kill its process, which here is pytest's."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _own_hangup() -> Iterator[None]:
    """Whoever started the tests may have let SIGHUP be ignored, as nohup does, and the processes they start would go on so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded sets that tests make stay out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("FASTBYOL_CACHE")
    os.environ["FASTBYOL_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FASTBYOL_CACHE"]
    else:
        os.environ["FASTBYOL_CACHE"] = before
