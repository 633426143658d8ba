"""What scripts call: train, resume, evaluate, load an encoder. The command line is a thin layer over these.

Each leaves the process as it found it (``process.left_as_found``). None touches the C library's allocator, which could not be
put back: ``engine.allocator.keep_freed_memory`` is for processes that only train, as the command line's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastbyol import config_io
from fastbyol.config import Config, resolve
from fastbyol.data import decoder as decoding
from fastbyol.data import embedded, loader
from fastbyol.engine import capture, trainer
from fastbyol.engine.device import pick_device
from fastbyol.engine.observer import Observer
from fastbyol.engine.origin import source_file
from fastbyol.engine.precision import settle
from fastbyol.engine.step import TrainState
from fastbyol.engine.trainer import Summary
from fastbyol.errors import UsageError, check_choice
from fastbyol.evaluation import protocol as protocols
from fastbyol.evaluation.protocol import PROTOCOLS
from fastbyol.model.resnet import ResNet
from fastbyol.process import left_as_found
from fastbyol.runs import checkpoint, consistency, inputs
from fastbyol.runs.folder import RunFolder, default_run_path

# Of an encoder: the online network's, the target network's, and the online network's before its first step.
WEIGHTS = ("trained", "target", "random")

_log = logging.getLogger(__name__)


@left_as_found()
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
    config = inputs.with_paths(config, config)
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


@left_as_found()
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
        config = inputs.moved(inputs.with_paths(folder.config, folder.config), data, test_data)
        return trainer.fit(folder, config, observer)


@left_as_found()
def load_encoder(run_or_file: str | Path, *, weights: str = "trained") -> nn.Module:
    """The encoder f of a run folder or a checkpoint file as an ordinary network: in eval mode, float32, on the CPU.

    It maps views (N, 3, S, S), normalised as ``views.plain`` does, to embeddings y (N, 8 * width). It is torchvision's ResNet
    of torch's own operations (``model.ordinary``), without the engine's kernels and its statistics per view, so that whatever
    torch can do with a network can be done with it; ``fc`` is free for a classifier.

    ``weights``: "trained" is the online network's, "target" the target network's, "random" the online network's as the run's
    seed drew them. Raises UsageError for another word. Where a run's newest checkpoint is damaged the one before is taken, and
    the log says so.
    """
    with warnings.catch_warnings():  # torchvision's import adds a filter; it takes a second, and training does without
        from fastbyol.model.ordinary import ordinary

    config, encoder, _ = _load(Path(run_or_file), weights)
    return ordinary(encoder, config.model)


def _load(path: Path, weights: str) -> tuple[Config, ResNet, int]:
    """The configuration, the engine's own encoder and the step of a run folder or checkpoint."""
    check_choice("weights", weights, WEIGHTS)
    if path.is_dir():
        with RunFolder.open(path, lock=False) as folder:
            config = folder.config
            loaded = None if weights == "random" else checkpoint.load_latest(folder.checkpoints)
            made_with = loaded.meta["config"] if loaded is not None else folder.env.get("config")
            if isinstance(made_with, str):
                consistency.refuse_changed(path, config, made_with, str(path))
    else:
        loaded = checkpoint.load(path)
        config = config_io.parse(loaded.meta["config"], where=str(path))
    for warning in loaded.warnings if loaded is not None else ():
        _log.warning("%s", warning)
    state = TrainState.create(config, steps_per_epoch=1, device="cpu")
    if loaded is not None and weights != "random":
        state.load_tensors(loaded.tensors)
    encoder = (state.target if weights == "target" else state.online).encoder.float().eval()
    return config, encoder, int(loaded.meta["step"]) if loaded is not None else 0


@left_as_found()
def evaluate(
    run: str | Path,
    protocol: str = "blog",
    *,
    train_data: str | Path | None = None,
    test_data: str | Path | None = None,
    weights: str = "trained",
    device: str = "auto",
    image_field: str | None = None,
    label_field: str | None = None,
) -> dict[str, Any]:
    """Accuracy of a run's encoder under ``protocol`` (``blog``, ``linear`` or ``knn``; see ``evaluation.protocol``).

    Data default to the run's own images; files that are named are taken whole. ``blog`` does not look at ``train_data``.
    The fields of both files default to those that the run was told to take; of these the run's own files must hold what they
    held when it was made. ``weights`` as in ``load_encoder``; ``device``: auto, cpu, cuda or cuda:N. Raises UsageError for
    other words. Returns a dict with at least ``accuracy`` (percent), ``protocol``, ``step``, ``decoder`` (the run's, or without
    FFCV torchvision) and ``notes``: lines on what keeps the accuracy from saying much.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    target = pick_device(device)
    config, encoder, step = _load(Path(run), weights)
    data, pinned = config.data, inputs.of_run(Path(run))
    decoder = decoding.choose(data.decoder) if pinned is None else decoding.choose_again(pinned.decoder)
    test_file = Path(test_data) if test_data else embedded.held_out_file(data)
    if test_file is None:
        raise UsageError(f"{run}: the run has no test data: name a labelled beton with --test-data")

    fields = {"image_field": image_field or data.image_field, "label_field": label_field or data.label_field}
    if (fields["image_field"], fields["label_field"]) != (data.image_field, data.label_field):
        pinned = None  # which is of the run's fields

    def read(name: str, file: Path, limit: int, *, named: bool, labels: loader.Labels) -> loader.Images:
        own = file if named else inputs.own_data(Path(run), pinned, name, file, **fields)
        size = data.size or config.views.size
        return loader.read_all(
            own,
            workers=data.workers,
            size=size,
            limit=0 if named else limit,
            decoder=decoder,
            labels=labels,
            **fields,
        )

    test = read("test", test_file, data.test_limit, named=test_data is not None, labels="needed")
    train = None
    if protocol != "blog":  # which is fitted within the test set
        train_file = Path(train_data) if train_data else embedded.training_file(data)
        train = read("train", train_file, data.limit, named=train_data is not None, labels="optional")
    result = protocols.evaluate(protocol, encoder.to(target), test=test, train=train, views=config.views, device=target)
    return {"run": str(run), "step": step, "weights": weights, "decoder": decoder, **result}
