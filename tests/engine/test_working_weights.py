"""A step in fused kernels against the same step in plain torch; weights computed all at once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from fastbyol.config import Config, resolve
from fastbyol.data.loader import Batch
from fastbyol.engine.capture import Eager, kept
from fastbyol.engine.session import hand_over
from fastbyol.engine.step import TrainState, train_step
from fastbyol.engine.working_weights import WorkingWeights
from fastbyol.errors import UsageError
from fastbyol.model import resnet
from fastbyol.model.standardizing import Standardizing
from fastbyol_kernels.weight_standardization import reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("triton",) if DEVICE == "cuda" else ("triton", "cpu")


def config(
    norm: str,
    ws: bool,
    optimizer: str,
    precision: str,
    kernels: str,
    *,
    heads: str = "fp32",
    encoder: str = "resnet18",
) -> Config:
    """Make a network of width 4, since Triton's interpreter runs programs one by one."""
    head = {"norm": norm, "hidden": 16, "out": 8, "ws": ws}
    optim = {"name": "sgd", "lr": 0.02, "weight_decay": 1e-2}
    if optimizer != "sgd":
        optim = {"name": "lars", "dialect": optimizer, "lr": 2.0, "eta": 0.01, "weight_decay": 1e-2}
    made = Config.model_validate(
        {
            "model": {
                "encoder": encoder, "norm": norm, "ws": ws, "groups": 2, "width": 4,
                "stem": "small", "projector": head, "predictor": head
            },
            "optim": optim,
            "schedule": {"tau": 0.9, "horizon_epochs": 7},
            "train": {"precision": precision, "batch_size": 2},
            "engine": {"kernels": kernels, "heads": heads},
        }
    )  # fmt: skip
    return resolve(made)


def some_views(step: int, *, batch: int, size: int) -> Tensor:
    g = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(1, batch, 3, size, size, generator=g)
    return (images + 0.5 * torch.randn(2, batch, 3, size, size, generator=g)).to(DEVICE)


def short(encoder: str, blocks: int = 1) -> resnet.Architecture:
    """``encoder`` with ``blocks`` in each stage."""
    return resnet.ARCHITECTURES[encoder]._replace(blocks_per_stage=(blocks,) * 4)


class Trace:
    """A state after ``steps``, with the values and the gradient of each; nobody changes it."""

    def __init__(
        self,
        choice: tuple[str, bool, str],
        precision: str,
        kernels: str,
        *,
        batch: int,
        size: int,
        steps: int = 2,
        blocks: int = 1,
        encoder: str = "resnet18",
    ) -> None:
        with pytest.MonkeyPatch.context() as patched:
            # With one block a stage the interpreter runs half of the programs.
            patched.setitem(resnet.ARCHITECTURES, encoder, short(encoder, blocks))
            self.state = TrainState.create(
                config(*choice, precision, kernels, encoder=encoder),
                steps_per_epoch=2,
                device=DEVICE,
            )
        self.values, self.gradients = [], []
        for step in range(steps):
            self.values.append(
                train_step(self.state, some_views(step, batch=batch, size=size)).values
            )
            self.gradients.append(self.state.arena.gradient.clone())


traced = cache(Trace)


def off(state: TrainState, got: Tensor, expected: Tensor) -> tuple[float, str]:
    """Return the largest relative distance of a parameter's part of two flat buffers, and its name.

    Some gradients are rounding and nothing else, a bias's before a batch norm, so a thousandth of
    the whole is added.
    """
    parts, floor = state.arena.named(expected.double()), 1e-3 * expected.double().norm()
    mine = state.arena.named(got.double())
    return max(
        (float((mine[n] - part).norm() / (part.norm() + floor)), n) for n, part in parts.items()
    )


# Batch norm over the two numbers that two images leave at one pixel would be a sign: four images of
# four times the pixels.
CASES = [
    (("gn", True, "blog"), 2, 8),
    (("ln", False, "deepmind"), 2, 8),
    (("bn", True, "bolts"), 4, 16),
    (("bn", False, "sgd"), 4, 16),
]


