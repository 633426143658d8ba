"""A conversion always ends: the old file or the new one whole, no process, no leftovers.

These are the machine's faults; a data set's are in tests/data/test_beton_write.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import run_rig as rig
from own_time import OwnTime, ends

import leftovers
from fastbyol.data import convert, textures
from fastbyol.data.loader import read_all
from fastbyol.data.verify import verify
from fastbyol.errors import UsageError
from leftovers import wait_for_writers, writers

KILLS = rig.many(4, 60)
# The "seconds": a dead worker is reported at once, the rest is a loaded machine.
END_S = 20.0
COUNT, SIDE = 2000, 64


@pytest.fixture(autouse=True)
def _nothing_in_shared_memory() -> Iterator[None]:
    before = leftovers.in_shared_memory()
    yield
    assert leftovers.lasting_in_shared_memory(before) == set()


def start(out: Path, seed: int, count: int = COUNT, **options: object) -> subprocess.Popen[bytes]:
    """Start a conversion of textures; to JPEG if they are more than ``COUNT``, to fill no disk."""
    what = (
        f"convert textures {out} --count {count} --size {SIDE} --seed {seed} --workers 2 "
        f"--overwrite --mode {'jpg' if count > COUNT else 'raw'}"
    ).split()
    return subprocess.Popen([sys.executable, "-m", "fastbyol.cli.main", *what], **options)  # type: ignore[call-overload]


def test_killed_at_random_instants(tmp_path: Path) -> None:
    """Kill parent or child: the old or the new file is whole, and the next conversion clears up."""
    out, draw, seen = tmp_path / "out.beton", random.Random(0), Counter[str]()
    started = time.monotonic()
    assert start(out, 0).wait(timeout=processes.PATIENCE_S) == 0
    # A whole conversion takes this long, imports included: later no process is left to kill.
    lasts_s = 1.1 * (time.monotonic() - started)
    older = out.read_bytes()
    made = [textures.make(COUNT, SIDE, seed) for seed in (0, 1)]
    while sum(seen[what] for what in seen if "nobody" not in what) < KILLS:
        parent = start(out, 1, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0, lasts_s))
        victims = (
            [parent.pid]
            if draw.random() < 0.5 and parent.poll() is None
            else writers(parent.pid)[:1]
        )
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        code = parent.wait(timeout=processes.PATIENCE_S)
        assert victims or code == 0  # otherwise the loop would not end
        wait_for_writers(parent.pid)
        verdict = verify(out, deep=True)
        verdict.demand_whole()
        assert verdict.info.manifest is not None
        seed = verdict.info.manifest.note["seed"]
        # Not by its own checksums alone: by the pixels that it should hold.
        images, labels, _ = read_all(out, workers=1, size=SIDE)
        np.testing.assert_array_equal(images.numpy(), made[seed][0])
        np.testing.assert_array_equal(labels, made[seed][1])
        whom = (
            "nobody, too early or late"
            if not victims
            else "the parent"
            if victims == [parent.pid]
            else "a writer"
        )
        seen[f"killed {whom}: exit {code}, {('older', 'newer')[seed]} file"] += 1
        if seed == 1:
            out.write_bytes(older)
    print(*sorted(seen.items()), sep="\n")
    convert.convert("textures", out, count=10, size=16, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_killed_worker(tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    out.write_bytes(b"older")
    parent = start(out, 1, count=200_000, stderr=subprocess.PIPE)
    processes.wait_until(lambda: len(writers(parent.pid)) >= 3, parent)
    os.kill(max(writers(parent.pid)), signal.SIGKILL)
    assert OwnTime(parent.pid).waits(ends(parent), END_S)
    _, errors = parent.communicate()
    assert b"ended by signal 9" in errors.splitlines()[-1]
    wait_for_writers(parent.pid)
    assert out.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("filled", range(19, 31) if rig.FULL else (20, 30))
def test_a_full_disk(small_disk: Path, filled: int) -> None:
    """Fill it during the conversion, after its own check of the free space."""
    out = small_disk / "out.beton"
    convert.convert("textures", out, count=100, size=16)
    older = out.read_bytes()
    # 14.3 MB of images and checksums.
    parent = start(out, 1, count=1000, stderr=subprocess.PIPE)
    processes.wait_until(lambda: writers(parent.pid), parent)
    (small_disk / "filler").write_bytes(bytes((filled << 20) - 512 * out.stat().st_blocks))
    _, errors = parent.communicate(timeout=processes.PATIENCE_S)
    assert parent.returncode == 1
    assert b"make room on that disk and try again" in errors.splitlines()[-1]
    wait_for_writers(parent.pid)
    assert out.read_bytes() == older
    assert {path.name for path in small_disk.iterdir()} == {out.name, "filler"}
    (small_disk / "filler").unlink()
    convert.convert("textures", out, count=900, size=SIDE, overwrite=True)
    verify(out, deep=True).demand_whole()


def test_a_disk_without_room_for_the_checksums(small_disk: Path) -> None:
    """Leave room for all samples but not for the manifest."""
    out = small_disk / "out.beton"
    (small_disk / "filler").write_bytes(bytes(30 << 20))
    with pytest.raises(Exception, match="make room on that disk") as caught:
        convert.convert("textures", out, count=20, size=SIDE, workers=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize(
    ("number", "delay_s", "group"),
    [
        (signal.SIGINT, 0.3, False),
        (signal.SIGINT, 4.0, False),
        (signal.SIGTERM, 2.0, False),
        (signal.SIGTERM, 4.0, True),
        (signal.SIGHUP, 4.0, False),
        (signal.SIGUSR1, 4.0, True),
    ],
)
def test_a_conversion_that_is_told_to_end_leaves_nothing(
    number: signal.Signals, delay_s: float, group: bool, tmp_path: Path
) -> None:
    """Signal the process, or its group as a terminal does."""
    out = tmp_path / "out.beton"
    parent = start(out, 1, count=200_000, stderr=subprocess.PIPE, start_new_session=True)
    time.sleep(delay_s)
    (os.killpg if group else os.kill)(parent.pid, number)
    assert OwnTime(parent.pid).waits(ends(parent), END_S)
    _, output = parent.communicate()
    # Before it has taken the signals over they do what they always do: Python fails with 1 where
    # a native module swallows the interrupt of what it imports, as pydantic's does.
    codes = {130 if number == signal.SIGINT else -number, -number} | ({1} if delay_s < 1 else set())
    assert parent.returncode in codes
    assert output.count(b"\n") <= 1 or delay_s < 1, output
    wait_for_writers(parent.pid)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_file_never_reads_as_zeros(tmp_path: Path) -> None:
    """Cut our file at any page: FFCV's half-written files may load as black samples."""
    out = tmp_path / "out.beton"
    convert.convert("textures", out, count=2000, size=32)
    whole = out.read_bytes()
    for end in range(0, len(whole), 1 << 20):
        out.write_bytes(whole[:end] + bytes(len(whole) - end))
        with pytest.raises(UsageError):
            read_all(out, workers=1, size=32)
    out.write_bytes(whole)
    assert np.count_nonzero(read_all(out, workers=1, size=32).images.numpy()) > 0
