"""Workers as tasks of a Ray cluster, one for each GPU or core that it has free.

Ray starts them and gives each its device; no more. What is to be done and what is done, the folder
says: Ray's own record would be a second truth.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from fastbyol.engine import interrupt
from fastbyol.errors import UsageError, one_line
from fastbyol.fleet.board import Board
from fastbyol.fleet.launch import Launch
from fastbyol.fleet.node import TICK_S, Node, NodeEnd
from fastbyol.fleet.slots import MOST_ON_A_GPU
from fastbyol.fleet.worker import Options

# A cluster that this call starts needs neither; the last keeps Ray from announcing a change.
_PLAIN = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# A cluster that runs already has its own environment.
_PASSED_ON = ("FASTBYOL_CACHE",)


def run(launch: Launch, options: Options, num_left: int, board: Board) -> NodeEnd:
    """Run workers on the cluster at ``launch.address``, or on one of this machine, until they end.

    One of ``interrupt.SIGNALS`` saves and stops them, a second SIGINT kills them. Raises UsageError
    where there is no such cluster.
    """
    for name, value in _PLAIN.items():
        os.environ.setdefault(name, value)
    import ray

    where = {"include_dashboard": False} if launch.address is None else {"address": launch.address}
    try:
        ray.init(**where, logging_level="ERROR", log_to_driver=False)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--launcher ray: no cluster: {one_line(error)}") from None
    stopped_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)
        if len(stopped_by) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt

    try:
        with interrupt.handling(stop, interrupt.signals_to_handle()):
            resources, count = _resources(ray.cluster_resources(), launch)
            variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
            task = ray.remote(**resources, max_retries=-1)(work)
            left = [task.remote(options, variables) for _ in range(min(count, num_left))]
            problems: list[str] = []
            is_cancelled = False
            while left:
                ended, left = ray.wait(left, timeout=TICK_S)
                problems += [problem for each in ended for problem in _problems(each)]
                board.draw()
                if stopped_by and not is_cancelled:
                    is_cancelled = True
                    for reference in left:
                        ray.cancel(reference)
        by = signal.Signals(stopped_by[0]).name if stopped_by else None
        return NodeEnd(by, tuple(dict.fromkeys(problems)))
    finally:
        ray.shutdown()


def work(options: Options, variables: dict[str, str]) -> NodeEnd:
    """Run one worker in a process of its own until nothing is left to do, as a task of Ray.

    Cancelled, which is a SIGINT to Python, it saves and ends.
    """
    return Node(options, [{"OMP_NUM_THREADS": "1", **variables}], lambda line: None).run()


def _problems(reference: Any) -> tuple[str, ...]:
    """Return what kept a task that has ended from working."""
    import ray

    try:
        end: NodeEnd = ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return ()
    except ray.exceptions.RayError as error:  # of Ray, or of the task, with its traceback
        return (f"a task of Ray: {str(error).strip().rpartition(chr(10))[2]}",)
    return end.problems


def _resources(cluster: dict[str, Any], launch: Launch) -> tuple[dict[str, float], int]:
    """Return what one worker asks for, and how many the cluster has room for."""
    gpus = int(cluster.get("GPU", 0))
    if launch.device == "cpu" or (launch.device == "auto" and not gpus):
        return {"num_cpus": 1}, launch.jobs or int(cluster.get("CPU", 1))
    if not gpus:
        raise UsageError(f"--device {launch.device}: the Ray cluster has no GPU")
    a_gpu = min(-(-(launch.jobs or gpus) // gpus), MOST_ON_A_GPU)
    return {"num_cpus": 1, "num_gpus": 1 / a_gpu}, launch.jobs or gpus
