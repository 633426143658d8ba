"""The least runs that ablations can be made of: settings for ``--set``, and what must be equal
between two folders of runs.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file

SETS = (
    *(
        "views.size=16",
        "model.width=4",
        "model.stem=small",
        "train.batch_size=8",
        "data.workers=1",
        "probe.every_epochs=0",
    ),
    *(
        "data.train=textures",
        "data.textures_count=64",
        "data.textures_test_count=64",
        "run.drain_every_steps=2",
        "train.device=cpu",
    ),
    *(
        f"model.{head}.{key}"
        for head in ("projector", "predictor")
        for key in ("hidden=16", "out=8")
    ),
)


def contents(runs: Path) -> dict[str, object]:
    """Metrics and newest weights of every run in the folder, by arm and seed."""
    found: dict[str, object] = {}
    for metrics in sorted(runs.glob("*/*/metrics.jsonl")):
        newest = max((metrics.parent / "checkpoints").glob("ckpt-*.safetensors"))
        weights = {name: value.tobytes() for name, value in load_file(newest).items()}
        found[str(metrics.parent.relative_to(runs))] = (metrics.read_bytes(), newest.name, weights)
    return found
