"""Workers as tasks of a Ray cluster, one for each GPU or core that it has free.

Ray starts them and gives each its device; no more. What is to be done and what is done, the folder
says: Ray's own record would be a second truth.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

from fastbyol.engine import interrupt
from fastbyol.errors import UsageError, one_line
from fastbyol.fleet.board import Board
from fastbyol.fleet.launch import Launch
from fastbyol.fleet.node import TICK_S, NodeEnd
from fastbyol.fleet.slots import MOST_ON_A_GPU
from fastbyol.fleet.worker import Options


def run(launch: Launch, options: Options, num_left: int, board: Board) -> NodeEnd:
    """Run workers on the cluster at ``launch.address``, or on one of this machine, until they end.

    One of ``interrupt.SIGNALS`` saves and stops them. Raises UsageError where there is no such
    cluster.
    """
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=launch.address, logging_level="ERROR", log_to_driver=False)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--launcher ray: no cluster: {one_line(error)}") from None
    stopped_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)

    try:
        with interrupt.handling(stop, interrupt.signals_to_handle()):
            resources, count = _resources(ray.cluster_resources(), launch)
            task = ray.remote(**resources, max_retries=-1)(work)
            left = [task.remote(options) for _ in range(min(count, num_left))]
            problems = []
            while left:
                ended, left = ray.wait(left, timeout=TICK_S)
                for reference in ended:
                    with suppress(ray.exceptions.TaskCancelledError):
                        problems += [line for line in [ray.get(reference)] if line]
                board.draw()
                if len(stopped_by) == 1 and left:
                    stopped_by.append(0)
                    for reference in left:
                        ray.cancel(reference)
        name = signal.Signals(stopped_by[0]).name if stopped_by else None
        return NodeEnd(name, tuple(dict.fromkeys(problems)))
    finally:
        ray.shutdown()


def work(options: Options) -> str:
    """Work as one worker, in a process of its own; return its last words if it could not."""
    command = [
        sys.executable,
        "-m",
        "fastbyol.cli.main",
        "ablate",
        "work",
        options.out,
        "--no-wait",
    ]
    if options.minutes is not None:
        command += ["--minutes", str(options.minutes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed = process.communicate()[0]
    except BaseException:  # cancelled: it saves
        process.terminate()
        process.wait()
        raise
    if process.returncode < 0:
        raise RuntimeError(f"a worker was killed by signal {-process.returncode}")
    return printed.strip().rpartition("\n")[2] if process.returncode else ""


def _resources(cluster: dict[str, Any], launch: Launch) -> tuple[dict[str, float], int]:
    """Return what one worker asks for, and how many the cluster has room for."""
    gpus = int(cluster.get("GPU", 0))
    if launch.device == "cpu" or (launch.device == "auto" and not gpus):
        return {"num_cpus": 1}, launch.jobs or int(cluster.get("CPU", 1))
    if not gpus:
        raise UsageError(f"--device {launch.device}: the Ray cluster has no GPU")
    a_gpu = min(-(-(launch.jobs or gpus) // gpus), MOST_ON_A_GPU)
    return {"num_cpus": 1, "num_gpus": 1 / a_gpu}, launch.jobs or gpus
