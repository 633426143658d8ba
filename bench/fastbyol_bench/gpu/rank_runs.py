"""What bench/gpu_ranks.sh asks of finished runs: whether two have the same bits, and their epochs.

python -m fastbyol_bench.gpu.rank_runs same RUN OTHER     # exit code 1 where they differ
python -m fastbyol_bench.gpu.rank_runs epochs RUN [...]   # seconds an epoch, images/s
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fastbyol.errors import UsageError
from fastbyol.runs import checkpoint
from fastbyol.runs.folder import RunFolder
from fastbyol_bench.harness import interquartile
from fastbyol_bench.table import aligned


def differing(run: Path, other: Path) -> str | None:
    """Return in words where the newest checkpoints of two runs differ, or None.

    Their tensors are compared byte by byte, names and steps as well.
    """
    a, b = (checkpoint.load_latest(path / "checkpoints") for path in (run, other))
    if a.meta["step"] != b.meta["step"]:
        return f"one ended at step {a.meta['step']}, the other at {b.meta['step']}"
    if a.tensors.keys() != b.tensors.keys():
        return f"only one has {', '.join(sorted(a.tensors.keys() ^ b.tensors.keys()))}"
    for name, tensor in a.tensors.items():
        ours, theirs = (t.contiguous().numpy().tobytes() for t in (tensor, b.tensors[name]))
        if ours != theirs:
            apart = (tensor.double() - b.tensors[name].double()).abs().max().item()
            return f"{name} differs, by {apart:.3g} at most"
    return None


def epochs(run: Path) -> tuple[list[float], int]:
    """Return the seconds of each epoch of a finished ``run`` but the first, and its steps.

    An epoch lasts from the last metrics of the one before to its own, end of an epoch included.
    """
    with RunFolder.open(run, lock=False) as folder:
        num_epochs = folder.config.train.epochs
    lines = [json.loads(line) for line in (run / "timing.jsonl").read_text("utf-8").splitlines()]
    drained = {line["step"]: line["unix_s"] for line in lines if line["event"] == "drain"}
    steps = max(drained) // num_epochs
    ends = [drained[steps * (epoch + 1)] for epoch in range(num_epochs)]
    return [end - start for start, end in pairwise(ends)], steps


def table(runs: Sequence[Path]) -> list[str]:
    """Return lines with the median epoch of each of ``runs`` and its images/s."""
    rows: list[tuple[str, ...]] = [("run", "epochs", "s each", "spread", "batch", "images/s")]
    for run in runs:
        with RunFolder.open(run, lock=False) as folder:
            batch_size = folder.config.train.batch_size
        seconds, steps = epochs(run)
        median = statistics.median(seconds)
        cells = (f"{median:.4g}", f"{interquartile(seconds):.2g}", str(batch_size))
        rows.append((run.name, str(len(seconds)), *cells, f"{steps * batch_size / median:,.0f}"))
    return aligned(rows)


def main(words: Sequence[str]) -> int:
    """Do what the first of ``words`` says; return the exit code."""
    word, *names = words
    runs = [Path(name) for name in names]
    if word == "epochs":
        print("\n".join(table(runs)))
        return 0
    if word != "same":
        raise UsageError(f"{word}: say same or epochs")
    where = differing(*runs)
    print("same" if where is None else f"DIFFERS: {where}")
    return int(where is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
