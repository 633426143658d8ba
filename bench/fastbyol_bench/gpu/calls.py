"""Three calls of nine minutes at most with every measurement worth a bare machine with a GPU.

    python -m fastbyol_bench.gpu.calls A|B|C OUT [options]

bench/README.md describes them. This module imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fastbyol_bench.gpu import rows as row_file

ROOT = Path(__file__).resolve().parents[3]
CALLS = ("A", "B", "C")
# A machine sends back files up to 16 MiB. A larger archive of compiled code would be lost.
MOST_BYTES = 15 << 20
# A job with less time could not even import torch and load compiled code.
LEAST_S = 40.0
LAST_S = 15.0  # for the work after the jobs
# A dry run's sizes are tiny, but its machine may be slow and busy, and its minutes cost nothing.
MINUTES, DRY_PATIENCE = 9.0, 8
PR_SET_PDEATHSIG = 1  # linux/prctl.h
FASTBYOL = ("pydantic", "safetensors")
# The files with tests that use the GPU; a test of this module compares them with the marker.
GPU_TESTS = (
    "tests/engine/test_addends.py", "tests/engine/test_capture.py", "tests/engine/test_overlap.py",
    "tests/engine/test_telemetry.py", "tests/engine/test_working_weights.py",
    "tests/kernels/test_batch_norm.py", "tests/kernels/test_group_norm.py",
    "tests/kernels/test_lars_ema.py", "tests/kernels/test_max_pool.py",
    "tests/kernels/test_tf32x3.py", "tests/kernels/test_weight_standardization.py",
    "tests/kernels/views/test_draw.py", "tests/kernels/views/test_table.py",
    "tests/test_views.py",
)  # fmt: skip
# SGD collapses and stays, LARS 0.2 recovers, LARS 0.1 does not, layer1 and layer2 alone, rates 0.5
# and 0.1.
CLAIMS = ("C6", "C5", "C7", "C12", "C10")
OUR_KERNELS = (
    "regex:^_(forward|moments|normalise|backward|gradient|sum_samples|norms|sweep|telemetry|"
    "pool|draw|crop|contrast|blur|product)"
)


@dataclass(frozen=True)
class Job:
    """A command with its time limit, its wrapper ``under`` and its requirements.

    In the command {rows}, {work}, {out} and {seconds} stand for the file of rows, the folder for
    files that stay behind, the folder that is sent back, and the job's seconds. {dry} is ``--dry``
    or nothing. A dry run omits ``under``, whose programs only a GPU needs.
    """

    name: str
    command: tuple[str, ...]
    most_s: float
    under: tuple[str, ...] = ()
    modules: tuple[str, ...] = FASTBYOL
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job: ``code`` is None if it did not finish, and ``why`` says why."""

    name: str
    seconds: float
    code: int | None
    why: str = ""
    failed: bool = False


def jobs(call: str, options: argparse.Namespace) -> tuple[Job, ...]:
    """Return the jobs of a call, the most informative first."""
    return {"A": _works, "B": _limits, "C": _runs}[call](options)


def _own(module: str, name: str, *words: str, most_s: float, **how: Any) -> Job:
    """Return a job that runs a module of this folder; all take the rows' file and a name first."""
    return Job(
        name,
        (sys.executable, "-m", f"fastbyol_bench.gpu.{module}", "{rows}", name, *words, "{dry}"),
        most_s,
        **how,
    )


