"""Exports are what the engine's encoder computes, for libraries that know nothing of the engine."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol import api, views
from fastbyol.data import embedded, loader
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.exports import exporting
from fastbyol.runs import checkpoint
from untrained import STEP, write_run

Make = Callable[..., Path]
# The norms as their documentation has them: 32 groups of 2 channels and more at width 64.
NORMS: dict[str, Callable[..., nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "gn": lambda channels, **options: nn.GroupNorm(32, channels, **options),
    "ln": lambda channels, **options: nn.GroupNorm(1, channels, **options),
    "none": lambda channels, **options: nn.Identity(),
}
WIDE = {
    "bn": ("model.norm=bn", "model.width=64"),
    "gn": ("model.norm=gn", "model.width=64"),
    "gn-ws": ("model.norm=gn", "model.width=64", "model.ws=true"),
    "ln": ("model.norm=ln", "model.width=64"),
    "none": ("model.norm=none", "model.width=64"),
    "resnet34-gn": ("model.encoder=resnet34", "model.norm=gn", "model.width=64"),
    "resnet50-bn": ("model.encoder=resnet50", "model.norm=bn", "model.width=64"),
    "resnet50-gn-ws": (
        "model.encoder=resnet50",
        "model.norm=gn",
        "model.width=64",
        "model.ws=true",
    ),
}
NARROW = ("model.norm=gn", "model.ws=true", "model.width=8", "model.stem=small")


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function of ``key=value`` texts: a run folder, made once for each of them."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*sets: str) -> Path:
        if sets not in made:
            made[sets] = tmp_path_factory.mktemp("runs") / "mine"
            write_run(made[sets], *sets)
        return made[sets]

    return make


def importorskip(library: str) -> Any:
    """Import a library of which ``[timm]`` and ``[onnx]`` are extras; others are always there."""
    return pytest.importorskip(library, reason="an extra is not installed")


def images(run: Path) -> Tensor:
    """64 of Fashion-MNIST's test images, others than those that the command compares on."""
    config = api._load(run, "random")[0]
    file = embedded.held_out_file(config.data)
    assert file is not None
    decoded = loader.read_all(file, workers=1, size=config.views.size, limit=1000).images
    return views.plain(decoded[:64], config.views).contiguous()


def own(run: Path, x: Tensor, weights: str = "trained") -> Tensor:
    """Embeddings of the engine's encoder."""
    with torch.no_grad():
        return api._load(run, weights)[1](x)


def bound_of(sets: tuple[str, ...]) -> float:
    """Fifty layers of standardized weights are up to 4e-5 from fp64, ours and an export's."""
    return 1e-4 if {"model.encoder=resnet50", "model.ws=true"} <= set(sets) else 1e-5


def assert_same(y: Tensor, wanted: Tensor, bound: float = 1e-5) -> None:
    """Equal to ``bound`` times the largest number, or times 1."""
    assert y.shape == wanted.shape
    assert float((y - wanted).abs().max()) <= bound * max(1.0, float(wanted.abs().max()))
    assert float(wanted.std(0).mean()) > 1e-3  # images differ, so the comparison says something


def shown(result: dict[str, Any]) -> Any:
    """The ``model`` of the lines that a user is shown."""
    names: dict[str, Any] = {}
    exec(result["load"], names)
    return names["model"]


def train_on(net: nn.Module, x: Tensor) -> None:
    """A step of plain SGD lowers the loss, and every parameter has a gradient."""
    targets = torch.arange(len(x)) % 5
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(net(x), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in net.parameters()]
        optimizer.step()
        assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("kind", WIDE)
