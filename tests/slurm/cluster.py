"""A SLURM cluster of this one machine, for tests: munged, slurmctld and slurmd in the foreground.

All that it writes lies below one folder. It needs Debian's packages slurmctld, slurmd, slurm-client
and munge, and root, since slurmd starts jobs as their owner; no systemd, cgroups or database.

    with cluster(folder) as variables:
        subprocess.run(["sbatch", "--partition=low", "job.sh"], env=os.environ | variables)

A job in the partition ``high`` pre-empts jobs in ``low``. README.md says what these get.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "srun")
# Debian's folder of daemons is missing from some users' PATH.
DAEMONS = "/usr/sbin"
# Seconds between the signal of a pre-emption and the end, which comes up to ten seconds late.
GRACE = 30
# A job that is queued again waits as long as its last start's credential lasts: 120 seconds by
# default. It is used at once, so a busy machine's seconds are enough.
CREDENTIAL = 5
# For what must happen, since other processes may hold the cores.
PATIENCE = 180.0
# Linux's 108 for a socket's path, less what SLURM and munge add.
LONGEST = 80

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={credential}

StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none

SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{controller}
JobRequeue=1
KillWait=5
CompleteWait=0
SlurmdTimeout=30
SlurmctldTimeout=30
MinJobAge=600
ReturnToService=2

SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Return the programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@contextlib.contextmanager
def cluster(
    folder: Path, grace: int = GRACE, user_signal: bool = True, cores: int | None = None
) -> Iterator[dict[str, str]]:
    """Run a cluster below ``folder`` until the block ends; give the variables of its clients.

    ``grace``: seconds that a pre-empted job has to save. ``user_signal``: pre-emption sends the
    signal that a job asked for (``sbatch --signal``) instead of SIGTERM. ``cores``: the node's,
    this machine's unless given, which may be fewer. Raise RuntimeError with the ends of the
    daemons' logs where the node does not get ready, ValueError where ``folder`` cannot hold it.
    """
    folder = folder.resolve()
    if len(str(folder)) > LONGEST or not set(" \t\n,#").isdisjoint(str(folder)):
        raise ValueError(f"{folder}: at most {LONGEST} characters, none special in slurm.conf")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "key"
    if not key.exists():
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
    controller_port, node_port = _free_ports(2)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            controller_port=controller_port,
            node_port=node_port,
            credential=CREDENTIAL,
            controller="SlurmctldParameters=preempt_send_user_signal" if user_signal else "",
            grace=grace,
            cores=cores or os.cpu_count(),
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        )
    )
    variables = {"SLURM_CONF": str(configuration), "PATH": _path()}
    # By force: it would have all users reach its socket, and in a temporary folder only root can.
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket"]
    munged += [f"--{name}-file={folder}/munge/{name}" for name in ("key", "log", "pid", "seed")]
    with contextlib.ExitStack() as end:
        end.callback(_kill_rest, variables)
        daemons: list[subprocess.Popen[bytes]] = []
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c"]):
            daemons.append(end.enter_context(_daemon(command, folder, variables)))
            if command is munged:
                _await(lambda: (folder / "munge" / "socket").exists(), folder, daemons)
        end.callback(_cancel, variables)
        state = ("sinfo", "--noheader", "--partition=low", "--format=%t")
        _await(lambda: client(variables, *state) == "idle", folder, daemons)
        yield variables


def client(variables: dict[str, str], *command: str) -> str:
    """Return what one of SLURM's commands says, or nothing where it fails."""
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=PATIENCE
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def running(variables: dict[str, str]) -> list[int]:
    """Return the processes with this cluster's configuration: daemons, jobs, clients."""
    mark, found = f"SLURM_CONF={variables['SLURM_CONF']}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return [process for process in found if process != os.getpid()]


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + os.pathsep + DAEMONS


def _free_ports(count: int) -> list[int]:
    """Return different ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as sockets:
        taken = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@contextlib.contextmanager
def _daemon(
    command: list[str], folder: Path, variables: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon in a session of its own: a terminal's Ctrl-C must not end it before its jobs."""
    with (folder / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(
    happened: Callable[[], bool], folder: Path, daemons: list[subprocess.Popen[bytes]]
) -> None:
    """Wait until ``happened()``; raise RuntimeError where a daemon ends before, or too late."""
    end = time.monotonic() + PATIENCE
    while not happened():
        ended = [str(process.args) for process in daemons if process.poll() is not None]
        if ended or time.monotonic() > end:
            logs = sorted({*folder.glob("*.out"), *folder.glob("*.log")})
            said = "".join(f"\n{log.name}:\n{log.read_text()[-2000:]}" for log in logs)
            raise RuntimeError(f"no cluster: {', '.join(ended) or 'waiting'} ended{said}")
        time.sleep(0.1)


def _cancel(variables: dict[str, str]) -> None:
    """Kill all jobs, and wait a little until SLURM has cleared them away."""
    for partition in ("high", "low"):
        client(variables, "scancel", f"--partition={partition}", "--state=PENDING")
        client(variables, "scancel", f"--partition={partition}", "--full", "--signal=KILL")
        client(variables, "scancel", f"--partition={partition}")
    end = time.monotonic() + 15
    while client(variables, "squeue", "--noheader") and time.monotonic() < end:
        time.sleep(0.2)


def _kill_rest(variables: dict[str, str]) -> None:
    """Kill what is left, since jobs outlive slurmd."""
    for process in running(variables):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
