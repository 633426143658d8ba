"""A peer process times itself with torch's defaults, and can neither hang nor linger."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest
import torch

from fastbyol_bench import peers
from fastbyol_bench.harness import HostClock, PeerError, Reading
from fastbyol_bench.peer_process import PeerProcess
from fastbyol_bench.peers import Post, Tuned

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Odd:
    """A peer with the calls that tests need."""

    def open(self, device: torch.device) -> Mapping[str, Callable[[], object]]:
        def fails() -> None:
            raise ValueError("no luck\nsecond line")

        def switches() -> None:
            values = {
                "policy": os.environ.get("OMP_WAIT_POLICY"),
                "deterministic": torch.backends.cudnn.deterministic,
                "benchmark": torch.backends.cudnn.benchmark,
                "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
                "threads": torch.get_num_threads(),
            }
            raise ValueError(str(values))

        return {
            "sleep": lambda: time.sleep(0.2),
            "hang": lambda: time.sleep(600),
            "fails": fails,
            "switches": switches,
        }


@dataclass(frozen=True)
class Parent:
    """A peer that starts a process, which writes to ``file`` endlessly."""

    file: Path

    def open(self, device: torch.device) -> Mapping[str, Callable[[], object]]:
        """Return a call that starts the process, as a DataLoader's first one does, and a wait."""
        child = multiprocessing.Process(target=_write_on, args=(self.file,), daemon=True)
        return {"start": child.start, "wait": lambda: time.sleep(0.5)}


def _write_on(file: Path) -> None:
    with file.open("wb", buffering=0) as opened:
        while True:
            opened.write(b".")
            time.sleep(0.001)


@dataclass(frozen=True)
class Unable:
    """A peer that cannot be built."""

    def open(self, device: torch.device) -> Mapping[str, Callable[[], object]]:
        raise RuntimeError("no kernel for this device")


@pytest.mark.parametrize(
    "recipe", [Post(32, 4), Post(32, 4, count=8, workers=0), Tuned(32, 4, "lars", "gn", ws=True)]
)
def test_its_reading_is_its_own(recipe: Post | Tuned) -> None:
    with PeerProcess("a peer", recipe, CPU) as peer:
        for _ in range(2):
            reading = HostClock().time(peer.caller("step"))
            # A ResNet-18 of full width on four images takes some milliseconds, on however many
            # threads.
            assert reading.cpu_s > 1e-3
            assert reading.wall_s > 1e-3
    assert not multiprocessing.active_children()


def test_the_posts_probe_is_timed_without_the_making_of_its_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sklearn")
    calls = Post(32, 4, probed=40).open(CPU)
    monkeypatch.setattr(peers, "pictures", None)
    # Ten classes of two, embedded by a network that was never trained.
    assert 0.0 <= calls["probe"]() <= 100.0


def test_waiting_is_not_counted() -> None:
    """Check that a reading excludes the peer's start, which takes seconds."""
    with PeerProcess("a peer", Odd(), CPU) as peer:
        began = time.perf_counter()
        reading = peer.call("sleep")
        assert 0.2 <= reading.wall_s < time.perf_counter() - began - 0.1
        assert reading.cpu_s < 0.2


def test_what_it_started_stands_still_between_its_calls(tmp_path: Path) -> None:
    file = tmp_path / "written"
    with PeerProcess("a peer", Parent(file), CPU) as peer:
        peer.call("start")
        peer.call("wait")
        written = file.stat().st_size
        time.sleep(0.3)
        assert file.stat().st_size == written > 0
        peer.call("wait")
        assert file.stat().st_size > written
        began = time.perf_counter()
    assert (
        time.perf_counter() - began < 30.0
    )  # of the 60 s after which a peer is killed, its children are not
    written = file.stat().st_size
    time.sleep(0.1)
    assert file.stat().st_size == written


def test_a_dataloaders_workers_die_with_their_peer() -> None:
    with PeerProcess("the post's path", Post(32, 4, count=8, workers=1), CPU) as peer:
        peer.call("step")
        (child,) = multiprocessing.active_children()
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert workers
        child.kill()
        child.join()
        processes.wait_for_end(workers)


def test_nothing_of_ours_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for switch in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, switch, True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # torch's documented defaults: convolutions in TF32, products not.
    expected = {"policy": None, "deterministic": False, "benchmark": False, "tf32": (True, False)}
    expected["threads"] = torch.get_num_threads()
    with PeerProcess("a peer", Odd(), CPU) as peer, pytest.raises(PeerError) as error:
        peer.call("switches")
    assert str(error.value) == f"a peer failed: ValueError: {expected}"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_tuned_peer_lets_cudnn_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    Tuned(32, 2).open(CPU)
    assert torch.backends.cudnn.benchmark


def test_an_early_end_is_an_error_not_a_wait() -> None:
    with PeerProcess("the post's path", Post(32, 4), CPU) as peer:
        peer.call("step")
        (child,) = multiprocessing.active_children()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(PeerError, match=r"^the post's path ended early \(exit code -9\)$"):
                peer.call("step")


@pytest.mark.parametrize(
    ("recipe", "what", "patience_s", "message"),
    [
        (Odd(), "fails", 600.0, "a peer failed: ValueError: no luck"),
        (Odd(), "hang", 1.0, "a peer did not answer within 1 s and was ended"),
        (Unable(), "step", 600.0, "a peer failed: RuntimeError: no kernel for this device"),
    ],
)
def test_a_failure_is_one_line(
    recipe: Odd | Unable, what: str, patience_s: float, message: str
) -> None:
    with PeerProcess("a peer", recipe, CPU, patience_s=patience_s) as peer:
        with pytest.raises(PeerError) as error:
            peer.call(what)
        assert str(error.value) == message
    assert not multiprocessing.active_children()


def test_a_clock_takes_a_reading_as_it_is() -> None:
    assert HostClock().time(lambda: Reading(5.0, 7.0)) == Reading(5.0, 7.0)
