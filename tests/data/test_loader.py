"""Batches, streamed and resident: pixels, order, resumption, early ends, failures, refusals."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreign_betons as foreign
from fastbyol.data import beton, prefetch
from fastbyol.data import loader as loading
from fastbyol.data.decoder import Decoder
from fastbyol.data.loader import Batch, Loader, open_loader, read_all, read_in_order
from fastbyol.data.order import permutation, subset
from fastbyol.errors import FastbyolError, UsageError

BATCH = 32
STEPS = foreign.COUNT // BATCH
SEED = 11


def opened(name: str | Path = "raw", cache: Any = "none", **options: Any) -> Loader:
    path = name if isinstance(name, Path) else foreign.made() / f"{name}.beton"
    plain = {"batch_size": BATCH, "seed": SEED, "device": "cpu", "workers": 1, "size": foreign.SIZE}
    return open_loader(path, cache=cache, **{**plain, **options})


def pixels_of(batch: Batch) -> torch.Tensor:
    return batch.images if batch.rows is None else batch.images[batch.rows]


def assert_equal(batch_list: list[Batch], expected: list[Batch]) -> None:
    assert len(batch_list) == len(expected)
    for ours, theirs in zip(batch_list, expected, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(pixels_of(ours), pixels_of(theirs))


def expected_ids(epoch: int) -> np.ndarray:
    return (
        permutation(foreign.COUNT, seed=SEED, epoch=epoch)
        .numpy()[: STEPS * BATCH]
        .reshape(STEPS, BATCH)
    )


def fail_in_the_loop(batches: Iterator[Batch]) -> None:
    for _ in batches:
        raise ZeroDivisionError


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Check that no thread is left but the decoders'."""
    before = set(threading.enumerate())
    yield
    assert {
        thread for thread in threading.enumerate() if not thread.name.startswith("decode")
    } <= before


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("cache", ["none", "device"])
def test_batches_are_the_orders_samples(cache: str, workers: int) -> None:
    with opened(cache=cache, workers=workers) as batches:
        assert (batches.num_samples, batches.steps_per_epoch) == (foreign.COUNT, STEPS)
        for epoch in (0, 5):
            # Kept until the end: a batch is not written to again.
            batch_list = list(batches.epoch(epoch))
            np.testing.assert_array_equal(
                torch.stack([batch.ids for batch in batch_list]).numpy(), expected_ids(epoch)
            )
            for batch in batch_list:
                assert batch.images.dtype == torch.uint8
                expected = np.stack([foreign.pixels("raw", i) for i in batch.ids.tolist()])
                np.testing.assert_array_equal(pixels_of(batch).numpy(), expected)


@pytest.mark.parametrize("name", ["raw", "jpg"])
def test_samples_in_order_are_those_of_the_whole_set(name: str) -> None:
    path = foreign.made() / f"{name}.beton"
    chosen, whole = torch.arange(3, foreign.COUNT, 5), read_all(path, workers=1, size=foreign.SIZE)
    parts = list(
        read_in_order(
            beton.inspect(path), chosen, batch_size=7, workers=1, size=foreign.SIZE, decoder="auto"
        )
    )
    assert all(len(part) == 7 for part in parts[:-1])
    assert torch.equal(torch.cat(parts), whole.images[chosen])


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_limit_trains_on_some_of_the_samples(cache: str) -> None:
    """Expect the same samples in every epoch and for every seed, with their ids and pixels."""
    limit = 2 * BATCH + 5
    chosen = subset(foreign.COUNT, limit)
    assert chosen is not None
    for seed in (SEED, SEED + 1):
        with opened(cache=cache, limit=limit, seed=seed) as batches:
            assert (batches.num_samples, batches.steps_per_epoch) == (limit, 2)
            for epoch in (0, 3):
                batch_list = list(batches.epoch(epoch))
                expected = chosen[permutation(limit, seed=seed, epoch=epoch)[: 2 * BATCH]]
                assert torch.equal(torch.cat([batch.ids for batch in batch_list]), expected)
                for batch in batch_list:
                    pixels = np.stack([foreign.pixels("raw", i) for i in batch.ids.tolist()])
                    np.testing.assert_array_equal(pixels_of(batch).numpy(), pixels)
            assert torch.equal(next(batches.epoch(3, start_step=1)).ids, expected[BATCH:])
    whole, some = (
        read_all(foreign.made() / "raw.beton", workers=1, size=foreign.SIZE, limit=n)
        for n in (0, limit)
    )
    assert torch.equal(some.images, whole.images[chosen])
    assert torch.equal(some.labels, whole.labels[chosen])
    with pytest.raises(
        UsageError, match=r"5 images \(data.limit, of \d+\) are less than one batch"
    ):
        opened(cache=cache, limit=5)


