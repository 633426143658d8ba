"""The step against an independent plain implementation in float64, and its properties."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import golden
from fastbyol.config import Config, resolve
from fastbyol.engine.step import (
    LAYER_METRICS,
    METRICS,
    StepMetrics,
    TrainState,
    as_batch,
    train_step,
    views_layout,
)
from fastbyol.errors import UsageError
from reference_byol import Reference

NORMS = ("bn", "gn", "ln", "none")
HEAD_NORMS = ("bn", "gn", "ln", "none", "brn")
OPTIMIZERS = ("sgd", "blog", "deepmind", "bolts")
# The worst combination comes to 1e-11 (weights standardized and no norm in the encoder). Of some
# twenty slips that were planted, the faintest, an eps of group norm off by one per cent, shows as
# 6e-8.
TOLERANCE = 1e-10
STEPS = 3


def tiny(
    norm: str = "bn",
    head_norm: str = "bn",
    ws: bool = False,
    optimizer: str = "sgd",
    order: str = "before",
    **more: object,
) -> Config:
    """Make a network of width 4 for 16x16 views; a few steps move every parameter."""
    head = {"norm": head_norm, "hidden": 16, "out": 8, "ws": ws}
    values: dict[str, dict[str, object]] = {
        "model": {
            "norm": norm,
            "ws": ws,
            "groups": 4,
            "width": 4,
            "stem": "small",
            "projector": head,
            "predictor": head,
        },
        "optim": {"name": "sgd", "lr": 0.005, "weight_decay": 1e-2}
        if optimizer == "sgd"
        else {"name": "lars", "dialect": optimizer, "lr": 2.0, "eta": 0.01, "weight_decay": 1e-2},
        "schedule": {"ema_order": order, "tau": 0.9, "horizon_epochs": 7},
        "train": {"precision": "fp64", "loss_scale": 1.5, "batch_size": 6},
        "method": {},
    }
    for key, value in more.items():
        part, name = key.split("__")
        values[part][name] = value
    return resolve(Config.model_validate(values))


def some_views(step: int, *, batch: int = 6, size: int = 16) -> Tensor:
    g = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(1, batch, 3, size, size, generator=g, dtype=torch.float64)
    return images + 0.5 * torch.randn(2, batch, 3, size, size, generator=g, dtype=torch.float64)


def reference_of(state: TrainState, config: Config, steps_per_epoch: int) -> Reference:
    nets = (state.online, state.target)
    parameters = [{name: p.detach() for name, p in net.named_parameters()} for net in nets]
    buffers = [{name: b.clone() for name, b in net.named_buffers()} for net in nets]
    return Reference(config, *parameters, *buffers, steps_per_epoch, state.queue)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference, relative to the tensor's largest number if that exceeds 1.

    Standardized weights without a norm layer let activations grow to 1e13, variances to 1e26.
    """
    assert a.keys() == b.keys()
    with torch.no_grad():
        return max(
            [(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1)), n) for n in a],
            default=(0.0, ""),
        )


def assert_same(state: TrainState, reference: Reference) -> None:
    arena = state.arena
    pairs = {
        "parameters": (dict(state.online.named_parameters()), reference.online.p),
        "momentum": (arena.named(arena.momentum), reference.momentum),
        "target": (dict(state.target.named_parameters()), reference.target.p),
        "online buffers": (dict(state.online.named_buffers()), reference.online.b),
        "target buffers": (dict(state.target.named_buffers()), reference.target.b),
    }
    for what, (ours, theirs) in pairs.items():
        worst, name = distance(ours, theirs)
        assert worst < TOLERANCE, f"{what}: {name} is off by {worst:.1e}"
    if state.queue is not None and reference.queue is not None:
        assert float((state.queue - reference.queue).abs().max()) < TOLERANCE
    assert (state.queue is None) == (reference.queue is None)


@torch.no_grad()
def move_off_start(state: TrainState) -> None:
    """Move the state away from where formulas coincide.

    Those are norm biases of 0 (LARS takes no steps), batch renormalisation before batch 5,000 (r =
    1 and d = 0), and a target equal to the online network.
    """
    g = torch.Generator().manual_seed(5)
    for p in (*state.online.parameters(), *state.target.parameters()):
        p += 0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    for name, buffer in (*state.online.named_buffers(), *state.target.named_buffers()):
        if name.endswith("num_batches_tracked"):
            buffer += 12345


