"""The setting that all suites share, and the way from variants to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastbyol.engine.allocator import keep_freed_memory
from fastbyol_bench import ceilings
from fastbyol_bench.harness import (
    Clock,
    Flush,
    PeerError,
    Plan,
    Variant,
    clock_of,
    kernel_clock,
    measure,
    ratios,
    timing,
)
from fastbyol_bench.results import Ceiling, Floor, Part, Row

NEEDS_GPU = "a GPU"
KERNELS_ALONE = "time of its kernels on the device"
STEPS_IN_A_ROW = 10
CPU_UNITS = ("amx_bf16", "avx512_bf16")


@dataclass
class Setting:
    """The device, ``quick`` for tiny sizes, and the ceilings measured so far by threads."""

    device: torch.device
    quick: bool
    note: Callable[[str], None] = lambda _: None
    ceilings: dict[int, Ceiling] = field(default_factory=dict)
    waterfall: tuple[Part, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """True if the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def calls_per_reading(self) -> int:
        """The number of whole steps per reading: on a GPU several in a row, as in training."""
        return STEPS_IN_A_ROW if self.on_gpu and not self.quick else 1

    def ceiling(self) -> Ceiling:
        """Return the device's ceiling with torch's current number of threads, measured once."""
        threads = torch.get_num_threads()
        if threads not in self.ceilings:
            self.ceilings[threads] = ceilings.ceiling(self.device, quick=self.quick)
        return self.ceilings[threads]

    def plan(self, rounds: int, budget_s: float, warmup: int = 1) -> Plan:
        """Return the plan, or one of two rounds in quick settings."""
        return (
            Plan(rounds=2, warmup=1, budget_s=budget_s)
            if self.quick
            else Plan(rounds, warmup, budget_s)
        )

    def rows(
        self,
        suite: str,
        name: str,
        variants: Sequence[Variant],
        plan: Plan,
        *,
        floors: Mapping[str, Floor] | None = None,
        notes: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        cold: bool = False,
    ) -> list[Row]:
        """Measure ``variants`` in turns, ours first, by ``clock`` (default: the device's).

        ``cold`` flushes the caches before each reading. A variant whose peer fails becomes a row
        that says so.
        """
        self.note(f"{suite}: {name}")
        lost: list[Row] = []

        def ended(variant: Variant, error: PeerError) -> None:
            lost.append(missing(suite, name, variant.name, f"a peer that runs to its end: {error}"))
            self.note(f"{suite}: {error}")

        flush = self._flush() if cold else None
        readings = measure(
            variants, plan, clock or clock_of(self.device), before=flush, ended=ended
        )
        against, num_threads = (
            ratios(variants, readings),
            None if self.on_gpu else torch.get_num_threads(),
        )
        timed = [
            Row(
                suite=suite,
                name=name,
                variant=variant.name,
                timing=timing(readings[variant.name]),
                images=variant.images,
                threads=num_threads,
                floor=(floors or {}).get(variant.name),
                ratio=against.get(variant.name),
                note=(notes or {}).get(variant.name, ""),
            )
            for variant in variants
            if variant.name in readings
        ]
        return [*timed, *lost]

    def kernel_rows(
        self,
        suite: str,
        name: str,
        variants: Sequence[Variant],
        plan: Plan,
        *,
        floors: Mapping[str, Floor],
        cold: bool,
    ) -> list[Row]:
        """Measure single operations by ``rows``, on a GPU by the time of their kernels alone."""
        notes = dict.fromkeys(
            (variant.name for variant in variants), KERNELS_ALONE if self.on_gpu else ""
        )
        clock = kernel_clock(self.device)
        return self.rows(
            suite, name, variants, plan, floors=floors, notes=notes, clock=clock, cold=cold
        )

    def _flush(self) -> Callable[[], None] | None:
        return None if self.quick and not self.on_gpu else Flush(self.device)


def missing(suite: str, name: str, variant: str, needs: str) -> Row:
    """Return a row that names what its measurement needs."""
    return Row(suite=suite, name=name, variant=variant, needs=needs)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_training_switches() -> None:
    """Set this process's switches as ``engine.trainer.fit`` does: no TF32, keep freed memory.

    Peers are unaffected in processes of their own (``peer_process``).
    """
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def fast_precision(device: torch.device) -> str:
    """Return bf16 if the device has units for its products, else fp32."""
    has = torch.cpu.get_capabilities()
    return "bf16" if device.type == "cuda" or any(has.get(unit) for unit in CPU_UNITS) else "fp32"
