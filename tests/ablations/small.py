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


def content(run: Path) -> tuple[bytes, str, dict[str, bytes]]:
    """Metrics, and name and tensors of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("ckpt-*.safetensors"))
    weights = {name: value.tobytes() for name, value in load_file(newest).items()}
    return (run / "metrics.jsonl").read_bytes(), newest.name, weights


def contents(runs: Path) -> dict[str, object]:
    """The content of every run in the folder, by arm and seed."""
    paths = sorted(path.parent for path in runs.glob("*/*/metrics.jsonl"))
    return {str(path.relative_to(runs)): content(path) for path in paths}
