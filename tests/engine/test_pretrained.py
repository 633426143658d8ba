"""Weights by name: from the file in a library's own cache, or one line where it cannot be had."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torchvision.models import ResNet18_Weights

import foreign_models
from fastbyol.engine import pretrained
from fastbyol.errors import UsageError
from fastbyol.runs import weights_file

FILE = Path(ResNet18_Weights.DEFAULT.url).name
REPOSITORY, REVISION = "timm/resnet18.a1_in1k", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches and no network."""

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def put(tmp_path: Path) -> nn.Module:
    """Write torchvision's file, of drawn weights."""
    model = foreign_models.resnet()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / FILE)
    return model


def put_timm(tmp_path: Path) -> nn.Module:
    """Write the hub's cache of timm's file, as a download leaves it."""
    model = foreign_models.shaken(timm.create_model("resnet18"))
    folder = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    (folder / "snapshots" / REVISION).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    file = folder / "snapshots" / REVISION / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet18.IMAGENET1K_V1", "resnet18.DEFAULT"])
def test_torchvisions_file_in_torchs_cache_needs_no_network(tmp_path: Path, name: str) -> None:
    model = put(tmp_path)
    assert pretrained.full_name(f"torchvision:{name}") == "torchvision:resnet18.IMAGENET1K_V1"
    loaded = pretrained.load(f"torchvision:{name}")
    state = model.state_dict()
    assert all(torch.equal(loaded.tensors[key], state[key]) for key in state)
    file = tmp_path / "torch" / "hub" / "checkpoints" / FILE
    assert loaded.digest == weights_file.read(file).digest
    transform = ResNet18_Weights.DEFAULT.transforms()
    assert loaded.mean == tuple(transform.mean)
    assert loaded.std == tuple(transform.std)


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k"])
def test_timms_file_in_the_hubs_cache_needs_no_network(tmp_path: Path, name: str) -> None:
    state = put_timm(tmp_path).state_dict()
    assert pretrained.full_name(f"timm:{name}") == "timm:resnet18.a1_in1k"
    loaded = pretrained.load(f"timm:{name}")
    assert loaded.tensors.keys() == state.keys()
    assert all(torch.equal(loaded.tensors[key], state[key]) for key in state)
    assert loaded.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("ask", [pretrained.full_name, pretrained.load])
def test_without_a_network_one_line_says_where_to_put_the_file(
    tmp_path: Path, ask: Callable[[str], object]
) -> None:
    for source, pattern in {
        "torchvision:resnet18": rf"cannot be had \(.*no network.*\): download \S+/{FILE} elsewhere "
        rf"and put it at {tmp_path}/torch/hub/checkpoints/{FILE}, or name it as a file",
        "timm:resnet18": rf"cannot be had \(.*\): download model.safetensors of {REPOSITORY} else"
        rf"where and name that file, or copy the hub's cache to {tmp_path}/hub",
        "torchvision:resnet19": "torchvision has no such model; the nearest: resnet18, ",
        "torchvision:resnet18.V9": "weights: 'V9' is none of IMAGENET1K_V1",
        "torchvision:": "torchvision has no such model; the nearest: such as resnet18",
        "timm:resnet18.of_no_one": "weights: 'of_no_one' is none of a1_in1k, ",
        "timm:resnet19": "timm has no such model; the nearest: resnet18",
        "timm:resnet18\x1b[2J": r"timm:resnet18\\x1b\[2J: timm has no such model",
    }.items():
        with pytest.raises(UsageError, match=pattern) as caught:
            ask(source)
        assert len(str(caught.value).splitlines()) == 1
        assert "\x1b" not in str(caught.value)


def test_damaged_files_in_caches_are_one_line(tmp_path: Path) -> None:
    put(tmp_path)
    put_timm(tmp_path)
    for source in ("torchvision:resnet18", "timm:resnet18"):
        (path,) = [
            file
            for file in tmp_path.rglob("*")
            if file.suffix in ((".pth",) if source.startswith("torchvision") else (".safetensors",))
        ]
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UsageError, match="damaged") as caught:
            pretrained.load(source)
        assert len(str(caught.value).splitlines()) == 1
