"""What is said of a checkpoint: against the gradients and activations of plain PyTorch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbyol import api
from fastbyol_bench.science import mechanism
from tiny import STEPS_PER_EPOCH, beton_files, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mechanism")
    config = tiny_config(beton_files(folder), "model.norm=gn", "run.keep_checkpoints=9")
    return Path(api.train(config, folder / "run").run)


def lines_of(run: Path) -> list[dict[str, float]]:
    """The steps that a run recorded."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "event" not in line]


def test_signal_and_noise_are_without_bias() -> None:
    """Drawn many times around a known mean, their squares come to it and to the variance."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.linspace(-4.0, 4.0, 50, dtype=torch.float64)
    rows = [
        mechanism.signal_and_noise(
            mean + 2.0 * torch.randn(4, 50, generator=generator, dtype=torch.float64)
        )
        for _ in range(4000)
    ]
    # 50 elements of variance 4. The deviations of both means of 4,000 draws are below .6.
    assert sum(row.noise**2 for row in rows) / 4000 == pytest.approx(200.0, abs=2.5)
    squares = sum(row.signal**2 for row in rows) / 4000
    assert squares == pytest.approx(float(mean.square().sum()), abs=2.5)
    # Equal gradients are all signal.
    same = mechanism.signal_and_noise(mean.expand(3, -1))
    assert same == pytest.approx((float(mean.norm()), 0.0), abs=1e-7)


def test_a_look_is_the_gradient_of_the_batches_that_follow(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch's gradient of early layers has the norm that the run then recorded."""
    first: list[Tensor] = []

    def noted(state: object, gradients: list[Tensor]) -> dict[str, object]:
        first.extend(gradients)
        return {}

    monkeypatch.setattr(mechanism, "_by_stage", noted)
    file = run / f"checkpoints/ckpt-{STEPS_PER_EPOCH:09d}.safetensors"
    mechanism.look(run, file, 2)
    steps = lines_of(run)
    recorded = [row["grad_norm"] for row in steps[STEPS_PER_EPOCH : STEPS_PER_EPOCH + 1]]
    # fp32 against fp64, on a network that is not collapsed.
    assert [float(g.norm()) for g in first[:1]] == pytest.approx(recorded, rel=1e-4)


def test_the_command_looks_at_every_checkpoint(run: Path, tmp_path: Path) -> None:
    mechanism.main([run], tmp_path / "seen.json", batches=3)
    (seen,) = json.loads((tmp_path / "seen.json").read_text())
    assert seen["seed"] == 0
    rows = seen["looks"]
    assert [row["step"] for row in rows] == [STEPS_PER_EPOCH * n for n in (1, 2, 3)]
    for row in rows:
        assert row["spread"].keys() == mechanism.PARTS.keys()
        assert row["gradient"].keys() == mechanism.STAGES.keys()
    # The spread of z is what the run measures at its next steps, in another batch.
    measured = [line["std_z"] for line in lines_of(run) if line["step"] in (6, 7, 8)]
    assert rows[0]["spread"]["z"] == pytest.approx(sum(measured[:3]) / 3, rel=0.5)
    # By hand: the mean over steps, and the slope through the logarithms.
    (curve, *_) = seen["curves"]
    own = [line["std_z"] for line in lines_of(run) if line["step"] < STEPS_PER_EPOCH]
    assert curve["std_z"] == pytest.approx(sum(own) / 6)
    around = [n - 2.5 for n in range(6)]
    slope = sum(x * math.log(s) for x, s in zip(around, own, strict=True)) / sum(
        x * x for x in around
    )
    assert curve["growth"] == pytest.approx(slope)
    # SGD's rate is its learning rate, here the same for all.
    assert curve["early_rate"] == pytest.approx(0.1, rel=1e-6)
    assert 0 < curve["early_move"] < 1
