"""Claims: one owner at a time, dead ones taken over, live ones left alone, whatever clocks say."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_disk import small_disk

from fastbyol.fleet import claim as claims
from fastbyol.fleet.claim import SIGN, Claim, LostClaimError, Owner, Seen, Watch, acquire, newest

HOLD = """
import sys, time
from pathlib import Path
from fastbyol.fleet.claim import Owner, acquire
claim = acquire(Path(sys.argv[1]), int(sys.argv[2]), Owner(stale_s=float(sys.argv[3])))
print(claim is not None, flush=True)
while claim is not None:
    time.sleep(0.05)
    claim.beat()
"""


@pytest.fixture
def stem(tmp_path: Path) -> Path:
    return tmp_path / "seed0"


@contextmanager
def holding(stem: Path, stale_s: float = 300.0) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed the run and gives signs."""
    command = [sys.executable, "-c", HOLD, str(stem), "0", str(stale_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def taken(stem: Path, last: int = 0, **fields: object) -> Claim:
    claim = acquire(stem, last, Owner(**fields))  # type: ignore[arg-type]
    assert claim is not None
    return claim


def there(stem: Path) -> Seen:
    seen = newest(stem)
    assert seen is not None
    return seen


def elsewhere(stem: Path, **fields: object) -> Claim:
    """A claim of a process on another machine."""
    owner = {"host": "far", "boot": "another", **fields}
    return taken(stem, **owner)  # type: ignore[arg-type]


def test_a_claim_says_who_has_the_run_and_leaves_nothing(stem: Path) -> None:
    claim = taken(stem, job="12_3")
    seen = newest(stem)
    assert seen is not None
    assert (seen.number, seen.sign["job"], seen.owner_name) == (1, "12_3", claim.owner.name)
    assert seen.sign["pid"] == os.getpid()
    claim.say(step=7)
    assert there(stem).sign["step"] == 7
    claim.check()
    claim.release()
    claim.release()
    assert list(stem.parent.iterdir()) == []


def test_one_of_many_gets_it(stem: Path) -> None:
    """Sixteen threads at once, a hundred times: one gets through and leaves its claim."""
    start = threading.Barrier(16)

    def run(number: int) -> Claim | None:
        start.wait()
        return acquire(stem, number, Owner())

    with ThreadPoolExecutor(16) as pool:
        for number in range(100):
            (claim,) = filter(None, pool.map(run, [number] * 16))
            assert list(stem.parent.iterdir()) == [claim.path]
            claim.close()


def test_a_process_that_is_gone_from_this_machine_is_dead_at_once(stem: Path) -> None:
    watch = Watch()
    with holding(stem):
        seen = newest(stem)
        assert seen is not None
        assert not watch.is_dead(seen)
        assert watch.has_seen_alive(seen)
    assert watch.is_dead(there(stem))
    claim = taken(stem, 1)
    assert [path.name for path in stem.parent.iterdir()] == ["seed0.claim.2"]
    claim.release()


def test_a_paused_process_of_this_machine_keeps_its_run(stem: Path) -> None:
    """It may write at any moment: nobody takes its run, however long it is silent."""
    with holding(stem, stale_s=0.2) as process:
        process.send_signal(signal.SIGSTOP)
        watch, until = Watch(), time.monotonic() + 1.0
        while time.monotonic() < until:
            assert not watch.is_dead(there(stem))
            time.sleep(0.05)


def test_another_machine_is_dead_after_its_time_without_a_sign(stem: Path) -> None:
    claim = elsewhere(stem, stale_s=0.5)
    watch = Watch()
    until = time.monotonic() + 1.0
    while time.monotonic() < until:  # twice its time, with signs
        claim.beat()
        assert not watch.is_dead(there(stem))
        time.sleep(0.05)
    assert watch.has_seen_alive(there(stem))
    began = time.monotonic()
    while not watch.is_dead(newest(stem)):  # type: ignore[arg-type]
        time.sleep(0.01)
    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, 10 * 365 * 86400.0])
