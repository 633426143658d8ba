"""Which kernels a training step launches and how long each takes, by torch's profiler.

    python -m fastbyol_bench.gpu_profile FILE

Works on a processor, too, where it names operations.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastbyol import load_config
from fastbyol.engine.step import TrainState, train_step

METHODS = {"BN, SGD": [], "GN + WS, LARS": ["model.norm=gn", "model.ws=true", "optim.name=lars"]}


def table(sets: list[str], device: torch.device, *, size: int, batch: int, steps: int = 3) -> str:
    """The 40 longest of ``steps`` steps, after as many to warm up."""
    config = load_config("blog", ["train.precision=bf16", f"views.size={size}", *sets])
    state = TrainState.create(config, steps_per_epoch=100, device=device)
    views = torch.randn(2, batch, 3, size, size, device=device)
    for _ in range(steps):
        train_step(state, views)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            train_step(state, views)
        if device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    text: str = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
    return text


def main() -> None:
    """Both methods into the file named on the command line."""
    on_gpu = torch.cuda.is_available()
    device, shape = (
        torch.device("cuda" if on_gpu else "cpu"),
        ({"size": 96, "batch": 256} if on_gpu else {"size": 32, "batch": 2}),
    )
    parts = [f"{name}\n{table(sets, device, **shape)}" for name, sets in METHODS.items()]
    Path(sys.argv[1]).write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
