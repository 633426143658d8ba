"""The ports where processes and nodes meet, looked at before torch waits for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from fastbyol.engine.worker import Worker
from fastbyol.errors import UsageError

# Asks whether a store of torch answers at HOST PORT, in a process of its own: torch prints traces
# and waits where none does.
_ASK = """
import datetime, sys, torch.distributed
wait = datetime.timedelta(seconds=5)
torch.distributed.TCPStore(
    sys.argv[1], int(sys.argv[2]), is_master=False, wait_for_workers=False, timeout=wait
)
"""
ASK_S = 30
# How long the others wait for the first process or launcher, as torch's store does.
MEETING_S = 300.0


def meet(here: Worker) -> None:
    """Wait for the first process, if this one is another.

    Raises UsageError if there is no such place, if the first process cannot listen there, and if
    nobody does within ``MEETING_S``.
    """
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _addresses(host, "MASTER_ADDR")
    if not _is_port(port):
        raise UsageError(f"MASTER_PORT: {port!r} is no port: name one that is free")
    # Under torchrun's own store it is torchrun that listens.
    if here.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _wait_for(host, int(port), "MASTER_ADDR")
    elif not _is_free(int(port)):
        raise UsageError(f"MASTER_PORT: {port} is in use here: name one that is free")


def _addresses(host: str, option: str) -> set[str | int]:
    """Return the addresses of ``host``. Raises UsageError, naming ``option``, if it has none."""
    try:
        return {address[4][0] for address in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:  # a label of a name may be too long to be asked for
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{option}: {host}: {reason}: name a machine that can be reached"
        ) from None


def _is_port(port: str) -> bool:
    return port.isdecimal() and 0 < int(port) < 2**16


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        # As the store does: a port that was just left counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def _wait_for(host: str, port: int, option: str) -> None:
    """Wait until somebody listens. Raises UsageError, naming ``option``, after ``MEETING_S``."""
    end = time.monotonic() + MEETING_S
    while True:
        try:
            # Not for long at a time: a machine that was away and is back would be seen late.
            return socket.create_connection((host, port), timeout=5.0).close()
        except OSError as error:
            if time.monotonic() > end:
                raise UsageError(
                    f"{option}: {host}: nobody answered at port {port} in {MEETING_S:.0f} s "
                    f"({error.strerror or error}): start the first one there, or name an address "
                    "of it that this machine can reach"
                ) from None
            time.sleep(0.05)


def meet_launchers(endpoint: str) -> None:
    """Wait for the first node's launcher, if this is another node.

    Raises UsageError if ``endpoint``, HOST:PORT, is no such pair or somebody else's port, and if
    nobody answers there within ``MEETING_S``.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not _is_port(port):
        raise UsageError(f"--rdzv-endpoint: {endpoint!r}: write HOST:PORT, for example node0:29400")
    own = socket.gethostname()
    is_here = host in ("localhost", "127.0.0.1", own) or bool(
        _addresses(host, "--rdzv-endpoint") & _addresses(own, "--rdzv-endpoint")
    )
    if not is_here:
        _wait_for(host, int(port), "--rdzv-endpoint")
    # Another node's launcher may run on this machine and listen already.
    elif not _is_free(int(port)):
        asked = [sys.executable, "-c", _ASK, host, port]
        try:
            subprocess.run(asked, capture_output=True, check=True, timeout=ASK_S)
        except subprocess.SubprocessError:
            raise UsageError(
                f"--rdzv-endpoint: port {port} is in use on this machine: name one that is free"
            ) from None
