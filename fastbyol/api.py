"""The functions that scripts and the command line call, such as train, resume, fork and evaluate.

Each leaves the process as it was (``process.left_as_found``). None of them changes the settings of
the C library's allocator, which cannot be restored: see ``engine.allocator.keep_freed_memory``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbyol import config_io
from fastbyol.config import Config, Resolved, resolve
from fastbyol.data import convert as conversion
from fastbyol.data.beton_write import Mode, Progress
from fastbyol.data.rgb import Resize
from fastbyol.engine import capture, forking, trainer
from fastbyol.engine import ranks as ranking
from fastbyol.engine.device import fitting_threads, pick_device
from fastbyol.engine.observer import Observer
from fastbyol.engine.origin import source_of
from fastbyol.engine.precision import choose_precision, native_unit
from fastbyol.engine.step import TrainState
from fastbyol.engine.trainer import Summary
from fastbyol.engine.worker import launch_id, worker
from fastbyol.errors import FastbyolError, UsageError, check_choice, quoted
from fastbyol.evaluation import lidar as lidars
from fastbyol.evaluation import protocol as protocols
from fastbyol.evaluation.finetune import Recipe
from fastbyol.evaluation.protocol import PROTOCOLS
from fastbyol.evaluation.scored_data import ScoredData
from fastbyol.loggers.observer import logged
from fastbyol.loggers.sink import refuse_missing, with_loggers
from fastbyol.model.adapter import Adapter, library_network
from fastbyol.model.byol import Online, Target
from fastbyol.model.resnet import ResNet
from fastbyol.process import left_as_found
from fastbyol.runs import checkpoint, consistency, inputs
from fastbyol.runs import fork as forks
from fastbyol.runs.environment import env_of
from fastbyol.runs.folder import CONFIG, RunFolder, default_run_path
from fastbyol.sweeps.names import point_name

# The encoder of the online network, of the target network, and of the online network before step 0.
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
    """Train ``config`` in the new run folder ``out`` (default: a new name under ``runs/``).

    Under torchrun all of its processes call this together, train the run together, and return the
    same. With ``train.init_from`` training starts from another run's weights, or with an encoder of
    a library or a file (docs/init.md); the new run's ``config.toml`` names the file.

    Raises:
        UsageError: input that cannot work.
        CollapsedError: the network collapsed and ``train.stop_on_collapse`` is set.
        NoGraphError: no CUDA graph can be recorded under ``engine.mode`` auto. ``resume`` continues
            the run, compiled, in another process.
    """
    with ranking.joined() as processes:
        _demand_same(processes, config_io.flatten(config), out=out)
        if processes.rank:
            return _follow(processes)
        with _telling(processes):
            refuse_missing(config)
            whole = _with_source(resolve(config), observer)
            whole = inputs.with_paths(whole, whole)
            ranks = ranking.count_ranks(whole, processes.count)
            # Refuses what this machine lacks.
            capture.choose(whole.engine, pick_device(whole.train.device))
            note = (lambda _: None) if observer is None else observer.note
            whole = choose_precision(whole, note)
            if ranks > 1 and whole.train.ranks is None:
                # By their number later processes get the same bits.
                train = whole.train.model_copy(update={"ranks": ranks})
                whole = whole.model_copy(update={"train": train})
                origin = {**(origin or {}), "train.ranks": "processes"}
            path = Path(out) if out is not None else default_run_path(whole)
            folder = _opened(path, whole, origin)
        with folder:
            return _lead(folder, whole, observer, processes, ranks)


def _demand_same(
    processes: ranking.Alone | ranking.Processes, settings: Mapping[str, object], **options: object
) -> None:
    """Raise UsageError in all ``processes`` if one was asked for something else than the first."""
    asked = {key: str(value) for key, value in settings.items() if key not in consistency.FREE}
    asked |= {f"--{name}": str(value) for name, value in options.items() if value is not None}
    first, *others = processes.every(asked)
    for rank, other in enumerate(others, 1):
        for name in sorted(first.keys() & other.keys()):
            if other[name] != first[name]:
                error = UsageError(
                    f"{name}: {other[name]} on rank {rank}, {first[name]} on the first one: type "
                    "the same command on every machine"
                )
                error.is_of_all = True
                raise error


@contextmanager
def _telling(processes: ranking.Alone | ranking.Processes) -> Iterator[None]:
    """Tell the other processes, which wait in ``_follow``, of an error inside."""
    try:
        yield
    except FastbyolError as error:
        error.is_of_all = True
        ranking.from_first(processes, error)
        raise


def _opened(path: Path, config: Resolved, origin: Mapping[str, str] | None) -> RunFolder:
    """Make the run's folder, or open it if torchrun starts this command again."""
    here = worker()
    if here is None:
        return RunFolder.create(path, config, origin)
    is_ours = env_of(path).get("launch") == launch_id() and (path / CONFIG).exists()
    if here.restarts and is_ours:
        return RunFolder.open(path, lock=True)
    return RunFolder.create(path, config, origin, launch=launch_id())