def test_no_clock_is_trusted(stem: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """A clock that jumps, of the owner, the watcher or the file server, makes nobody dead."""
    claim = elsewhere(stem, stale_s=60.0)
    watch = Watch()
    assert not watch.is_dead(there(stem))
    now = time.time() + jump_s
    monkeypatch.setattr(time, "time", lambda: now)
    os.utime(claim.path / SIGN, (now, now))
    assert not watch.is_dead(there(stem))
    assert watch.has_seen_alive(there(stem))


def test_whoever_was_given_up_for_dead_writes_nothing_more(stem: Path) -> None:
    old = elsewhere(stem)
    new = taken(stem, 1)
    with pytest.raises(LostClaimError, match=new.owner.name):
        old.check()
    old.release()
    new.check()
    new.release()
    with pytest.raises(LostClaimError, match="its claim is gone"):
        new.check()


def test_a_late_taker_of_an_old_claim_gives_way(stem: Path) -> None:
    """Two saw claim 1 dead. One takes it over, ends and is followed by a third, before the other
    goes on: it must not take the third's run.
    """
    third = taken(stem, 2)  # claim 3: claims 1 and 2 are gone
    assert acquire(stem, 1, Owner()) is None
    third.check()
    assert there(stem).number == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from fastbyol.fleet.claim import Owner, acquire
left = int(sys.argv[2])
def stop(event, arguments):
    global left
    left -= event in ("os.mkdir", "os.rename", "os.utime", "open", "fcntl.flock")
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(stop)
acquire(Path(sys.argv[1]), 0, Owner())
left = 10**9
print("alive")
"""


def test_killed_amid_claiming_a_process_is_dead_at_once(stem: Path) -> None:
    """At each of its calls for files: nobody waits for a worker that never said who it is."""
    for calls in range(100):
        command = [sys.executable, "-c", KILLED, str(stem), str(calls)]
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout
        seen = newest(stem)
        assert seen is None or Watch().is_dead(seen)
        claim = taken(stem, seen.number if seen else 0)
        assert list(stem.parent.iterdir()) == [claim.path]
        claim.release()
        if printed:
            break
    assert calls >= 4


def test_a_claim_without_a_sign_is_dead_after_the_usual_time(stem: Path) -> None:
    """A version before this one made the folder first, and could be killed before the file."""
    (stem.parent / "seed0.claim.4").mkdir()
    watch = Watch()
    seen = newest(stem)
    assert seen is not None
    assert (seen.number, seen.owner_name) == (4, "an unknown worker")
    assert not watch.is_dead(seen, 0.3)
    time.sleep(0.4)
    assert watch.is_dead(seen, 0.3)
    assert not watch.has_seen_alive(seen)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_a_damaged_sign_is_no_sign(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "seed0"
        (Path(folder) / "seed0.claim.1").mkdir()
        (Path(folder) / "seed0.claim.1" / SIGN).write_bytes(content)
        seen = newest(stem)
        assert seen is not None
        assert seen.process_lives() is None
        assert not Watch().is_dead(seen)


_JSON = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([])
    | st.just(10**400)
)  # fmt: skip


@example("left_s", math.nan)
@example("stale_s", math.nan)
@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(("host", "pid", "boot", "stale_s", "epoch", "step", "left_s", "ended")), _JSON
)
def test_a_sign_of_other_types_is_no_sign(name: str, value: object) -> None:
    """Whoever reads it gets what it can count with, or nothing."""
    whole = {**vars(Owner(boot="another")), "number": 1, "epoch": 1, "step": 8, "left_s": 2.5}
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "seed0"
        path = Path(folder) / "seed0.claim.1"
        path.mkdir()
        (path / SIGN).write_text(json.dumps(whole | {name: value}))
        seen = newest(stem)
        assert seen is not None
        number = name in ("stale_s", "left_s")
        wanted = (int, float) if number else (type(whole.get(name, "")),)
        is_sound = type(value) in wanted and (not number or abs(value) < math.inf)  # type: ignore[arg-type]
        assert bool(seen.sign) == is_sound
        assert (seen.owner_name == "an unknown worker") == (not is_sound)
        assert Watch().is_dead(seen) in (True, False)
        assert seen.process_lives() is None


def test_a_full_disk_lets_the_owner_give_signs_and_say_why_it_ends(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 100_000) as disk:
        stem = disk / "seed0"
        claim = taken(stem, boot="another")
        with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        before = newest(stem)
        time.sleep(0.02)
        claim.beat()
        claim.say(ended="the disk is full")
        after = newest(stem)
        assert before is not None
        assert after is not None
        assert after.touched_ns > before.touched_ns
        assert after.has_ended
        assert Watch().is_dead(after)
        with pytest.raises(OSError, match="No space left"):
            acquire(disk / "seed1", 0, Owner())
        claim.release()
        assert sorted(path.name for path in disk.iterdir()) == ["filler"]


def test_without_locks_the_time_decides(stem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    taken(stem, stale_s=0.3)
    watch, seen = Watch(), newest(stem)
    assert seen is not None
    assert seen.process_lives() is None
    assert not watch.is_dead(seen)
    time.sleep(0.4)
    assert watch.is_dead(seen)


def test_only_claims_of_the_run_count(stem: Path) -> None:
    """seed1 is not seed10, and other files are no claims."""
    for name in ("seed00.claim.9", "seed0.claim.x", "seed0.json", "seed0.claims.3"):
        (stem.parent / name).mkdir()
    assert newest(stem) is None
    claim = taken(stem)
    assert claim.number == 1
    folder = stem.parent.parent
    assert claims.claims_below(folder)[stem] == 1