def run_both(
    config: Config,
    *,
    steps: int = STEPS,
    steps_per_epoch: int = 1,
    size: int = 16,
    afresh: bool = False,
) -> None:
    state = TrainState.create(config, steps_per_epoch=steps_per_epoch)
    move_off_start(state)
    reference = reference_of(state, config, steps_per_epoch)
    for step in range(steps):
        if afresh and step:
            assert_same(state, reference)
            reference = reference_of(state, config, steps_per_epoch)
            reference.momentum = {
                k: v.clone() for k, v in state.arena.named(state.arena.momentum).items()
            }
            reference.step_count = step
        views = some_views(step, size=size)
        metrics, expected = train_step(state, views), reference.step(views)
        # The metrics are fp32 numbers of size 1.
        assert dict(zip(METRICS, metrics.values.tolist(), strict=True)) == pytest.approx(
            expected, rel=1e-5, abs=1e-6
        )
    assert_same(state, reference)
    assert int(state.step) == steps


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ws", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_plain_implementation(norm: str, ws: bool, optimizer: str, order: str) -> None:
    """Every combination of norm, MLP norm, weight standardization, optimizer, dialect and EMA
    order.
    """
    for head_norm in HEAD_NORMS:
        run_both(tiny(norm, head_norm, ws, optimizer, order))


VARIANTS = {
    "torchvision stem": (tiny("bn", "bn", model__stem="torchvision"), 48),
    "torchvision stem, gn, ws": (tiny("gn", "none", ws=True, optimizer="blog",
    model__stem="torchvision"), 48),
    "substring filter": (tiny(optimizer="blog", optim__lars_exclude="substring",
    optim__decay_exclude="substring"), 16),
    "biases and norms": (
        tiny(optimizer="deepmind", optim__lars_exclude="bias_and_norm",
        optim__decay_exclude="bias_and_norm"), 16
    ),
    "bolts, some decay": (tiny(optimizer="bolts", optim__lars_exclude="bias_and_norm",
    optim__decay_exclude="substring"), 16),
    "lars on two layers": (tiny("gn", "none", optimizer="blog", optim__lars_on=("encoder.layer1",
    "encoder.layer2")), 16),
    "lars on heads": (tiny("gn", "none", optimizer="blog", optim__lars_on=("projector",
    "*.linear2.*")), 16),
    "lars on nothing": (tiny("gn", "ln", optimizer="deepmind", optim__lars_on=()), 16),
    "rate factors": (tiny("gn", "bn", optim__lr_mult=(("encoder.layer1", 5.0), ("*.bn1.*", 0.5),
    ("predictor", 0.0))), 16),
    "lars rate factors": (tiny("gn", "bn", optimizer="blog", optim__lr_mult=(("encoder.layer1",
    5.0), ("projector", 0.5))), 16),
    "steps and warm-up": (
        tiny(schedule__lr_unit="step", schedule__tau_unit="step", schedule__warmup_epochs=0.5,
        schedule__horizon_epochs=3), 16
    ),
    "constant": (tiny(schedule__lr="constant", schedule__tau_schedule="constant"), 16),
    "beyond the horizon": (tiny("gn", "none", schedule__horizon_epochs=1), 16),
    "32 groups": (tiny("gn", "bn", model__groups=32), 16),
    "unlike heads": (tiny("gn", "bn", model__predictor={"norm": "ln", "hidden": 24, "out": 8}), 16),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_plain_implementation_in_variants(name: str) -> None:
    config, size = VARIANTS[name]
    run_both(config, steps=5, steps_per_epoch=4, size=size)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("norm", "ws"), [("bn", False), ("bn", True), ("gn", False), ("gn", True), ("ln", True)]
)
@pytest.mark.parametrize("encoder", ["resnet34", "resnet50"])
def test_deeper_encoders_equal_the_plain_implementation(
    encoder: str, norm: str, ws: bool, optimizer: str
) -> None:
    """Each step from our own state: one of ResNet-50 magnifies a difference of 3e-12 to 1e-9."""
    config = tiny(norm, norm, ws, optimizer, model__encoder=encoder)
    run_both(config, steps_per_epoch=2, afresh=True)


