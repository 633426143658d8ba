"""Networks of timm and torchvision as the encoder: the libraries' own, a pass per view."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fastbyol import load_config
from fastbyol.config import ModelConfig
from fastbyol.engine.step import METRICS, TrainState, train_step
from fastbyol.errors import UsageError
from fastbyol.evaluation.features import eval_mode
from fastbyol.model import adapter
from fastbyol.model.adapter import Adapter, adapted, library_network
from fastbyol.model.byol import draw_networks
from reference_byol import Net
from test_step import assert_same, move_off_start, reference_of, some_views
from together import in_threads

# With batch norm, and small: a step of both takes a second.
NORMED = ("timm:test_resnet", "torchvision:mobilenet_v3_small")
# Group norm, layer norm and attention, dropout and stochastic depth by default, squeezed channels,
# batch norm in attention, a cache in evaluation.
SEVERAL = (
    *NORMED, "timm:test_vit", "timm:test_convnext", "timm:test_efficientnet", "timm:test_nfnet",
    "timm:test_byobnet", "timm:levit_128s", "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
)  # fmt: skip
SIZE = 32


def build(name: str, size: int = SIZE, seed: int = 0) -> Adapter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return adapted(ModelConfig(encoder=name), num_views=2, image_size=size)


def independent(name: str, size: int = SIZE) -> nn.Module:
    """The library's network by its documentation: no classifier, and nothing that is drawn."""
    library, _, model = name.partition(":")
    if library == "timm":
        options = {"img_size": size} if "vit" in model and "levit" not in model else {}
        net: nn.Module = timm.create_model(model, num_classes=0, **options)
        return net
    net = torchvision.models.get_model(model, weights=None)
    if model.startswith("shufflenet"):
        net.fc = nn.Identity()
    else:
        net.classifier[-1 if "mobile" in model else 1] = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


@pytest.mark.parametrize("name", [name for name in SEVERAL if "levit" not in name])
def test_equals_the_librarys_network_run_view_after_view(name: str) -> None:
    """Features, gradients and running statistics in fp64, and features in evaluation."""
    ours, theirs = build(name).double(), independent(name).double()
    theirs.load_state_dict(ours.net.state_dict())
    for step in range(2):
        views = some_views(step, size=SIZE)
        y = ours(views.flatten(0, 1))
        expected = torch.cat([theirs(view) for view in views])
        assert torch.allclose(y, expected, rtol=1e-9, atol=1e-9)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        (y * weights).sum().backward()
        (expected * weights).sum().backward()
    state = theirs.state_dict()
    for key, tensor in ours.net.state_dict().items():
        assert torch.allclose(tensor, state[key], rtol=1e-9, atol=1e-9), key
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    for key, parameter in ours.net.named_parameters():
        own, other = parameter.grad, gradients[key]
        assert (own is None) == (other is None), key
        assert own is None or torch.allclose(own, other, rtol=1e-7, atol=1e-7), key
    with eval_mode(ours), eval_mode(theirs):
        images = some_views(5, size=SIZE)[0]
        assert torch.allclose(ours(images), theirs(images), rtol=1e-9, atol=1e-9)


@dataclass
class ForeignNet(Net):
    """The reference with a library's network: train mode, one view a pass."""

    library_net: nn.Module

    def encoder(self, x: Tensor) -> Tensor:
        start = "encoder.net."
        state = {k.removeprefix(start): v for k, v in (self.p | self.b).items() if start in k}
        y: Tensor = torch.func.functional_call(self.library_net, state, (x,))
        return y


