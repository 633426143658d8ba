"""Training of all of an encoder's layers with labels, under a new linear classifier.

Source of the recipe: BYOL, arXiv:2006.07733, appendices on semi-supervised training and transfer:
SGD with Nesterov's momentum of .9 on the cross-entropy, crops and flips, no weight decay, the
learning rate chosen on images that are not the test set's.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol import views as view_ops
from fastbyol.config import ViewsConfig
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.evaluation.features import check_finite, embed
from fastbyol.evaluation.intervals import accuracy_text
from fastbyol.evaluation.probe import LinearClassifier, linear_head
from fastbyol.model.norm import join_views
from fastbyol.process import full_precision

MOMENTUM = 0.9
# Of the training images, to choose among learning rates: as many as tell .1 from .01 apart.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Recipe:
    """How layers are trained with labels; the defaults fine-tune.

    Of several ``lrs`` the best on a held-out tenth of the training images is taken. The rate rises
    linearly over the share ``warmup`` of the steps, then falls to 0. Every draw is a function of
    ``seed``. ``dtype`` is that of the images, and so of the convolutions. Raises UsageError for a
    number out of its range.
    """

    epochs: int = 30
    batch_size: int = 64
    lrs: tuple[float, ...] = (0.05,)
    weight_decay: float = 0.0
    warmup: float = 0.1
    decay: Literal["cosine", "linear"] = "cosine"
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise UsageError(f"--epochs {self.epochs}: must be at least 0")
        if self.batch_size < 2:
            raise UsageError(f"--batch-size {self.batch_size}: must be at least 2")
        for lr in self.lrs:
            if not 0.0 < lr < math.inf:
                raise UsageError(f"--lr {lr:g}: must be above 0")
        if not self.lrs:
            raise UsageError("--lr: name at least one")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: must be at least 0 and below 2**63")

    def share(self, step: int, total: int) -> float:
        """Return the share of the peak learning rate at ``step`` of ``total``."""
        warmup = max(1, math.ceil(self.warmup * total))
        left = min(1.0, (total - step) / max(1, total - warmup))
        fall = left if self.decay == "linear" else (1.0 - math.cos(math.pi * left)) / 2.0
        return min((step + 1) / warmup, fall)


def finetune(
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    views: ViewsConfig,
    recipe: Recipe,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[nn.Module, LinearClassifier]:
    """Return a trained copy of ``encoder`` and its classifier of ``labels`` (N,), int64.

    ``images`` are uint8 (N, H, W, 3). The classifier starts from torch's random weights, the
    encoder, which is on its device, from its own. ``note`` is called with a line an epoch. Raises
    FastbyolError if the loss is not finite.
    """
    if len(recipe.lrs) > 1:
        recipe = replace(recipe, lrs=(_best_lr(encoder, images, labels, views, recipe, note),))
    classes, targets = torch.unique(labels, return_inverse=True)
    net = copy.deepcopy(encoder)
    join_views(net)
    y = embed(net, images[:1], views, device=_device(net))
    check_finite(y)
    head = _new_head(y.shape[1], len(classes), recipe.seed).to(_device(net))
    fit(nn.Sequential(net, head), images, targets, views, recipe, note)
    return net, linear_head(head, classes)


def fit(
    net: nn.Module,
    images: Tensor,
    targets: Tensor,
    views: ViewsConfig,
    recipe: Recipe,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Train ``net``, images -> logits (B, K), in place on class indices ``targets`` (N,), int64.

    By the first of ``recipe.lrs``. An incomplete last batch is left out. Deterministic on one
    machine with one number of threads.
    """
    device, views = _device(net), crops_and_flips(views)
    batch_size = min(recipe.batch_size, len(images))
    per_epoch = len(images) // batch_size
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=recipe.lrs[0],
        momentum=MOMENTUM,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.share(step, recipe.epochs * per_epoch)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    net.train()
    began = time.perf_counter()
    with full_precision():
        for epoch in range(recipe.epochs):
            order, total = torch.randperm(len(images), generator=generator), torch.zeros(())
            for ids in order[: per_epoch * batch_size].view(per_epoch, batch_size):
                batch = _augmented(images[ids].to(device), ids.to(device), views, recipe, epoch)
                optimizer.zero_grad()
                loss = F.cross_entropy(net(batch), targets[ids].to(device))
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                total = total.to(device) + loss.detach()
            _tell(note, recipe, epoch, float(total) / per_epoch, time.perf_counter() - began)


