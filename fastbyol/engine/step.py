"""The whole state of training in one object, and the one function that advances it.

Drive it yourself:

    state = TrainState.create(fastbyol.load_config(), steps_per_epoch=16)
    for views in batches:                     # (2, B, 3, S, S), normalised
        metrics = train_step(state, views)
    print(dict(zip(METRICS, metrics.values.tolist())))

Method: Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733, section 3.
Letters: B images, S pixels, D features, K keys in a queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastbyol.config import Config, Resolved
from fastbyol.engine.device import dtype_of
from fastbyol.engine.exchange import Exchange, Layout
from fastbyol.engine.ranks import Alone, Ranks, gather_of, shares
from fastbyol.engine.working_weights import WorkingWeights
from fastbyol.errors import UsageError
from fastbyol.model.adapter import refuse_global
from fastbyol.model.byol import NUM_VIEWS, Online, OnlineOutput, Target, draw_networks
from fastbyol.model.norm import share_statistics, use_kernels
from fastbyol.model.objective import (
    OBJECTIVES,
    Objective,
    Share,
    byol_loss,
    contrastive_loss,
    enqueue,
    moments,
    num_moments,
    observe,
    unit,
)
from fastbyol.model.standardizing import use_products
from fastbyol.optim import schedule
from fastbyol.optim.arena import Arena
from fastbyol.optim.lars import rule_of, treatments
from fastbyol.optim.rate_override import RateOverride
from fastbyol.process import exact_products
from fastbyol_kernels import dispatch
from fastbyol_kernels.lars_ema import LAYER_METRICS, Reversible, Rule, scheduled_step

__all__ = ["LAYER_METRICS", "METRICS", "StepMetrics", "TrainState", "forward", "train_step"]

# The names of ``StepMetrics.values``: the loss, ``objective.observe``'s, ``scheduled_step``'s.
METRIC_MEANINGS: Mapping[str, str] = {
    "loss": "the loss as minimised, scale included",
    "pos_cos": "mean cosine of the online network's projection of a view and the target's of the "
    "same image's other view, over the batch and both orders of the views",
    "neg_cos": "the same over pairs of different images; near 1 in a collapse",
    "std_z": "spread of the projections' directions: 1 over the whole sphere, 0 if all are one",
    "std_y": "the same of the embeddings",
    "dead_y": "share of the embedding's units that are 0 over the whole batch",
    "grad_norm": "Euclidean norm of the gradient of all parameters",
    "lr": "learning rate of this step, after warm-up and schedule",
    "tau": "factor of the target's old weights in this step's moving average",
    "skipped": "1 if the step was left out because its gradient was not finite, else 0",
}
METRICS = tuple(METRIC_MEANINGS)


class StepMetrics(NamedTuple):
    """One step's fp32 measurements on the device.

    ``values`` (len(METRICS),) and ``layers`` (segments, len(LAYER_METRICS)).
    """

    values: Tensor
    layers: Tensor


@dataclass(frozen=True)
class Recipe:
    """The numbers of a step that never change."""

    rule: Rule
    eta: float
    momentum: float
    ema_first: bool
    objective: Objective
    views_dtype: torch.dtype
    views_layout: str

    @staticmethod
    def of(config: Config, kernels: str, share: Share | None = None) -> Recipe:
        """Collect the numbers of ``config``, for a whole batch or a ``share`` of it.

        ``kernels`` is triton, cpu or reference. Raises UsageError if ``engine.stem`` does not fit.
        """
        optim, method, train = config.optim, config.method, config.train
        part = 1.0 if share is None else share.count / share.total
        return Recipe(
            rule=rule_of(optim),
            eta=optim.eta,
            momentum=optim.momentum,
            ema_first=config.schedule.ema_order == "before",
            objective=Objective(method.name, train.loss_scale * part, method.temperature, share),
            views_dtype=dtype_of(train.precision),
            views_layout=views_layout(config, kernels),
        )


def views_layout(config: Config, kernels: str) -> str:
    """Return the layout of the views that the stem trains on, "plain" or "blocks".

    ``kernels`` is triton, cpu or reference. Raises UsageError for blocks that cannot be.
    """
    wanted, stem, size = config.engine.stem, config.model.stem, config.views.size
    if config.model.foreign is not None:
        if wanted == "blocks":
            raise UsageError(
                f"engine.stem: blocks are for fastbyol's own encoders, model.encoder is "
                f"{config.model.encoder}: take plain or auto"
            )
        return "plain"
    if wanted == "auto":
        # In fp32 there are no tensor cores to gain, only products with zeros.
        pays = kernels == "triton" and config.train.precision == "bf16"
        return "blocks" if pays and stem == "torchvision" and size % 2 == 0 else "plain"
    if wanted == "blocks" and stem != "torchvision":
        raise UsageError(
            f"engine.stem: blocks are for model.stem torchvision, it is {stem}: take plain or auto"
        )
    if wanted == "blocks" and size % 2:
        raise UsageError(
            f"engine.stem: blocks of 2x2 pixels need an even views.size, it is {size}: take plain "
            "or auto"
        )
    return wanted


@dataclass(frozen=True)
class TrainState:
    """Everything that training changes; floats are fp32, or fp64 under that precision.

    Both networks over the arena's buffers and ``step``, 0-d int64. ``rates`` (T, 2) holds lr
    and tau of each step, ``rate_override`` replaces LARS's rates, ``kernels`` is triton, cpu or
    reference. ``queue`` (K, D) holds the contrastive loss's negatives, past target projections as
    unit vectors, at first random ones. ``exchange`` is None unless there are several ranks.
    ``statistics`` are those of both networks' norms, which a step that is left out must not change;
    None without any. Whoever writes parameters or statistics other than by a step or
    ``load_tensors`` calls ``renew`` after it.
    """

    online: Online
    target: Target
    arena: Arena
    step: Tensor
    rates: Tensor
    recipe: Recipe
    weights: WorkingWeights
    kernels: str
    rate_override: RateOverride | None = None
    queue: Tensor | None = None
    exchange: Exchange | None = None
    statistics: Reversible | None = None

    @staticmethod
    def create(
        config: Resolved,
        *,
        steps_per_epoch: int,
        device: str | torch.device = "cpu",
        ranks: Ranks | None = None,
    ) -> TrainState:
        """Make the state before the first step: the same on any device, whatever was drawn before.

        It is also the same on all of several ``ranks``, and each steps on its share of a batch,
        within ``ranks.current``. Switches TF32 off for the process on CUDA under fp32
        (``process.exact_products``). Raises UsageError for patterns that match no parameter, heads
        that do not fit together, a horizon that is too long, and an engine that cannot be had.
        """
        optim, epochs = config.optim, config.schedule.horizon_epochs
        device, dtype = (
            torch.device(device),
            torch.float64 if config.train.precision == "fp64" else torch.float32,
        )
        try:
            kernels = dispatch.resolve(config.engine.kernels, device, dtype)
        except ValueError as error:
            raise UsageError(f"engine.{error}") from None
        if config.engine.heads != "fp32" and kernels != "triton":
            raise UsageError(
                f"engine.heads: {config.engine.heads} needs Triton's kernels (a CUDA device, "
                f"precision fp32 or bf16), this run has kernels {kernels}: take engine.heads=fp32"
            )
        if config.engine.overlap and config.method.name == "simsiam":
            raise UsageError(
                "engine.overlap: in method simsiam the target has no forward pass: set it to false"
            )
        if device.type == "cuda" and config.train.precision == "fp32":
            exact_products()
        rates = schedule.joined(
            schedule.lr_table(
                config.schedule, optim.lr, horizon_epochs=epochs, steps_per_epoch=steps_per_epoch
            ),
            schedule.tau_table(
                config.schedule, horizon_epochs=epochs, steps_per_epoch=steps_per_epoch
            ),
        )
        num_keys = config.method.queue if config.method.name == "contrastive" else 0
        online, target, keys = draw_networks(
            config.model, config.train.seed, num_keys, image_size=config.views.size
        )
        for net in (online, target):
            net.to(device, dtype)
            use_kernels(net, kernels)
            use_products(net, config.engine.heads)
        shapes = {name: p.shape for name, p in online.named_parameters()}
        ranks = Alone() if ranks is None else ranks
        share = None if ranks.count == 1 else share_of(config.train.batch_size, ranks)
        layout = _layout(config, online, target, num_keys)
        arena = Arena.adopt(
            online,
            target,
            treatments(shapes, optim),
            weight_decay=optim.weight_decay,
            tail=0 if share is None else sum(layout.sizes(ranks.count)),
        )
        exchange = None
        if share is not None:
            exchange = Exchange.of(ranks, share, layout, arena.gradient, config.model.projector.out)
            if config.model.norm_scope == "global":
                refuse_global(config.model, online.encoder)
                for net in (online, target):
                    share_statistics(net, share.gather)
        step = torch.zeros((), dtype=torch.int64, device=device)
        recipe = Recipe.of(config, kernels, share)
        blocks = kernels == "triton" and recipe.views_layout == "blocks"
        weights = WorkingWeights.of(
            online, target, arena, recipe.views_dtype, kernels, blocks=blocks
        )
        rate_override = RateOverride.of(optim, arena.table)
        queue = unit(keys.to(dtype)).to(device) if num_keys else None
        return TrainState(
            online,
            target,
            arena,
            step,
            rates.to(device, dtype),
            recipe,
            weights,
            kernels,
            rate_override,
            queue,
            exchange,
            # Tensors of their own, not views of one: torch 2.11's Inductor takes an operation's
            # mutated argument to begin at its storage's first element, and writes elsewhere.
            Reversible.of(_statistics(online, target)),
        )

    @property
    def lr(self) -> Tensor:
        """The learning rate of each step, (T,)."""
        return self.rates[:, 0]

    @property
    def tau(self) -> Tensor:
        """The moving average's coefficient of each step, (T,)."""
        return self.rates[:, 1]

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the batch."""
        return Alone() if self.exchange is None else self.exchange.ranks

    @property
    def segment_names(self) -> tuple[str, ...]:
        """The trained parameters' names, in the order of ``StepMetrics.layers``."""
        return tuple(segment.name for segment in self.arena.segments)

    def tensors(self) -> dict[str, Tensor]:
        """Return the live tensors, by stable names, from which a run resumes bit for bit.

        These are the three flat buffers that outlive a step, both networks' norm buffers, the step
        and the queue, if any.
        """
        tensors = {
            f"arena.{name}": getattr(self.arena, name) for name in ("online", "momentum", "target")
        }
        for prefix, net in (("online", self.online), ("target", self.target)):
            tensors |= {f"{prefix}.{name}": buffer for name, buffer in net.named_buffers()}
        return tensors | {"step": self.step} | ({} if self.queue is None else {"queue": self.queue})

    @torch.no_grad()
    def renew(self) -> None:
        """Copy again what a step copies, after anything else has written the networks."""
        self.weights.renew()
        if self.statistics is not None:
            self.statistics.save()

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in ``tensors``, those of an equally configured state.

        Raises UsageError and changes nothing if names, shapes or dtypes differ.
        """
        own = self.tensors()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise UsageError(
                f"checkpoint: holds another network than the configuration's ({len(odd)} names "
                f"differ, first {odd[0]!r})"
            )
        for name, tensor in own.items():
            if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise UsageError(
                    f"checkpoint: {name!r} is {_kind(tensors[name])}, the configuration's network "
                    f"has {_kind(tensor)}"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.renew()


Forward = Callable[
    [Online, Target, Tensor, Objective, Tensor | None], tuple[Tensor, Tensor, Tensor | None]
]


def forward(
    online: Online, target: Target, batch: Tensor, objective: Objective, queue: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run both networks on a batch (2B, 3, S, S): one graph, which ``engine.capture`` can compile.

    The batch may be in blocks, as ``train_step``'s views.
    Returns the loss, 0-d; the measurements of ``observe``, (5,), or of a share ``moments``, (K,),
    without gradient; and the keys for the queue, (B, D), or None without one.
    """
    output = online(batch)
    # simsiam's target is the online network without gradient (arXiv:2011.10566, algorithm 1).
    projections = output.z.detach() if objective.name == "simsiam" else project(target, batch)
    return measure(output, projections, objective, queue)