def _lead(
    folder: RunFolder,
    config: Resolved,
    observer: Observer | None,
    processes: ranking.Alone | ranking.Processes,
    ranks: int,
) -> Summary:
    """Train as the first of ``processes``, once the others know what."""
    here = worker()
    if here is not None and here.restarts and observer is not None:
        step = checkpoint.newest_step(folder.checkpoints) or 0
        observer.note(f"{folder.path}: a rank was lost: all go on from step {step}")
    ranking.from_first(processes, (config, ranks))
    with logged(folder.path, config, observer) as watching:
        summary = trainer.fit(folder, config, watching, processes, ranks)
    if not summary.finished and observer is not None:
        where = (
            f"saved at step {summary.step}" if summary.step else "stopped before a step was made"
        )
        again = f"fastbyol resume {quoted(folder.path)}"
        observer.note(f"{summary.stopped_by}: {where}; go on with: {again}")
    return summary


def _follow(processes: ranking.Alone | ranking.Processes) -> Summary:
    assert isinstance(processes, ranking.Processes)
    terms: tuple[Resolved, int] | FastbyolError = ranking.from_first(processes, None)
    if isinstance(terms, FastbyolError):
        terms.is_of_all = True
        raise terms
    return trainer.follow(processes, *terms)


def _with_source(config: Resolved, observer: Observer | None) -> Resolved:
    """Return ``config`` with ``train.init_from`` as a file, or as weights' full name.

    A run's folder would not do, because its newest checkpoint changes.
    """
    if config.train.init_from is None:
        return config
    source, warnings = source_of(config.train.init_from)
    if observer is not None:
        for warning in warnings:
            observer.note(warning)
    return config.model_copy(
        update={"train": config.train.model_copy(update={"init_from": source})}
    )


@left_as_found()
def resume(
    run: str | Path,
    *,
    data: str | Path | None = None,
    test_data: str | Path | None = None,
    ranks: int | None = None,
    log: Sequence[str] | None = None,
    observer: Observer | None = None,
) -> Summary:
    """Continue a run from its newest sound checkpoint, bit for bit as if it had never stopped.

    ``data`` and ``test_data`` are its files' new paths, which the run keeps. Their content must be
    what the run was made with. Another number of ``ranks`` than the run's draws the same views and
    rounds otherwise. ``log`` are the loggers from now on, by default the run's. Raises the errors
    of ``train``.
    """
    with ranking.joined() as processes:
        _demand_same(processes, {}, data=data, test_data=test_data, ranks=ranks)
        if processes.rank:
            return _follow(processes)
        with ExitStack() as opened:
            with _telling(processes):
                folder = opened.enter_context(RunFolder.open(Path(run), lock=True))
                config = inputs.with_paths(folder.config, folder.config)
                config = inputs.moved(config, data, test_data)
                if log is not None:
                    config = with_loggers(config, log)
                refuse_missing(config)
                count = ranking.count_ranks(config, processes.count, ranks)
            return _lead(folder, config, observer, processes, count)


