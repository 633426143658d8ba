"""telemetry.py, metrics.py, layers.py: exact values, and the same bytes whether a run was killed or
not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbyol.engine.telemetry import Telemetry
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.runs import layers as layers_file
from fastbyol.runs.layers import read_layers
from fastbyol.runs.metrics import MetricsFile, read_events, read_metrics

METRICS = ("loss", "neg_cos")
LAYERS = ("encoder.conv1.weight", "encoder.bn1.weight", "encoder.bn1.bias")
LAYER_METRICS = ("weight_norm", "rate")
SPACE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


class Measured(NamedTuple):
    values: torch.Tensor
    layers: torch.Tensor


def measured(step: int) -> Measured:
    """A step's measures, a function of the step alone as training is; now and then they are not
    finite.
    """
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(len(METRICS), generator=generator)
    layers = torch.randn(len(LAYERS), len(LAYER_METRICS), generator=generator)
    if step % 11 == 5:
        values[1] = (math.nan, math.inf, -math.inf)[step % 3]
        layers[0, 0] = math.nan
    return Measured(values, layers)


def open_telemetry(folder: Path, resume_step: int = 0, **changed: Any) -> Telemetry:
    options: dict[str, Any] = {
        "steps_per_epoch": 5,
        "drain_every": 4,
        "layers_every": 1,
        "device": "cpu",
        **changed,
    }
    return Telemetry(
        folder,
        metric_names=METRICS,
        layer_names=LAYERS,
        layer_metric_names=LAYER_METRICS,
        resume_step=resume_step,
        **options,
    )


def strict(path: Path, **options: Any) -> list[dict[str, Any]]:
    """Lines parsed by the letter of RFC 8259, which knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [
        json.loads(line, parse_constant=refuse, **options)
        for line in path.read_text("utf-8").splitlines()
    ]


def train(telemetry: Telemetry, first: int, last: int, steps_per_epoch: int) -> Iterator[int]:
    """The trainer's calls for steps first..last - 1; yields the step number wherever a checkpoint
    could be saved.
    """
    for step in range(first, last):
        telemetry.record(measured(step))
        if (step + 1) % steps_per_epoch == 0:
            means = telemetry.epoch_summary()
            telemetry.event(
                "epoch",
                step=step + 1,
                epoch=step // steps_per_epoch,
                state="healthy",
                accuracy=None,
                **means,
            )
        yield step + 1


def abandon(telemetry: Telemetry) -> None:
    """Leave everything as a kill does: nothing flushed, descriptors closed by the system."""
    for file in (telemetry._metrics._file, telemetry._layers._file, telemetry._timing):
        file.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != "timing.jsonl"
    }


