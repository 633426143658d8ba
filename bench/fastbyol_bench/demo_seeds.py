"""The tables of docs/demo.md: the demonstration over seeds, on this CPU and as a narrower one.

    python -m fastbyol_bench.demo_seeds measure FOLDER   # train what FOLDER lacks, collect, docs
    python -m fastbyol_bench.demo_seeds collect FOLDER   # write first_light/seeds.json from it
    python -m fastbyol_bench.demo_seeds docs             # write the tables

Measuring takes half an hour on one core. The runs of each name in ``CPUS`` are made in a process of
their own, with one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbyol.runs.durable import write_text
from fastbyol.show import run_report
from fastbyol_bench.readme import DOCS, RESULTS, filled

DOCUMENT = DOCS / "demo.md"
KEPT = RESULTS / "first_light" / "seeds.json"
# The pair that collapses has more seeds in the appendix's runs.
APPENDIX = RESULTS / "ablations" / "mini" / "ledger.json"
BEGIN, END = "<!-- demo: made by fastbyol_bench.demo_seeds -->", "<!-- demo: end -->"
# A library adds in an order that depends on the CPU's instructions. These settings keep each
# library from instructions that a narrower CPU lacks.
CPUS: Mapping[str, Mapping[str, str]] = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
    },
}
SEEDS = range(5)
DATA = "fashion-mnist"
SUPERVISED = "supervised.json"
NOTHING = "not run"


def train(folder: Path) -> None:
    """Train what ``folder`` lacks of every seed, BYOL and with labels, in this process."""
    from fastbyol import api, config_io, demo

    supervised = _supervised(folder)
    for seed in SEEDS:
        config = config_io.load(
            preset="demo", sets=[f"train.seed={seed}", f"data.train={DATA}", "train.device=cpu"]
        ).config
        run = folder / f"seed{seed}"
        if run.exists():
            api.resume(run)
        else:
            api.train(config, run)
        if seed not in supervised:
            supervised[seed] = demo.supervised(config).percent
            write_text(folder / SUPERVISED, json.dumps(supervised) + "\n")


def measure(folder: Path) -> None:
    """Train under each of ``CPUS``, one after the other, into ``folder`` / its name."""
    for name, settings in CPUS.items():
        command = [sys.executable, "-m", "fastbyol_bench.demo_seeds", "train", str(folder / name)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **settings}, check=True)


def collected(folder: Path) -> dict[str, Any]:
    """Return a row for each finished run in ``folder``, by CPU. Accuracies are in percent."""
    from fastbyol.runs.environment import cpu_name

    return {
        "cpu": cpu_name(),
        "data": DATA,
        "cpus": {name: list(_rows(folder / name)) for name in CPUS},
    }


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    from fastbyol.registry.index import list_runs

    supervised = _supervised(folder)
    for run in list_runs(folder):
        if run.status == "done":
            path = Path(run.path)
            seed, curves = int(path.name.removeprefix("seed")), run_report.read(path)
            accuracies = curves.accuracies
            yield {
                "seed": seed,
                "state": curves.epoch_events[-1]["state"],
                "random": accuracies.untrained,
                "byol": accuracies.last,
                "supervised": supervised.get(seed),
            }


def _supervised(folder: Path) -> dict[int, float]:
    path = folder / SUPERVISED
    return (
        {int(seed): value for seed, value in json.loads(path.read_text("utf-8")).items()}
        if path.exists()
        else {}
    )


def block(record: Mapping[str, Any], ledger: Mapping[str, Any]) -> str:
    """Return the block, marks included, from ``collected``'s record and the appendix's ledger."""
    from fastbyol.demo import PAIR

    names = list(record["cpus"])
    heads = [f"{name}, seeds: {len(record['cpus'][name])}" for name in names]
    ranges = {
        title: [span(row[key] for row in record["cpus"][name]) for name in names]
        for title, key in (
            ("random weights", "random"),
            ("BYOL", "byol"),
            ("supervised", "supervised"),
        )
    }
    lines = [
        f"| {title} | {' | '.join(cells)} |"
        for title, cells in ranges.items()
        if set(cells) != {NOTHING}
    ]
    pair = [
        f"| {name} | {_endings([run for run in ledger['runs'].values() if run['arm'] == name])} |"
        for name in PAIR
    ]
    return "\n".join(
        [
            BEGIN,
            f"| linear accuracy | {' | '.join(heads)} |",
            "|---" * (1 + len(names)) + "|",
            *lines,
            "",
            "| LARS without BatchNorm | at the end, with how many seeds, linear accuracy |",
            "|---|---|",
            *pair,
            END,
        ]
    )


def _endings(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the final states, the most frequent first: ``recovering 3 of 3, 59.8 to 63.2 %``."""
    states = [run["state"] for run in runs]
    return "; ".join(
        f"{state} {states.count(state)} of {len(states)}, "
        f"{span(run['accuracy'] for run in runs if run['state'] == state)}"
        for state in sorted(set(states), key=lambda state: (-states.count(state), state))
    )


def span(values: Iterable[float | None]) -> str:
    """Return the lowest and the highest of the measured ``values``: ``73.0 to 77.2 %``."""
    measured = [value for value in values if value is not None]
    if not measured:
        return NOTHING
    low, high = f"{min(measured):.1f}", f"{max(measured):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def fresh(text: str) -> str:
    """Return the document's ``text`` with its block made anew from bench/results."""
    return filled(
        text, BEGIN, END, block(*(json.loads(path.read_text("utf-8")) for path in (KEPT, APPENDIX)))
    )


def main() -> None:
    """Do what the first word of the command line says."""
    word, *where = sys.argv[1:]
    if word == "train":
        train(Path(*where))
    if word == "measure":
        measure(Path(*where))
    if word in ("measure", "collect"):
        write_text(KEPT, json.dumps(collected(Path(*where)), indent=1) + "\n")
    if word in ("measure", "docs"):
        write_text(DOCUMENT, fresh(DOCUMENT.read_text("utf-8")))


if __name__ == "__main__":
    main()
