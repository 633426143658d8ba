"""Twenty steps of training on a CPU, digested: views, networks, backward passes, optimizer and
moving average, bit by bit.

``python tests/engine/golden.py THREADS [STEPS]`` prints the digest of every case, one JSON object;
``--write`` keeps them in golden.json under this machine's name, for one thread and for two: only
where bits are meant to change, and why stands in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numba
import torch
from torch import Tensor

from fastbyol import load_config, views
from fastbyol.engine.step import TrainState, train_step

GOLDEN = Path(__file__).with_suffix(".json")
THREADS = ("1", "2")
STEPS, BATCH, SIDE = 20, 16, 48
# Channels of 8 to 64, even and odd sizes of feature maps, a mixed set of rows: every branch of the
# kernels for a CPU.
SMALL = (
    "views.size=33",
    "model.width=16",
    "model.groups=8",
    "model.projector.hidden=64",
    "model.projector.out=32",
    "model.predictor.hidden=64",
    "model.predictor.out=32",
    "optim.sgd_lr=0.1",
    f"train.batch_size={BATCH}",
    "train.device=cpu",
    "engine.mode=eager",
)
BN_SGD = ("model.stem=small",)
GN_WS_LARS = (
    "model.stem=small",
    "model.norm=gn",
    "model.ws=true",
    "model.projector.norm=none",
    "model.predictor.norm=none",
    "optim.name=lars",
)
POOLED = ("model.stem=torchvision", "views.blur=gaussian")
CASES = {"bn_sgd": BN_SGD, "gn_ws_lars": GN_WS_LARS, "bn_sgd_max_pool": POOLED}
PRECISIONS = ("fp32", "bf16")


def digest(case: str, precision: str, steps: int = STEPS) -> str:
    """Return the SHA-256 of parameters, momentum, target, statistics and every step's metrics after
    ``steps`` steps.
    """
    config = load_config("blog", [*SMALL, *CASES[case], f"train.precision={precision}"])
    state = TrainState.create(config, steps_per_epoch=10)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    ids, sha256 = torch.arange(BATCH), hashlib.sha256()
    for step in range(steps):
        batch = views.two_views(
            config.views, images, ids, seed=3, epoch=step, dtype=state.recipe.views_dtype
        )
        metrics = train_step(state, batch)
        _feed(sha256, batch, *metrics)
    for name, tensor in sorted(state.tensors().items()):
        sha256.update(name.encode())
        _feed(sha256, tensor)
    assert bool(torch.stack([t.isfinite().all() for t in state.tensors().values()]).all())
    return sha256.hexdigest()


def _feed(into: hashlib._Hash, *tensors: Tensor) -> None:
    for tensor in tensors:
        into.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)


def machine() -> str:
    """Name what decides the bits besides the source: the cpu and the libraries."""
    cpu = f"{llvmlite.binding.get_host_cpu_name()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{cpu}, torch {torch.__version__.split('+')[0]}, numba {numba.__version__}"


def write() -> None:
    """Write this machine's digests."""
    kept = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    runs = {threads: [sys.executable, __file__, threads] for threads in THREADS}
    kept[machine()] = {
        threads: json.loads(subprocess.check_output(run)) for threads, run in runs.items()
    }
    GOLDEN.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write()
    else:
        threads, steps = map(int, (*sys.argv[1:], STEPS)[:2])
        torch.set_num_threads(threads)
        print(
            json.dumps(
                {
                    f"{case} {precision}": digest(case, precision, steps)
                    for case in CASES
                    for precision in PRECISIONS
                }
            )
        )
