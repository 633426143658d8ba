"""Everything that a machine with a GPU can tell, in stages, each within a budget of time and with what is installed there.

    python -m fastbyol_bench.gpu_machine --out DIR [--stage tests|bench|train|profile] [--budget-s 540] [--dry-run]

Without ``--stage`` all share the budget. Each job's output goes to DIR/STAGE-JOB.log, and DIR/summary.json says what ran,
for how long and with what exit code, what was left out and why. The exit code is 1 where a job failed or was cut off.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
Stage = Literal["tests", "bench", "train", "profile"]
STAGES: tuple[Stage, ...] = ("tests", "bench", "train", "profile")
# A job that is given less time than this could not even import torch.
LEAST_S = 15.0


@dataclass(frozen=True)
class Job:
    """A command, the modules and programs that it needs, and the most seconds it may take."""

    stage: Stage
    name: str
    command: tuple[str, ...]
    most_s: float
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``code`` is its exit code, None where it did not run or was cut off; ``why`` says so."""

    stage: str
    name: str
    command: tuple[str, ...]
    seconds: float
    code: int | None
    why: str = ""


def jobs(out: Path) -> tuple[Job, ...]:
    """All jobs, the most telling first within each stage. What they write lies in ``out``."""
    python = sys.executable
    bench = (python, "-m", "fastbyol.cli", "bench")
    train = (python, "-m", "fastbyol.cli", "train", "--preset", "blog", "--data", "textures", "--epochs", "3", "--json")
    textures = ("--set", "data.textures_count=20000", "--set", "data.textures_test_count=4096")
    bf16 = ("--precision", "bf16", "--device", "cuda")
    need = ("pydantic", "typer", "rich", "safetensors")
    suites = ("kernels", "optimizer", "step", "views", "train", "loader")
    data = {"train", "loader"}
    return (
        Job("tests", "kernels", (python, "-m", "pytest", "-q", "tests/kernels"), 300, ("pytest", "hypothesis")),
        Job(
            "tests", "model", (python, "-m", "pytest", "-q", "tests/model", "tests/optim"), 180, ("pytest", "hypothesis", *need)
        ),
        Job(
            "tests", "engine", (python, "-m", "pytest", "-q", "tests/engine/test_step.py"), 120, ("pytest", "hypothesis", *need)
        ),
        *(
            Job(
                "bench",
                suite,
                (*bench, suite, "--device", "cuda", "--out", str(out)),
                240,
                (*need, *(["ffcv"] * (suite in data))),
            )
            for suite in suites
        ),
        Job("train", "bn", (*train, *textures, *bf16, "--out", str(out / "run-bn")), 400, (*need, "ffcv")),
        Job(
            "train",
            "gn-lars",
            (*train, *textures, *bf16, "--norm", "gn", "--ws", "--opt", "lars", "--out", str(out / "run-gn")),
            400,
            (*need, "ffcv"),
        ),
        Job(
            "profile",
            "ncu",
            ("ncu", "--set", "basic", "--launch-count", "200", *bench, "optimizer", "--quick", "--device", "cuda"),
            200,
            need,
            ("ncu",),
        ),
        Job("profile", "kernels", (python, "-m", "fastbyol_bench.gpu_profile", str(out / "profile.txt")), 120, need),
    )


def lacks(job: Job) -> str:
    """What of ``job``'s needs is not installed, in words; empty where all is there."""
    absent = [name for name in job.modules if importlib.util.find_spec(name) is None]
    absent += [name for name in job.programs if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def run(
    chosen: Sequence[Job], out: Path, budget_s: float, *, now: Callable[[], float] = time.monotonic, dry: bool = False
) -> list[Outcome]:
    """Run ``chosen`` one after the other until ``budget_s`` is used up; never raises for what a job does."""
    out.mkdir(parents=True, exist_ok=True)
    began, outcomes = now(), []
    for job in chosen:
        left = min(job.most_s, budget_s - (now() - began))
        why = (
            lacks(job)
            or (f"only {max(left, 0):.0f} s of the budget left" if left < LEAST_S else "")
            or ("dry run" if dry else "")
        )
        started = now()
        code = None
        if not why:
            code = _call(job, out / f"{job.stage}-{job.name}.log", left)
            why = "" if code is not None else f"cut off after {left:.0f} s"
        outcomes.append(Outcome(job.stage, job.name, job.command, now() - started, code, why))
        # After every job: whoever cuts this process off still finds what is known.
        (out / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return outcomes


def _call(job: Job, log: Path, most_s: float) -> int | None:
    """The exit code; None where it had to be killed, with all that it started."""
    paths = [str(ROOT / part) for part in ("", "kernels", "bench")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as file:
        process = subprocess.Popen(job.command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            return process.wait(most_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def failed(outcome: Outcome) -> bool:
    """Whether a job ended badly or was cut off; one that was left out did not."""
    return outcome.code not in (0, None) or outcome.why.startswith("cut off")


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fastbyol_bench.gpu_machine", description="What a machine with a GPU can tell.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, action="append", help="several: repeat it; default: all")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and what is missing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    chosen = [job for job in jobs(out) if job.stage in (arguments.stage or STAGES)]
    outcomes = run(chosen, out, arguments.budget_s, dry=arguments.dry_run)
    for outcome in outcomes:
        said = outcome.why or f"exit code {outcome.code}"
        print(f"{outcome.stage:8s}{outcome.name:12s}{outcome.seconds:7.1f} s  {said}")
    return int(any(map(failed, outcomes)))


if __name__ == "__main__":
    sys.exit(main())