@left_as_found()
def fork(
    run: str | Path,
    step: int,
    sets: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    observer: Observer | None = None,
) -> Summary:
    """Train a new run that is ``run`` up to the saved ``step``, and differs by ``sets`` from there.

    ``sets`` are ``key=value`` texts. ``out`` is by default ``RUN.forks/STEP-CHANGES``. The same
    call goes on with a fork that was stopped, and returns the summary of a finished one. Raises the
    errors of ``train``, and UsageError for a step that was not kept or a key that cannot change.
    """
    with ranking.joined() as processes:
        _demand_same(processes, {}, run=run, step=step, sets=list(sets), out=out)
        if processes.rank:
            return _follow(processes)
        with ExitStack() as opened:
            with _telling(processes):
                asked = forks.plan(Path(run), step, sets)
                refuse_missing(asked.config)
                path = fork_path(asked) if out is None else Path(out)
                note = (lambda _: None) if observer is None else observer.note
                if forks.is_begun(asked, path):
                    folder = opened.enter_context(RunFolder.open(path, lock=True))
                    ended = forking.finished(folder)
                    if ended is not None and processes.count == 1:
                        note(f"{path}: this fork is finished: nothing is left to do")
                        return ended
                else:
                    for line in asked.notes:
                        note(line)
                    folder = opened.enter_context(forking.begin(asked, path))
                config = inputs.with_paths(folder.config, folder.config)
                count = ranking.count_ranks(config, processes.count)
            return _lead(folder, config, observer, processes, count)


def fork_path(asked: forks.Plan) -> Path:
    """Return the folder of a fork for which none is named: ``RUN.forks/STEP-CHANGES``."""
    parent = asked.parent if asked.parent.name not in ("", "..") else asked.parent.resolve()
    name = point_name(asked.changes) if asked.changes else "unchanged"
    return parent.with_name(f"{parent.name}.forks") / f"{asked.step}-{name}"


@left_as_found()
def load_encoder(run_or_file: str | Path, *, weights: str = "trained") -> nn.Module:
    """Return the encoder f of a run folder or a checkpoint file: in eval mode, float32, on the cpu.

    It maps views (N, 3, S, S), normalised as ``views.plain`` does, to embeddings y (N, E).
    It is torchvision's ResNet made of torch's own operations (``model.ordinary``), without the
    engine's kernels and its statistics per view, so everything in torch works with it. ``fc`` is
    free for a classifier. An encoder of timm or torchvision is the library's own network.

    ``weights``: "trained" of the online network, "target" of the target network, "random" of the
    online network as the run's seed drew them. Raises UsageError for another word. If the newest
    checkpoint is damaged, the one before is loaded and a warning logged.
    """
    with (
        warnings.catch_warnings()
    ):  # the import adds a filter; it takes a second that training saves
        from fastbyol.model.ordinary import ordinary

    config, encoder, _ = _load(Path(run_or_file), weights)
    if isinstance(encoder, Adapter):
        return library_network(encoder)
    return ordinary(encoder, config.model)


@left_as_found()
def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "torchvision",  # noqa: A002 - the command's word
    weights: str = "trained",
    num_classes: int | None = None,
    license: str | None = None,  # noqa: A002 - the word of the hub
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the encoder of a run folder or a checkpoint file for other libraries, and a model card.

    What was written is loaded as users load it and compared with the run's own encoder.

    Args:
        out: a file, for safetensors a folder; default: a name in ``RUN/exports/``.
        format: torchvision or timm (state dicts of their ResNets), safetensors, onnx or
            torch-export.
        weights: as in ``load_encoder``.
        num_classes: of an untrained classifier ``fc`` to add to a state dict; default: none.
        license: of the weights, for the card.
        overwrite: replace an earlier export.

    Returns a dict with at least ``out``, ``card``, ``load`` (lines of Python that define ``model``)
    and ``parity`` (``max_difference``, ``tolerance``, ``num_images``, ``data``). Raises UsageError
    for input that cannot work, FastbyolError if the disk fails or the file computes something else.
    """
    with warnings.catch_warnings():  # libraries add filters when they are imported
        from fastbyol.exports import exporting, formats

        check_choice("format", format, formats.FORMATS)
        wishes = exporting.Wishes(format, weights, num_classes, license, overwrite)
        wishes.check()
        config, encoder, step = _load(Path(run), weights)
        target, step = None if out is None else Path(out), 0 if weights == "random" else step
        return exporting.export(Path(run), config, encoder, step, target, wishes)


@left_as_found()
def embed(
    run: str | Path,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    weights: str = "trained",
    projections: bool = False,
    limit: int = 0,
    picture: str | Path | None = None,
    by: str = "pca",
    image_field: str | None = None,
    label_field: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the embeddings y of images by a run, not augmented, and a picture of them.

    Args:
        out: a file that ends in .npz or .parquet.
        data: images, a beton or what ``convert`` reads; default: the run's own.
        split: of ``data``, or train or test of the run's own; default: test.
        weights: as in ``load_encoder``.
        projections: whether to write the projections z instead.
        limit: the most images, chosen alike for all runs; 0: all, of the run's own as many as it
            used.
        picture: a file that ends in .png or .html.
        by: how the picture lays them out, pca or umap.
        image_field, label_field: fields of the images' file; default: the run's.
        device: auto, cpu, cuda or cuda:N.
        overwrite: replace files that exist.

    Returns a dict with at least ``num_images``, ``dim``, ``out``, ``picture``, ``notes`` and what
    the file says of its origin. Raises UsageError for input that cannot work, and FastbyolError
    for a full disk or embeddings that are not finite.
    """
    with warnings.catch_warnings():  # libraries add filters when they are imported
        from fastbyol.exports import embedding

        wishes = embedding.Wishes(
            out=None if out is None else Path(out),
            picture=None if picture is None else Path(picture),
            by=by, data=None if data is None else str(data), split=split, weights=weights,
            projections=projections, limit=limit, image_field=image_field,
            label_field=label_field, overwrite=overwrite,
        )  # fmt: skip
        wishes.check()
        target = pick_device(device)
        config, net, loaded = _load_net(Path(run), weights)
        return embedding.write(Path(run), config, net.to(target), loaded, wishes, device=target)