def crops_and_flips(views: ViewsConfig) -> ViewsConfig:
    """Return ``views`` with crops of half the area or more and flips only: they keep the label."""
    light = {
        "scale": (0.5, 1.0),
        "jitter_p": 0.0,
        "grayscale_p": 0.0,
        "blur_p": (0.0, 0.0),
        "solarize_p": (0.0, 0.0),
    }
    return views.model_copy(update=light)


def labels_of_each_class(labels: Tensor, share: float, seed: int) -> Tensor:
    """Return ascending rows, int64, with ``share`` of each class of ``labels`` (N,), one at least.

    The larger of two shares has all rows of the smaller. Raises UsageError for no share.
    """
    if not 0.0 < share <= 1.0:
        raise UsageError(f"--labels {share:g}: must be above 0 and at most 1, a share of them")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in torch.unique(labels):
        rows = order[labels[order] == label]
        chosen.append(rows[: max(1, round(share * len(rows)))])
    return torch.cat(chosen).sort().values


def _best_lr(
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    views: ViewsConfig,
    recipe: Recipe,
    note: Callable[[str], None],
) -> float:
    """Return the learning rate that is best on held-out images, the smallest of equals."""
    held_out = labels_of_each_class(labels, HELD_OUT, recipe.seed)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held_out] = False
    if len(torch.unique(labels[kept])) < 2:
        raise UsageError(
            f"--lr: {len(labels)} training images are too few to hold some out and choose among "
            "learning rates: name one --lr"
        )
    accuracies = {}
    for lr in sorted(recipe.lrs):
        one = replace(recipe, lrs=(lr,))
        try:
            net, classifier = finetune(encoder, images[kept], labels[kept], views, one, note)
        except FastbyolError as error:
            note(f"lr {lr:g}: {error}")
            continue
        y = embed(net, images[held_out], views, device=_device(net))
        accuracies[lr] = classifier.score(y, labels[held_out])
        shown = accuracy_text(accuracies[lr], len(held_out))
        note(f"lr {lr:g}: {shown} of {len(held_out)} held-out training images")
    if not accuracies:
        raise FastbyolError("--lr: fine-tuning diverged at every learning rate: name smaller ones")
    return max(accuracies, key=accuracies.__getitem__)


def _new_head(dim: int, num_classes: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(dim, num_classes)


def _augmented(
    images: Tensor, ids: Tensor, views: ViewsConfig, recipe: Recipe, epoch: int
) -> Tensor:
    height, width = images.shape[1:3]
    table = view_ops.draw(views, ids, seed=recipe.seed, epoch=epoch, height=height, width=width)
    return view_ops.apply(images, table[:1], views, recipe.dtype)[0]


def _tell(
    note: Callable[[str], None], recipe: Recipe, epoch: int, loss: float, elapsed_s: float
) -> None:
    """Report an epoch. Raises FastbyolError if its mean ``loss`` is not finite."""
    if not math.isfinite(loss):
        raise FastbyolError(
            f"fine-tuning diverged in epoch {epoch + 1}: the loss is {loss}: lower the learning "
            f"rate, {recipe.lrs[0]:g} (--lr)"
        )
    left_s = elapsed_s / (epoch + 1) * (recipe.epochs - epoch - 1)
    note(f"fine-tuning epoch {epoch + 1}/{recipe.epochs} loss {loss:.4g}, {left_s:.0f} s left")


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device
