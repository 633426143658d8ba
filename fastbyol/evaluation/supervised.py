"""The same encoder trained with labels: the ceiling in the demo's comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbyol.config import ModelConfig, ViewsConfig
from fastbyol.errors import UsageError
from fastbyol.evaluation.features import embed
from fastbyol.evaluation.finetune import Recipe, fit
from fastbyol.evaluation.intervals import Accuracy
from fastbyol.evaluation.protocol import LabelledImages, labelled_rows
from fastbyol.model.resnet import build_encoder

# From random weights, which need a larger rate and gain by weight decay.
RECIPE = Recipe(epochs=12, lrs=(0.07,), weight_decay=5e-4, warmup=0.15, decay="linear")


def supervised_accuracy(
    model: ModelConfig,
    train: LabelledImages,
    test: LabelledImages,
    views: ViewsConfig,
    *,
    recipe: Recipe = RECIPE,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """Train the encoder of ``model`` with labels and return its accuracy on ``test``.

    Deterministic for a seed on one machine. Raises UsageError without labels.
    """
    images, labels = _labelled(train, "training data")
    test_images, test_labels = _labelled(test, "test data")
    classes, targets = torch.unique(labels, return_inverse=True)
    net = _build(model, len(classes), recipe.seed, views.size).to(device)
    fit(net, images, targets, views, recipe)
    predicted = classes[embed(net, test_images, views, device=device).argmax(1).cpu()]
    right = (predicted == test_labels).double().mean()
    return Accuracy(100.0 * float(right), len(test_labels))


def _build(model: ModelConfig, num_classes: int, seed: int, size: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(model, num_views=1, image_size=size)
        return nn.Sequential(encoder, nn.Linear(encoder.embedding_dim, num_classes))


def _labelled(data: LabelledImages, name: str) -> tuple[Tensor, Tensor]:
    images, labels = labelled_rows(data, name)
    if not len(labels):
        raise UsageError(f"{name}: no labels: the supervised baseline needs a labelled beton")
    return images, labels
