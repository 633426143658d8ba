"""Sweeps written by hand: a grid's text, and runs with settings and ``metrics.jsonl`` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastbyol.fleet import asking
from fastbyol.fleet.ledger import RUNS, Call, Ledger
from fastbyol.sweeps import grid
from small import SETS

# Two learning rates by two weight decays.
SQUARE = """
preset = "demo"
[optim]
name = "lars"
[grid]
"optim.lr" = [0.1, 0.5]
"optim.weight_decay" = [0.0, 1.5e-6]
"""


def written(folder: Path, text: str, name: str = "grid.toml") -> Path:
    """Write the text of a grid; return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, "utf-8")
    return folder / name


def small(axes: str, seeds: int = 1, epochs: int = 1) -> str:
    """The text of a grid with the least settings that train."""
    lines = []
    for text in (*SETS, f"train.epochs={epochs}"):
        key, value = text.split("=")
        lines.append(f"{key} = {value if value.isdecimal() else json.dumps(value)}")
    return "\n".join([f'preset = "demo"\nseeds = {seeds}', *lines, "[grid]", axes, ""])


def ask(text: str, out: Path, **options: object) -> grid.Grid:
    """Ask for the runs of a grid in ``out``, as a call without workers does."""
    made = grid.read(written(out.parent, text), **options)
    tasks = grid.tasks(made, out)
    Call(out, grid.SCALE, made.record())
    asking.ask(out, tasks)
    return made


def finish(
    out: Path, key: str, states: Sequence[str], last: Mapping[str, object] | None = None
) -> None:
    """Write the epochs of the run ``key`` as if it had been trained, each with its end's state.

    ``last`` are the measures of all of them.
    """
    folder, entry = out / RUNS / key, Ledger(out).entry(key)
    assert entry is not None
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(entry.row["config"])
    lines = [{"event": "untrained", "step": 0, "accuracy": 10.0}]
    before = "healthy"
    for epoch, state in enumerate(states):
        step = 4 * (epoch + 1)
        if state != before:
            lines.append({"event": "state", "step": step, "before": before, "after": state})
        measures = {"neg_cos": 0.5, **(last or {})}
        lines.append({"event": "epoch", "step": step, "epoch": epoch, "state": state, **measures})
        before = state
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
