"""The post's path in a process of its own: it trains there, says what it took, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal

import numpy as np
import pytest

from fastbyol_bench.blog_process import BlogProcess
from fastbyol_bench.harness import HostClock

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("workers", [None, 0])
def test_its_time_is_counted_as_the_calls(workers: int | None) -> None:
    with BlogProcess(IMAGES, batch_size=4, workers=workers) as peer:
        for _ in range(3):
            reading = HostClock().time(peer.step)
            # A ResNet-18 of full width on four images takes some milliseconds, on however many threads.
            assert reading.cpu_s > 1e-3
            assert reading.wall_s > 1e-3
    assert not multiprocessing.active_children()


def test_an_early_end_is_an_error_not_a_wait() -> None:
    with BlogProcess(IMAGES, batch_size=4, workers=None) as peer:
        peer.step()
        (child,) = multiprocessing.active_children()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="the post's path ended early"):
            peer.step()
