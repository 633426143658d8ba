"""Exports of encoders of other libraries load into the libraries' own networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from fastbyol import api
from fastbyol.errors import UsageError
from fastbyol.model import adapter
from untrained import write_run

SIZE = 32
VIT, NORMED, OF_TORCHVISION = "timm:test_vit", "timm:test_resnet", "torchvision:mobilenet_v3_small"


def vit() -> nn.Module:
    net: nn.Module = timm.create_model("test_vit", num_classes=0, img_size=SIZE)
    return net


def resnet() -> nn.Module:
    net: nn.Module = timm.create_model("test_resnet", num_classes=0)
    return net


def mobilenet() -> nn.Module:
    net = torchvision.models.mobilenet_v3_small()
    net.classifier[-1] = nn.Identity()
    return net


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(encoder: str) -> Path:
        if encoder not in made:
            made[encoder] = tmp_path_factory.mktemp("runs") / "mine"
            write_run(made[encoder], f"model.encoder={encoder}", f"views.size={SIZE}")
        return made[encoder]

    return make


@pytest.mark.parametrize(
    ("encoder", "name", "make"),
    [
        (VIT, "timm", vit),
        (VIT, "safetensors", vit),
        (NORMED, "timm", resnet),
        (OF_TORCHVISION, "torchvision", mobilenet),
        (OF_TORCHVISION, "safetensors", mobilenet),
    ],
)
def test_a_state_dict_is_the_librarys_own(
    made_run: Callable[[str], Path],
    tmp_path: Path,
    encoder: str,
    name: str,
    make: Callable[[], nn.Module],
) -> None:
    """It loads strictly into the documented constructor, and gives what ``load_encoder`` gives."""
    run = made_run(encoder)
    result = api.export(run, tmp_path / "out", format=name)
    file = tmp_path / "out" / "model.safetensors" if name == "safetensors" else tmp_path / "out"
    state = load_file(file) if name == "safetensors" else torch.load(file, weights_only=True)
    net = make()
    net.load_state_dict(state)
    shown: dict[str, Any] = {}
    exec(result["load"], shown)
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = api.load_encoder(run)(images)
        for each in (net.eval(), shown["model"]):
            assert torch.allclose(each(images), expected, rtol=1e-5, atol=1e-6)
    card = Path(result["card"]).read_text("utf-8")
    library, _, model = encoder.partition(":")
    assert f"library_name: {library}\n" in card
    assert f"- {model}\n" in card
    assert f"those of {library}'s {model}" in card
    assert f"embeddings (N, {expected.shape[1]})" in card
    assert "ResNet-18" not in card


@pytest.mark.parametrize("name", ["onnx", "torch-export"])
@pytest.mark.parametrize("encoder", [VIT, OF_TORCHVISION])
def test_what_is_traced_takes_any_batch_of_the_runs_size(
    made_run: Callable[[str], Path], tmp_path: Path, encoder: str, name: str
) -> None:
    run = made_run(encoder)
    result = api.export(run, tmp_path / "out.pt2", format=name)
    shown: dict[str, Any] = {}
    exec(result["load"], shown)
    for count in (1, 5):
        images = torch.randn(count, 3, SIZE, SIZE)
        with torch.no_grad():
            expected = api.load_encoder(run)(images)
            batch = images.numpy() if name == "onnx" else images
            y = torch.as_tensor(shown["model"](batch))
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert f"Images are of {SIZE} px exactly; N is free." in Path(result["card"]).read_text("utf-8")


@pytest.mark.parametrize(
    ("encoder", "options", "words"),
    [
        (VIT, {"format": "torchvision"}, "--format torchvision: the encoder is test_vit of timm"),
        (OF_TORCHVISION, {"format": "timm"}, "take --format torchvision, safetensors, onnx or"),
        (VIT, {"format": "timm", "num_classes": 3}, "--num-classes: is of fastbyol's own encoders"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    made_run: Callable[[str], Path],
    tmp_path: Path,
    encoder: str,
    options: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(UsageError, match=words):
        api.export(made_run(encoder), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_traced_is_one_line(
    made_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that asks a tensor for a number, as some networks do."""
    build = adapter.Recipe.build

    def asking(self: adapter.Recipe) -> nn.Module:
        net = build(self)
        net.register_forward_pre_hook(lambda _, inputs: int(inputs[0].sum().item() > 0) and None)
        return net

    run = made_run(NORMED)
    monkeypatch.setattr(adapter.Recipe, "build", asking)
    with pytest.raises(UsageError, match="torch cannot trace test_resnet of timm") as refused:
        api.export(run, tmp_path / "out.pt2", format="torch-export")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
