"""The writer always ends: a whole file under its name, or an error in time and no leftovers."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ffcv_files
import leftovers
from fastbyol.data import beton, beton_worker, beton_write
from fastbyol.errors import FastbyolError, UsageError

BEFORE = leftovers.in_shared_memory()


@dataclass(frozen=True)
class Items:
    """Noise, and the ``fault`` at item ``at``."""

    count: int = 200
    side: int = 16
    fault: str = ""
    at: int = 130

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[object, ...]:
        image = np.random.default_rng(index).integers(
            0, 256, (self.side, self.side + index % 3, 3), np.uint8
        )
        return (
            FAULTS[self.fault](image, index)
            if index == self.at and self.fault
            else (image, index - 5)
        )

    def name(self, index: int) -> str:
        return f"picture {index}"


def _raise(error: Exception) -> tuple[object, ...]:
    raise error


FAULTS: dict[str, Callable[[np.ndarray, int], Any]] = {
    "fail": lambda *_: _raise(RuntimeError("lost\nit")),
    "unreadable": lambda *_: _raise(beton_write.UnreadableItemError("cut short")),
    "die": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "leave": lambda *_: os._exit(0),
    "exit": lambda *_: sys.exit("enough"),
    "sleep": lambda *_: time.sleep(600),
    "float": lambda image, index: (image / 255, index),
    "grey": lambda image, index: (image[..., 0], index),
    "list": lambda image, index: (image.tolist(), index),
    "flat": lambda image, index: (image[:0], index),
    "wide": lambda image, index: (np.zeros((1, 16385, 3), np.uint8), index),
    "large": lambda image, index: (np.zeros((900, 900, 3), np.uint8), index),
    "no label": lambda image, index: (image,),
    "text label": lambda image, index: (image, "cat"),
    "real label": lambda image, index: (image, 1.0),
    "huge label": lambda image, index: (image, 2**63),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return the path of an older file, which every failure must leave alone."""
    path = tmp_path / "out.beton"
    path.write_text("older")
    return path


def demand_untouched(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_text() == "older"
    leftovers.wait_for_writers(os.getpid())
    assert leftovers.lasting_in_shared_memory(BEFORE) == set()


def write(out: Path, items: Items, **options: object) -> beton.BetonInfo:
    options = {"labelled": True, "overwrite": True, "page_bytes": 1 << 21, "workers": 2} | options
    return beton_write.write(out, items, **options)  # type: ignore[arg-type]


def test_what_is_written_is_what_ffcv_reads(out: Path) -> None:
    seen: list[int] = []
    info = write(out, Items(), progress=lambda done, total: seen.append(done))
    assert (info.path, info.num_samples, info.label_field) == (out, 200, "label")
    images, labels = ffcv_files.regions(out)
    assert labels == [k - 5 for k in range(200)]
    for k, image in enumerate(images):
        np.testing.assert_array_equal(image, Items()[k][0])
    assert seen == sorted(seen)
    assert seen[-1] == 200
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("workers", [1, 3])
def test_many_pages_and_no_labels(out: Path, workers: int) -> None:
    """Write 9 images a page of 2 MiB, so that workers take turns at 23 pages."""
    items = Items(side=270)
    write(out, items, labelled=False, workers=workers)
    images, labels = ffcv_files.regions(out)
    assert labels is None
    assert all(np.array_equal(image, items[k][0]) for k, image in enumerate(images))


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("fail", UsageError, "item 130 (picture 130) RuntimeError: lost it"),
        ("float", UsageError, "item 130 (picture 130) is float64"),
        ("die", FastbyolError, "ended by signal 9 while these were in work: item"),
        ("leave", FastbyolError, "ended with status 0"),
        ("exit", FastbyolError, "SystemExit: enough"),
    ],
)
def test_faults_end_the_writing(
    out: Path, fault: str, kind: type[FastbyolError], words: str
) -> None:
    started = time.monotonic()
    with pytest.raises(FastbyolError) as caught:
        write(out, Items(fault=fault))
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < beton_write.STALL_S  # it was told, and gave nothing up
    demand_untouched(out)


def test_a_stall_ends_the_writing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_write, "STALL_S", 6.0)
    with pytest.raises(FastbyolError, match="no item was read for 6 s"):
        write(out, Items(fault="sleep"))
    demand_untouched(out)


@pytest.mark.parametrize("stop", [False, True])
def test_unreadable_items_are_gathered(out: Path, stop: bool) -> None:
    with pytest.raises(
        beton_write.UnreadableItemsError, match=r"1 of 200 items .* item 130: cut short"
    ) as caught:
        write(out, Items(fault="unreadable"), stop_at_unreadable=stop)
    assert caught.value.items == ((130, "cut short"),)
    demand_untouched(out)


class Unloadable(Items):
    """A set that fails on loading, as a script's class does that the worker cannot import."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_unload, ())


def _unload() -> Items:
    raise LookupError("cannot be loaded")


def test_a_data_set_that_cannot_be_loaded_says_why(out: Path) -> None:
    for _ in range(3):
        with pytest.raises(
            FastbyolError, match=r"the writing process died \(LookupError: cannot be loaded\)"
        ):
            write(out, Unloadable())
    demand_untouched(out)


@pytest.mark.parametrize("most", [100, 4096, 3 << 20])
def test_a_full_disk_ends_the_writing(out: Path, most: int) -> None:
    """Break writes off half way by a limit on file sizes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(FastbyolError, match="make room"):
            write(out, Items(side=270))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    demand_untouched(out)