METHODS: dict[str, dict[str, object]] = {
    # 5 steps of 6 images go round the queue, which is a whole number of batches, or is not.
    "contrastive": {"method__name": "contrastive", "method__queue": 18},
    "contrastive, odd queue": {
        "method__name": "contrastive",
        "method__queue": 16,
        "method__temperature": 0.5,
    },
    "contrastive, a batch's queue": {"method__name": "contrastive", "method__queue": 6},
    "contrastive in the batch": {"method__name": "contrastive", "method__queue": 0},
    "contrastive, no predictor": {
        "method__name": "contrastive",
        "method__queue": 7,
        "model__predictor": {"layers": 0},
    },
    "simsiam": {"method__name": "simsiam"},
    "simsiam, no predictor": {"method__name": "simsiam", "model__predictor": {"layers": 0}},
    "no predictor": {"model__predictor": {"layers": 0}},
}


@pytest.mark.parametrize("optimizer", ["sgd", "blog"])
@pytest.mark.parametrize(("norm", "head_norm"), [("bn", "bn"), ("gn", "none"), ("bn", "brn")])
@pytest.mark.parametrize("name", METHODS)
def test_other_methods_equal_the_plain_implementation(
    name: str, norm: str, head_norm: str, optimizer: str
) -> None:
    """SGD at a fifth of ``tiny``'s rate: a temperature of .2 makes gradients five times as long,
    and at .005 five steps of the contrastive loss magnify the first one's 1e-13 to 2e-10. Here the
    worst is 3e-12.
    """
    slow: dict[str, object] = {"optim__lr": 0.001} if optimizer == "sgd" else {}
    run_both(
        tiny(norm, head_norm, optimizer=optimizer, **METHODS[name], **slow),
        steps=5,
        steps_per_epoch=2,
    )


def test_sgd_is_torchs_under_a_rate_that_moves_at_every_step() -> None:
    """The rate stands outside the momentum: m = mu m + g + wd w, then w -= lr m.

    LARS's blog dialect has it inside, w -= m with m = mu m + rate (g + wd w), as algorithm 1 of
    arXiv:1708.03888 and the post's lars.py do: there a rate belongs to the gradient that it was
    measured on. Where lr is constant the two are one.
    """
    state = TrainState.create(
        tiny("gn", "bn", schedule__lr_unit="step", schedule__horizon_epochs=3), steps_per_epoch=4
    )
    theirs = [p.detach().clone() for p in state.online.parameters()]
    optimizer = torch.optim.SGD(theirs, momentum=0.9, weight_decay=1e-2)
    for step in range(8):
        train_step(state, some_views(step))
        for other, p in zip(theirs, state.online.parameters(), strict=True):
            other.grad = p.grad
        optimizer.param_groups[0]["lr"] = 0.005 * (1 + math.cos(math.pi * step / 12)) / 2
        optimizer.step()
    for other, p in zip(theirs, state.online.parameters(), strict=True):
        torch.testing.assert_close(
            p.detach(), other, rtol=1e-13, atol=1e-15
        )  # a few roundings each step


def test_a_contrastive_start_is_that_of_byol_and_random_keys() -> None:
    """Unit vectors, drawn from the seed alone, after the networks."""
    config = tiny(train__precision="fp32", **METHODS["contrastive"])
    state, byol = (
        TrainState.create(c, steps_per_epoch=2) for c in (config, tiny(train__precision="fp32"))
    )
    assert torch.equal(state.arena.online, byol.arena.online)
    assert byol.queue is None
    assert state.queue is not None
    torch.testing.assert_close(state.queue.norm(dim=1), torch.ones(18))
    other = TrainState.create(with_train(config, seed=1), steps_per_epoch=2).queue
    assert other is not None
    assert (state.queue - other).abs().max() > 0.1
    # 4096 normal vectors: means of 8 coordinates of variance 1/8, four standard errors.
    many = TrainState.create(
        tiny(method__name="contrastive", method__queue=4096), steps_per_epoch=2
    ).queue
    assert many is not None
    assert many.mean(0).abs().max() < 4 * (8 * 4096) ** -0.5


