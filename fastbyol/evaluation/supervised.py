"""The same encoder trained with labels: the ceiling in the demo's comparison."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol import views as view_ops
from fastbyol.config import ModelConfig, ViewsConfig
from fastbyol.errors import UsageError
from fastbyol.evaluation.features import embed
from fastbyol.evaluation.protocol import LabelledImages, labelled_rows
from fastbyol.model.resnet import build_encoder

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARMUP_SHARE = 0.15


def supervised_accuracy(
    model: ModelConfig,
    train: LabelledImages,
    test: LabelledImages,
    views: ViewsConfig,
    *,
    epochs: int = 12,
    batch_size: int = 64,
    lr: float = 0.07,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Train the encoder of ``model`` with labels and return its accuracy on ``test`` in percent.

    A linear layer and cross-entropy; SGD with Nesterov's momentum; ``lr`` rises and falls linearly;
    crops of at least half the area and flips. Deterministic for a ``seed`` on one machine. Raises
    UsageError without labels.
    """
    images, labels = _labelled(train, "training data")
    test_images, test_labels = _labelled(test, "test data")
    classes, targets = torch.unique(labels, return_inverse=True)
    net = _build(model, len(classes), seed, views.size).to(device)
    _fit(net, images, targets, _light(views), epochs, min(batch_size, len(images)), lr, seed)
    predicted = classes[embed(net, test_images, views, device=device).argmax(1).cpu()]
    return 100.0 * float((predicted == test_labels).double().mean())


def _fit(
    net: nn.Module,
    images: Tensor,
    targets: Tensor,
    views: ViewsConfig,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    device = next(net.parameters()).device
    per_epoch = len(images) // batch_size
    optimizer = torch.optim.SGD(
        net.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _triangle(step, epochs * per_epoch)
    )
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for ids in order[: per_epoch * batch_size].view(per_epoch, batch_size):
            batch = _augmented(images[ids].to(device), ids.to(device), views, seed, epoch)
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(batch), targets[ids].to(device)))
            optimizer.step()
            schedule.step()


def _augmented(images: Tensor, ids: Tensor, views: ViewsConfig, seed: int, epoch: int) -> Tensor:
    height, width = images.shape[1:3]
    table = view_ops.draw(views, ids, seed=seed, epoch=epoch, height=height, width=width)
    return view_ops.apply(images, table[:1], views)[0]


def _triangle(step: int, total: int) -> float:
    """Return the share of the peak lr: up over WARMUP_SHARE of ``total`` steps, then down to 0."""
    warmup = max(1, math.ceil(WARMUP_SHARE * total))
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup))


def _build(model: ModelConfig, num_classes: int, seed: int, size: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(model, num_views=1, image_size=size)
        return nn.Sequential(encoder, nn.Linear(encoder.embedding_dim, num_classes))


def _light(views: ViewsConfig) -> ViewsConfig:
    """Return ``views`` with crops of half the area or more and flips only: they keep the label."""
    light = {
        "scale": (0.5, 1.0),
        "jitter_p": 0.0,
        "grayscale_p": 0.0,
        "blur_p": (0.0, 0.0),
        "solarize_p": (0.0, 0.0),
    }
    return views.model_copy(update=light)


def _labelled(data: LabelledImages, name: str) -> tuple[Tensor, Tensor]:
    images, labels = labelled_rows(data, name)
    if not len(labels):
        raise UsageError(f"{name}: no labels: the supervised baseline needs a labelled beton")
    return images, labels
