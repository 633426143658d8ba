"""A new run from another run's weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastbyol import api
from fastbyol.cli.main import app
from fastbyol.engine import origin
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.runs import checkpoint
from tiny import beton_files, tiny_config


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("betons"))


@pytest.fixture(scope="module")
def source(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("source") / "run"
    api.train(tiny_config(files, "probe.every_epochs=0"), run)
    return run


def test_weights_and_statistics_come_over_momentum_and_step_do_not(
    files: tuple[Path, Path], source: Path
) -> None:
    saved = checkpoint.load_latest(source / "checkpoints")
    state = TrainState.create(
        tiny_config(files, "train.seed=9", "optim.name=lars"), steps_per_epoch=6
    )
    origin.copy_weights(state, saved.path)
    mine = state.tensors()
    for name, tensor in saved.tensors.items():
        if name in ("arena.momentum", "step"):
            assert not mine[name].any()
            assert tensor.any()
        else:
            assert torch.equal(mine[name], tensor), name


def test_weights_that_come_over_are_rounded_anew(files: tuple[Path, Path], source: Path) -> None:
    state = TrainState.create(
        tiny_config(files, "train.seed=9", "train.precision=bf16"), steps_per_epoch=6
    )
    origin.copy_weights(state, checkpoint.load_latest(source / "checkpoints").path)
    for copy, buffer in zip(
        state.weights.rounded_copies, (state.arena.online, state.arena.target), strict=True
    ):
        assert copy is not None
        assert torch.equal(copy, buffer.bfloat16())


def test_a_network_of_another_shape_is_refused_by_the_first_tensor(
    files: tuple[Path, Path], source: Path
) -> None:
    wider = TrainState.create(
        tiny_config(files, "model.projector.out=12", "model.predictor.out=12"), steps_per_epoch=6
    )
    before = {name: tensor.clone() for name, tensor in wider.tensors().items()}
    file = checkpoint.load_latest(source / "checkpoints").path
    with pytest.raises(
        UsageError, match=r"online\.\S+ is \(.*\) there and \(.*\) in this network"
    ) as caught:
        origin.copy_weights(wider, file)
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in wider.tensors().items())
    plain = TrainState.create(tiny_config(files, "model.norm=none"), steps_per_epoch=6)
    with pytest.raises(UsageError, match="absent"):
        origin.copy_weights(plain, file)


def test_a_run_remembers_where_it_began_and_needs_its_source_no_longer(
    files: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    """It is resumed bit for bit from its own checkpoint of step 0 after the source is gone."""
    newest = checkpoint.load_latest(source / "checkpoints").path
    copy = tmp_path / newest.name
    copy.write_bytes(newest.read_bytes())
    config = tiny_config(
        files,
        f"train.init_from={copy}",
        "train.epochs=1",
        "probe.every_epochs=0",
        "run.keep_checkpoints=9",
    )
    api.train(config, tmp_path / "run")
    assert f'init_from = "{copy}"' in (tmp_path / "run" / "config.toml").read_text()
    first, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert torch.equal(
        checkpoint.load(first).tensors["arena.online"],
        checkpoint.load(newest).tensors["arena.online"],
    )
    whole = last.read_bytes()
    last.unlink()
    copy.unlink()
    assert api.resume(tmp_path / "run").finished
    assert last.read_bytes() == whole


def test_the_flag_takes_a_run_and_refuses_what_is_none(
    files: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    from fastbyol import config_io

    (tmp_path / "config.toml").write_text(
        config_io.dump(tiny_config(files, "train.epochs=1", "probe.every_epochs=0"))
    )
    arguments = [
        "train",
        "--config",
        str(tmp_path / "config.toml"),
        "--out",
        str(tmp_path / "run"),
        "--init-from",
    ]
    result = CliRunner().invoke(app, [*arguments, str(source)])
    assert result.exit_code == 0, result.output
    named = checkpoint.load_latest(source / "checkpoints").path.resolve()
    assert f'init_from = "{named}"  # --init-from' in (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(UsageError, match="no checkpoint"):
        api.train(tiny_config(files, f"train.init_from={tmp_path}"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
