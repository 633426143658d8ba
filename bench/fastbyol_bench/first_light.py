"""The README's first example and its demonstration: their runs, pictures and printed output."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fastbyol
from fastbyol.show import figures, run_report

# The README's command.
TYPED = "train --data fashion-mnist --norm gn --opt lars --lr 0.2 --mlp-norm none"


def run(folder: Path, *words: str, threads: int | None = None) -> tuple[str, str]:
    """Run ``fastbyol`` with ``words`` in ``folder`` and return its standard output and error.

    The home folder's path becomes ``~`` in both.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", "fastbyol.cli.main", *words]
    ended = subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return tuple(text.replace(str(Path.home()), "~") for text in (ended.stdout, ended.stderr))  # type: ignore[return-value]


def draw(run_folder: Path, path: Path, *, height: float, supervised: float | None = None) -> None:
    """Draw a run's cosines and accuracy side by side.

    The live states are shaded behind them, or with ``supervised`` that accuracy is drawn as a line.
    """
    from matplotlib.figure import Figure

    curves = run_report.read(run_folder)
    figure = Figure(figsize=(9.0, height), layout="constrained")
    for axes, curve in zip(
        figure.subplots(1, 2), (run_report.draw_cosines, run_report.draw_accuracy), strict=True
    ):
        if supervised is None:
            run_report.shade_states(axes, curves)
        curve(axes, curves)
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    if supervised is not None:
        axes.axhline(supervised, color=figures.GREEN, lw=0.9, ls="--", label="supervised")
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train in a temporary folder, for some minutes on two cores, and write the README's files.

        python -m fastbyol_bench.first_light bench/results/first_light

    writes ``results.json``, ``typed.txt``, ``typed.png``, ``demo.txt``, ``recovery.png`` and
    ``demo.png``.
    """
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        printed, _ = run(folder, *TYPED.split(), "--device", "cpu", threads=1)
        (out / "typed.txt").write_text(f"$ fastbyol {TYPED}\n{printed}")
        (made,) = (folder / "runs").iterdir()
        draw(made, out / "typed.png", height=3.2)
        answer, printed = run(folder, "demo", "demo", "--json")
        (out / "demo.txt").write_text(f"$ make demo\n{printed}")
        result = json.loads(answer)
        draw(folder / result["run"], out / "demo.png", height=3.0, supervised=result["supervised"])
        shutil.copy(folder / "demo" / "pictures" / "recovery.png", out / "recovery.png")
    machine = {
        "cpu": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastbyol": fastbyol.__version__,
    }
    kept = {name: value for name, value in result.items() if name not in ("run", "pictures")}
    for row in kept["pair"].values():
        row.pop("run")
    (out / "results.json").write_text(
        json.dumps({"machine": machine, "demo": kept}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
