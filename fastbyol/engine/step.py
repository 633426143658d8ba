"""The whole state of training in one object, and the one function that advances it.

Drive it yourself:

    state = TrainState.create(fastbyol.load_config(), steps_per_epoch=16)
    for views in batches:                     # (2, B, 3, S, S), normalised
        metrics = train_step(state, views)
    print(dict(zip(METRICS, metrics.values.tolist())))

Method: Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733, section 3.

Letters: V = 2 views, B images, S pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastbyol.config import Config, ModelConfig, Resolved
from fastbyol.engine.device import dtype_of
from fastbyol.engine.standardized import StandardizedWeights
from fastbyol.errors import UsageError
from fastbyol.model.byol import NUM_VIEWS, Online, Target, build_online, build_target
from fastbyol.model.norm import use_kernels
from fastbyol.model.objective import OBJECTIVES, Objective, byol_loss, contrastive_loss, enqueue, observe, unit
from fastbyol.optim import schedule
from fastbyol.optim.arena import Arena
from fastbyol.optim.given_rates import GivenRates
from fastbyol.optim.lars import rule_of, treatments
from fastbyol.process import exact_products, left_as_found
from fastbyol_kernels import dispatch
from fastbyol_kernels.lars_ema import LAYER_METRICS, Rule, lars_ema

__all__ = ["LAYER_METRICS", "METRICS", "StepMetrics", "TrainState", "forward", "train_step"]

METRICS = ("loss", "pos_cos", "neg_cos", "std_z", "std_y", "dead_y", "grad_norm", "lr", "tau", "skipped")


class StepMetrics(NamedTuple):
    """What one step measured, on the device: ``values`` (len(METRICS),) and ``layers`` (segments, len(LAYER_METRICS)), fp32.

    loss is as it was minimised, scale included. pos_cos and neg_cos are mean cosines of online projections z(v) and target
    projections z'(v') of the same and of different images, averaged over the two orders of the views; under simsiam z' is z.
    std_z and std_y are the spread of projections and embeddings, dead_y is the share of embedding units that are 0 over the
    whole batch (``model.objective``), grad_norm is the whole gradient's, lr and tau are this step's, skipped is 1 where the
    optimizer left the step out, else 0.
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

    @staticmethod
    def of(config: Config) -> Recipe:
        """Take a configuration's numbers."""
        optim, method, train = config.optim, config.method, config.train
        return Recipe(
            rule=rule_of(optim),
            eta=optim.eta,
            momentum=optim.momentum,
            ema_first=config.schedule.ema_order == "before",
            objective=Objective(method.name, train.loss_scale, method.temperature),
            views_dtype=dtype_of(train.precision),
        )