def test_a_wide_encoder_loads_strictly_and_computes_the_same(
    kind: str, library: str, made_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importorskip(library)
    run = made_run(*WIDE[kind])
    monkeypatch.chdir(tmp_path)
    result = api.export(run, "file.pth", format=library)
    norm = NORMS[kind.removesuffix("-ws").rpartition("-")[2]]
    name, state = kind[:8] if "resnet" in kind else "resnet18", torch.load("file.pth")
    net: nn.Module
    if library == "timm":
        net = importorskip("timm").create_model(name, num_classes=0, norm_layer=norm)
    else:
        net = getattr(torchvision.models, name)(norm_layer=norm)
        net.fc = nn.Identity()
    net.load_state_dict(state, strict=True)
    net.eval()
    x = images(run)
    wanted = own(run, x)
    with torch.no_grad():
        assert_same(net(x), wanted, bound_of(WIDE[kind]))
        assert_same(shown(result)(x), wanted, bound_of(WIDE[kind]))
    assert result["parity"]["num_images"] == 64
    assert result["parity"]["data"] == "fashion-mnist, test"
    train_on(net.train(), x[:8])


def test_a_classifier_is_added_and_learns(made_run: Make, tmp_path: Path) -> None:
    run = made_run(*WIDE["bn"])
    api.export(run, tmp_path / "a.pth", num_classes=5)
    net = torchvision.models.resnet18(num_classes=5)
    net.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    train_on(net, images(run)[:8])
    result = api.export(run, tmp_path / "b", num_classes=7, format="safetensors")
    fc = shown(result).fc
    assert fc.weight.shape == (7, 512)
    assert torch.equal(load_file(tmp_path / "b" / "model.safetensors")["fc.weight"], fc.weight)
    with pytest.raises(UsageError, match="--num-classes: not with --format onnx"):
        api.export(run, tmp_path / "c", num_classes=5, format="onnx")


GROUPS = ("model.groups=5",)  # some sizes have 4 groups, and others 3
OF_SIZE_64 = ("model.width=64", "model.stem=small", "views.size=16", "data.size=16")


@pytest.mark.parametrize(
    ("library", "sets"),
    [
        ("torchvision", ("model.norm=bn", "model.width=8")),
        ("torchvision", ("model.norm=bn", *OF_SIZE_64)),
        ("timm", ("model.norm=gn", "model.groups=64", *OF_SIZE_64)),
        ("safetensors", ("model.norm=gn", "model.width=12", "model.stem=small", "model.groups=3")),
        ("safetensors", ("model.norm=none", "model.width=6", "model.ws=true")),
        ("safetensors", ("model.encoder=resnet34", "model.norm=ln", "model.width=6")),
        ("torchvision", ("model.encoder=resnet50", "model.norm=bn", "model.width=6")),
        ("torchvision", ("model.encoder=resnet50", *NARROW[:2], "model.width=12", *GROUPS)),
        ("safetensors", ("model.encoder=resnet50", "model.norm=ln", "model.width=4")),
        ("safetensors", ("model.encoder=resnet50", "model.norm=none", "model.width=4")),
        ("timm", ("model.encoder=resnet50", "model.norm=gn", *GROUPS, *OF_SIZE_64)),
    ],
    ids=str,
)
def test_the_shown_constructor_fits_any_width_and_stem(
    library: str,
    sets: tuple[str, ...],
    made_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importorskip(library)
    run, out = made_run(*sets), tmp_path / "out"
    x = images(run)
    net = shown(api.export(run, out, format=library))
    with torch.no_grad():
        assert_same(net(x), own(run, x), bound_of(sets))
    if library == "safetensors":
        assert load_file(out / "model.safetensors").keys() == net.state_dict().keys()
        monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
        with pytest.raises(UsageError, match="--format torchvision, safetensors, onnx or"):
            api.export(run, tmp_path / "timm", format="timm")
        assert files(tmp_path) == {"out", "out/README.md", "out/model.safetensors"}


BOTTLENECKS = ("model.encoder=resnet50", *NARROW)


@pytest.mark.parametrize("sets", [WIDE["bn"], NARROW, BOTTLENECKS], ids=["wide", "narrow", "50"])
def test_onnx_runtime_computes_the_same_at_any_batch_and_size(
    sets: tuple[str, ...], made_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importorskip("onnxruntime")
    run = made_run(*sets)
    model = shown(api.export(run, tmp_path / "a.onnx", format="onnx"))
    assert capsys.readouterr().out == ""
    assert b"/torch" not in (tmp_path / "a.onnx").read_bytes()  # no folder of this machine
    x = images(run)
    larger = F.interpolate(x[:3], scale_factor=1.5, mode="bilinear")
    for batch in (x, x[:7], larger, larger[:, :, :40]):
        assert_same(torch.from_numpy(model(batch.numpy())), own(run, batch), bound_of(sets))
    assert model(x[:1].numpy()).shape == own(run, x[:1]).shape


@pytest.mark.parametrize("sets", [NARROW, BOTTLENECKS], ids=["18", "50"])
def test_a_torch_export_takes_any_batch_and_trains(
    sets: tuple[str, ...], made_run: Make, tmp_path: Path
) -> None:
    run = made_run(*sets)
    model = shown(api.export(run, tmp_path / "a.pt2", format="torch-export"))
    with zipfile.ZipFile(tmp_path / "a.pt2") as file:  # no folder of this machine
        assert not any(b"site-packages" in file.read(name) for name in file.namelist())
    x = images(run)
    with torch.no_grad():
        for batch in (x, x[:2], x[:9]):
            assert_same(model(batch), own(run, batch), bound_of(sets))
        dim = own(run, x[:1]).shape[1]
        assert model(x[:1]).shape == (1, dim)
    train_on(nn.Sequential(model, nn.Linear(dim, 5)), x[:8])


def test_weights_are_those_that_were_asked_for(made_run: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made_run(*NARROW), run)
    x = images(run)
    seen = []
    for word in api.WEIGHTS:
        result = api.export(run, weights=word)
        suffix = "" if word == "trained" else f"-{word}"
        assert result["out"] == str(run / "exports" / f"torchvision{suffix}.pth")
        wanted = own(run, x, word)
        with torch.no_grad():
            assert_same(shown(result)(x), wanted)
        seen.append(wanted)
        assert result["step"] == (0 if word == "random" else STEP)
    assert not any(torch.allclose(a, b, rtol=0.1) for a, b in itertools.pairwise(seen))
    file = checkpoint.newest(run / "checkpoints")
    assert file is not None
    result = api.export(file, format="safetensors")
    with torch.no_grad():
        assert_same(shown(result)(x), seen[0])
    assert "# ResNet-18 encoder of run\n" in Path(result["card"]).read_text()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["torchvision", "safetensors"])
def test_a_file_that_computes_something_else_is_refused_and_nothing_is_left(
    name: str, made_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(made_run(*NARROW), run)
    before = files(run)
    fold = exporting.folded

    def off(*arguments: Any) -> Any:
        net = fold(*arguments)
        with torch.no_grad():
            net.layer2[0].conv1.weight[0, 0, 0, 0] += 0.01
        return net

    monkeypatch.setattr(exporting, "folded", off)
    with pytest.raises(FastbyolError, match="from the run's own encoder on 64 images, more than"):
        api.export(run, format=name)
    assert files(run) == before


def test_what_is_there_is_not_overwritten(made_run: Make, tmp_path: Path) -> None:
    run, out = made_run(*NARROW), tmp_path / "a.pth"
    api.export(run, out)
    for path in (out, tmp_path / "b.pth.md"):
        path.write_text("mine")
        with pytest.raises(UsageError, match=r"exists already; .*--overwrite"):
            api.export(run, path.with_suffix("") if path.suffix == ".md" else path)
        assert path.read_text() == "mine"
    api.export(run, out, overwrite=True)
    assert torch.load(out, weights_only=True)
    folder = tmp_path / "folder"
    api.export(run, folder, format="safetensors")
    with pytest.raises(UsageError, match="exists already"):
        api.export(run, folder, format="safetensors")
    api.export(run, folder, format="safetensors", overwrite=True)
    (folder / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        api.export(run, folder, format="safetensors", overwrite=True)
    assert files(tmp_path) == {
        *("a.pth", "a.pth.md", "b.pth.md", "folder"),
        *(f"folder/{name}" for name in ("README.md", "model.safetensors", "notes.txt")),
    }


def test_places_that_cannot_be(made_run: Make, tmp_path: Path) -> None:
    run = made_run(*NARROW)
    (tmp_path / "file").touch()
    for out, why in (
        (tmp_path / "absent" / "a.pth", "no such folder"),
        (tmp_path / "file" / "a.pth", "cannot be written|is no folder"),
        (Path(), r"\.: has no name of its own: take such as torchvision\.pth"),
        (Path(".."), "has no name of its own"),
        (Path("/"), "has no name of its own"),
        (tmp_path, "is a folder, not a regular file"),
        (Path("/proc/self/a.pth"), "cannot be written"),  # not even by root
    ):
        with pytest.raises(UsageError, match=why):
            api.export(run, out)
    with pytest.raises(UsageError, match="exists already"):
        api.export(run, tmp_path / "file", format="safetensors")
    with pytest.raises(UsageError, match=r"a\.pth: torch\.export loads files that end in \.pt2"):
        api.export(run, tmp_path / "a.pth", format="torch-export")
    assert files(tmp_path) == {"file"}


def test_a_full_disk_is_one_line(
    made_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("torchvision", "safetensors"):
        with pytest.raises(FastbyolError, match=r"out: cannot write: No space left on device$"):
            api.export(made_run(*NARROW), tmp_path / "out", format=name)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("timm", "timm", "timm"), ("onnx", "onnx", "onnx")]
)
def test_a_missing_library_is_named(
    name: str, module: str, extra: str, made_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"{module} is not installed: .*'fastbyol\[{extra}\]'"):
        api.export(made_run(*NARROW), format=name)


def test_without_the_runs_data_textures_serve(made_run: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made_run(*NARROW), run)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("fashion-mnist", "/gone/secret/images.beton"))
    result = api.export(run)
    (note,) = result["notes"][:1]
    assert result["parity"]["data"] == "textures, not the run's"
    assert "secret" not in Path(result["card"]).read_text()
    assert "textures, because" in note
    assert "images.beton" in note
    assert "--test-data" not in note


def test_damaged_runs_are_one_line(made_run: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made_run(*NARROW), run)
    file = checkpoint.newest(run / "checkpoints")
    assert file is not None
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    before = files(run)
    for path in (run, file, tmp_path / "nothing"):
        with pytest.raises(UsageError) as caught:
            api.export(path)
        assert "\n" not in str(caught.value)
    assert files(run) == before