def test_interrupted_by_the_caller(out: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(out, Items(), progress=progress)
    demand_untouched(out)


def test_a_file_that_came_meanwhile_is_kept(out: Path) -> None:
    out.unlink()
    with pytest.raises(UsageError, match="meanwhile"):
        write(
            out,
            Items(count=3),
            overwrite=False,
            progress=lambda done, total: out.write_text("older"),
        )  # type: ignore[arg-type]
    demand_untouched(out)


def shadow(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make processes started from now on fail to import the package ``name``."""
    (folder / "shadow").mkdir(exist_ok=True)
    (folder / "shadow" / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    monkeypatch.syspath_prepend(folder / "shadow")


def test_needs_neither_ffcv_nor_opencv_nor_torch(
    out: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ffcv", "cv2", "numba", "torch"):
        shadow(tmp_path_factory.getbasetemp(), name, monkeypatch)
    assert write(out, Items(), mode="jpg").num_samples == 200


def test_a_writing_process_that_cannot_start(
    out: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow(tmp_path_factory.mktemp("path"), "PIL", monkeypatch)
    with pytest.raises(FastbyolError, match=r"died \(ImportError: no PIL here\).*doctor"):
        write(out, Items())
    demand_untouched(out)


def test_wrong_arguments(out: Path) -> None:
    for options in (
        {"mode": "png"},
        {"quality": 101},
        {"workers": -1},
        {"page_bytes": 1 << 20},
        {"page_bytes": 3 << 20},
    ):
        with pytest.raises(UsageError, match=r"must be|is none of raw, jpg"):
            write(out, Items(), **options)
    with pytest.raises(UsageError, match="empty"):
        write(out, Items(count=0))
    with pytest.raises(UsageError, match="--overwrite"):
        write(out, Items(), overwrite=False)
    demand_untouched(out)


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), (Path("/dev/null"), "a device")):
        with pytest.raises(UsageError, match=f"is {kind}, not a regular file"):
            write(path, Items())
        assert not path.is_file()


def test_leftovers_of_the_dead_are_removed(out: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    prefix = beton_write._temporary_prefix(out)
    kept = {
        f"{prefix}{os.getpid()}-00c0ffee.tmp",
        f"{prefix}1-00c0ffee.tmp",
        f".{out.name}.elsewhere-{ended.pid}-00c0ffee.tmp",
    }
    kept |= {f".other.{prefix[1:]}{ended.pid}-00c0ffee.tmp", f"{prefix}{ended.pid}-notes.tmp"}
    for name in (*kept, f"{prefix}{ended.pid}-00c0ffee.tmp"):
        (out.parent / name).touch()
    beton_write.remove_leftovers(out)
    assert {path.name for path in out.parent.iterdir()} == kept | {out.name}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("grey", "of shape (16, 17), not uint8 (height, width, 3)"),
        ("list", "is a list"),
        ("flat", "17 x 0 pixels"),
        ("wide", "16385 x 1 pixels"),
        ("large", "more than a page"),
        ("no label", "no integer label"),
        ("text label", "no integer label but ('cat',)"),
        ("real label", "no integer label"),
        ("huge label", "64 bits"),
    ],
)
def test_items_are_checked(fault: str, words: str) -> None:
    items = Items(fault=fault, at=1)
    job = beton_write.Job(items, True, "raw", 90, 1, 1 << 21, -1, -1)
    beton_worker._encoded(job, items[0])
    with pytest.raises(ValueError, match=re.escape(words)):
        beton_worker._encoded(job, items[1])


def test_a_jpeg_that_is_larger_than_a_page_and_than_its_pixels() -> None:
    job = beton_write.Job(Items(), True, "jpg", 100, 1, 1000, -1, -1)
    with pytest.raises(ValueError, match=r"takes 1\d\d\d bytes as JPEG, more than a page of 1000"):
        beton_worker._encoded(job, job.items[0])


def test_writes_are_whole_or_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write to a disk that accepts 5 bytes at a time, 12 in all."""
    stored = bytearray()

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if len(stored) == 12:
            raise OSError(errno.ENOSPC, "full")
        assert offset == len(stored)
        part = bytes(data[: min(5, 12 - len(stored))])
        stored.extend(part)
        return len(part)

    monkeypatch.setattr(os, "pwrite", pwrite)
    beton_write.write_at(-1, b"abcdefghijk", 0)
    assert stored == b"abcdefghijk"
    with pytest.raises(OSError, match="full"):
        beton_write.write_at(-1, b"lm", 11)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_writers_that_come_at_once_one_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    path, begin = tmp_path / "out.beton", threading.Barrier(8)

    def publish(number: int) -> bool:
        temporary = tmp_path / f"{number}.tmp"
        temporary.write_text(str(number))
        begin.wait()
        try:
            beton_write.publish(temporary, path, overwrite=False)
        except UsageError as error:
            assert "--overwrite" in str(error)  # noqa: PT017
            return False
        return True

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(publish, range(8)))
        assert won.count(True) == 1
        assert path.read_text() == str(won.index(True))
        path.unlink()


def refuse_links(self: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_rename_that_fails_leaves_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    monkeypatch.setattr(Path, "replace", fail)
    (tmp_path / "a.tmp").touch()
    with pytest.raises(FastbyolError, match="cannot be put in place"):
        beton_write.publish(tmp_path / "a.tmp", tmp_path / "out.beton", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tmp"]


def test_an_output_of_the_longest_name(tmp_path: Path) -> None:
    path = tmp_path / (249 * "x" + ".beton")
    assert beton_write.write(path, Items(count=3), labelled=True).path == path
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.beton").write_text("old")
    link = tmp_path / "a.beton"
    link.symlink_to("disk/a.beton")
    beton_write.write(link, Items(count=3), labelled=True, overwrite=True)
    assert link.is_symlink()
    assert beton.inspect(tmp_path / "disk" / "a.beton").num_samples == 3