def test_lines_hold_every_step_in_order_with_its_epoch(tmp_path: Path) -> None:
    with open_telemetry(tmp_path) as telemetry:
        list(train(telemetry, 0, 12, 5))
    rows, events = read_metrics(tmp_path)
    assert [(row["step"], row["epoch"]) for row in rows] == [
        (step, step // 5) for step in range(12)
    ]
    for step, row in enumerate(rows):
        for name, value in zip(METRICS, measured(step).values, strict=True):
            assert row[name] == (value.item() if value.isfinite() else None) or np.float32(
                row[name]
            ) == np.float32(value)
    assert [(event["event"], event["step"], event["epoch"]) for event in events] == [
        ("epoch", 5, 0),
        ("epoch", 10, 1),
    ]
    order = [("event" in line, line["step"]) for line in strict(tmp_path / "metrics.jsonl")]
    assert order[5] == (True, 5)
    assert order[11] == (True, 10)


@settings(SPACE, max_examples=50)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_a_float32_comes_back_exactly_and_as_short_as_can_be(
    tmp_path: Path, numbers: list[float]
) -> None:
    with closing(MetricsFile(tmp_path, ["x"], steps_per_epoch=100, resume_step=0)) as metrics:
        metrics.append_steps(0, np.array(numbers, np.float32)[:, None])
    written = strict(tmp_path / "metrics.jsonl", parse_float=str)
    for number, row, text in zip(numbers, strict(tmp_path / "metrics.jsonl"), written, strict=True):
        if math.isfinite(number):
            assert np.float32(row["x"]).tobytes() == np.float32(number).tobytes()
            # Nine digits always do (IEEE 754-2019, 5.12.2).
            assert len(re.sub(r"e.*|\D", "", text["x"]).strip("0")) <= 9
            # The bytes of earlier code, numpy's text, whose exponents begin elsewhere in its
            # versions.
            assert (
                text["x"] == str(np.float32(number))
                or abs(number) >= 1e6
                or round(abs(number), 9) == 1e-4
            )
        else:
            assert row["x"] is None


def test_record_returns_what_was_written_meanwhile(tmp_path: Path) -> None:
    with open_telemetry(tmp_path, drain_every=3) as telemetry:
        returned = [telemetry.record(measured(step)) for step in range(7)]
        assert [len(rows) for rows in returned] == [0, 0, 3, 0, 0, 3, 0]
        assert len(strict(tmp_path / "metrics.jsonl")) == 6
        (last,) = telemetry.flush()
    assert (last["step"], last["epoch"]) == (6, 1)
    assert np.float32(last["loss"]) == measured(6).values[0].numpy()
    assert math.isnan(returned[5][2]["neg_cos"])  # step 5 is not finite


@settings(
    SPACE, max_examples=40
)  # 3,000 were tried once; each forces files to disk dozens of times
@given(
    total=st.integers(1, 40),
    steps_per_epoch=st.integers(1, 9),
    drain_every=st.integers(1, 12),
    layers_every=st.integers(1, 5),
    save_every=st.integers(1, 12),
    kills=st.lists(
        st.tuples(st.integers(1, 20), st.binary(max_size=40), st.binary(max_size=60)), max_size=4
    ),
    clean=st.booleans(),
)
def test_killed_and_resumed_is_byte_for_byte_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    total: int,
    steps_per_epoch: int,
    drain_every: int,
    layers_every: int,
    save_every: int,
    kills: list[tuple[int, bytes, bytes]],
    clean: bool,
) -> None:
    """Runs die anywhere, with a half-written tail in both files; each resumes from its last
    checkpoint.
    """
    changed = {
        "steps_per_epoch": steps_per_epoch,
        "drain_every": drain_every,
        "layers_every": layers_every,
    }
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    with open_telemetry(whole, **changed) as telemetry:
        list(train(telemetry, 0, total, steps_per_epoch))
    saved = 0
    for life, tail, rows_tail in kills:
        telemetry = open_telemetry(broken, saved, **changed)
        for step in train(telemetry, saved, min(saved + life, total), steps_per_epoch):
            if step % save_every == 0 or step % steps_per_epoch == 0:
                telemetry.flush()
                saved = step
        if clean:
            telemetry.close()
            continue
        abandon(telemetry)
        with (broken / "metrics.jsonl").open("ab") as file:
            file.write(tail)
        with (broken / "layers.npy").open("ab") as file:
            file.write(rows_tail)
    with open_telemetry(
        broken, saved, drain_every=5, layers_every=layers_every, steps_per_epoch=steps_per_epoch
    ) as telemetry:
        list(train(telemetry, saved, total, steps_per_epoch))
    assert contents(broken) == contents(whole)
    assert set(contents(whole)) == {"metrics.jsonl", "layers.npy"}