def test_a_step_that_is_left_out_leaves_the_queue_alone() -> None:
    state = TrainState.create(tiny(**METHODS["contrastive, odd queue"]), steps_per_epoch=2)
    assert state.queue is not None
    for step, good in enumerate((True, False, True)):
        before = state.queue.clone()
        views = some_views(step) if good else some_views(step) * torch.inf
        assert train_step(state, views).values[METRICS.index("skipped")] == (not good)
        changed = (state.queue != before).any(1).nonzero().flatten().tolist()
        assert changed == sorted(row % 16 for row in range(6 * step, 6 * step + 6) if good)


def test_a_batch_that_does_not_fit_the_queue_is_refused() -> None:
    state = TrainState.create(tiny(**METHODS["contrastive, a batch's queue"]), steps_per_epoch=2)
    with pytest.raises(
        UsageError,
        match=r"^method.queue: 6 keys are fewer than the 7 of a batch: take 7 or more, or 0$",
    ):
        train_step(state, some_views(0, batch=7))


SOME = tiny("bn", "bn", optimizer="blog", train__precision="fp32")


def run(
    config: Config, steps: int = 4, state: TrainState | None = None
) -> tuple[TrainState, list[StepMetrics]]:
    state = state or TrainState.create(config, steps_per_epoch=2)
    first = int(state.step)
    return state, [train_step(state, some_views(step)) for step in range(first, first + steps)]