@pytest.mark.parametrize("optimizer", ["sgd", "blog", "deepmind"])
@pytest.mark.parametrize("name", [*NORMED, "timm:test_vit"])
def test_steps_equal_the_plain_implementation(name: str, optimizer: str) -> None:
    """Three steps in fp64: parameters, momentum, target, running statistics and metrics."""
    # Batch norm over three pixels, of three images, makes rounding a thousand times as large.
    size = 64 if name.startswith("torchvision") else SIZE
    sets = (
        f"model.encoder={name}", f"views.size={size}", "model.projector.hidden=16",
        "model.projector.out=8", "model.predictor.hidden=16", "model.predictor.out=8",
        "train.precision=fp64", "train.batch_size=6", "optim.weight_decay=0.01",
        *(("optim.lr=0.005",) if optimizer == "sgd" else
          ("optim.name=lars", f"optim.dialect={optimizer}", "optim.lr=1", "optim.eta=0.01",
           "optim.lars_exclude=bias_and_norm")),
    )  # fmt: skip
    config = load_config("blog", sets)
    state = TrainState.create(config, steps_per_epoch=1)
    move_off_start(state)
    reference = reference_of(state, config, 1)
    for kind in ("online", "target"):
        net = getattr(reference, kind)
        setattr(
            reference, kind,
            ForeignNet(net.model, net.p, net.b, independent(name, size).double().train()),
        )  # fmt: skip
    for step in range(3):
        views = some_views(step, size=size)
        metrics, expected = train_step(state, views), reference.step(views)
        assert dict(zip(METRICS, metrics.values.tolist(), strict=True)) == pytest.approx(
            expected, rel=1e-5, abs=1e-6
        )
    assert_same(state, reference)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_seed_draws_the_same_network_whatever_was_drawn_before(name: str) -> None:
    config = ModelConfig(encoder=name)
    first, target, _ = draw_networks(config, 3, image_size=SIZE)
    random.random()
    torch.rand(7)
    again, _, _ = draw_networks(config, 3, image_size=SIZE)
    other, _, _ = draw_networks(config, 4, image_size=SIZE)
    ours, theirs = first.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert not all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in ours.items())
    assert all(int(value) == 0 for key, value in ours.items() if key.endswith("tracked"))
    names = [key for key, _ in target.named_parameters()]
    assert [key for key, _ in first.named_parameters()][: len(names)] == names


def test_nothing_is_drawn_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """efficientnet_b0 has dropout and stochastic depth by default; who keeps them is refused."""
    net = build("torchvision:efficientnet_b0")
    images = some_views(0, size=SIZE).float().flatten(0, 1)
    state = torch.default_generator.get_state()
    assert torch.equal(net(images), net(images))
    assert torch.equal(torch.default_generator.get_state(), state)
    monkeypatch.setattr(adapter, "_stop_draws", lambda net: None)
    with pytest.raises(UsageError, match="efficientnet_b0 draws random numbers in a pass"):
        build("torchvision:efficientnet_b0")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda net, x: x, r"gives \(2, 3, 32, 32\) for two images"),
        (lambda net, x: (x.mean((2, 3)), x), "gives a tuple for two images"),
        (lambda net, x: x.mean((2, 3)) / 0, "not finite"),
        (lambda net, x: x[:, : 2 + net.training].mean((2, 3)), "in training and in evaluation"),
    ],
)
def test_a_network_without_features_is_one_line(
    forward: Callable[[nn.Module, Tensor], object], words: str
) -> None:
    net = type("Odd", (nn.Module,), {"forward": forward})()
    with pytest.raises(UsageError, match=words):
        adapter._try(net, ModelConfig(encoder="timm:odd"), SIZE)


def test_a_network_with_other_memory_than_running_averages_is_refused() -> None:
    with pytest.raises(UsageError, match="changes seen in a pass"):
        adapter._try(Counting(), ModelConfig(encoder="timm:odd"), SIZE)


