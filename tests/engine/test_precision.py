"""What ``auto`` becomes, and that the gate tells a network that bears bf16 from one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbyol import api, load_config
from fastbyol.config import Config
from fastbyol.engine import precision
from fastbyol.engine.observer import Silent
from fastbyol.engine.run_folder import RunFolder
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from tiny import beton_files, tiny_config

CPU = torch.device("cpu")


def network(norm: str, heads: str, ws: bool) -> Config:
    sets = {"norm": norm, "projector.norm": heads, "predictor.norm": heads, "ws": str(ws).lower()}
    return load_config("blog", [f"model.{key}={value}" for key, value in sets.items()])


def with_units(monkeypatch: pytest.MonkeyPatch, **units: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)


@pytest.mark.parametrize("unit", precision.CPU_UNITS)
def test_a_processor_with_bf16_units_takes_bf16(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    with_units(monkeypatch, **{unit: True})
    chosen = precision.choose(network("bn", "bn", False), CPU)
    assert chosen.value == "bf16"
    assert unit in chosen.why


def test_a_processor_without_takes_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    with_units(monkeypatch, avx512_f=True, amx_bf16=False)
    assert precision.choose(network("bn", "bn", False), CPU).value == "fp32"


def test_a_network_that_loses_its_gradients_takes_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group norm in the heads over standardized weights: the gradient's direction is gone, by bf16's rounding of y alone."""
    with_units(monkeypatch, avx512_bf16=True)
    chosen = precision.choose(network("gn", "gn", True), CPU)
    assert chosen.value == "fp32"
    assert "gradients are off" in chosen.why


def test_the_gap_is_none_between_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_narrow", lambda config, _: config)
    config = load_config("blog", ["train.precision=fp64", "model.width=4", "model.projector.out=32", "model.predictor.out=32"])
    assert precision.gradient_gap(config, CPU, "collapsed") == (0.0, 0.0)


def test_the_exact_step_has_no_use_for_tritons_kernels() -> None:
    config = load_config("blog", ["engine.kernels=triton"])
    assert [precision._narrow(config, unit).engine.kernels for unit in ("fp64", "bf16")] == ["auto", "triton"]


def test_a_run_names_what_auto_became(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_units(monkeypatch, avx512_bf16=True)
    config = tiny_config(beton_files(tmp_path), "train.precision=auto", "train.epochs=1")
    notes: list[str] = []
    observer = Silent()
    monkeypatch.setattr(observer, "note", notes.append)
    api.train(config, tmp_path / "run", observer=observer)
    assert notes[0].startswith("precision auto is bf16: ")
    with_units(monkeypatch)  # another machine: a resume does not choose again
    with RunFolder.open(tmp_path / "run", lock=False) as folder:
        assert folder.config.train.precision == "bf16"
        assert precision.settle(folder.config) == folder.config


def test_a_state_is_made_of_a_settled_precision() -> None:
    with pytest.raises(UsageError, match="has to be settled"):
        TrainState.create(load_config("blog", ["model.width=4"]), steps_per_epoch=1)