def assert_equal_states(a: TrainState, b: TrainState) -> None:
    for (name, x), y in zip(a.tensors().items(), b.tensors().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
def test_a_restored_state_goes_on_bit_for_bit(encoder: str) -> None:
    config = SOME.model_copy(update={"model": SOME.model.model_copy(update={"encoder": encoder})})
    whole, metrics = run(config, 5)
    half, _ = run(config, 2)
    saved = {name: tensor.clone() for name, tensor in half.tensors().items()}
    restored = TrainState.create(config, steps_per_epoch=2)
    run(config, 1, restored)  # whatever it held is replaced
    restored.load_tensors(saved)
    _, rest = run(config, 3, restored)
    assert_equal_states(restored, whole)
    for got, expected in zip(rest, metrics[2:], strict=True):
        assert torch.equal(got.values, expected.values)
        assert torch.equal(got.layers, expected.layers)


def test_the_start_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = TrainState.create(SOME, steps_per_epoch=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_equal_states(a, TrainState.create(SOME, steps_per_epoch=2))
    wide = TrainState.create(with_train(SOME, precision="fp64"), steps_per_epoch=2)
    for name, p in a.online.named_parameters():
        assert torch.equal(p.double(), dict(wide.online.named_parameters())[name]), name
    other = TrainState.create(with_train(SOME, seed=1), steps_per_epoch=2)
    assert not torch.equal(a.arena.online, other.arena.online)
    # The convolutions' start does not depend on the norms between them.
    gn = TrainState.create(tiny("gn", "none", train__precision="fp32"), steps_per_epoch=2)
    for name, p in gn.online.named_parameters():
        assert torch.equal(p, dict(a.online.named_parameters())[name]), name


def with_train(config: Config, **values: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def test_target_starts_as_the_online_network_and_takes_no_gradient() -> None:
    state = TrainState.create(SOME, steps_per_epoch=2)
    online = dict(state.online.named_parameters())
    assert all(torch.equal(p, online[name]) for name, p in state.target.named_parameters())
    frozen = with_schedule(SOME, tau=1.0)
    state, _ = run(frozen)
    assert all(p.grad is None and not p.requires_grad for p in state.target.parameters())
    start = TrainState.create(frozen, steps_per_epoch=2)
    assert torch.equal(state.arena.target, start.arena.target)
    assert not torch.equal(state.arena.online, start.arena.online)


def with_schedule(config: Config, **values: object) -> Config:
    return config.model_copy(update={"schedule": config.schedule.model_copy(update=values)})


def test_order_of_the_moving_average() -> None:
    """With tau = 0 the target is the online network of before or after the optimizer's step,
    exactly.
    """
    for order in ("before", "after"):
        state = TrainState.create(
            with_schedule(SOME, tau=0.0, tau_schedule="constant", ema_order=order),
            steps_per_epoch=2,
        )
        before = state.arena.online.clone()
        train_step(state, some_views(0))
        expected = before if order == "before" else state.arena.online
        assert torch.equal(state.arena.target, expected[: len(state.arena.target)])


def test_layer_telemetry_describes_the_step() -> None:
    state = TrainState.create(
        tiny("gn", "bn", optimizer="blog", train__precision="fp32"), steps_per_epoch=2
    )
    for step in range(3):
        before = {name: p.detach().clone() for name, p in state.online.named_parameters()}
        metrics = train_step(state, some_views(step))
        rows = dict(zip(state.segment_names, metrics.layers, strict=True))
        lr = metrics.values[METRICS.index("lr")]
        for name, p in state.online.named_parameters():
            row = dict(zip(LAYER_METRICS, rows[name], strict=True))
            assert p.grad is not None
            torch.testing.assert_close(row["weight_norm"], before[name].norm(), rtol=1e-5, atol=0.0)
            torch.testing.assert_close(row["grad_norm"], p.grad.norm(), rtol=1e-5, atol=0.0)
            torch.testing.assert_close(row["rate"], lr * row["trust_ratio"], rtol=1e-5, atol=0.0)
            # A difference of weights of size 1 holds the update only to 1e-7.
            torch.testing.assert_close(
                row["update_norm"], (p.detach() - before[name]).norm(), rtol=1e-3, atol=3e-7
            )


def test_gradients_stay_in_the_arena() -> None:
    state = TrainState.create(SOME, steps_per_epoch=2)
    pointers = [p.grad.data_ptr() for p in state.online.parameters() if p.grad is not None]
    assert len(pointers) == len(state.segment_names)
    run(SOME, 2, state)
    assert pointers == [p.grad.data_ptr() for p in state.online.parameters() if p.grad is not None]
    low, high = (
        state.arena.gradient.data_ptr(),
        state.arena.gradient.data_ptr() + state.arena.gradient.nbytes,
    )
    assert all(low <= pointer < high for pointer in pointers)


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
def test_a_compiled_network_takes_the_same_step(encoder: str) -> None:
    """Users may compile it, and gradients stay in the arena."""
    config = SOME if encoder == "resnet18" else tiny("gn", "bn", model__encoder=encoder)
    eager, compiled = (TrainState.create(config, steps_per_epoch=2) for _ in range(2))
    pointers = [p.grad.data_ptr() for p in compiled.online.parameters() if p.grad is not None]
    compiled.online.compile(backend="aot_eager", fullgraph=True)
    for step in range(2):
        expected, got = (
            train_step(eager, some_views(step)).values,
            train_step(compiled, some_views(step)).values,
        )
        # The same kernels but for two reductions: fp32 roundings, amplified by two steps.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert pointers == [
        p.grad.data_ptr() for p in compiled.online.parameters() if p.grad is not None
    ]
    for (name, a), b in zip(compiled.tensors().items(), eager.tensors().values(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_views_are_not_copied_where_they_fit() -> None:
    views = torch.randn(2, 4, 16, 16, 3).permute(0, 1, 4, 2, 3)
    batch = as_batch(views, torch.float32)
    assert batch.data_ptr() == views.data_ptr()
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(as_batch(views.contiguous(), torch.float32), batch)
    assert as_batch(views, torch.bfloat16).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "views", [torch.zeros(3, 4, 3, 8, 8), torch.zeros(2, 1, 3, 8, 8), torch.zeros(2, 4, 3, 8)]
)
def test_views_of_another_shape_are_refused(views: Tensor) -> None:
    with pytest.raises(ValueError, match="views must be floats"):
        as_batch(views, torch.float32)


@pytest.mark.parametrize(
    ("kernels", "precision", "stem", "size", "wanted", "layout"),
    [
        ("triton", "bf16", "torchvision", 96, "auto", "blocks"),
        ("triton", "fp32", "torchvision", 96, "auto", "plain"),
        ("triton", "bf16", "torchvision", 95, "auto", "plain"),
        ("triton", "bf16", "small", 96, "auto", "plain"),
        ("cpu", "bf16", "torchvision", 96, "auto", "plain"),
        ("triton", "bf16", "torchvision", 96, "plain", "plain"),
        ("cpu", "fp32", "torchvision", 96, "blocks", "blocks"),
        ("cpu", "fp32", "torchvision", 95, "blocks", "an even views.size, it is 95"),
        ("cpu", "fp32", "small", 96, "blocks", "for model.stem torchvision, it is small"),
    ],
)
def test_views_are_in_blocks_where_tensor_cores_are(
    kernels: str, precision: str, stem: str, size: int, wanted: str, layout: str
) -> None:
    config = Config.model_validate(
        {
            "views": {"size": size}, "model": {"stem": stem}, "train": {"precision": precision},
            "engine": {"stem": wanted},
        }
    )  # fmt: skip
    if layout in ("plain", "blocks"):
        assert views_layout(config, kernels) == layout
    else:
        with pytest.raises(UsageError, match=f"^engine.stem: blocks .*{layout}"):
            views_layout(config, kernels)


def corrupt(tensors: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], str]]:
    yield {k: v for k, v in tensors.items() if k != "step"}, "1 names differ, first 'step'"
    yield tensors | {"arena.online": tensors["arena.online"][:-1]}, "'arena.online' is float32"
    yield (
        tensors | {"arena.momentum": tensors["arena.momentum"].double()},
        "'arena.momentum' is float64",
    )
    yield tensors | {"online.fc": tensors["step"]}, "first 'online.fc'"


def test_tensors_of_another_network_are_refused_and_change_nothing() -> None:
    state, other = run(SOME, 1)[0], run(SOME, 2)[0]
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for tensors, reason in corrupt(other.tensors()):
        with pytest.raises(UsageError, match=reason):
            state.load_tensors(tensors)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())


