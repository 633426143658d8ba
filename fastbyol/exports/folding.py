"""The encoder that is exported: what happens to weights before they are used has happened."""

from __future__ import annotations

import torch
from torch import nn

from fastbyol.config import ModelConfig
from fastbyol.model.ordinary import Encoder, ordinary
from fastbyol.model.resnet import ResNet
from fastbyol_kernels.weight_standardization import reference

# Of a new classifier's weights, as after MoCo. Zeros would give the encoder no gradient in the
# first step.
CLASSIFIER_STD = 0.01


def folded(encoder: ResNet, config: ModelConfig) -> Encoder:
    """Copy ``encoder``, made with ``config``, into torchvision's modules: (N, 3, S, S) -> (N, D).

    Standardized weights are stored as such, computed in float64 and rounded to float32 once.
    """
    plain = ordinary(encoder, config.model_copy(update={"ws": False}))
    if config.ws:
        with torch.no_grad():
            for layer in plain.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.copy_(reference(layer.weight.double()))
    return plain


def add_classifier(encoder: Encoder, num_classes: int, seed: int) -> None:
    """Replace ``fc`` of ``encoder`` by an untrained linear classifier, drawn from ``seed``."""
    classifier = nn.Linear(encoder.embedding_dim, num_classes, device="meta").to_empty(device="cpu")
    draws = torch.Generator().manual_seed(seed)
    nn.init.normal_(classifier.weight, std=CLASSIFIER_STD, generator=draws)
    nn.init.zeros_(classifier.bias)
    encoder.add_module("fc", classifier)
