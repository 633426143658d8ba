"""The encoders against torchvision's ResNet-18, 34 and 50."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastbyol.config import ModelConfig
from fastbyol.model.norm import GroupNorm
from fastbyol.model.resnet import Conv2d, ResNet, build_encoder
from fastbyol_kernels.views.blocks import IMAGE_BORDER, in_blocks

ENCODERS = ("resnet18", "resnet34", "resnet50")


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def torchvision_encoder(state: dict[str, Tensor], encoder: str = "resnet18") -> nn.Module:
    net: nn.Module = getattr(torchvision.models, encoder)()
    net.fc = nn.Identity()
    net.load_state_dict(state)
    return net


def test_same_weights_same_embeddings_as_torchvision() -> None:
    torch.manual_seed(0)
    ours = build_encoder(ModelConfig(), num_views=1)
    theirs = torchvision_encoder(ours.state_dict())
    x = images(4, 64)
    for net in (ours, theirs):
        net.train()
    # fp32 through 20 layers in another memory format: relative 1e-5 of embeddings of size 1.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=2e-5)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_equal_torchvisions(encoder: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"encoder": encoder})
    ours = build_encoder(config, num_views=1).double()
    theirs = torchvision_encoder(ours.state_dict(), encoder).double()
    x = images(4, 64).double()
    direction = torch.randn(4, ours.embedding_dim, dtype=torch.float64)
    for net in (ours, theirs):
        (net(x) * direction).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "none"])
def test_every_norm_learns_from_few_pixels(norm: str) -> None:
    """At 16 pixels the last stage of 2x2 works pixel by pixel in float32, and never in float64."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"norm": norm, "width": 8, "stem": "small"})
    net, exact = build_encoder(config, num_views=1), build_encoder(config, num_views=1).double()
    exact.load_state_dict(net.state_dict())
    x, direction = images(16, 16), torch.randn(16, 64)
    (net(x) * direction).sum().backward()
    (exact(x.double()) * direction).sum().backward()
    for (name, a), b in zip(net.named_parameters(), exact.parameters(), strict=True):
        # fp32 through 20 layers; norms over few numbers amplify it.
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-6, name


def test_initialisation_has_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    net = build_encoder(ModelConfig(width=32))
    for module in net.modules():
        if isinstance(module, Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected = (2 / fan_out) ** 0.5
            # Four standard errors of a sample standard deviation.
            assert (
                abs(module.weight.std().item() / expected - 1)
                < 4 / (2 * module.weight.numel()) ** 0.5
            )


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "none"])
@pytest.mark.parametrize(("encoder", "width"), [(e, w) for e in ENCODERS for w in (4, 24)])
def test_state_dict_keys_and_shapes_are_torchvisions(norm: str, encoder: str, width: int) -> None:
    theirs = getattr(torchvision.models, encoder)()
    expected = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    config = {"encoder": encoder, "norm": norm, "width": width}
    net = build_encoder(ModelConfig.model_validate(config))
    got = {k: v.shape for k, v in net.state_dict().items()}
    norm_keys = {k for k in expected if "bn" in k or "downsample.1" in k}
    statistics = {k for k in norm_keys if "running" in k or "tracked" in k}
    missing = {"bn": set(), "gn": statistics, "ln": statistics, "none": norm_keys}[norm]
    assert got.keys() == expected.keys() - missing
    for key, shape in got.items():
        assert [side * width // 64 if side >= 64 else side for side in expected[key]] == list(shape)


def standardized(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    return (rows / (rows.std(1, keepdim=True) + 1e-5)).view_as(weight)


def test_weight_standardization_covers_every_convolution() -> None:
    torch.manual_seed(1)
    config = ModelConfig(width=8, ws=True, norm="gn")
    ours, plain = build_encoder(config), build_encoder(config.model_copy(update={"ws": False}))
    plain.load_state_dict(
        {k: standardized(v) if v.ndim == 4 else v for k, v in ours.state_dict().items()}
    )
    x = images(
        2, 64
    )  # at 32 the last groups would hold two numbers, whose group norm is nearly a sign
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)


def test_layer_norm_normalises_over_channels_and_pixels() -> None:
    torch.manual_seed(2)
    net = build_encoder(ModelConfig(width=8, norm="ln"))
    layers = [m for m in net.modules() if isinstance(m, GroupNorm)]
    assert len(layers) == 20
    assert all(layer.num_groups == 1 for layer in layers)
    x = images(2, 16).contiguous(memory_format=torch.channels_last)
    y = net.bn1(net.conv1(x))
    torch.testing.assert_close(
        y, nn.functional.layer_norm(net.conv1(x), y.shape[1:]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("stem", "side"), [("torchvision", 8), ("small", 32)])
def test_stems(stem: str, side: int) -> None:
    net = build_encoder(ModelConfig.model_validate({"width": 4, "stem": stem}))
    sizes: list[torch.Size] = []
    hook = net.layer1.register_forward_pre_hook(lambda _module, args: sizes.append(args[0].shape))
    assert net(images(4, 32)).shape == (4, net.embedding_dim) == (4, 32)
    hook.remove()
    assert sizes == [(4, 4, side, side)]


@pytest.mark.parametrize("ws", [False, True])
def test_images_in_blocks_have_the_same_embeddings_and_gradients(ws: bool) -> None:
    torch.manual_seed(4)
    net = build_encoder(ModelConfig(width=4, norm="gn", groups=2, ws=ws)).double()
    x, direction = images(2, 32).double(), torch.randn(2, 32, dtype=torch.float64)
    results = []
    for form in (x, in_blocks(x, IMAGE_BORDER)):
        y = net(form)
        results.append((y, *torch.autograd.grad((y * direction).sum(), list(net.parameters()))))
    for got, exact in zip(*results, strict=True):  # float64 through 20 layers
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)
        # All gradients are copied in one launch, if none is laid out otherwise than its weight.
        assert got.stride() == exact.stride()
    assert net.conv1.weight.shape == (4, 3, 7, 7)


def test_activations_and_weights_stay_channels_last() -> None:
    net: ResNet = build_encoder(ModelConfig(width=8, norm="bn", ws=True), num_views=2)
    bad: list[str] = []

    def check(name: str, out: Tensor) -> None:
        if not out.is_contiguous(memory_format=torch.channels_last):
            bad.append(name)

    for name, module in net.named_modules():
        if isinstance(module, Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
        if name:
            module.register_forward_hook(lambda _module, _args, out, name=name: check(name, out))
    net(images(4, 32))
    assert not bad


def test_bf16_views_give_fp32_embeddings_near_the_reference() -> None:
    torch.manual_seed(3)
    net = build_encoder(ModelConfig(width=8, norm="gn"))
    x = images(4, 64)
    y, half = net(x), net(x.bfloat16())
    assert half.dtype == torch.float32
    # Input, weights, convolutions, norms and residuals: some sixty independent roundings to 8 bits.
    assert (y - half).norm() / y.norm() < 60**0.5 * 2**-8
