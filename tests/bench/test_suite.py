"""The rows of a piece of work: failed peers, and the clock of each device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastbyol_bench import harness, suite
from fastbyol_bench.harness import CudaClock, HostClock, KernelClock, PeerError, Plan, Variant
from fastbyol_bench.suite import Setting

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_peer_that_ends_is_a_row_that_says_so() -> None:
    def ends() -> object:
        raise PeerError("a peer ended early (exit code -9)")

    notes: list[str] = []
    setting = Setting(CPU, quick=True, note=notes.append)
    variants = [
        Variant("ours", lambda: sum(range(1000))),
        Variant("a peer", ends),
        Variant("another", lambda: None),
    ]
    ours, another, lost = setting.rows("step", "a step", variants, Plan(2))
    assert (ours.variant, another.variant, lost.variant) == ("ours", "another", "a peer")
    assert another.ratio is not None
    assert lost.needs == "a peer that runs to its end: a peer ended early (exit code -9)"
    assert notes == ["step: a step", "step: a peer ended early (exit code -9)"]


def test_operations_are_timed_by_their_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks: list[object] = []

    def measure(
        variants: list[Variant], plan: Plan, clock: object, **_: Callable[..., object]
    ) -> dict[str, list[float]]:
        clocks.append(clock)
        return {}

    monkeypatch.setattr(suite, "measure", measure)
    for device in (GPU, CPU):
        Setting(device, quick=True).kernel_rows(
            "kernels", "it", [Variant("ours", int)], Plan(2), floors={}, cold=False
        )
    assert [type(clock) for clock in clocks] == [KernelClock, HostClock]
    assert isinstance(harness.clock_of(GPU, 10), CudaClock)
    assert Setting(GPU, quick=False).calls_per_reading == 10
    assert Setting(CPU, quick=False).calls_per_reading == 1


def test_switches_of_a_run_do_not_reach_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that ceilings use true fp32 whatever is set, and restore the switches."""
    from fastbyol_bench import ceilings

    seen: list[tuple[bool, bool]] = []
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    monkeypatch.setattr(
        ceilings, "_measured", lambda *_: seen.append((matmul.allow_tf32, cudnn.allow_tf32))
    )
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        ceilings.ceiling(CPU, quick=True)
        assert seen == [(False, False)]
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