@pytest.mark.parametrize(
    ("choice", "batch", "size", "encoder", "kernels"),
    [
        (*case, encoder, kernels)
        for encoder, cases in (("resnet18", CASES), ("resnet50", CASES[::3]))
        for case in cases
        for kernels in KERNELS
    ],
)
def test_a_step_in_kernels_equals_the_step_in_plain_torch(
    choice: tuple[str, bool, str], batch: int, size: int, encoder: str, kernels: str
) -> None:
    """fp32: sums in another order, which a net of many layers amplifies, and again in the second
    step. The order of plain torch's sums depends on the number of threads: with one the first
    step's values were within 1e-5, with two 1.4e-5 apart and the heads' gradients 2.6e-5. Batch
    norm over four images magnifies that: over four draws of images the first step's gradients were
    up to 2e-4 apart, and the second's up to .1, by one ReLU on the other side of zero.
    """
    steps, bound = (1, 5e-4) if choice[0] == "bn" else (2, 5e-5)
    asked = {"batch": batch, "size": size, "steps": steps, "encoder": encoder}
    plain, fused = (
        Trace(choice, "fp32", "reference", **asked),
        traced(choice, "fp32", kernels, **asked),
    )
    for a, b, rtol in zip(fused.values, plain.values, (5e-5, 1e-3), strict=False):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)
    worst = off(plain.state, fused.gradients[0], plain.gradients[0])
    assert worst[0] < bound, worst
    for name in ("online", "target", "momentum"):
        worst = off(plain.state, getattr(fused.state.arena, name), getattr(plain.state.arena, name))
        assert worst[0] < 1e-3, (name, worst)