@dataclass(frozen=True)
class TrainState:
    """Everything that training changes: both networks over the arena's buffers, and ``step``, a 0-d int64 tensor.

    ``lr`` and ``tau`` are the schedules as tables, ``given`` rates that replace LARS's own, ``standardized`` makes the weights
    of a step that are made at once, and ``kernels`` is triton, cpu or reference. ``queue`` (K, D) holds the contrastive loss's
    negatives: past target projections as unit vectors, at first random ones. Weights, momentum, statistics and queue are fp32
    (fp64 under that precision).
    """

    online: Online
    target: Target
    arena: Arena
    step: Tensor
    lr: Tensor
    tau: Tensor
    recipe: Recipe
    standardized: StandardizedWeights
    kernels: str
    given: GivenRates | None = None
    queue: Tensor | None = None

    @staticmethod
    def create(config: Resolved, *, steps_per_epoch: int, device: str | torch.device = "cpu") -> TrainState:
        """The state before the first step. It depends on ``config`` alone: the same on any device, whatever was drawn before.

        On CUDA under ``fp32`` TF32 is switched off for the process (``process.exact_products``). Raises ``UsageError`` for
        configurations that name parameters which do not exist, heads that do not fit together, or a horizon beyond all measure.
        """
        optim, epochs = config.optim, config.schedule.horizon_epochs
        device, dtype = torch.device(device), torch.float64 if config.train.precision == "fp64" else torch.float32
        try:
            kernels = dispatch.resolve(config.engine.kernels, device, dtype)
        except ValueError as error:
            raise UsageError(f"engine.{error}") from None
        if device.type == "cuda" and config.train.precision == "fp32":
            exact_products()
        tables = (
            schedule.lr_table(config.schedule, optim.lr, horizon_epochs=epochs, steps_per_epoch=steps_per_epoch),
            schedule.tau_table(config.schedule, horizon_epochs=epochs, steps_per_epoch=steps_per_epoch),
        )
        num_keys = config.method.queue if config.method.name == "contrastive" else 0
        online, target, keys = _drawn(config.model, config.train.seed, num_keys)
        for net in (online, target):
            net.to(device, dtype)
            use_kernels(net, kernels)
        shapes = {name: p.shape for name, p in online.named_parameters()}
        arena = Arena.adopt(online, target, treatments(shapes, optim), weight_decay=optim.weight_decay)
        step = torch.zeros((), dtype=torch.int64, device=device)
        lr, tau = (table.to(device, dtype) for table in tables)
        recipe = Recipe.of(config)
        standardized = StandardizedWeights.of(online, target, arena, recipe.views_dtype, kernels)
        given = GivenRates.of(optim, arena.table)
        queue = unit(keys.to(dtype)).to(device) if num_keys else None
        return TrainState(online, target, arena, step, lr, tau, recipe, standardized, kernels, given, queue)

    @property
    def segment_names(self) -> tuple[str, ...]:
        """The trained parameters' names in the order of ``StepMetrics.layers``."""
        return tuple(segment.name for segment in self.arena.segments)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to go on bit for bit, by stable names: the live tensors, not copies.

        The three flat buffers that outlive a step, the norm layers' buffers of both networks, the step, and the queue if any.
        """
        tensors = {f"arena.{name}": getattr(self.arena, name) for name in ("online", "momentum", "target")}
        for prefix, net in (("online", self.online), ("target", self.target)):
            tensors |= {f"{prefix}.{name}": buffer for name, buffer in net.named_buffers()}
        return tensors | {"step": self.step} | ({} if self.queue is None else {"queue": self.queue})

    @torch.no_grad()
    def statistics(self) -> Tensor:
        """A copy of both networks' running statistics in one flat tensor, empty where no norm keeps any."""
        buffers = self._float_buffers()
        return torch.cat([buffer.flatten() for buffer in buffers]) if buffers else self.lr[:0]

    @torch.no_grad()
    def keep_statistics(self, flat: Tensor) -> None:
        """Take over what ``statistics`` gave."""
        buffers = self._float_buffers()
        for buffer, kept in (
            zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True) if buffers else ()
        ):
            buffer.copy_(kept.view_as(buffer))

    def _float_buffers(self) -> list[Tensor]:
        return [buffer for net in (self.online, self.target) for buffer in net.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` of an equally configured state gave. Raises ``UsageError``, having changed nothing,
        where names, shapes or dtypes differ."""
        own = self.tensors()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise UsageError(
                f"checkpoint: holds another network than the configuration's ({len(odd)} names differ, first {odd[0]!r})"
            )
        for name, tensor in own.items():
            if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise UsageError(
                    f"checkpoint: {name!r} is {_kind(tensors[name])}, the configuration's network has {_kind(tensor)}"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


Forward = Callable[[Online, Target, Tensor, Objective, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


def forward(
    online: Online, target: Target, batch: Tensor, objective: Objective, queue: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run both networks on a batch (2B, 3, S, S).

    Return the loss, 0-d; what ``observe`` watches beside it, (5,), without gradient; and the keys that are to enter ``queue``,
    (B, D), None without one. It is one graph without a break, so that it and its backward pass can be compiled
    (``engine.capture``).
    """
    output = online(batch)
    with torch.no_grad():
        # simsiam: a target that is the online network itself, without gradient (arXiv:2011.10566, algorithm 1).
        projections = output.z.detach() if objective.name == "simsiam" else target(batch)
    if objective.name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective.name!r}")
    if objective.name == "contrastive":
        loss = contrastive_loss(output.q, projections, objective.temperature, queue) * objective.loss_scale
    else:
        loss = byol_loss(output.q, projections) * objective.loss_scale
    # The post's code keeps the second view's keys alone (moco.py).
    keys = None if queue is None else unit(projections)[len(batch) // NUM_VIEWS :]
    return loss, torch.stack(observe(output, projections)), keys


def train_step(state: TrainState, views: Tensor, forward: Forward = forward) -> StepMetrics:
    """One step on ``views`` (2, B, 3, S, S), normalised floats on the state's device, B >= 2. Never waits for the device.

    Forward passes of both networks, backward pass, optimizer and moving average in the configured order, ``step`` + 1.
    ``forward`` is this module's or a compiled form of it.
    """
    recipe, arena = state.recipe, state.arena
    lr, tau = schedule.at(state.lr, state.step), schedule.at(state.tau, state.step)
    batch = as_batch(views, recipe.views_dtype)
    arena.gradient.zero_()
    statistics = state.statistics()
    with state.standardized.in_use():
        loss, observed, keys = forward(state.online, state.target, batch, recipe.objective, state.queue)
        torch.autograd.backward(loss)
    with torch.no_grad():
        table, factor = arena.table, lr
        if state.given is not None:
            state.given.set(arena.online, arena.gradient, lr, state.step)
            table, factor = state.given.table, state.given.lr
        layers = lars_ema(
            arena.online, arena.gradient, arena.momentum, arena.target, table, factor, tau,
            rule=recipe.rule, eta=recipe.eta, mu=recipe.momentum, ema_first=recipe.ema_first,
            kernels=state.kernels,
        )  # fmt: skip
        # The optimizer leaves a step out whose gradient is not finite; what norms and queue gathered in it has to go as well.
        taken = layers[:, 1].isfinite().all()
        state.keep_statistics(torch.where(taken, state.statistics(), statistics))
        if state.queue is not None and keys is not None:
            enqueue(state.queue, keys, state.step, taken)
        state.step.add_(1)
        of_step = torch.stack((torch.linalg.vector_norm(arena.gradient), lr, tau, (~taken).to(lr.dtype)))
        values = torch.cat((loss.detach().view(1), observed, of_step))
    return StepMetrics(values.float(), layers.float())


def as_batch(views: Tensor, dtype: torch.dtype) -> Tensor:
    """Views (2, B, 3, S, S) -> (2B, 3, S, S) in ``dtype`` and channels-last, without a copy where they are that already."""
    if views.ndim != 5 or views.shape[0] != NUM_VIEWS or views.shape[1] < 2 or not views.is_floating_point():
        raise ValueError(f"views must be floats (2, B >= 2, 3, S, S), got {_kind(views)}")
    return views.flatten(0, 1).to(dtype, memory_format=torch.channels_last)


def _drawn(config: ModelConfig, seed: int, num_keys: int) -> tuple[Online, Target, Tensor]:
    """Draw both networks and then ``num_keys`` normal keys (K, D) from ``seed`` alone, on the CPU in fp32.

    torch's generators are left as they were.
    """
    with torch.random.fork_rng(devices=[]), left_as_found():
        torch.default_generator.manual_seed(seed)
        return build_online(config), build_target(config), torch.randn(num_keys, config.projector.out)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