def _load(path: Path, weights: str) -> tuple[Resolved, ResNet | Adapter, int]:
    """Return configuration, engine's encoder and step of a run folder or checkpoint."""
    config, net, loaded = _load_net(path, weights)
    return config, net.encoder, 0 if loaded is None else int(loaded.meta["step"])


def _load_net(
    path: Path, weights: str
) -> tuple[Resolved, Online | Target, checkpoint.Checkpoint | None]:
    """Return configuration, network in eval mode and checkpoint of a run folder or checkpoint."""
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
    net = state.target if weights == "target" else state.online
    return config, net.float().eval(), loaded


@left_as_found()
def convert(
    dataset: Any,
    out: str | Path,
    *,
    kind: str | None = None,
    split: str | None = None,
    size: int | None = None,
    resize: Resize | None = None,
    mode: Mode = "raw",
    quality: int = conversion.QUALITY,
    workers: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> conversion.Report:
    """Write a dataset as the beton file ``out``; return an account of its images.

    ``dataset`` is a path or name that ``fastbyol convert`` reads, of which ``kind`` and ``split``
    choose, or an object with ``__len__`` and ``__getitem__``, read in this process. Its items are
    images, (image, label) or dicts: Pillow's images, uint8 arrays or tensors (H, W), (H, W, 3) or
    (3, H, W), or floats in [0, 1]; labels are whole numbers, texts or None. ``resize`` ("resize",
    "centre", "none"), ``mode`` ("raw", "jpg") and the rest are the command's options;
    ``progress`` is called with (images done, images). Raises UsageError for what the caller can
    correct, FastbyolError for a full disk.
    """
    options: dict[str, Any] = {"size": size, "resize": resize, "mode": mode, "quality": quality}
    options |= {"workers": workers, "strict": strict, "progress": progress, "overwrite": overwrite}
    if isinstance(dataset, str | Path):
        return conversion.convert(str(dataset), out, kind=kind, split=split, **options)
    for name, value in (("kind", kind), ("split", split)):
        if value is not None:
            raise UsageError(f"{name} {value!r}: is of paths and names; leave it out")
    return conversion.convert_dataset(dataset, out, **options)


@left_as_found()
def evaluate(
    run: str | Path,
    protocol: str = "blog",
    *,
    data: str | Path | None = None,
    train_data: str | Path | None = None,
    test_data: str | Path | None = None,
    weights: str = "trained",
    device: str = "auto",
    image_field: str | None = None,
    label_field: str | None = None,
    labels: float = 1.0,
    epochs: int | None = None,
    lr: float | Sequence[float] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
    lidar: bool = False,
    lidar_images: int = lidars.IMAGES,
    lidar_views: int = lidars.VIEWS,
) -> dict[str, Any]:
    """Measure the accuracy of a run's encoder under a ``protocol`` of ``evaluation.protocol``.

    The run is not changed.

    Args:
        protocol: blog, linear, knn or finetune.
        data: another data set, of which the training part is fitted and the test part scored, both
            whole.
        train_data: images to fit on, used whole, a beton or what ``convert`` reads; default: the
            run's own. ``blog`` ignores it.
        test_data: images to score on, used whole; default: the run's own.
        weights: as in ``load_encoder``.
        device: auto, cpu, cuda or cuda:N.
        image_field: field of both files; default: the run's.
        label_field: field of both files; default: the run's, of ``data`` the only one.
        labels: share of each class's images to fit that is used.
        epochs, lr, batch_size: of ``finetune``; default: those of ``evaluation.finetune.Recipe``.
            Of several learning rates the best on held-out training images is taken.
        seed: of ``labels`` and ``finetune``.
        note: called with lines on how ``finetune`` goes.
        lidar: whether to measure LiDAR of the test images, too (``evaluation.lidar``); not with
            ``finetune``.
        lidar_images, lidar_views: how many images, and of each how many views.

    Returns a dict with at least ``accuracy`` (percent), ``accuracy_low`` and ``accuracy_high`` (its
    95 % interval), ``protocol``, ``step``, ``train_data`` and ``test_data`` (names), ``decoder``
    (the run's, or torchvision without FFCV), ``notes`` (lines on what limits the accuracy's
    meaning) and ``classes`` (``evaluation.protocol.evaluate``). Raises UsageError for other words,
    and if the run's own files changed in the run's own fields.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    lidars.check(lidar_images, lidar_views)
    if lidar and protocol == "finetune":
        raise UsageError(
            "--lidar: is of the run's encoder, and finetune trains another: leave it out"
        )
    recipe = _recipe(protocol, epochs, lr, batch_size, seed)
    target = pick_device(device)
    config, net, loaded = _load_net(Path(run), weights)
    decoder = inputs.decoder_of(Path(run), config.data)
    images = ScoredData(
        Path(run),
        config.data,
        None if data is None else str(data),
        None if train_data is None else str(train_data),
        None if test_data is None else str(test_data),
        image_field,
        label_field,
        decoder,
    )
    capture.make_cudnn_deterministic(target)
    test = images.read("test")
    # blog is fitted within the test set.
    train = None if protocol == "blog" else images.read("train")
    with fitting_threads(config) if protocol == "finetune" else nullcontext():
        result = protocols.evaluate(
            protocol,
            net.to(target).encoder,
            test=test,
            train=train,
            views=config.views,
            device=target,
            recipe=replace(recipe, dtype=_training_dtype(config, target)),
            labels=labels,
            note=note,
        )
    if lidar:
        result |= lidars.measure(
            net.encoder, net.projector, test.images, config.views,
            device=target, num_images=lidar_images, num_views=lidar_views, rank=result["rank"],
        )  # fmt: skip
        result["notes"] += result.pop("lidar_notes")
    step = 0 if loaded is None else int(loaded.meta["step"])
    about = {"run": str(run), "step": step, "weights": weights, "decoder": decoder}
    fitted = images.name("train") if result["num_repeated"] is not None else None
    about |= {"train_data": fitted, "test_data": images.name("test")}
    return {**about, "image_size": list(test.images.shape[1:3]), **result}


def _recipe(
    protocol: str,
    epochs: int | None,
    lr: float | Sequence[float] | None,
    batch_size: int | None,
    seed: int,
) -> Recipe:
    """Return ``finetune``'s recipe. Raises UsageError for what is out of range or not used."""
    asked = {"--epochs": epochs, "--lr": lr, "--batch-size": batch_size}
    name = next((name for name, value in asked.items() if value is not None), None)
    if name is not None and protocol != "finetune":
        raise UsageError(f"{name}: is of --protocol finetune, not {protocol}: leave it out")
    lrs = None if lr is None else (lr,) if isinstance(lr, int | float) else tuple(lr)
    values: dict[str, Any] = {"epochs": epochs, "lrs": lrs, "batch_size": batch_size, "seed": seed}
    return Recipe(**{name: value for name, value in values.items() if value is not None})


def _training_dtype(config: Resolved, device: torch.device) -> torch.dtype:
    """Return bfloat16 for a run that trained in it, where ``device`` multiplies it natively."""
    is_fast = config.train.precision == "bf16" and native_unit(device) is not None
    return torch.bfloat16 if is_fast else torch.float32
