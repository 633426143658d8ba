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
FASTBYOL = (sys.executable, "-m", "fastbyol.cli")
NEED = ("pydantic", "typer", "rich", "safetensors")
# The suites in the order of what they tell, and what else they need.
BENCHES = {"kernels": (), "optimizer": (), "step": (), "views": (), "train": ("ffcv",), "loader": ("ffcv",)}


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


def jobs(out: Path, *, on_gpu: bool = True) -> tuple[Job, ...]:
    """All jobs, the most telling first within each stage; what they write lies in ``out``. Without a GPU in tiny sizes."""
    return (*_tests(), *_benches(out, on_gpu), *_trainings(out, on_gpu), *_profiles(out, on_gpu))


def _tests() -> tuple[Job, ...]:
    pytest, need = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"), ("pytest", "hypothesis")
    return (
        Job("tests", "kernels", (*pytest, "tests/kernels"), 300, need),
        Job(
            "tests",
            "engine",
            (*pytest, *_there("tests/engine/test_step.py", "tests/engine/test_capture.py")),
            240,
            (*need, *NEED),
        ),
        Job("tests", "model", (*pytest, "tests/model", "tests/optim"), 180, (*need, *NEED)),
    )


def _there(*paths: str) -> tuple[str, ...]:
    return tuple(path for path in paths if (ROOT / path).exists())


def _benches(out: Path, on_gpu: bool) -> tuple[Job, ...]:
    how = ("--device", "cuda") if on_gpu else ("--device", "cpu", "--quick")
    return tuple(
        Job("bench", suite, (*FASTBYOL, "bench", suite, *how, "--out", str(out)), 240, (*NEED, *needs))
        for suite, needs in BENCHES.items()
    )


def _trainings(out: Path, on_gpu: bool) -> tuple[Job, ...]:
    """As many images as the post's training set; five epochs, from which 320 follow."""
    values = {"data.textures_count": 105_000, "data.textures_test_count": 4096}
    how: tuple[str, ...] = ("--epochs", "5", "--precision", "bf16", "--device", "cuda")
    if not on_gpu:
        values = {"data.textures_count": 64, "data.textures_test_count": 64, "views.size": 32, "train.batch_size": 32}
        how = ("--epochs", "1", "--precision", "fp32", "--device", "cpu")
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    train = (*FASTBYOL, "train", "--preset", "blog", "--data", "textures", "--json", *how, *sets)
    methods: dict[str, tuple[str, ...]] = {"bn": (), "gn-lars": ("--norm", "gn", "--ws", "--opt", "lars")}
    return tuple(
        Job("train", name, (*train, *method, "--out", str(out / f"run-{name}")), 400, (*NEED, "ffcv"))
        for name, method in methods.items()
    )


def _profiles(out: Path, on_gpu: bool) -> tuple[Job, ...]:
    ncu = ("ncu", "--set", "basic", "--launch-count", "200", *FASTBYOL, "bench", "optimizer", "--quick", "--device", "cuda")
    kernels = Job(
        "profile", "kernels", (sys.executable, "-m", "fastbyol_bench.gpu_profile", str(out / "profile.txt")), 120, NEED
    )
    return (kernels, Job("profile", "ncu", ncu, 200, NEED, ("ncu",))) if on_gpu else (kernels,)


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


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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
    on_gpu = _has_gpu()
    if not on_gpu:
        print("no GPU here: tiny sizes on the processor, to try the stages; they say nothing about speed")
    chosen = [job for job in jobs(out, on_gpu=on_gpu) if job.stage in (arguments.stage or STAGES)]
    outcomes = run(chosen, out, arguments.budget_s, dry=arguments.dry_run)
    for outcome in outcomes:
        said = outcome.why or f"exit code {outcome.code}"
        print(f"{outcome.stage:8s}{outcome.name:12s}{outcome.seconds:7.1f} s  {said}")
    return int(any(map(failed, outcomes)))


if __name__ == "__main__":
    sys.exit(main())