def _works(options: argparse.Namespace) -> tuple[Job, ...]:
    """Return call A's jobs: correct kernels, agreement of the modes, speed under each setting."""

    def engine(method: str, *settings: str) -> Job:
        name = "-".join(
            ["engine", method, *(word.lstrip("-").replace("=", "") for word in settings)]
        )
        # The first of a method compiles; later ones find most of it on disk.
        return _own(
            "engine", name, method, f"{{work}}/logs/{name}-kernels.txt", *settings, most_s=240
        )

    # cuDNN's switches are deterministic and benchmark: the engine takes 10, and blocks.
    settings = (
        ("bn", "--stem=plain"), ("bn", "--cudnn=11"), ("bn", "--cudnn=01"), ("bn", "--overlap"),
        ("gn_ws", "--overlap"), ("bn", "--heads=tf32x3"), ("bn", "--combo"),
        ("gn_ws", "--cudnn=01"), ("bn", "--timed"), ("bn", "--cudnn=01", "--stem=plain"),
        ("gn_ws", "--heads=tf32x3"), ("bn", "--cudnn=00"), ("gn_ws", "--cudnn=11"),
        ("gn_ws", "--combo"),
    )  # fmt: skip
    # On a CPU a setting changes nothing, so each option is tried once.
    once = (
        ("bn", "--cudnn=01", "--stem=blocks"), ("bn", "--overlap"), ("bn", "--heads=tf32x3"),
        ("bn", "--combo"), ("bn", "--timed"),
    )  # fmt: skip
    kernels = _own("exactness", "kernels", most_s=150)
    return (
        engine("bn"),
        engine("gn_ws"),
        kernels,
        *(engine(*setting) for setting in (once if options.dry else settings)),
    )


def _limits(options: argparse.Namespace) -> tuple[Job, ...]:
    """Return call B's jobs: the device's ceilings, GPU tests, memory errors and races, suites."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not cpu", "-W", "default")
    plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark")
    spread = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    tests = ("tests/kernels/views/test_draw.py",) if options.dry else GPU_TESTS
    how = ("--device", "cpu", "--quick") if options.dry else ("--device", "cuda")
    suites = ("kernels", "optimizer", "views", "step")
    bench = (
        sys.executable,
        "-m",
        "fastbyol.cli.main",
        "bench",
        *suites,
        *how,
        "--out",
        "{out}/bench.json",
    )
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    own_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ncu = (
        "ncu", "--clock-control", "none", "-k", OUR_KERNELS, "--launch-count", "60", "--csv",
        "--log-file", "{work}/logs/ncu.csv",
    )  # fmt: skip
    return (
        *(
            _own("limits", f"limits-cudnn{digits}", f"--cudnn={digits}", most_s=90)
            for digits in ("01", "10")
        ),
        Job(
            "tests",
            (*pytest, *plugins, *spread, *tests),
            180,
            modules=(*FASTBYOL, "pytest", "hypothesis"),
        ),
        *(
            _own(
                "exactness",
                tool,
                "--small",
                "--untimed",
                most_s=90,
                under=(*sanitizer, tool),
                variables=own_memory,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Job("bench", bench, 240, modules=(*FASTBYOL, "typer", "rich")),
        _own("exactness", "ncu", "--untimed", most_s=90, under=ncu),
    )


def _runs(options: argparse.Namespace) -> tuple[Job, ...]:
    """Return call C's jobs: whole epochs, then the claims, on carried images and on textures."""

    def run(what: str, name: str, *words: str, most_s: float) -> Job:
        modules = (*FASTBYOL, "typer", "rich")
        return _own(
            "runs",
            name,
            what,
            "--folder",
            f"{{work}}/runs/{name}",
            *words,
            most_s=most_s,
            modules=modules,
        )

    def claims(name: str, precision: str, *files: str, most_s: float) -> Job:
        how = ("--precision", precision, "--seconds", "{seconds}")
        claim = CLAIMS[1:2] if options.dry else CLAIMS
        return run("claims", f"claims-{name}-{precision}", *how, *files, *claim, most_s=most_s)

    carried = ["--data", options.data, "--test-data", options.test_data]
    carried += [word for each in options.set for word in ("--set", each)]
    on_carried = [
        claims("carried", "bf16", *carried, most_s=200),
        claims("carried", "fp32", *carried, most_s=120),
    ]
    return (
        *(
            run("train", f"train-{method}", "--method", method, most_s=150)
            for method in ("bn", "gn_ws")
        ),
        *(on_carried if options.data else ()),
        *(
            claims("textures", precision, "--data", "textures", most_s=200)
            for precision in ("bf16", "fp32")
        ),
    )


