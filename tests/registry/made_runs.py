"""Run folders without a training: a configuration, an environment and epochs as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbyol import config_io

STARTED = "2026-11-05T08:20:00+00:00"


def make_run(
    path: Path, *sets: str, epochs: Sequence[dict[str, Any]] = (), scored: int = 100, **env: Any
) -> Path:
    """Write a run of preset blog whose epochs measured ``epochs``, and return its folder."""
    text = config_io.dump(config_io.load(preset="blog", sets=sets).config)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(text)
    (path / "env.json").write_text(json.dumps({"started": STARTED, "config": text, **env}))
    write_metrics(path, epochs, scored)
    return path


def write_metrics(path: Path, epochs: Sequence[dict[str, Any]], scored: int = 100) -> None:
    """Write a step and the end of each epoch, and what was measured before them."""
    lines: list[dict[str, Any]] = [
        {"event": "untrained", "step": 0, "accuracy": 20.0, "num_scored": scored}
    ]
    for epoch, fields in enumerate(epochs):
        common = {"loss": 1.0, "pos_cos": 0.9, "neg_cos": 0.25}
        lines.append({"step": epoch, "epoch": epoch, **common, "lr": 0.1})
        measured = {"state": "healthy", "accuracy": None, **common, **fields}
        lines.append({"event": "epoch", "step": epoch + 1, "epoch": epoch, **measured})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
