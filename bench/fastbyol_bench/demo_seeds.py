"""The demonstration's figures over seeds, on this CPU and as a narrower one rounds; the README's table of them.

    python -m fastbyol_bench.demo_seeds measure FOLDER   # train what FOLDER lacks, and write both: half an hour on one core
    python -m fastbyol_bench.demo_seeds collect FOLDER   # write bench/results/first_light/seeds.json from FOLDER's runs
    python -m fastbyol_bench.demo_seeds readme           # write the README's table

A library takes the order of its sums from the CPU's instructions. ``CPUS`` are settings that keep each of them from
what a narrower CPU lacks; the runs of a name are made under them in a process of their own, with one thread. The pair
that collapses is told from the appendix's runs, which have more seeds.
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

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
KEPT = RESULTS / "first_light" / "seeds.json"
APPENDIX = RESULTS / "ablations" / "mini" / "ledger.json"
BEGIN, END = "<!-- demo: made by fastbyol_bench.demo_seeds -->", "<!-- demo: end -->"
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

    told = _supervised(folder)
    for seed in SEEDS:
        config = config_io.load(preset="demo", sets=[f"train.seed={seed}", f"data.train={DATA}", "train.device=cpu"]).config
        run = folder / f"seed{seed}"
        if run.exists():
            api.resume(run)
        else:
            api.train(config, run)
        if seed not in told:
            told[seed] = demo.supervised(config)
            write_text(folder / SUPERVISED, json.dumps(told) + "\n")


def measure(folder: Path) -> None:
    """Train under every name of ``CPUS``, each in ``folder`` / its name."""
    for name, settings in CPUS.items():
        command = [sys.executable, "-m", "fastbyol_bench.demo_seeds", "train", str(folder / name)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **settings}, check=True)


def collected(folder: Path) -> dict[str, Any]:
    """What the finished runs in ``folder`` came to, by the name of the CPU a row a seed, accuracies in percent."""
    from fastbyol.runs.environment import cpu_name

    return {"cpu": cpu_name(), "data": DATA, "cpus": {name: list(_rows(folder / name)) for name in CPUS}}


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    from fastbyol.runs.folder import list_runs

    told = _supervised(folder)
    for run in list_runs(folder):
        if run.status == "done":
            path = Path(run.path)
            seed, curves = int(path.name.removeprefix("seed")), run_report.read(path)
            found = {"random": curves.accuracies.untrained, "byol": curves.accuracies.last, "supervised": told.get(seed)}
            yield {"seed": seed, "state": curves.epoch_events[-1]["state"], **found}


def _supervised(folder: Path) -> dict[int, float]:
    path = folder / SUPERVISED
    return {int(seed): value for seed, value in json.loads(path.read_text("utf-8")).items()} if path.exists() else {}


def block(told: Mapping[str, Any], ledger: Mapping[str, Any]) -> str:
    """The README's block, marks included: of what ``collected`` gave, and the pair's runs in the appendix's ledger."""
    from fastbyol.demo import PAIR

    names = list(told["cpus"])
    heads = [f"{name}, seeds: {len(told['cpus'][name])}" for name in names]
    found = {
        title: [span(row[key] for row in told["cpus"][name]) for name in names]
        for title, key in (("random weights", "random"), ("BYOL", "byol"), ("supervised", "supervised"))
    }
    lines = [f"| {title} | {' | '.join(cells)} |" for title, cells in found.items() if set(cells) != {NOTHING}]
    pair = [f"| {name} | {_endings([run for run in ledger['runs'].values() if run['arm'] == name])} |" for name in PAIR]
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
    """``recovering 3 of 3, 59.8 to 63.2 %``: the states, the commonest first."""
    states = [run["state"] for run in runs]
    return "; ".join(
        f"{state} {states.count(state)} of {len(states)}, {span(run['accuracy'] for run in runs if run['state'] == state)}"
        for state in sorted(set(states), key=lambda state: (-states.count(state), state))
    )


def span(values: Iterable[float | None]) -> str:
    """``73.0 to 77.2 %``, lowest and highest of what was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    low, high = f"{min(known):.1f}", f"{max(known):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def filled(readme: str, made: str) -> str:
    """``readme`` with the block ``made`` in the place of its own."""
    return readme[: readme.index(BEGIN)] + made + readme[readme.index(END) + len(END) :]


def fresh(readme: str) -> str:
    """``readme`` with the block of what lies under bench/results."""
    return filled(readme, block(*(json.loads(path.read_text("utf-8")) for path in (KEPT, APPENDIX))))


def main() -> None:
    """Do what the command line says."""
    word, *where = sys.argv[1:]
    if word == "train":
        train(Path(*where))
    if word == "measure":
        measure(Path(*where))
    if word in ("measure", "collect"):
        write_text(KEPT, json.dumps(collected(Path(*where)), indent=1) + "\n")
    if word in ("measure", "readme"):
        write_text(ROOT / "README.md", fresh((ROOT / "README.md").read_text("utf-8")))


if __name__ == "__main__":
    main()