@pytest.mark.parametrize("name", foreign.FILES)
def test_streamed_and_resident_agree_on_every_kind_of_file(name: str) -> None:
    with opened(name, "none", workers=2) as streamed, opened(name, "device") as resident:
        assert (streamed.resident, resident.resident) == (False, True)
        own, rows = list(streamed.epoch(3)), list(resident.epoch(3))
    assert_equal(own, rows)
    # No batch of a resident set has a copy of its images.
    assert {id(batch.images) for batch in rows} == {id(rows[0].images)}
    assert len(rows[0].images) == foreign.COUNT
    assert all(batch.rows is None for batch in own)


@settings(max_examples=15)
@given(st.integers(0, STEPS), st.integers(0, 100), st.sampled_from(["none", "device"]))
def test_resumes_at_any_step(start: int, epoch: int, cache: str) -> None:
    with opened(cache=cache) as batches:
        assert_equal(list(batches.epoch(epoch, start)), list(batches.epoch(epoch))[start:])


@pytest.mark.parametrize("start", [-1, STEPS + 1])
def test_start_beyond_the_epoch(start: int) -> None:
    with opened() as batches, pytest.raises(ValueError, match="start_step"):
        batches.epoch(0, start)


@pytest.mark.usefixtures("no_thread_left")
def test_early_ends_leave_no_thread_and_no_trace() -> None:
    with opened(workers=2) as batches:
        expected = list(batches.epoch(1))
        num_threads = threading.active_count()
        for k in range(30):
            for step, _ in enumerate(batches.epoch(1)):
                if step == k % STEPS:
                    break
            with pytest.raises(ZeroDivisionError):
                fail_in_the_loop(batches.epoch(2))
            assert threading.active_count() == num_threads
        assert_equal(list(batches.epoch(1)), expected)


@pytest.mark.usefixtures("no_thread_left", "two_threads")
def test_twenty_epochs_keep_threads_and_torchs_setting() -> None:
    setting = torch.get_num_threads()
    with opened(workers=2) as batches:
        assert sum(len(list(batches.epoch(epoch))) for epoch in range(20)) == 20 * STEPS
    assert torch.get_num_threads() == setting


@pytest.mark.usefixtures("no_thread_left")
def test_two_loaders_and_two_epochs_at_once() -> None:
    with opened("jpg", workers=2) as first, opened("mixed", workers=2) as second:
        expected = [list(first.epoch(0)), list(second.epoch(1)), list(first.epoch(2))]
        running = (first.epoch(0), second.epoch(1), first.epoch(2))
        together = [list(column) for column in zip(*zip(*running, strict=True), strict=True)]
        for batch_list, alone in zip(together, expected, strict=True):
            assert_equal(batch_list, alone)


@pytest.mark.usefixtures("no_thread_left")
def test_closing_ends_what_runs() -> None:
    batches = opened()
    running = batches.epoch(0)
    next(running)
    batches.close()
    assert list(running) == []
    with pytest.raises(ValueError, match="closed"):
        batches.epoch(1)
    batches.close()