@torch.no_grad()
def collapse(state: TrainState) -> None:
    """Move projections and predictions to within 1e-3 of one direction: gradients fall to 1e-11."""
    direction = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    heads = (state.online.projector, state.online.predictor, state.target.projector)
    for linear in (head.linear2 for head in heads):
        linear.weight *= 1e-3
        linear.bias.copy_(direction)


def collapsed_gradients(precision: str) -> dict[str, Tensor]:
    config = tiny(
        "gn", "none", train__precision=precision, model__width=16, model__stem="torchvision"
    )
    state = TrainState.create(config, steps_per_epoch=2)
    collapse(state)
    train_step(state, some_views(0, batch=16, size=64))
    return {name: g.double() for name, g in state.arena.named(state.arena.gradient).items()}


@pytest.mark.parametrize(
    ("precision", "length", "error"), [("fp32", 1e-4, 1e-3), ("bf16", 0.1, 0.3)]
)
def test_gradients_of_a_collapsed_state(precision: str, length: float, error: float) -> None:
    """LARS divides by |g|, so |g| must not drown in rounding where it is tiny beside |w|.

    bf16: activations carry 2e-3 of rounding through twenty layers, which turns gradients by up to a
    fifth in the first ones and leaves their lengths.
    """
    exact, got = collapsed_gradients("fp64"), collapsed_gradients(precision)
    assert exact["encoder.layer1.0.conv1.weight"].norm() < 1e-9
    for name, g in exact.items():
        assert got[name].isfinite().all()
        assert abs(got[name].norm() / g.norm() - 1) < length, name
        assert (got[name] - g).norm() / g.norm() < error, name


@pytest.mark.slow
def test_twenty_steps_give_the_bits_that_are_kept() -> None:
    """With two threads and with one. Where none are kept, four steps with two are equal twice.

    tests/kernels/test_native.py holds kernels from the cache to those just compiled.
    """
    kept = json.loads(golden.GOLDEN.read_text("utf-8")).get(golden.machine())
    if kept is None:
        assert _digests("2", "4") == _digests("2", "4")
        pytest.skip(
            f"golden.json holds no bits of {golden.machine()}: bits differ between CPUs and "
            "versions"
        )
    assert {threads: _digests(threads) for threads in golden.THREADS} == kept


def _digests(threads: str, *steps: str) -> dict[str, str]:
    """Run the program in a process of its own."""
    run = [sys.executable, golden.__file__, threads, *steps]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    return dict(json.loads(subprocess.check_output(run, env=environment)))