def lacks(job: Job, *, dry: bool) -> str:
    """Return a message that names what ``job`` needs and is not installed, or an empty string."""
    absent = [name for name in job.modules if importlib.util.find_spec(name) is None]
    absent += [] if dry else [name for name in job.under[:1] if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


class Call:
    """One call: a folder ``out`` to send back, a folder ``work`` for the rest, and a time limit.

    Every result is on disk at once, so a call that is killed keeps what it has measured.
    """

    def __init__(self, name: str, out: Path, work: Path, options: argparse.Namespace) -> None:
        self.name, self.out, self.work, self.options = name, out, work, options
        self.rows = out / "rows.jsonl"
        self.outcomes: list[Outcome] = []
        self._until = time.monotonic() + 60.0 * options.minutes - LAST_S
        self._process: subprocess.Popen[bytes] | None = None
        # Of an earlier call; its data and compiled code are used again.
        for folder in (work / "logs", work / "runs"):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (out, work / "logs", work / "caches"):
            folder.mkdir(parents=True, exist_ok=True)
        self.rows.unlink(missing_ok=True)

    def run(self, chosen: Sequence[Job]) -> None:
        """Run the jobs one after the other until the time is up. A job's failure raises nothing."""
        for job in chosen:
            most_s = job.most_s * (DRY_PATIENCE if self.options.dry else 1)
            left = min(most_s, self._until - time.monotonic())
            why = lacks(job, dry=self.options.dry)
            code, began = None, time.monotonic()
            failed = bool(why)
            if not why and left < LEAST_S:
                why = f"only {max(left, 0.0):.0f} s were left"
            elif not why:
                code = self._do(job, left)
                why = "" if code is not None else f"cut off after {left:.0f} s"
                failed = code != 0
            self.outcomes.append(
                Outcome(job.name, round(time.monotonic() - began, 1), code, why, failed)
            )
            self._keep()
            print(self._line(self.outcomes[-1]), flush=True)

    def _do(self, job: Job, most_s: float) -> int | None:
        """Run a job and return its exit code, or None if it had to be killed with its children."""
        values = {
            "rows": self.rows,
            "work": self.work,
            "out": self.out,
            "seconds": f"{most_s - LAST_S:.0f}",
        }
        values["dry"] = "--dry" if self.options.dry else ""
        words = (*(() if self.options.dry else job.under), *job.command)
        command = [word.format(**values) if word.startswith("{") else word for word in words]
        command = [word for word in command if word]
        with (self.work / "logs" / f"{job.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(job), stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
            try:
                return self._process.wait(most_s)
            except subprocess.TimeoutExpired:
                return None
            finally:
                self.end_job()

    def end_job(self) -> None:
        """Kill the running job and every process that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _environment(self, job: Job) -> dict[str, str]:
        paths = [str(ROOT / part) for part in ("", "kernels", "bench")]
        caches = self.work / "caches"
        own = {
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "FASTBYOL_CACHE": str(self.work / "data"),
            **({"FASTBYOL_COMMIT": self.options.commit} if self.options.commit else {}),
            **({"CUDA_VISIBLE_DEVICES": ""} if self.options.dry else {}),
        }
        return {**os.environ, **own, **job.variables}

    def _keep(self) -> None:
        """Write the outcomes and the logs so far to ``out``."""
        report = {"call": self.name, "commit": self.options.commit, "dry": self.options.dry}
        report["jobs"] = [asdict(outcome) for outcome in self.outcomes]
        _replace(self.out / "jobs.json", (json.dumps(report, indent=1) + "\n").encode())
        _archive(self.out / "logs.tar.gz", self.work, ["logs", *_records(self.work)])

    def finish(self) -> int:
        """Write the last files, print the table and return the exit code.

        The code is 1 if a job failed, was cut off or lacks a requirement, or if a row says
        ``failed``.
        """
        self._keep()
        _archive(self.out / "caches.tar.gz", self.work, ["caches"])
        rows = row_file.read(self.rows)
        _replace(self.out / "table.txt", (row_file.table(rows) + "\n").encode())
        print(
            row_file.table(
                [row for row in rows if row["part"] != "conv" or row["name"] == "all of a step"]
            )
        )
        failures = [row for row in rows if "failed" in row]
        print("", *map(self._line, self.outcomes), sep="\n")
        print(*(f"FAILED {row['job']}: {row_file.shown(row)}" for row in failures), sep="\n")
        return int(bool(failures) or any(outcome.failed for outcome in self.outcomes))

    @staticmethod
    def _line(outcome: Outcome) -> str:
        return (
            f"{outcome.name:26s}{outcome.seconds:7.1f} s  "
            f"{outcome.why or f'exit code {outcome.code}'}"
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _records(work: Path) -> list[str]:
    """Return the paths of runs' small records: no checkpoints, no rates per layer and step."""
    names = ("config.toml", "env.json", "metrics.jsonl", "timing.jsonl")
    paths = sorted((work / "runs").rglob("*"))
    rows = [path for path in paths if path.match("calls/*.json") or path.match("ledger/*/*.json")]
    records = [path for path in paths if path.name in names]
    return [str(path.relative_to(work)) for path in (*rows, *records)]


def _archive(path: Path, root: Path, names: Sequence[str]) -> None:
    """Pack files and folders below ``root``; drop an archive that is too large, with a message."""
    partial = path.with_name(f".{path.name}")
    with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        for name in names:
            archive.add(root / name, name)
    if partial.stat().st_size > MOST_BYTES:
        print(f"{path.name}: {partial.stat().st_size >> 20} MiB, left out", flush=True)
        partial.unlink()
        path.unlink(missing_ok=True)
        return
    partial.replace(path)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.replace(path)


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line ``words``."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("out", type=Path, help="a folder for at most eight files of at most 16 MiB")
    parser.add_argument(
        "--dry",
        action="store_true",
        help="every path at tiny size on a CPU; says nothing about speed",
    )
    parser.add_argument(
        "--commit",
        default=os.environ.get("FASTBYOL_COMMIT"),
        help="of the sources, where no .git is",
    )
    parser.add_argument(
        "--caches", type=Path, help="the caches.tar.gz of a call before, of the same versions"
    )
    parser.add_argument(
        "--data", metavar="IMAGES", help="C: what to train the claims on, too, as train's --data"
    )
    parser.add_argument(
        "--test-data", metavar="IMAGES", help="C: labelled images for the probe, with --data"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="C: for runs on --data"
    )
    parser.add_argument("--only", action="append", metavar="JOB", help="jobs by name; repeat it")
    parser.add_argument(
        "--minutes", type=float, help=f"for all jobs; default {MINUTES:.0f}, without a GPU more"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="for data and runs; default: a temporary folder, removed at the end",
    )
    options = parser.parse_args(words)
    if options.minutes is None:
        options.minutes = MINUTES * (DRY_PATIENCE if options.dry else 1)
    if bool(options.data) != bool(options.test_data):
        parser.error("--data and --test-data go together: name both")
    if options.caches and not options.caches.is_file():
        parser.error(
            f"--caches: {options.caches} is no file: name a caches.tar.gz of a call before"
        )
    names = [job.name for job in jobs(options.call, options)]
    for name in options.only or ():
        if name not in names:
            parser.error(
                f"--only: no job {name!r} in call {options.call}: take some of {', '.join(names)}"
            )
    return options


def main() -> int:
    """Run the call and return the exit code."""
    options = parsed()

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if options.work:
        return _made(options, options.work.resolve())
    with tempfile.TemporaryDirectory(prefix="fastbyol-", ignore_cleanup_errors=True) as work:
        return _made(options, Path(work).resolve())


def _made(options: argparse.Namespace, work: Path) -> int:
    call = Call(options.call, options.out.resolve(), work, options)
    if options.caches:
        with tarfile.open(options.caches) as archive:
            archive.extractall(work, filter="data")
    chosen = [
        job for job in jobs(options.call, options) if not options.only or job.name in options.only
    ]
    try:
        call.run(chosen)
    except KeyboardInterrupt:
        call.end_job()
        call.finish()
        return 1
    return call.finish()


if __name__ == "__main__":
    sys.exit(main())
