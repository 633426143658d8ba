"""Models of other libraries, made by their own code, and the files in which they are kept.

lightly and solo-learn are installed without what they demand (Makefile): most of it trains. What
solo-learn's module of BYOL imports of that is stood in for by classes that its networks never call.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import nn

FOREIGN = Path(sys.prefix) / "foreign"
HIDDEN, OUT = 16, 8


def resnet(name: str = "resnet18", seed: int = 0, **options: Any) -> nn.Module:
    """torchvision's model, with weights and statistics that are no constants."""
    torch.manual_seed(seed)
    return shaken(torchvision.models.get_model(name, **options))


def shaken(model: nn.Module) -> nn.Module:
    """The same model with drawn norms: fresh ones are ones and zeros, which are easily confused."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.ndim == 1:
                tensor.uniform_(-0.5, 1.5)
    return model


def without_classifier(model: nn.Module) -> nn.Module:
    model.fc = nn.Identity()
    return model.eval()


@contextmanager
def _importable() -> Iterator[None]:
    assert FOREIGN.is_dir(), f"{FOREIGN}: not there: make setup"
    sys.path.insert(0, str(FOREIGN))
    try:
        yield
    finally:
        sys.path.remove(str(FOREIGN))


def lightly_byol(backbone: nn.Module, dim: int = 512) -> nn.Module:
    """BYOL as lightly's example for PyTorch has it: its heads around a Sequential of children."""
    with _importable():
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    class BYOL(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(backbone.children())[:-1])
            self.projection_head = BYOLProjectionHead(dim, HIDDEN, OUT)
            self.prediction_head = BYOLPredictionHead(OUT, HIDDEN, OUT)
            self.backbone_momentum = _moved(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)

    return BYOL()


def lightly_small_resnet() -> nn.Module:
    """lightly's own ResNet-18, for small images; its classifier is ``linear``."""
    with _importable():
        from lightly.models import ResNetGenerator
    torch.manual_seed(5)
    return shaken(ResNetGenerator("resnet-18", num_classes=10))


def solo_byol(encoder: str = "resnet18", *, cifar: bool = False) -> nn.Module:
    """solo-learn's class BYOL of version 1.0.2, whose encoder is called ``encoder``."""
    root = FOREIGN / "solo"
    assert root.is_dir(), f"{root}: not there: make setup"

    def module(name: str, folder: Path | None = None, **content: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(content)
        made.__path__ = [str(folder or root / "none")]
        return made

    class LightningModule(nn.Module):
        pass

    backbones = {
        f"{kind}_{size}": None
        for kind in ("swin", "vit")
        for size in ("tiny", "small", "base", "large")
    }
    modules = (
        module("solo", root),
        *(module(f"solo.{part}", root / part) for part in ("methods", "losses", "utils")),
        module("solo.utils.backbones", **backbones),
        module("pytorch_lightning", LightningModule=LightningModule),
        module("pl_bolts"),
        module("pl_bolts.optimizers"),
        module("pl_bolts.optimizers.lr_scheduler", LinearWarmupCosineAnnealingLR=None),
        module("torchmetrics"),
        module("torchmetrics.metric", Metric=nn.Module),
    )
    with mock.patch.dict(sys.modules, {each.__name__: each for each in modules}):
        made = importlib.import_module("solo.methods.byol").BYOL(
            encoder=encoder, num_classes=10, backbone_args={"cifar": cifar,
            "zero_init_residual": False}, max_epochs=1, batch_size=4, optimizer="sgd", lars=False,
            lr=0.1, weight_decay=0.0, classifier_lr=0.1, exclude_bias_n_norm=False,
            accumulate_grad_batches=1, extra_optimizer_args={}, scheduler="none", min_lr=0.0,
            warmup_start_lr=0.0, warmup_epochs=0, num_large_crops=2, num_small_crops=0,
            base_tau_momentum=0.99, final_tau_momentum=1.0, momentum_classifier=False,
            proj_output_dim=OUT, proj_hidden_dim=HIDDEN, pred_hidden_dim=HIDDEN,
        )  # fmt: skip
    shaken(made)
    _move(made.momentum_encoder)
    return made


def solo_checkpoint(model: nn.Module, encoder: str = "encoder") -> dict[str, Any]:
    """What Lightning saves of it: weights, and how far training came.

    Version 1.0.6 calls the encoder ``backbone``.
    """
    state = model.state_dict()
    renamed = {key.replace("encoder.", f"{encoder}.", 1): value for key, value in state.items()}
    step = {"epoch": 3, "global_step": 40, "pytorch-lightning_version": "1.6.4"}
    states = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    return {**step, "state_dict": renamed, "optimizer_states": [states], "callbacks": {}}


def _moved(model: nn.Module) -> nn.Module:
    return _move(copy.deepcopy(model))


@torch.no_grad()
def _move(model: nn.Module) -> nn.Module:
    """Make an average's weights differ from those that it averages."""
    for parameter in model.parameters():
        parameter.add_(0.01)
    return model