@pytest.mark.usefixtures("no_thread_left")
def test_what_fails_in_the_thread_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = Decoder.decode, []

    def failing(self: Decoder, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise UsageError("sample 7 is damaged")
        decode(self, *arguments)

    with opened() as batches:
        monkeypatch.setattr(Decoder, "decode", failing)
        running, start = batches.epoch(0), time.monotonic()
        assert len([next(running), next(running)]) == 2
        with pytest.raises(UsageError, match="sample 7"):
            next(running)
        assert time.monotonic() - start < 300


def test_a_hanging_decoder_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(prefetch, "STALL_S", 0.3)
    with opened() as batches:
        monkeypatch.setattr(Decoder, "decode", lambda *_: release.wait(600))
        start = time.monotonic()
        with pytest.raises(FastbyolError, match=r"raw\.beton: nothing for 0\.3 s"):
            next(iter(batches.epoch(0)))
        assert time.monotonic() - start < 300
        release.set()


def test_a_stream_from_a_file_too_large_for_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "set.beton"
    path.write_bytes((foreign.made() / "raw.beton").read_bytes())
    with opened(path) as batches:
        expected = list(batches.epoch(4))
    monkeypatch.setattr(loading, "available_bytes", lambda _: path.stat().st_size)
    with opened(path) as batches:
        assert_equal(list(batches.epoch(4)), expected)
        with path.open("r+b") as file:
            file.write(b"\x02")
        with pytest.raises(UsageError, match="the file changed while in use"):
            next(iter(batches.epoch(5)))


@pytest.mark.parametrize(("free_share", "resident"), [(0.39, False), (0.41, True)])
def test_auto_keeps_the_set_where_it_takes_two_fifths_of_what_is_free(
    free_share: float, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded_bytes = foreign.COUNT * 24 * 20 * 3
    monkeypatch.setattr(
        loading, "available_bytes", lambda _: int(decoded_bytes / 0.4 * (free_share / 0.4))
    )
    with opened(cache="auto") as batches:
        assert batches.resident is resident


def test_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"203 images are less than one batch .* = 204; take --batch-size 203 or less",
    ):
        opened(batch_size=foreign.COUNT + 1)
    with pytest.raises(UsageError, match="no such file"):
        opened(tmp_path / "none.beton")
    (tmp_path / "cut.beton").write_bytes((foreign.made() / "raw.beton").read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"cut\.beton, byte"):
        opened(tmp_path / "cut.beton")
    with pytest.raises(UsageError, match=r"cut\.beton, byte"):
        read_all(tmp_path / "cut.beton", workers=1, size=16)
    monkeypatch.setattr(loading, "available_bytes", lambda _: 300_000)
    for use in (
        lambda: opened(cache="device"),
        lambda: read_all(foreign.made() / "raw.beton", workers=1, size=16),
    ):
        with pytest.raises(
            UsageError, match=r"raw\.beton: the decoded images take 292 kB of the 300 kB"
        ):
            use()


@pytest.mark.parametrize("name", foreign.FILES)
def test_read_all_is_the_file_in_its_order(name: str) -> None:
    images, labels, _ = read_all(foreign.made() / f"{name}.beton", workers=2, size=foreign.SIZE)
    with opened(name, batch_size=foreign.COUNT) as batches:
        (batch,) = batches.epoch(0)
    assert torch.equal(images[batch.ids], pixels_of(batch))
    if name == "unlabelled":
        assert labels is None
    else:
        assert labels is not None
        assert labels.tolist() == [foreign.label(i) for i in range(foreign.COUNT)]


@pytest.mark.parametrize(("free_share", "where"), [(0.39, "cpu"), (0.41, "meta")])
def test_read_all_leaves_images_on_a_device_that_has_room(
    free_share: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where training images would be kept, too; ``meta`` stands for a GPU and holds no values."""
    need = foreign.COUNT * 24 * 20 * 3
    monkeypatch.setattr(
        loading,
        "available_bytes",
        lambda where: 10 * need if where.type == "cpu" else need / 0.4 * (free_share / 0.4),
    )
    file = foreign.made() / "raw.beton"
    images, labels, _ = read_all(file, workers=1, size=16, device=torch.device("meta"))
    assert (images.device.type, tuple(images.shape)) == (where, (foreign.COUNT, 24, 20, 3))
    assert labels is not None
    assert labels.device.type == "cpu"


def test_sets_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_all(foreign.made() / "jpg.beton", workers=1, size=foreign.SIZE)
    monkeypatch.setattr(loading, "CHUNK", 50)
    assert torch.equal(
        read_all(foreign.made() / "jpg.beton", workers=1, size=foreign.SIZE).images, whole.images
    )


LEAVE = """
from fastbyol.data.loader import open_loader
batches = open_loader({path!r}, batch_size=2, seed=0, device="cpu", cache="none", workers=2,
size=16)
running = [batches.epoch(0), batches.epoch(1)]
for each in running:
    next(each)
"""


def test_a_process_may_end_in_mid_epoch() -> None:
    """Expect no crash of decoding threads and no error in a finalizer."""
    code = LEAVE.format(path=str(foreign.made() / "jpg.beton"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, timeout=600, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
