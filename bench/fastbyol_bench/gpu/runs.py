"""Whole runs on a GPU: five epochs end to end, and the post's claims, with a row per epoch.

python -m fastbyol_bench.gpu.runs train ROWS JOB --method bn|gn_ws --folder DIR [--dry]
python -m fastbyol_bench.gpu.runs claims ROWS JOB --folder DIR --precision bf16 --seconds 200
    [--data FILE --test-data FILE] [--set KEY=VALUE]... [--dry] CLAIM...
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastbyol import load_config, train
from fastbyol.data import embedded
from fastbyol.engine.observer import EpochEnd, Silent
from fastbyol.errors import FastbyolError
from fastbyol.runs import checkpoint
from fastbyol.runs.metrics import read_events
from fastbyol_bench.gpu.rows import Rows
from fastbyol_bench.gpu.rows import parser as job_parser
from fastbyol_bench.own_step import METHODS

EPOCHS = 5
HORIZON = 320  # the post's
# As many images as STL-10's labelled and unlabelled ones, the post's training set, and test images
# for a probe of seconds.
FULL = ("data.textures_count=105000", "data.textures_test_count=4096", "data.textures_size=96")
TINY = (
    "data.textures_count=64", "data.textures_test_count=64", "data.textures_size=32",
    "model.width=16",
    "model.groups=8", "train.batch_size=32",
)  # fmt: skip
POLL_S = 1.0
GRACE_S = 15.0


class Watch(Silent):
    """An observer that writes a row per epoch: its time with the end, and its steps' rate."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.ends = [time.perf_counter()]

    def epoch_end(self, message: EpochEnd) -> None:
        """Write the row of an epoch."""
        self.ends.append(time.perf_counter())
        self._rows.add(
            "epoch", f"epoch {message.epoch + 1}", seconds=self.ends[-1] - self.ends[-2],
            steps_img_s=message.img_s,
            loss=message.metrics["loss"], state=message.state, accuracy=message.accuracy,
        )  # fmt: skip

    def note(self, text: str) -> None:
        """Print a message of the run."""
        print(text, flush=True)


def five_epochs(rows: Rows, method: str, folder: Path, *, dry: bool) -> None:
    """Train ``EPOCHS`` epochs as the command line does and write the time of a whole epoch."""
    device, sizes = ("cpu", TINY) if dry else ("cuda", FULL)
    size = 32 if dry else 96
    config = load_config(
        "blog",
        [
            *(
                "data.train=textures",
                f"train.epochs={EPOCHS}",
                "train.precision=bf16",
                f"train.device={device}",
            ),
            *(f"views.size={size}", "schedule.horizon_epochs=320", *sizes, *METHODS[method]),
        ],
    )
    began = time.perf_counter()
    embedded.training_file(config.data)
    embedded.held_out_file(config.data)
    rows.add(
        "data",
        f"{config.data.textures_count} textures of {size} px",
        seconds=time.perf_counter() - began,
    )
    watch = Watch(rows)
    summary = train(config, folder, observer=watch)
    mode = checkpoint.load_latest(folder / "checkpoints").meta["engine"]
    # The first epoch compiles. Each other epoch ends where the next begins.
    whole = sorted(b - a for a, b in zip(watch.ends[1:], watch.ends[2:], strict=False))
    epoch_s = whole[len(whole) // 2]
    rows.check(
        "run", f"{EPOCHS} epochs", holds=summary.finished and mode == ("eager" if dry else "graph"),
        says=f"finished {summary.finished}, mode {mode}", mode=mode, epoch_s=epoch_s,
        img_s=config.data.textures_count / epoch_s, minutes_320=HORIZON * epoch_s / 60,
        state=summary.state, accuracy=summary.accuracy,
    )  # fmt: skip


def claims(rows: Rows, arguments: argparse.Namespace) -> None:
    """Run the claims by ``fastbyol ablate run`` until the time is up, a row per probed epoch."""
    folder: Path = arguments.folder
    command = [
        sys.executable,
        "-m",
        "fastbyol.cli.main",
        "ablate",
        "run",
        *arguments.claims,
        "--out",
        str(folder),
    ]
    sets = [f"train.precision={arguments.precision}", *arguments.set]
    if arguments.dry:
        command += ["--scale", "mini", "--seeds", "1", "--device", "cpu"]
        sets += ["train.epochs=2", "probe.every_epochs=1", *TINY]
    else:
        command += ["--scale", "short", "--device", "cuda"]
    for name in ("data", "test_data"):
        if getattr(arguments, name):
            command += [f"--{name.replace('_', '-')}", getattr(arguments, name)]
    command += [word for each in sets for word in ("--set", each)]
    until = time.monotonic() + arguments.seconds
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    seen: dict[Path, int] = {}
    stopped = False
    while child.poll() is None:
        time.sleep(POLL_S)
        _new_epochs(rows, folder, seen)
        if time.monotonic() > until and not stopped:
            stopped = True
            child.terminate()  # runs are saved and stop
            until = time.monotonic() + GRACE_S
        elif stopped and time.monotonic() > until:
            child.kill()
    _new_epochs(rows, folder, seen)
    rows.check(
        "claims", " ".join(arguments.claims), holds=stopped or child.returncode == 0,
        says=f"exit code {child.returncode}", runs=len(seen), epochs=sum(seen.values()),
        cut=stopped,
    )  # fmt: skip


def _new_epochs(rows: Rows, folder: Path, seen: dict[Path, int]) -> None:
    """Write a row per new epoch with an accuracy. ``seen`` counts the events of each file."""
    for path in sorted(folder.glob("runs/*/seed*")):
        try:
            events = [event for event in read_events(path) if event["event"] == "epoch"]
        except FastbyolError:  # the run has not started yet
            continue
        for event in events[seen.get(path, 0) :]:
            if event["accuracy"] is not None:
                rows.add(
                    "claim",
                    f"{path.parent.name} {path.name} epoch {event['epoch'] + 1}",
                    **_figures(event),
                )
        seen[path] = len(events)


def _figures(event: dict[str, Any]) -> dict[str, Any]:
    return {name: event.get(name) for name in ("state", "accuracy", "neg_cos", "loss")}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = job_parser()
    parser.add_argument("what", choices=("train", "claims"))
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--data")
    parser.add_argument("--test-data")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("claims", nargs="*")
    return parser


def main() -> int:
    """Train or run claims and return 1 if something failed."""
    arguments = parser().parse_intermixed_args()
    rows = Rows(arguments.rows, arguments.job)
    with rows.guarded("run", arguments.what):
        if arguments.what == "train":
            five_epochs(rows, arguments.method, arguments.folder, dry=arguments.dry)
        else:
            claims(rows, arguments)
    return int(rows.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
