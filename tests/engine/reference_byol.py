"""BYOL and its relatives from their formulas, in float64: no modules, one pass per view, one loop
over tensors per update.

Slow and independent: it shares nothing with fastbyol but the parameters' names and the
configuration's fields. Sources: byol arXiv:2006.07733; MoCo arXiv:1911.05722; SimSiam
arXiv:2011.10566; ResNet arXiv:1512.03385; batch norm arXiv:1502.03167; group norm arXiv:1803.08494;
batch renormalisation arXiv:1702.03275; weight standardization arXiv:1903.10520; LARS
arXiv:1708.03888 in the three readings that fastbyol documents.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol.config import Config, HeadConfig, ModelConfig

Named = dict[str, Tensor]


def standardize(w: Tensor) -> Tensor:
    rows = w.flatten(1)
    mean = rows.sum(1, keepdim=True) / rows.shape[1]
    variance = (rows - mean).pow(2).sum(1, keepdim=True) / (rows.shape[1] - 1)
    return ((rows - mean) / (variance.sqrt() + 1e-5)).view(w.shape)


@dataclass
class Net:
    """A network's parameters and buffers, with a train-mode forward pass of ONE view."""

    model: ModelConfig
    p: Named
    b: Named

    def encoder(self, x: Tensor) -> Tensor:
        if self.model.stem == "torchvision":
            x = self.norm(
                self.conv(x, "encoder.conv1", 2, 3), "encoder.bn1", self.model.norm
            ).relu()
            x = F.max_pool2d(x, 3, 2, 1)
        else:
            x = self.norm(
                self.conv(x, "encoder.conv1", 1, 1), "encoder.bn1", self.model.norm
            ).relu()
        block = self.bottleneck if self.model.encoder == "resnet50" else self.block
        counts = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
        for stage, count in enumerate(counts[self.model.encoder], 1):
            for index in range(count):
                name, stride = f"encoder.layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
                x = block(x, name, stride)
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3])

    def block(self, x: Tensor, name: str, stride: int) -> Tensor:
        kind = self.model.norm
        out = self.norm(self.conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1", kind).relu()
        out = self.norm(self.conv(out, f"{name}.conv2", 1, 1), f"{name}.bn2", kind)
        return (out + self.shortcut(x, name, stride)).relu()

    def bottleneck(self, x: Tensor, name: str, stride: int) -> Tensor:
        kind = self.model.norm
        out = self.norm(self.conv(x, f"{name}.conv1", 1, 0), f"{name}.bn1", kind).relu()
        out = self.norm(self.conv(out, f"{name}.conv2", stride, 1), f"{name}.bn2", kind).relu()
        out = self.norm(self.conv(out, f"{name}.conv3", 1, 0), f"{name}.bn3", kind)
        return (out + self.shortcut(x, name, stride)).relu()

    def shortcut(self, x: Tensor, name: str, stride: int) -> Tensor:
        if f"{name}.downsample.0.weight" not in self.p:
            return x
        x = self.conv(x, f"{name}.downsample.0", stride, 0)
        return self.norm(x, f"{name}.downsample.1", self.model.norm)

    def conv(self, x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        w = self.p[f"{name}.weight"]
        return F.conv2d(x, standardize(w) if self.model.ws else w, stride=stride, padding=padding)

    def head(self, x: Tensor, name: str, config: HeadConfig) -> Tensor:
        w = self.p[f"{name}.linear1.weight"]
        hidden = x @ (standardize(w) if config.ws else w).T + self.p[f"{name}.linear1.bias"]
        hidden = self.norm(hidden, f"{name}.norm", config.norm).relu()
        return hidden @ self.p[f"{name}.linear2.weight"].T + self.p[f"{name}.linear2.bias"]

    def norm(self, x: Tensor, name: str, kind: str) -> Tensor:
        if kind == "none":
            return x
        shape = (1, -1) + (1,) * (x.ndim - 2)
        normalised = {"bn": self.batch, "brn": self.renorm, "gn": self.group, "ln": self.layer}[
            kind
        ](x, name)
        return normalised * self.p[f"{name}.weight"].view(shape) + self.p[f"{name}.bias"].view(
            shape
        )

    def batch(self, x: Tensor, name: str) -> Tensor:
        dims, shape = [d for d in range(x.ndim) if d != 1], (1, -1) + (1,) * (x.ndim - 2)
        count = x.numel() // x.shape[1]
        mean = x.sum(dims) / count
        squares = (x - mean.view(shape)).pow(2).sum(dims)
        with torch.no_grad():
            self.b[f"{name}.running_mean"] = 0.9 * self.b[f"{name}.running_mean"] + 0.1 * mean
            self.b[f"{name}.running_var"] = 0.9 * self.b[f"{name}.running_var"] + 0.1 * squares / (
                count - 1
            )
            self.b[f"{name}.num_batches_tracked"] = self.b[f"{name}.num_batches_tracked"] + 1
        return (x - mean.view(shape)) / (squares / count + 1e-5).sqrt().view(shape)

    def renorm(self, x: Tensor, name: str) -> Tensor:
        mean = x.sum(0) / len(x)
        std = ((x - mean).pow(2).sum(0) / len(x)).sqrt() + 1e-3
        k = int(self.b[f"{name}.num_batches_tracked"])
        rmax, dmax = (
            min(max(2 / 35000 * k + 25 / 35, 1.0), 3.0),
            min(max(5 / 20000 * k - 25 / 20, 0.0), 5.0),
        )
        running_mean, running_std = self.b[f"{name}.running_mean"], self.b[f"{name}.running_std"]
        r = (std.detach() / running_std).clamp(1 / rmax, rmax)
        d = ((mean.detach() - running_mean) / running_std).clamp(-dmax, dmax)
        self.b[f"{name}.running_mean"] = 0.99 * running_mean + 0.01 * mean.detach()
        self.b[f"{name}.running_std"] = 0.99 * running_std + 0.01 * std.detach()
        self.b[f"{name}.num_batches_tracked"] = self.b[f"{name}.num_batches_tracked"] + 1
        return (x - mean) / std * r + d

    def group(self, x: Tensor, name: str) -> Tensor:
        channels = x.shape[1]
        count = min(self.model.groups, max(1, channels // 2))
        while channels % count:
            count -= 1
        return self.in_groups(x, count)

    def layer(self, x: Tensor, name: str) -> Tensor:
        return self.in_groups(x, 1)

    def in_groups(self, x: Tensor, count: int) -> Tensor:
        rows = x.reshape(x.shape[0], count, -1)
        mean = rows.sum(2, keepdim=True) / rows.shape[2]
        variance = (rows - mean).pow(2).sum(2, keepdim=True) / rows.shape[2]
        return ((rows - mean) / (variance + 1e-5).sqrt()).view(x.shape)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.pow(2).sum(1).sqrt() * b.pow(2).sum(1).sqrt())


def distance(q: Tensor, t: Tensor) -> Tensor:
    return 1 - cosine(q, t).mean()


@dataclass
class Reference:
    """A run of ``config`` from copies of parameters and buffers (by name) and of a queue."""

    config: Config
    parameters: Named
    target_parameters: Named
    online_buffers: Named
    target_buffers: Named
    steps_per_epoch: int
    queue: Tensor | None = None
    oldest: int = 0
    step_count: int = 0
    momentum: Named = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.config.model
        start, followed = (
            {k: v.clone().contiguous() for k, v in p.items()}
            for p in (self.parameters, self.target_parameters)
        )
        self.online = Net(
            model,
            {k: v.clone().requires_grad_() for k, v in start.items()},
            dict(self.online_buffers),
        )
        self.target = Net(model, followed, dict(self.target_buffers))
        self.momentum = {k: torch.zeros_like(v) for k, v in start.items()}
        self.queue = None if self.queue is None else self.queue.clone()

    def step(self, views: Tensor) -> dict[str, float]:
        config, online, target = self.config, self.online, self.target
        y = [online.encoder(view) for view in views]
        z = [online.head(one, "projector", config.model.projector) for one in y]
        q = (
            [online.head(one, "predictor", config.model.predictor) for one in z]
            if config.model.predictor.layers
            else z
        )
        if config.method.name == "simsiam":
            t = [one.detach() for one in z]
        else:
            with torch.no_grad():
                t = [
                    target.head(target.encoder(view), "projector", config.model.projector)
                    for view in views
                ]
        one_way = self.cross_entropy if config.method.name == "contrastive" else distance
        loss = (one_way(q[0], t[1]) + one_way(q[1], t[0])) * config.train.loss_scale
        names = list(online.p)
        gradient = dict(
            zip(names, torch.autograd.grad(loss, [online.p[n] for n in names]), strict=True)
        )
        lr, tau = self.lr(), self.tau()
        with torch.no_grad():
            measured = self.measure(loss, y, z, t, gradient, lr, tau)
            if config.schedule.ema_order == "before":
                self.average(tau)
            self.update(gradient, lr)
            if config.schedule.ema_order == "after":
                self.average(tau)
            if self.queue is not None:
                for key in t[1]:
                    self.queue[self.oldest] = key / key.pow(2).sum().sqrt()
                    self.oldest = (self.oldest + 1) % len(self.queue)
        self.step_count += 1
        return measured

    def cross_entropy(self, q: Tensor, keys: Tensor) -> Tensor:
        """Return the mean of -log(positive's share), image by image and pair by pair."""
        total = q.new_zeros(())
        for i, query in enumerate(q):
            negatives = (
                [key for j, key in enumerate(keys) if j != i]
                if self.queue is None
                else list(self.queue)
            )
            positive, *others = (
                (cosine(query[None], key[None])[0] / self.config.method.temperature).exp()
                for key in (keys[i], *negatives)
            )
            total = total - (positive / (positive + sum(others))).log()
        return total / len(q)

    def measure(
        self,
        loss: Tensor,
        y: list[Tensor],
        z: list[Tensor],
        t: list[Tensor],
        g: Named,
        lr: float,
        tau: float,
    ) -> dict[str, float]:
        size = len(z[0])
        positive, negative = [], []
        for i in range(size):
            for j in range(size):
                for a, b in ((z[0], t[1]), (z[1], t[0])):
                    (positive if i == j else negative).append(
                        cosine(a[i : i + 1], b[j : j + 1]).item()
                    )

        def spread(x: Tensor) -> float:
            unit = x / x.pow(2).sum(1, keepdim=True).sqrt()
            return float((unit - unit.mean(0)).pow(2).mean(0).sqrt().mean() * x.shape[1] ** 0.5)

        return {
            "loss": loss.item(),
            "pos_cos": sum(positive) / len(positive),
            "neg_cos": sum(negative) / len(negative),
            "std_z": (spread(z[0]) + spread(z[1])) / 2,
            "std_y": (spread(y[0]) + spread(y[1])) / 2,
            "dead_y": sum(not torch.cat(y)[:, unit].any() for unit in range(y[0].shape[1]))
            / y[0].shape[1],
            "grad_norm": math.sqrt(sum(v.pow(2).sum().item() for v in g.values())),
            "lr": lr,
            "tau": tau,
            "skipped": 0.0,
        }

    def average(self, tau: float) -> None:
        for name, value in self.target.p.items():
            self.target.p[name] = tau * value + (1 - tau) * self.online.p[name].detach()

    def update(self, gradient: Named, lr: float) -> None:
        optim = self.config.optim
        for name, w in self.online.p.items():
            wd = 0.0 if excluded(name, w, optim.decay_exclude) else float(optim.weight_decay or 0.0)
            k = math.prod(factor for pattern, factor in optim.lr_mult if selects(pattern, name))
            if optim.name == "sgd":
                self.sgd(name, w, gradient[name], lr * k, wd)
            else:
                adapts = any(selects(pattern, name) for pattern in optim.lars_on)
                adapts = adapts and not excluded(name, w, optim.lars_exclude)
                getattr(self, optim.dialect)(name, w, gradient[name], lr * k, wd, adapts)

    def sgd(self, name: str, w: Tensor, g: Tensor, lr: float, wd: float) -> None:
        m = self.momentum[name] = self.config.optim.momentum * self.momentum[name] + g + wd * w
        w -= lr * m

    def blog(self, name: str, w: Tensor, g: Tensor, lr: float, wd: float, adapts: bool) -> None:
        rate = lr
        if adapts:
            w_norm, g_norm = w.pow(2).sum().sqrt().item(), g.pow(2).sum().sqrt().item()
            rate = (
                0.0 if w_norm == 0 else lr * self.config.optim.eta * w_norm / (g_norm + wd * w_norm)
            )
        m = self.momentum[name] = self.config.optim.momentum * self.momentum[name] + rate * (
            g + wd * w
        )
        w -= m

    def deepmind(self, name: str, w: Tensor, g: Tensor, lr: float, wd: float, adapts: bool) -> None:
        u = g + wd * w
        w_norm, u_norm = w.pow(2).sum().sqrt().item(), u.pow(2).sum().sqrt().item()
        if adapts and w_norm > 0 and u_norm > 0:
            u = u * (self.config.optim.eta * w_norm / u_norm)
        m = self.momentum[name] = self.config.optim.momentum * self.momentum[name] + u
        w -= lr * m

    def bolts(self, name: str, w: Tensor, g: Tensor, lr: float, wd: float, adapts: bool) -> None:
        w_norm, g_norm = w.pow(2).sum().sqrt().item(), g.pow(2).sum().sqrt().item()
        if not adapts:
            d = g + wd * w
        elif w_norm != 0 and g_norm != 0:
            d = (g + wd * w) * (self.config.optim.eta * w_norm / (g_norm + w_norm * wd + 1e-8))
        else:
            d = g
        m = self.momentum[name] = self.config.optim.momentum * self.momentum[name] + d
        w -= lr * m

    def clock(self, unit: str) -> tuple[int, int]:
        """Return how far the run is and how far it goes, in steps or whole epochs."""
        horizon = int(self.config.schedule.horizon_epochs or self.config.train.epochs)
        if unit == "epoch":
            return min(self.step_count // self.steps_per_epoch, horizon), horizon
        return min(self.step_count, horizon * self.steps_per_epoch), horizon * self.steps_per_epoch

    def lr(self) -> float:
        base, t, total = (
            float(self.config.optim.lr or 0.0),
            *self.clock(self.config.schedule.lr_unit),
        )
        warmup = int(self.config.schedule.warmup_epochs * self.steps_per_epoch)
        if self.step_count < warmup:
            return base * self.step_count / warmup
        if self.config.schedule.lr == "constant":
            return base
        if self.config.schedule.lr_unit == "step":
            t, total = t - warmup, total - warmup
        return base * (1 + math.cos(math.pi * t / total)) / 2

    def tau(self) -> float:
        base, t, total = self.config.schedule.tau, *self.clock(self.config.schedule.tau_unit)
        if self.config.schedule.tau_schedule == "constant":
            return base
        return 1 - (1 - base) * (math.cos(math.pi * t / total) + 1) / 2


def selects(pattern: str, name: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return parts[: len(wanted)] == wanted or fnmatch.fnmatchcase(name, pattern)


def excluded(name: str, w: Tensor, how: str) -> bool:
    if how == "substring":
        return ".bias" in name or ".bn" in name
    return how == "bias_and_norm" and w.ndim == 1