def project(target: Target, batch: Tensor) -> Tensor:
    """Run the target on a batch (2B, 3, S, S). Returns its projections z' (2B, D)."""
    with torch.no_grad():
        projections: Tensor = target(batch)
    return projections


def measure(
    output: OnlineOutput, projections: Tensor, objective: Objective, queue: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what ``forward`` does, from both networks' outputs."""
    if objective.name not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)}, not {objective.name!r}"
        )
    if objective.name == "contrastive":
        loss = (
            contrastive_loss(output.q, projections, objective.temperature, queue, objective.share)
            * objective.loss_scale
        )
    else:
        loss = byol_loss(output.q, projections) * objective.loss_scale
    # Like the post's code (moco.py), keep only the second view's keys.
    keys = None if queue is None else unit(projections)[len(projections) // NUM_VIEWS :]
    if objective.share is not None:
        return loss, moments(output, projections), keys
    return loss, torch.stack(observe(output, projections)), keys


def train_step(state: TrainState, views: Tensor, forward: Forward = forward) -> StepMetrics:
    """Advance ``state`` by a step on ``views`` (2, B, 3, S, S). Never waits for the device.

    Both forward passes, the backward pass, optimizer and moving average in the configured order.
    Views are normalised floats on the state's device, B >= 2 or, on several ranks, this one's
    share. For the torchvision stem they may be in blocks, (2, B, 16, S/2 + 3, S/2 + 3), whatever
    the layout that the recipe asks for. ``forward`` is this module's or a compiled form of it.
    """
    recipe, arena = state.recipe, state.arena
    batch = as_batch(views, recipe.views_dtype, 2 if state.exchange is None else 1)
    with state.weights.in_use(len(batch)) as leaves:
        loss, observed, keys = forward(
            state.online, state.target, batch, recipe.objective, state.queue
        )
    state.weights.differentiate(loss, leaves)
    with torch.no_grad():
        loss, statistics = loss.detach(), state.statistics
        if state.exchange is not None:
            own = None if statistics is None else statistics.flat()
            loss, observed, mean, keys = state.exchange.sum_(loss, observed, own, keys)
            if statistics is not None and mean is not None:
                statistics.write(mean)
        table, lr, override = arena.table, None, state.rate_override
        if override is not None:
            now = schedule.at(state.lr, state.step)
            override.set(arena.online, arena.gradient, now, state.step)
            table, lr = override.table, override.lr
        online_copy, target_copy = state.weights.rounded_copies
        # The optimizer skips a step whose gradient is not finite; norms and queue must forget it,
        # too.
        row = scheduled_step(
            arena.online, arena.gradient, arena.momentum, arena.target, table,
            state.rates, state.step, loss, observed, statistics, lr=lr,
            rule=recipe.rule, eta=recipe.eta, mu=recipe.momentum, ema_first=recipe.ema_first,
            kernels=state.kernels, online_copy=online_copy, target_copy=target_copy,
        )  # fmt: skip
        values, layers = torch.split(row, [len(METRICS), len(row) - len(METRICS)])
        if state.queue is not None and keys is not None:
            enqueue(state.queue, keys, state.step - 1, values[METRICS.index("skipped")] == 0)
    return StepMetrics(values, layers.view(-1, len(LAYER_METRICS)))


def as_batch(views: Tensor, dtype: torch.dtype, least: int = 2) -> Tensor:
    """Flatten views (2, B, 3, S, S) to (2B, 3, S, S) in ``dtype`` and channels-last, if need be.

    Those in blocks keep their 16 channels. Raises ValueError for other shapes and for B under
    ``least``.
    """
    if (
        views.ndim != 5
        or views.shape[0] != NUM_VIEWS
        or views.shape[1] < least
        or not views.is_floating_point()
    ):
        raise ValueError(f"views must be floats (2, B >= {least}, 3, S, S), got {_kind(views)}")
    return views.flatten(0, 1).to(dtype, memory_format=torch.channels_last)


def share_of(batch_size: int, ranks: Ranks) -> Share:
    """Return the images of a batch that ``ranks.rank`` has: consecutive, one more or less each."""
    counts = shares(batch_size, ranks.count)
    return Share(sum(counts[: ranks.rank]), counts, ranks.rank, gather_of(ranks.count))


def _statistics(online: Online, target: Target) -> list[Tensor]:
    """Return the running statistics of both networks' norms."""
    # Other libraries' networks have buffers of constants, too.
    return [
        buffer
        for net in (online, target)
        for name, buffer in net.named_buffers()
        if buffer.is_floating_point() and name.rpartition(".")[2].startswith("running_")
    ]


def _layout(config: Config, online: Online, target: Target, num_keys: int) -> Layout:
    model = config.model
    own = model.norm_scope == "rank"
    buffers = _statistics(online, target)
    return Layout(
        moments=num_moments(model.projector.out, online.encoder.embedding_dim),
        statistics=sum(b.numel() for b in buffers) if own else 0,
        keys=(config.train.batch_size, model.projector.out) if num_keys else (0, 0),
    )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
