"""A small result for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastbyol_bench.results import Ceiling, Floor, Machine, Part, Ratio, Result, Row, Timing

MACHINE = Machine(
    device="cpu", device_name="A CPU", cpu="A CPU", cores=2, python="3.11.2", torch="2.11.0",
    torchvision=None,
    triton="3.6.0", cuda=None, driver=None, fastbyol="0.1.0", platform="Linux",
)  # fmt: skip
GPU = MACHINE.model_copy(update={"device": "cuda", "device_name": "A GPU", "driver": "1.2"})


def timed(median_s: float, spread_s: float = 0.001, runs: int = 5) -> Timing:
    """Return a timing whose cpu time is twice its wall time."""
    return Timing(median_s=median_s, spread_s=spread_s, runs=runs, cpu_s=2 * median_s)


def result(**changes: Any) -> Result:
    """Return two measured variants, a row that needs a GPU, and a kernel."""
    common = {"suite": "views", "name": "two views of 96 px"}
    rows = (
        Row(
            **common,
            variant="ours",
            timing=timed(0.1),
            images=64,
            threads=2,
            floor=Floor(seconds=0.025, bound="bytes"),
        ),
        Row(
            **common,
            variant="Pillow",
            timing=timed(0.4),
            images=64,
            threads=2,
            ratio=Ratio(median=4.0, spread=0.1, cpu=4.0),
        ),
        Row(**common, variant="fused, Triton", needs="a GPU"),
        Row(suite="kernels", name="a norm", variant="ours", timing=timed(2e-6, 0.0)),
    )
    defaults: dict[str, Any] = {
        "schema": "fastbyol-bench/1", "suites": ("views",), "quick": False, "machine": MACHINE,
        "commit": "0123456789ab",
        "date": "2026-01-02T03:04:05+00:00", "command": ("fastbyol", "bench"), "seconds": 12.0,
        "load": 0.1,
        "ceilings": (Ceiling(threads=2, copy_bytes_s=4e10, fp32_flop_s=1e11, bf16_flop_s=5e11),),
        "rows": rows,
        "waterfall": (Part(name="views", seconds=0.1), Part(name="rest", seconds=0.3)),
    }  # fmt: skip
    return Result(**defaults | changes)


def replace_at(data: Any, keys: Sequence[Any], value: object) -> None:
    """Replace the entry of nested ``data`` at ``keys``."""
    for key in keys[:-1]:
        data = data[key]
    data[keys[-1]] = value