@pytest.mark.parametrize(
    ("choice", "kernels"), [(("none", True, "sgd"), "triton"), (("gn", True, "blog"), KERNELS[-1])]
)
def test_a_step_on_views_in_blocks_is_the_step_on_pixels(
    choice: tuple[str, bool, str], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From images; fp32 sums in another order, and views that differ by it.

    Tensors have the same names and shapes, and whoever asks for blocks takes pixels, too.
    """
    monkeypatch.setitem(resnet.ARCHITECTURES, "resnet18", short("resnet18"))
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, device=DEVICE)
    batch = Batch(images, torch.arange(2, device=DEVICE))
    states, metrics = list[TrainState](), list[Tensor]()
    for stem, own in (("plain", KERNELS[-1]), ("blocks", kernels)):
        values = config(*choice, "fp32", own).model_dump()
        values["model"]["stem"], values["engine"]["stem"] = "torchvision", stem
        values["views"] |= {"size": 8, "blur_kernel": 3}
        made = resolve(Config.model_validate(values))
        states.append(TrainState.create(made, steps_per_epoch=2, device=DEVICE))
        metrics.append(Eager(states[-1], made)(batch, 0).values)
    plain, blocks = states
    torch.testing.assert_close(metrics[1], metrics[0], rtol=2e-4, atol=1e-5)
    worst = off(plain, blocks.arena.gradient, plain.arena.gradient)
    assert worst[0] < 5e-4, worst
    if kernels == KERNELS[-1]:
        plain.load_tensors(blocks.tensors())
        views = some_views(1, batch=2, size=8)
        again = [train_step(state, views).values for state in states]
        torch.testing.assert_close(*again, rtol=1e-5, atol=1e-6)  # on a GPU sums vary


def test_heads_multiply_split_values_of_the_standardized_weights() -> None:
    """And their gradient comes to the weights; with other bits than fp32's."""
    results = []
    for kernels, heads in (("reference", "fp32"), ("triton", "tf32x3")):
        asked = config("gn", True, "blog", "fp32", kernels, heads=heads)
        model = asked.model.model_copy(update={"ws": False})  # 19 layers less to standardize
        asked = asked.model_copy(update={"model": model})
        state = TrainState.create(asked, steps_per_epoch=2, device=DEVICE)
        y = some_views(0, batch=2, size=8).reshape(4, -1)[:, : 8 * model.width]
        with state.weights.in_use(len(y)) as leaves:
            q = state.online.predictor(state.online.projector(y))
        state.weights.differentiate(q.square().sum(), leaves)
        results.append((state, q, state.arena.gradient))
    (plain, *expected), (_, *got) = results
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(got[0], expected[0])
    worst = off(plain, got[1], expected[1])
    assert 0.0 < worst[0] < 1e-5, worst


@pytest.mark.parametrize(("kernels", "precision"), [("cpu", "bf16"), ("auto", "fp64")])
def test_heads_of_split_values_are_refused_without_their_kernels(
    kernels: str, precision: str
) -> None:
    asked = config("gn", True, "blog", precision, kernels, heads="tf32x3")
    with pytest.raises(UsageError, match=r"engine\.heads: tf32x3 needs .* take engine\.heads=fp32"):
        TrainState.create(asked, steps_per_epoch=2)


@pytest.mark.parametrize("kernels", KERNELS)
def test_in_bf16_kernels_are_as_near_to_float64_as_plain_torch(kernels: str) -> None:
    choice = ("gn", True, "blog")
    exact, plain, fused = (
        Trace(choice, precision, backend, batch=2, size=8, steps=1, blocks=2)
        for precision, backend in (("fp64", "reference"), ("bf16", "reference"), ("bf16", kernels))
    )

    def distance(trace: Trace) -> float:
        gradient, truth = trace.gradients[0].double(), exact.gradients[0]
        parts = exact.state.arena.named(truth)
        mine = trace.state.arena.named(gradient)
        return float(
            torch.cat([(mine[n] - parts[n]).flatten() for n in parts]).norm() / truth.norm()
        )

    # Both round weights and activations to 8 bits; which way a sum rounds is chance.
    assert distance(fused) < 1.5 * distance(plain)


@pytest.mark.parametrize("kernels", KERNELS[-1:])  # the interpreter runs in one order
def test_the_same_step_twice_is_the_same_bit_for_bit(kernels: str) -> None:
    choice, batch, size = CASES[0]
    first, second = (
        make(choice, "fp32", kernels, batch=batch, size=size) for make in (traced, Trace)
    )
    for name in ("online", "target", "momentum"):
        assert torch.equal(getattr(first.state.arena, name), getattr(second.state.arena, name))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_made_at_once_are_those_each_layer_makes(precision: str, kernels: str) -> None:
    state = TrainState.create(
        config("gn", True, "blog", precision, kernels), steps_per_epoch=2, device=DEVICE
    )
    assert state.weights.groups
    with state.weights.in_use(4):
        for net in (state.online, state.target):
            layers = {
                name: m for name, m in net.named_modules() if isinstance(m, Standardizing) and m.ws
            }
            assert len(layers) == 20 + 1 + (
                net is state.online
            )  # ResNet-18's convolutions, the heads' first linears
            for name, layer in layers.items():
                assert layer.precomputed is not None
                truth = reference(layer.weight.double())
                # One rounding to the copy's dtype after float32 statistics of rows of at most 288.
                eps = torch.finfo(layer.precomputed.dtype).eps
                torch.testing.assert_close(
                    layer.precomputed.double(), truth, rtol=4 * eps, atol=4 * eps, msg=name
                )
    assert all(
        m.precomputed is None
        for net in (state.online, state.target)
        for m in net.modules()
        if isinstance(m, Standardizing)
    )


@pytest.mark.parametrize("ws", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_laid_out_as_the_flat_buffers_that_they_go_to(
    monkeypatch: pytest.MonkeyPatch, precision: str, ws: bool
) -> None:
    """Equal strides, and one dtype on each side, are what torch copies in a few launches on a GPU;
    it copies all others one by one (foreach_tensor_copy_list_kernel_cuda_ of ATen).
    """
    copy, numbers = torch._foreach_copy_, list[int]()

    def watched(into: list[Tensor], gradients: list[Tensor]) -> None:
        assert [t.stride() for t in into] == [t.stride() for t in gradients]
        assert len({(a.dtype, b.dtype) for a, b in zip(into, gradients, strict=True)}) == 1
        numbers.append(len(into))
        copy(into, gradients)

    monkeypatch.setattr(torch, "_foreach_copy_", watched)
    kernels = "triton" if DEVICE == "cuda" else "cpu"
    state = TrainState.create(
        config("gn", ws, "blog", precision, kernels), steps_per_epoch=2, device=DEVICE
    )
    train_step(state, some_views(0, batch=2, size=16))
    affine = () if state.weights.affine is None else state.weights.affine.names  # have sums instead
    assert sum(numbers) == len(state.segment_names) - len(affine)
    assert len(numbers) <= 2


def test_what_the_loss_does_not_depend_on_has_a_gradient_of_zeros() -> None:
    """Whatever the buffer held before: nothing else clears it."""
    state = TrainState.create(
        config("gn", True, "sgd", "fp32", KERNELS[-1]), steps_per_epoch=2, device=DEVICE
    )
    state.arena.gradient.fill_(7.0)
    with state.weights.in_use(4) as leaves:
        loss = state.online(some_views(0, batch=2, size=8).flatten(0, 1)).z.square().sum()
    state.weights.differentiate(loss, leaves)
    for name, part in state.arena.named(state.arena.gradient).items():
        assert bool(part.count_nonzero()) == (not name.startswith("predictor")), name


def rounded_state(kernels: str = KERNELS[-1]) -> TrainState:
    return TrainState.create(
        config("gn", False, "blog", "bf16", kernels), steps_per_epoch=2, device=DEVICE
    )


def assert_rounded(state: TrainState) -> None:
    """Check every convolution's working weight against its parameter, of both networks."""
    with state.weights.in_use(4):
        for net in (state.online, state.target):
            layers = [m for m in net.modules() if isinstance(m, resnet.Conv2d)]
            assert len(layers) == 20
            for layer in layers:
                assert layer.precomputed is not None
                assert torch.equal(layer.precomputed, layer.weight.bfloat16())
                assert layer.precomputed.stride() == layer.weight.stride()


def test_rounded_weights_are_those_of_the_parameters_whoever_writes_them() -> None:
    """The optimizer in each step, also one that is left out, and whatever fills a state."""
    state, views = rounded_state(), some_views(0, batch=2, size=8)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    assert_rounded(state)
    for scale in (1.0, torch.inf, 1.0):
        before = state.arena.online.clone()
        train_step(state, scale * views)
        assert torch.equal(state.arena.online, before) == (scale == torch.inf)
        assert_rounded(state)
    with kept(state):
        train_step(state, views)
    assert_rounded(state)
    state.load_tensors(saved)
    assert_rounded(state)
    state.arena.online.mul_(1.5)
    state.arena.target.mul_(0.5)
    hand_over(state)
    assert_rounded(state)


def test_a_resumed_state_rounds_the_same_weights() -> None:
    whole, half = rounded_state(), rounded_state()
    views = [some_views(step, batch=2, size=8) for step in range(3)]
    for step in range(3):
        train_step(whole, views[step])
    train_step(half, views[0])
    saved = {name: tensor.clone() for name, tensor in half.tensors().items()}
    resumed = rounded_state()
    resumed.load_tensors(saved)
    for step in (1, 2):
        train_step(resumed, views[step])
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


@pytest.mark.parametrize("kernels", KERNELS[-1:])
def test_rounding_at_once_gives_the_bits_of_rounding_by_each_layer(
    kernels: str,
) -> None:
    """Weights and gradients are rounded and widened either way, only elsewhere."""
    at_once, state = rounded_state(kernels), rounded_state(kernels)
    # For products in the parameters' own dtype there is nothing to round beforehand.
    nets = state.online, state.target
    own = WorkingWeights.of(*nets, state.arena, state.arena.online.dtype, kernels)
    assert at_once.weights.rounded
    assert not own.rounded
    by_layer = replace(state, weights=own)
    for step in range(2):
        views = some_views(step, batch=2, size=8)
        one, other = train_step(at_once, views), train_step(by_layer, views)
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.layers, other.layers)
    for name, tensor in at_once.tensors().items():
        assert torch.equal(tensor, by_layer.tensors()[name]), name


def test_kernels_that_are_not_there_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbyol_kernels.dispatch.TRITON_ON_CPU", False)
    with pytest.raises(
        UsageError,
        match=r"^engine\.kernels=triton needs CUDA, the network is on cpu: take auto or reference",
    ):
        TrainState.create(
            config("gn", True, "blog", "fp32", "triton"), steps_per_epoch=2, device="cpu"
        )


def test_on_a_cpu_the_weights_are_made_at_once_and_in_plain_torch_by_each_layer() -> None:
    for kernels, groups in (("auto", 4), ("reference", 0)):
        state = TrainState.create(
            config("gn", True, "blog", "bf16", kernels), steps_per_epoch=2, device="cpu"
        )
        assert state.kernels == ("cpu" if kernels == "auto" else kernels)
        # Two networks, whose convolutions multiply in bf16 and whose heads in fp32.
        assert len(state.weights.groups) == groups
