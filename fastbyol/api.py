"""What scripts call: train, resume, evaluate, load an encoder. The command line is a thin layer over these."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastbyol import config_io
from fastbyol.config import Config, resolve
from fastbyol.data import embedded, loader
from fastbyol.engine import capture, checkpoint, inputs, record, trainer
from fastbyol.engine.device import pick_device
from fastbyol.engine.observer import Observer
from fastbyol.engine.origin import source_file
from fastbyol.engine.precision import settle
from fastbyol.engine.run_folder import RunFolder, default_run_path
from fastbyol.engine.step import TrainState
from fastbyol.engine.trainer import Summary
from fastbyol.errors import UsageError
from fastbyol.evaluation import protocol as protocols
from fastbyol.evaluation.protocol import PROTOCOLS

_log = logging.getLogger(__name__)


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    observer: Observer | None = None,
    origin: Mapping[str, str] | None = None,
) -> Summary:
    """Train ``config`` in the new run folder ``out`` (default: a fresh name under ``runs/``).

    With ``train.init_from`` it starts from another run's weights; the run's own ``config.toml`` then names the checkpoint.
    Raises ``UsageError`` for input that cannot work, ``CollapsedError`` where the run was asked to stop on collapse, and
    ``NoGraphError`` where no CUDA graph can be had under ``engine.mode`` auto: ``resume`` then goes on with the run, compiled,
    from another process.
    """
    config = _with_source(resolve(config), observer)
    config = inputs.with_places(config, config)
    capture.choose(config.engine, pick_device(config.train.device))  # refuses what this machine lacks
    config = settle(config, observer.note) if observer is not None else settle(config)
    path = Path(out) if out is not None else default_run_path(config)
    with RunFolder.create(path, config, origin) as folder:
        return trainer.fit(folder, config, observer)


def _with_source(config: Config, observer: Observer | None) -> Config:
    """``train.init_from`` made the one file that is meant: a run's newest checkpoint will be another one later."""
    if config.train.init_from is None:
        return config
    file, warnings = source_file(Path(config.train.init_from))
    if observer is not None:
        for warning in warnings:
            observer.note(warning)
    return config.model_copy(update={"train": config.train.model_copy(update={"init_from": str(file)})})


def resume(
    run: str | Path,
    *,
    data: str | Path | None = None,
    test_data: str | Path | None = None,
    observer: Observer | None = None,
) -> Summary:
    """Go on with a run from its newest sound checkpoint, bit for bit as if it had never stopped. Raises what ``train`` does.

    ``data`` and ``test_data`` say where its files lie now; the run keeps that. What they hold must be what it was made with.
    """
    with RunFolder.open(Path(run), lock=True) as folder:
        config = inputs.moved(inputs.with_places(folder.config, folder.config), data, test_data)
        return trainer.fit(folder, config, observer)


def load_encoder(run_or_file: str | Path, *, weights: str = "trained") -> nn.Module:
    """The online encoder f of a run folder or a checkpoint file, in eval mode, float32, on the CPU.

    Where a run's newest checkpoint is damaged the one before is taken, and the log says so.

    It maps views (N, 3, S, S), normalised as ``views.plain`` does, to embeddings y (N, 8 * width).
    ``weights="random"`` gives the same network as it was before its first step.
    """
    return _load(Path(run_or_file), weights)[1]


def _load(path: Path, weights: str) -> tuple[Config, nn.Module, int]:
    if path.is_dir():
        with RunFolder.open(path, lock=False) as folder:
            config = folder.config
            loaded = None if weights == "random" else checkpoint.load_latest(folder.checkpoints)
            made_with = loaded.meta["config"] if loaded is not None else folder.env.get("config")
            if isinstance(made_with, str):
                record.refuse_changed(path, config, made_with, str(path))
    else:
        loaded = checkpoint.load(path)
        config = config_io.parse(loaded.meta["config"], where=str(path))
    for warning in loaded.warnings if loaded is not None else ():
        _log.warning("%s", warning)
    state = TrainState.create(config, steps_per_epoch=1, device="cpu")
    if loaded is not None and weights != "random":
        state.load_tensors(loaded.tensors)
    encoder: nn.Module = state.online.encoder.float().eval()
    return config, encoder, int(loaded.meta["step"]) if loaded is not None else 0


def evaluate(
    run: str | Path,
    protocol: str = "blog",
    *,
    train_data: str | Path | None = None,
    test_data: str | Path | None = None,
    weights: str = "trained",
    device: str = "auto",
) -> dict[str, Any]:
    """Accuracy of a run's encoder under ``protocol`` (``blog``, ``linear`` or ``knn``; see ``evaluation.protocol``).

    Data default to the run's own images; files that are named are taken whole. ``blog`` does not look at ``train_data``.
    The run's own must hold what they held when it was made. Returns a dict with at least ``accuracy`` (percent), ``protocol``,
    ``step`` and ``notes``: lines on what keeps the accuracy from saying much.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol: {protocol!r} is none of {', '.join(PROTOCOLS)}")
    config, encoder, step = _load(Path(run), weights)
    data, pinned = config.data, inputs.of_run(Path(run))
    test_file = Path(test_data) if test_data else embedded.held_out_file(data)
    if test_file is None:
        raise UsageError(f"{run}: the run has no test data: name a labelled beton with --test-data")

    def read(name: str, file: Path, limit: int, *, named: bool) -> loader.Images:
        own = file if named else inputs.own_data(Path(run), pinned, name, file)
        return loader.read_all(own, workers=data.workers, size=data.size or config.views.size, limit=0 if named else limit)

    test = read("test", test_file, data.test_limit, named=test_data is not None)
    train = None
    if protocol != "blog":  # which is fitted within the test set
        train_file = Path(train_data) if train_data else embedded.training_file(data)
        train = read("train", train_file, data.limit, named=train_data is not None)
    target = pick_device(device)
    result = protocols.evaluate(protocol, encoder.to(target), test=test, train=train, views=config.views, device=target)
    return {"run": str(run), "step": step, "weights": weights, **result}