def test_parameters_without_gradient_become_buffers_of_the_same_names() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    net[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    adapter._freeze(net)
    assert [name for name, _ in net.named_parameters()] == ["1.weight", "1.bias"]
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    net.load_state_dict(before)


def test_strided_convolutions_of_few_channels_take_pixels() -> None:
    """oneDNN writes past its workspace for them: ``model.convolution.SAFE_CHANNELS``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 24, 1, stride=2), nn.Conv2d(24, 8, 1, stride=2)).double()
    images = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    expected = net(images)
    adapter._subsample(net)
    assert [layer.stride for layer in net] == [(1, 1), (2, 2)]
    assert torch.allclose(net(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [32, 64])
def test_a_network_of_one_size_is_built_for_the_views(size: int) -> None:
    net = build("timm:test_vit", size)
    assert net.net.pos_embed.shape[1] == (size // 16) ** 2 + 1
    assert net(torch.zeros(4, 3, size, size)).shape == (4, 64)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("timm:convnext_ato", 32, r"no such network for images; nearest: timm:convnext_atto"),
        ("timm:convnext_atto.d2_in1k", 32, "its tag names weights.*take timm:convnext_atto$"),
        ("torchvision:ssd300_vgg16", 32, "no such network for images; nearest: torchvision:vgg16"),
        ("torchvision:alexnet", 32, "does not work on views of 32 px.*set another views.size"),
        ("torchvision:vit_b_16", 40, "does not work on views of 40 px .*indivisible"),
    ],
)
def test_what_cannot_be_an_encoder_is_one_line(name: str, size: int, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build(name, size)
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"timm is not installed: pip install 'fastbyol\[timm\]'"):
        adapter.check_name(ModelConfig(encoder="timm:convnext_atto"))


def test_bf16_is_autocast_and_near_fp32() -> None:
    """bf16 has 8 bits: after twenty layers features are within a tenth of their size."""
    images = some_views(0, size=SIZE).flatten(0, 1).float()
    for name in ("timm:test_resnet", "timm:test_vit", "timm:test_convnext"):
        net = build(name)
        with torch.no_grad():
            exact, rounded = net(images), net(images.bfloat16())
        assert exact.dtype == rounded.dtype == torch.float32
        error = float((exact - rounded).norm() / exact.norm())
        assert 1e-5 < error < 0.1, (name, error)


@pytest.mark.parametrize(
    "name", ["timm:test_resnet", "timm:levit_128s", "torchvision:alexnet", "torchvision:mnasnet0_5"]
)
def test_users_get_the_librarys_own_network(name: str) -> None:
    """Its embeddings are the run's, it shares no memory with it, trains and can be pickled."""
    size = 64
    ours = build(name, size).eval()
    theirs = library_network(ours)
    images = torch.randn(3, 3, size, size)
    assert type(theirs).__module__.partition(".")[0] == name.partition(":")[0]
    assert not theirs.training
    with torch.no_grad():
        expected = ours(images)
        assert torch.allclose(theirs(images), expected, rtol=1e-4, atol=1e-5)
        for parameter in theirs.parameters():
            assert parameter.requires_grad
            parameter.zero_()
        assert torch.equal(ours(images), expected)
    assert pickle.loads(pickle.dumps(theirs)).state_dict().keys() == theirs.state_dict().keys()


def test_what_is_computed_for_evaluation_is_dropped_with_it() -> None:
    """LeViT keeps attention biases for evaluation: after a step they would be those of before."""
    net = build("timm:levit_128s", 64)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        with eval_mode(net):
            before = net(images)
        for key, parameter in net.named_parameters():
            if key.endswith("attention_biases"):
                parameter.copy_(torch.linspace(-4, 4, parameter.numel()).view_as(parameter))
        with eval_mode(net):
            after = net(images)
        again = library_network(net)(images)
    assert not torch.allclose(after, before, rtol=1e-3)
    assert torch.allclose(after, again, rtol=1e-4, atol=1e-5)


def test_batch_norm_over_several_ranks_is_refused_unless_each_has_its_own() -> None:
    sets = ("model.encoder=timm:test_resnet", f"views.size={SIZE}", "train.batch_size=8")

    def create(*more: str, name: str = "timm:test_resnet") -> None:
        config = load_config("demo", [*sets, f"model.encoder={name}", *more])
        in_threads(2, lambda ranks: TrainState.create(config, steps_per_epoch=1, ranks=ranks))

    with pytest.raises(UsageError, match="norm_scope: the batch norms of timm:test_resnet"):
        create()
    create("model.norm_scope=rank")
    create(name="timm:test_vit")


def test_some_networks_build_and_embed() -> None:
    """A seeded few; docs/encoders.md has what became of more of them."""
    small = [name for name in timm.list_models() if "test_" in name or "_pico" in name]
    for name in random.Random(22).sample(small, 8):
        net = build(f"timm:{name}", 64)
        y = net(torch.randn(4, 3, 64, 64))
        y.square().mean().backward()
        assert y.shape == (4, net.embedding_dim), name
        assert y.isfinite().all(), name