def test_epoch_means_are_those_of_the_whole_epoch_after_a_resumption(tmp_path: Path) -> None:
    steps = [0, 1, 2, 3]  # finite ones
    reference = torch.stack([measured(step).values for step in steps]).double().mean(0)
    telemetry = open_telemetry(tmp_path, steps_per_epoch=4, drain_every=3)
    for step in steps[:3]:
        telemetry.record(measured(step))
    telemetry.flush()
    abandon(telemetry)
    with open_telemetry(tmp_path, 3, steps_per_epoch=4, drain_every=3) as telemetry:
        telemetry.record(measured(3))
        means = telemetry.epoch_summary()
        assert list(means) == list(METRICS)
        # Shortest decimals stand for the float32: off by half a unit in its last place at most.
        assert means["loss"] == pytest.approx(reference[0].item(), rel=1e-7)
        assert telemetry.epoch_summary() == means
        telemetry.record(measured(4))
        assert telemetry.epoch_summary()["loss"] == pytest.approx(
            measured(4).values[0].item(), rel=1e-7
        )
        telemetry.record(measured(5))
        assert math.isnan(telemetry.epoch_summary()["neg_cos"])


def test_an_event_at_the_checkpoint_is_kept_and_later_ones_are_cut(tmp_path: Path) -> None:
    with open_telemetry(tmp_path) as telemetry:
        telemetry.event("start", step=0, names=["a"], ratio=0.1, missing=float("nan"))
        list(train(telemetry, 0, 10, 5))
    with open_telemetry(tmp_path, 5):
        pass
    rows, events = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [event["step"] for event in events] == [0, 5]
    assert events[0] == {"event": "start", "step": 0, "names": ["a"], "ratio": 0.1, "missing": None}
    assert events == read_events(tmp_path)
    with open_telemetry(tmp_path, 0):
        pass
    assert read_metrics(tmp_path) == ([], events[:1])
    assert read_layers(tmp_path).values.shape == (0, len(LAYERS), len(LAYER_METRICS))


@pytest.mark.parametrize("every", [1, 3])
def test_layers_hold_every_nth_step(tmp_path: Path, every: int) -> None:
    with open_telemetry(tmp_path, layers_every=every, drain_every=4) as telemetry:
        for step in range(11):
            telemetry.record(measured(step))
        telemetry.flush()
        live = read_layers(tmp_path)
    steps = list(range(0, 11, every))
    expected = torch.stack([measured(step).layers for step in steps]).numpy()
    for mode in (None, "r"):
        rows = np.load(tmp_path / "layers.npy", mode)
        assert rows["step"].dtype == np.int64
        assert rows["step"].tolist() == steps
        assert tuple(rows.dtype.fields["layers"][2].split()) == LAYERS
        for index, name in enumerate(LAYER_METRICS):
            assert rows["layers"][name].dtype == np.float32
            assert rows["layers"][name].tobytes() == expected[..., index].tobytes()
    for layers in (live, read_layers(tmp_path)):
        assert layers.steps.tolist() == steps
        assert layers.values.tobytes() == expected.tobytes()
        assert (layers.names, layers.metrics) == (LAYERS, LAYER_METRICS)


