"""Processes and launchers wait for the first one, and say in a line that nobody is there."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from unittest.mock import patch

import pytest

from fastbyol.engine import ports
from fastbyol.engine.worker import Worker
from fastbyol.errors import UsageError
from fastbyol_bench.rank_times import environment, free_port

# This machine by an address that is not that of its name: another machine, as far as one can tell.
# Some systems give the name 127.0.1.1 or 127.0.0.2.
ELSEWHERE = "127.0.0.3"


def meet_launchers(port: int) -> None:
    """Meet as the launcher of another node than the first."""
    ports.meet_launchers(f"{ELSEWHERE}:{port}")


def meet(port: int) -> None:
    """Meet as a process that is not the first."""
    with patch.dict(os.environ, environment(1, 2, port)):
        ports.meet(Worker(1, 2, 1, 2))


BOTH = pytest.mark.parametrize("come", [meet, meet_launchers])


@BOTH
def test_waits_for_the_first_one(come: Callable[[int], None]) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        late = threading.Timer(0.3, listener.listen)
        began = time.monotonic()
        late.start()
        come(listener.getsockname()[1])
        assert time.monotonic() - began >= 0.3
        late.join()


@BOTH
def test_a_place_where_nobody_is_ends_in_a_line(
    come: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "MEETING_S", 0.2)
    port = free_port()
    said = rf"^(MASTER_ADDR|--rdzv-endpoint): \S+: nobody answered at port {port} in 0 s \(Conn.*:"
    with pytest.raises(UsageError, match=said):
        come(port)
