"""Batches of decoded images in permuted order, from the device's memory or streamed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fastbyol.data import beton
from fastbyol.data.beton import BetonInfo
from fastbyol.data.decoder import Decoder
from fastbyol.data.memory import available_bytes
from fastbyol.data.order import Orders, subset
from fastbyol.data.prefetch import prefetch
from fastbyol.errors import UsageError, check_choice, size_text

Cache = Literal["auto", "device", "none"]
Labels = Literal["unused", "optional", "needed"]
# Returns a tensor of a shape that was filled once for all ranks of a node (``engine.ranks``).
Shared = Callable[[Sequence[int], Callable[[Tensor], None], torch.device], Tensor]

# Shares of a device's free memory: "auto" leaves most of it to training, "device" is an explicit
# wish.
AUTO_SHARE = 0.4
DEVICE_SHARE = 0.9
# Images a call while decoding a whole set: enough for every core, and still interruptible.
CHUNK = 1024
CPU = torch.device("cpu")
# A forked child inherits OpenMP's pool without its threads and would wait for them for ever; with
# one thread it needs no pool.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


class Batch(NamedTuple):
    """uint8 (B, H, W, 3) images and int64 (B,) sample ids, which are indices in the file.

    With int64 ``rows`` (B,) ``images`` is the whole resident set, (N, H, W, 3), and the batch's are
    these rows of it: every batch has the same tensor.
    """

    images: Tensor
    ids: Tensor
    rows: Tensor | None = None


class Images(NamedTuple):
    """A file's images in its order, uint8 (N, H, W, 3), and labels, int64 (N,) or None, on the cpu.

    The images may be on another device instead, where ``read_all`` was asked for that.
    ``class_names`` are the names of labels 0, 1 and so on, empty where the file has none.
    """

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] = ()


class Loader:
    """The batches of one file, as rows of the decoded set on the device or streamed.

    Batch ``k`` of an epoch holds the samples ``permutation(...)[k * B : (k + 1) * B]``, or with
    ``chosen`` ids, int64 (N,), those at these indices of ``chosen``; with ``columns`` only these of
    them, a rank's share. A batch is never written to again. A ``resident`` loader needs no file and
    no thread once it is open; a streaming one decodes a few batches ahead in one thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        chosen: Tensor | None,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        resident: bool,
        columns: slice = slice(None),
        shared: Shared | None = None,
    ) -> None:
        self.num_samples = decoder.info.num_samples if chosen is None else len(chosen)
        self.steps_per_epoch = self.num_samples // batch_size
        self._decoder, self._chosen = decoder, chosen
        self._batch_size, self._device = batch_size, device
        self._orders = Orders(self.num_samples, seed)
        self._columns = columns
        self._running: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()
        self._closed, self._images = False, None
        if resident:
            with decoder:
                self._images = _decode(decoder, chosen, device, shared)

    @property
    def resident(self) -> bool:
        """True if the decoded set is on the device."""
        return self._images is not None

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """Return the batches of ``epoch`` from ``start_step`` on, where a run resumes."""
        if self._closed:
            raise ValueError("the loader is closed")
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} is not in [0, {self.steps_per_epoch}]")
        steps = self._orders.of(epoch)[: self.steps_per_epoch * self._batch_size].view(
            self.steps_per_epoch, self._batch_size
        )[start_step:, self._columns]
        batches = self._streamed(steps) if self._images is None else self._rows(steps, self._images)
        self._running.add(batches)
        return batches

    def _rows(self, steps: Tensor, images: Tensor) -> Generator[Batch]:
        """Yield batches of the rows of ``steps``, int64 (steps, B) on the cpu."""
        all_rows = _to_device(steps, self._device)
        chosen = self._chosen
        all_ids = all_rows if chosen is None else _to_device(chosen[steps], self._device)
        for rows, ids in zip(all_rows, all_ids, strict=True):
            yield Batch(images, ids, rows)

    def _streamed(self, steps: Tensor) -> Generator[Batch]:
        """Yield the batches of ``_rows`` with images of their own, in memory of their own."""
        self._decoder.check_unchanged()
        # Both sides own their tensors: torch's pinned allocator reuses a block only after its copy
        # has ended, so the decoder need not wait for an event.
        steps = steps if self._chosen is None else self._chosen[steps]
        for images, ids in prefetch(self._decoded(steps), name=str(self._decoder.info.path)):
            yield Batch(_to_device(images, self._device), _to_device(ids, self._device))

    def _decoded(self, steps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for ids in steps:
            images = _host_images(len(ids), self._decoder, self._device)
            self._decoder.decode(ids.numpy(), images.numpy())
            yield images, ids

    def close(self) -> None:
        """Stop running iterators and release file and memory. Closing twice is fine."""
        self._closed, self._images = True, None
        for batches in list(self._running):
            batches.close()
        self._orders.close()
        self._decoder.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_loader(
    file: str | Path | BetonInfo,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    cache: Cache,
    workers: int,
    size: int,
    limit: int = 0,
    decoder: str = "auto",
    columns: slice = slice(None),
    shared: Shared | None = None,
) -> Loader:
    """Verify ``file``, unless it was just inspected, and open it for training.

    ``cache`` is "device" to keep the decoded set on ``device``, "none" to stream it, or "auto" to
    keep it if it takes at most 40 % of the device's free memory. ``workers`` is the number of
    decoding threads, 0 for one a core. ``size`` is the side in pixels of images whose sizes differ,
    ``limit`` the number of images to use (``order.subset``), ``decoder`` a name for
    ``decoder.choose``. Raises
    UsageError if the file is missing, damaged, smaller than a batch, or does not fit into the
    device.
    """
    check_choice("data.cache", cache, get_args(Cache))
    info, where = _inspected(file, None, None, may_lack_labels=True), torch.device(device)
    chosen = subset(info.num_samples, limit)
    count = info.num_samples if chosen is None else len(chosen)
    if batch_size < 1:
        raise UsageError(f"train.batch_size = {batch_size}: must be at least 1")
    if count < batch_size:
        of_limit = "" if chosen is None else f" (data.limit, of {info.num_samples})"
        raise UsageError(
            f"{info.path}: {count} images{of_limit} are less than one batch of train.batch_size = "
            f"{batch_size}; "
            f"take --batch-size {count} or less, or more images"
        )
    need = _decoded_bytes(info, size, count)
    resident = _is_resident(info, need, where, cache)
    in_memory = _fits_in_memory(info, need if resident else 0)
    images = Decoder(info, size=size, workers=workers, in_memory=in_memory, decoder=decoder)
    return Loader(
        images, chosen, batch_size=batch_size, seed=seed, device=where, resident=resident,
        columns=columns, shared=shared,
    )  # fmt: skip


def choose_cache(
    file: BetonInfo, *, device: torch.device, size: int, limit: int, cache: Cache
) -> Cache:
    """Return "device" or "none": where ``auto`` keeps the decoded images, for all ranks alike."""
    need = _decoded_bytes(file, size, min(limit or file.num_samples, file.num_samples))
    return "device" if _is_resident(file, need, device, cache) else "none"


def read_all(
    file: str | Path | BetonInfo,
    *,
    workers: int,
    size: int,
    limit: int = 0,
    decoder: str = "auto",
    image_field: str | None = None,
    label_field: str | None = None,
    labels: Labels = "unused",
    device: torch.device = CPU,
    shared: Shared | None = None,
) -> Images:
    """Verify ``file``, unless it was just inspected, and decode its images in file order.

    They are on ``device`` if they take at most 40 % of its free memory, else on the cpu.
    ``limit`` and ``decoder`` are those of ``open_loader``, ``image_field`` and ``label_field``
    those of ``beton.inspect``. Raises UsageError if the file is missing, damaged or larger than
    memory; if it has no labels where they are "needed"; and where they are "optional", if it has
    int fields but none is clearly the label.
    """
    info = _inspected(file, image_field, label_field, may_lack_labels=labels != "needed")
    if labels == "needed" or (labels == "optional" and info.has_ints):
        beton.demand_labels(info)
    chosen = subset(info.num_samples, limit)
    need = _decoded_bytes(info, size, info.num_samples if chosen is None else len(chosen))
    where = device if _is_resident(info, need, device, "auto") else CPU
    if where.type == "cpu":
        _is_resident(info, need, CPU, "device")
    in_memory = _fits_in_memory(info, need)
    with Decoder(info, size=size, workers=workers, in_memory=in_memory, decoder=decoder) as images:
        targets = None if info.labels is None else torch.from_numpy(info.labels)
        if targets is not None and chosen is not None:
            targets = targets[chosen]
        return Images(_decode(images, chosen, where, shared), targets, info.class_names)


def read_in_order(
    info: BetonInfo, chosen: Tensor, *, batch_size: int, workers: int, size: int, decoder: str
) -> Generator[Tensor]:
    """Yield the samples ``chosen``, int64 (N,), as uint8 (B, H, W, 3) on the cpu.

    A thread decodes a few batches ahead, so that no more are in memory. The rest is as in
    ``read_all``.
    """
    with Decoder(info, size=size, workers=workers, in_memory=False, decoder=decoder) as images:

        def decoded() -> Iterator[Tensor]:
            for ids in torch.split(chosen, batch_size):
                batch = _host_images(len(ids), images, CPU)
                images.decode(ids.numpy(), batch.numpy())
                yield batch

        yield from prefetch(decoded(), name=str(info.path))


def _inspected(
    file: str | Path | BetonInfo,
    image_field: str | None,
    label_field: str | None,
    *,
    may_lack_labels: bool,
) -> BetonInfo:
    if isinstance(file, BetonInfo):
        return file
    return beton.inspect(
        file, image_field=image_field, label_field=label_field, may_lack_labels=may_lack_labels
    )


def _is_resident(info: BetonInfo, need: int, device: torch.device, cache: Cache) -> bool:
    free = available_bytes(device)
    if cache == "device" and need > DEVICE_SHARE * free:
        raise UsageError(
            f"{info.path}: the decoded images take {size_text(need)} of the {size_text(free)} "
            f"that {device} has free; "
            "take data.cache = 'none', a smaller size or fewer images"
        )
    return cache == "device" or (cache == "auto" and need <= AUTO_SHARE * free)


def _decoded_bytes(info: BetonInfo, size: int, count: int) -> int:
    height, width = info.uniform_size or (size, size)
    return count * height * width * 3


def _fits_in_memory(info: BetonInfo, beside: int) -> bool:
    """Return whether the file fits into memory ``beside`` so many bytes of decoded images."""
    return info.num_bytes + beside <= AUTO_SHARE * available_bytes(CPU)


def _decode(
    decoder: Decoder, chosen: Tensor | None, device: torch.device, shared: Shared | None
) -> Tensor:
    """Decode the samples ``chosen`` (None: all), in this order."""
    ids = np.arange(decoder.info.num_samples) if chosen is None else chosen.numpy()
    shape = (len(ids), *decoder.shape)

    def fill(images: Tensor) -> None:
        for first in range(0, len(ids), CHUNK):
            rows = images[first : first + CHUNK]
            part = rows if rows.device.type == "cpu" else _host_images(len(rows), decoder, device)
            decoder.decode(ids[first : first + len(rows)], part.numpy())
            if part is not rows:
                rows.copy_(part, non_blocking=True)
        decoder.check_unchanged()

    if shared is not None:
        return shared(shape, fill, device)
    images = torch.empty(shape, dtype=torch.uint8, device=device)
    fill(images)
    return images


def _host_images(count: int, decoder: Decoder, device: torch.device) -> Tensor:
    return torch.empty((count, *decoder.shape), dtype=torch.uint8, pin_memory=device.type == "cuda")


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
