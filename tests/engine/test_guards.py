"""Too little disk or memory and numbers that are not finite are reported before they do harm."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbyol import api
from fastbyol.config import Config
from fastbyol.engine import guards
from fastbyol.errors import FastbyolError, UsageError
from tiny import beton_files, tiny_config

Usage = namedtuple("Usage", "total used free")


def test_the_estimate_bounds_what_a_run_writes_and_not_by_far(tmp_path: Path) -> None:
    """Against a real run's folder: its files are within the estimate, which is within thrice of
    them.
    """
    config = tiny_config(
        beton_files(tmp_path), "run.keep_checkpoints=2", "run.checkpoint_every_steps=3"
    )
    api.train(config, tmp_path / "run")
    files = [
        path
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and path.suffix not in (".json", ".toml")
    ]
    written = sum(path.stat().st_size for path in files)
    checkpoints = [path.stat().st_size for path in files if path.suffix == ".safetensors"]
    from fastbyol.engine.step import LAYER_METRICS, METRICS, TrainState

    state = TrainState.create(config, steps_per_epoch=6)
    estimate = guards.disk_bytes(
        config,
        checkpoint_bytes=checkpoints[0],
        steps=18,
        num_metrics=len(METRICS),
        layer_numbers=len(LAYER_METRICS) * len(state.segment_names),
    )
    assert written <= estimate <= 3 * written


def test_a_disk_too_small_refuses_the_run_with_numbers_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(beton_files(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(
        UsageError,
        match=r"MB are needed for checkpoints and telemetry, 1.0 kB are free.*keep_checkpoints "
        r"\(3\)",
    ):
        api.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@given(
    count=st.integers(1, 64),
    index=st.integers(0, 63),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_one_bad_number_among_many_has_a_name(count: int, index: int, bad: float) -> None:
    largest = torch.finfo(torch.float32).max
    tensors = {
        "count": torch.tensor(3),
        "big": torch.full((count,), largest),
        "small": torch.full((count,), -largest),
    }
    assert guards.not_finite(tensors) is None
    tensors["small"][index % count] = bad
    assert guards.not_finite(tensors) == "small"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate "
            "memory"
        ),
    ],
)
def test_running_out_of_memory_says_what_to_lower(error: Exception) -> None:
    advice = r"batch_size \(256\), views.size \(96\) or model.width \(64\).*data.cache"
    with pytest.raises(FastbyolError, match=advice), guards.memory_advice(Config()):
        raise error


def test_a_real_allocation_that_cannot_be_is_one(tmp_path: Path) -> None:
    with pytest.raises(FastbyolError, match="out of memory"), guards.memory_advice(Config()):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shape"), guards.memory_advice(Config()):
        raise RuntimeError("shape mismatch")