def test_layers_load_at_every_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each write that a run makes, in whatever pieces; written bytes are the rows once and a
    block for each flush.
    """
    path, sizes, lengths = tmp_path / "layers.npy", [], []

    def loads() -> None:
        rows = np.load(path)
        assert rows["step"].tolist() == list(range(len(rows)))
        assert rows["layers"]["rate"].tolist() == [
            measured(step).layers[:, 1].tolist() for step in range(len(rows))
        ]
        lengths.append(len(rows))

    def in_pieces(file: BinaryIO, data: bytes) -> None:
        for start in range(0, len(data), 5):
            sizes.append(file.write(data[start : start + 5]))
            loads()

    def block(descriptor: int, data: bytes, offset: int) -> int:
        loads()
        sizes.append(written := pwrite(descriptor, data, offset))
        loads()
        return written

    pwrite = os.pwrite
    monkeypatch.setattr(layers_file, "append", in_pieces)
    monkeypatch.setattr(os, "pwrite", block)
    with open_telemetry(tmp_path, drain_every=2) as telemetry:
        for step in range(24):
            telemetry.record(measured(step))
    with open_telemetry(tmp_path, 7):
        pass
    assert set(lengths) == {*range(0, 25, 2), 7}
    row = 8 + 4 * len(LAYERS) * len(LAYER_METRICS)
    assert sum(sizes) == 24 * row + 14 * 64
    assert path.stat().st_size == len(path.read_bytes()[: -7 * row]) + 7 * row


def test_a_damaged_middle_ends_the_file_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_telemetry(tmp_path) as telemetry:
        list(train(telemetry, 0, 4, 50))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b"\0\0\0\0\n", b'{"step": 2\n', b'{"loss": 1}\n', b"3\n"):
        path.write_bytes(lines[0] + lines[1] + damage + lines[3])
        assert [row["step"] for row in read_metrics(tmp_path)[0]] == [0, 1]
    with caplog.at_level(logging.WARNING), open_telemetry(tmp_path, 4):
        pass
    assert "holds 2 steps of the 4 done" in caplog.text


def test_layers_of_another_network_are_refused(tmp_path: Path) -> None:
    open_telemetry(tmp_path).close()
    with pytest.raises(UsageError, match="another network"):
        layers_file.LayersFile(tmp_path, ("other",), LAYER_METRICS, every=1, resume_step=2)


def test_reading_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "layers.npy").write_bytes(b"no archive")
    for read, folder in (
        (read_metrics, tmp_path),
        (read_layers, tmp_path),
        (read_layers, tmp_path / "broken"),
    ):
        with pytest.raises(UsageError) as caught:
            read(folder)
        assert len(str(caught.value).splitlines()) == 1


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FastbyolError, match=r"metrics.jsonl: cannot write: No such file") as caught:
        open_telemetry(tmp_path / "absent")
    assert len(str(caught.value).splitlines()) == 1


def test_clock_times_go_to_a_file_of_their_own_that_only_grows(tmp_path: Path) -> None:
    for resume_step in (0, 4):
        with open_telemetry(tmp_path, resume_step) as telemetry:
            list(train(telemetry, resume_step, 8, 50))
    lines = strict(tmp_path / "timing.jsonl")
    assert [line["event"] for line in lines] == [
        "open",
        "drain",
        "drain",
        "close",
        "open",
        "drain",
        "close",
    ]
    assert all(earlier["unix_s"] <= later["unix_s"] for earlier, later in pairwise(lines))


def test_closing_twice_or_after_an_error_writes_once(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path)
    telemetry.record(measured(0))
    with pytest.raises(ZeroDivisionError), telemetry:
        raise ZeroDivisionError
    telemetry.close()
    assert [row["step"] for row in read_metrics(tmp_path)[0]] == [0]


def test_a_file_that_cannot_be_written_leaves_none_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held() -> list[Path]:
        files = [file.resolve() for file in Path("/proc/self/fd").iterdir()]
        return [file for file in files if tmp_path in file.parents]

    telemetry = open_telemetry(tmp_path)
    telemetry.record(measured(0))
    assert len(held()) == 3
    monkeypatch.setattr(MetricsFile, "sync", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        telemetry.close()
    assert held() == []


@pytest.mark.gpu(only=True)
def test_recording_and_draining_never_wait_for_the_gpu(tmp_path: Path) -> None:
    """torch's own detector of synchronising calls is set to raise; values still arrive, one ring
    late.
    """
    reference = tmp_path / "cpu"
    on_device = [Measured(*(part.cuda() for part in measured(step))) for step in range(24)]
    with open_telemetry(tmp_path, device="cuda") as telemetry:
        torch.cuda.set_sync_debug_mode("error")
        try:
            sizes = [len(telemetry.record(step)) for step in on_device]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [size for size in sizes if size] == [4] * 5
    reference.mkdir()
    with open_telemetry(reference) as telemetry:
        for step in range(24):
            telemetry.record(measured(step))
    assert contents(reference).items() <= contents(tmp_path).items()
