"""This process's place among those that torchrun started, read from the environment."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastbyol.errors import FastbyolError, LostRankError, NoGraphError, UsageError

# The variable that names the file into which the first process that fails writes its exit code.
# torchrun knows one kind of failure, and starts all again after any.
OUTCOME = "FASTBYOL_OUTCOME"
_PR_SET_PDEATHSIG = 1
# Time for the rank that failed to say why.
LINGER_S = 1.0
# What torchrun tells its workers; none of it is guessed from a batch system's variables.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Worker:
    """A process ``rank`` of ``count``, number ``local_rank`` of ``local_count`` on its node.

    ``restarts``: how many times all of them were started again after one was lost.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    restarts: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it writes the run's files and speaks to the user."""
        return self.rank == 0

    @property
    def is_on_only_node(self) -> bool:
        """Whether all processes are on one node."""
        return self.local_count == self.count


def worker() -> Worker | None:
    """Return this process's place, or None without both RANK and WORLD_SIZE.

    Raises UsageError where another variable is missing or no number.
    """
    values = {name: os.environ.get(name) for name in VARIABLES}
    if values["RANK"] is None or values["WORLD_SIZE"] is None:
        return None
    try:
        rank, count, local_rank = (int(values[name] or "") for name in VARIABLES[:3])
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        sound = 0 <= rank < count and 0 <= local_rank < local_count
    except ValueError:
        sound = False
    if not sound or not values["MASTER_ADDR"] or not values["MASTER_PORT"]:
        raise UsageError(
            f"{', '.join(VARIABLES)}: RANK is set, and the rest does not go with it: start with "
            "torchrun, or unset RANK and WORLD_SIZE"
        )
    return Worker(rank, count, local_rank, local_count, restarts)


def tells_of_signals() -> bool:
    """Tell whether this process says that a signal ended it, and not the one that started it."""
    here = worker()
    return here is None or (here.is_first and OUTCOME not in os.environ)


def is_first() -> bool:
    """Tell whether this process writes files and speaks to the user: no worker, or the first."""
    here = worker()
    return here is None or here.is_first


def program_as_typed() -> list[str]:
    """Return the interpreter's flags and the script or module of this process, as typed."""
    return sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]


def begin() -> None:
    """End with the process that started this one, and now if another one's failure is final."""
    if OUTCOME not in os.environ or (here := worker()) is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # On several nodes the others have to be told first: ``ranks.joined`` does.
    if here.is_on_only_node and outcome():
        sys.exit(0)


def outcome() -> int:
    """Return the exit code that a process of this node has left, or 0."""
    path = os.environ.get(OUTCOME)
    return int(Path(path).read_text() or 1) if path is not None and Path(path).exists() else 0


def leave_outcome(code: int) -> bool:
    """Leave an exit code for this node's launcher. Return whether this process was the first.

    Nothing is left where torchrun was typed.
    """
    if OUTCOME not in os.environ:
        return False
    try:
        with Path(os.environ[OUTCOME]).open("x") as file:
            file.write(str(code))
    except FileExistsError:
        return False
    return True


def launch_id() -> str:
    """Return what tells this start of torchrun from others, and not its restarts from each other.

    Its own id is "none" unless it was given one; it keeps running while its workers restart.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    stat = Path(f"/proc/{os.getppid()}/stat").read_text("utf-8", errors="replace")
    return f"{os.getppid()}.{stat.rpartition(')')[2].split()[19]}"


def claim(error: FastbyolError) -> None:
    """Leave the exit code of ``error`` before the other ranks notice that this one is gone.

    Not if this one lost another, or if all start again because of it.
    """
    if isinstance(error, LostRankError | NoGraphError) or error.is_claimed is not None:
        return
    if OUTCOME in os.environ and worker() is not None:
        error.is_claimed = leave_outcome(error.exit_code)


def speaks(error: FastbyolError) -> bool:
    """Tell whether this process is the one to print ``error``: the first that did not lose another.

    The others wait a moment, because torchrun ends all of them once one has ended.
    """
    try:
        here = worker()
    except UsageError:  # which is the error
        here = None
    if here is None:
        return True
    claim(error)
    if OUTCOME in os.environ:
        if not error.is_claimed:
            time.sleep(LINGER_S)
        return bool(error.is_claimed)
    return here.is_first or not (error.is_of_all or isinstance(error, LostRankError))
