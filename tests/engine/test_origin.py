"""A new run from weights that exist: another run's, another library's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import ResNet18_Weights
from typer.testing import CliRunner

import foreign_models
from fastbyol import api
from fastbyol.cli.main import app
from fastbyol.config import Config, resolve
from fastbyol.data import source_idx, sources
from fastbyol.engine import origin
from fastbyol.engine.observer import Silent
from fastbyol.engine.origin import FirstWeights
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.model.byol import draw_networks
from fastbyol.runs import checkpoint
from fastbyol.runs.environment import env_of
from fastbyol.sweeps import grid
from fastbyol.views import plain
from tiny import beton_files, tiny_config

FILE = Path(ResNet18_Weights.DEFAULT.url).name
# Of resnet18 as other libraries have it, but for heads of a size that is quickly trained.
FULL = ("model.width=64", "model.stem=torchvision", "views.size=32")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("betons"))


@pytest.fixture(scope="module")
def source(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("source") / "run"
    api.train(tiny_config(files, "probe.every_epochs=0"), run)
    return run


def test_weights_and_statistics_come_over_momentum_and_step_do_not(
    files: tuple[Path, Path], source: Path
) -> None:
    saved = checkpoint.load_latest(source / "checkpoints")
    state = TrainState.create(
        tiny_config(files, "train.seed=9", "optim.name=lars"), steps_per_epoch=6
    )
    origin.copy_weights(state, saved.path)
    mine = state.tensors()
    for name, tensor in saved.tensors.items():
        if name in ("arena.momentum", "step"):
            assert not mine[name].any()
            assert tensor.any()
        else:
            assert torch.equal(mine[name], tensor), name


def test_weights_that_come_over_are_rounded_anew(files: tuple[Path, Path], source: Path) -> None:
    state = TrainState.create(
        tiny_config(files, "train.seed=9", "train.precision=bf16"), steps_per_epoch=6
    )
    origin.copy_weights(state, checkpoint.load_latest(source / "checkpoints").path)
    for copy, buffer in zip(
        state.weights.rounded_copies, (state.arena.online, state.arena.target), strict=True
    ):
        assert copy is not None
        assert torch.equal(copy, buffer.bfloat16())


def test_a_network_of_another_shape_is_refused_by_the_first_tensor(
    files: tuple[Path, Path], source: Path
) -> None:
    wider = TrainState.create(
        tiny_config(files, "model.projector.out=12", "model.predictor.out=12"), steps_per_epoch=6
    )
    before = {name: tensor.clone() for name, tensor in wider.tensors().items()}
    file = checkpoint.load_latest(source / "checkpoints").path
    with pytest.raises(
        UsageError, match=r"online\.\S+ is \(.*\) there and \(.*\) in this network"
    ) as caught:
        origin.copy_weights(wider, file)
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in wider.tensors().items())
    plain = TrainState.create(tiny_config(files, "model.norm=none"), steps_per_epoch=6)
    with pytest.raises(UsageError, match="absent"):
        origin.copy_weights(plain, file)


def test_a_run_remembers_where_it_began_and_needs_its_source_no_longer(
    files: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    """It is resumed bit for bit from its own checkpoint of step 0 after the source is gone."""
    newest = checkpoint.load_latest(source / "checkpoints").path
    copy = tmp_path / newest.name
    copy.write_bytes(newest.read_bytes())
    config = tiny_config(
        files,
        f"train.init_from={copy}",
        "train.epochs=1",
        "probe.every_epochs=0",
        "run.keep_checkpoints=9",
    )
    api.train(config, tmp_path / "run")
    assert f'init_from = "{copy}"' in (tmp_path / "run" / "config.toml").read_text()
    first, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert torch.equal(
        checkpoint.load(first).tensors["arena.online"],
        checkpoint.load(newest).tensors["arena.online"],
    )
    whole = last.read_bytes()
    last.unlink()
    copy.unlink()
    assert api.resume(tmp_path / "run").finished
    assert last.read_bytes() == whole


def test_the_flag_takes_a_run_and_refuses_what_is_none(
    files: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    from fastbyol import config_io

    (tmp_path / "config.toml").write_text(
        config_io.dump(tiny_config(files, "train.epochs=1", "probe.every_epochs=0"))
    )
    arguments = [
        "train",
        "--config",
        str(tmp_path / "config.toml"),
        "--out",
        str(tmp_path / "run"),
        "--init-from",
    ]
    result = CliRunner().invoke(app, [*arguments, str(source)])
    assert result.exit_code == 0, result.output
    named = checkpoint.load_latest(source / "checkpoints").path.resolve()
    assert f'init_from = "{named}"  # --init-from' in (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(UsageError, match="no checkpoint"):
        api.train(tiny_config(files, f"train.init_from={tmp_path}"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def state_of(*sets: str) -> TrainState:
    return TrainState.create(
        resolve(tiny_config((Path("a"), Path("b")), *FULL, *sets)), steps_per_epoch=6
    )


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def of_torchvision(folder: Path) -> tuple[Path, nn.Module]:
    model = foreign_models.resnet()
    return saved(model.state_dict(), folder / "torchvision.pth"), model


def of_timm(folder: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(1)
    model = foreign_models.shaken(timm.create_model("resnet18"))
    content = {"state_dict": model.state_dict(), "epoch": 3, "arch": "resnet18"}
    return saved(content, folder / "timm.pth.tar"), model


def of_lightly(folder: Path) -> tuple[Path, nn.Module]:
    model = foreign_models.lightly_byol(foreign_models.resnet())
    features = nn.Sequential(model.backbone, nn.Flatten())
    return saved(model.state_dict(), folder / "lightly.pth"), features


def of_solo_learn(folder: Path) -> tuple[Path, nn.Module]:
    model = foreign_models.solo_byol()
    return saved(foreign_models.solo_checkpoint(model), folder / "solo.ckpt"), model.encoder


def of_newer_solo_learn(folder: Path) -> tuple[Path, nn.Module]:
    model = foreign_models.solo_byol()
    content = foreign_models.solo_checkpoint(model, "backbone")
    return saved(content, folder / "solo.ckpt"), model.encoder


STYLES = {
    of_torchvision: ("by name", (), {"fc": 2}),
    of_timm: ("by name under state_dict", (), {"state_dict.fc": 2}),
    of_lightly: (
        "by position in an nn.Sequential under backbone",
        ("backbone_momentum.",),
        {
            "projection_head": 8,
            "prediction_head": 8,
            "backbone_momentum": 120,
            "projection_head_momentum": 8,
        },
    ),
    **{
        style: (
            f"by name under state_dict.{name}",
            (f"state_dict.momentum_{name}.",),
            {
                "state_dict.classifier": 2,
                f"state_dict.momentum_{name}": 120,
                "state_dict.projector": 9,
                "state_dict.momentum_projector": 9,
                "state_dict.predictor": 9,
            },
        )
        for style, name in ((of_solo_learn, "encoder"), (of_newer_solo_learn, "backbone"))
    },
}


def real_images() -> torch.Tensor:
    """Sixteen of Fashion-MNIST's images, normalised, (16, 3, 32, 32)."""
    config = tiny_config((Path("a"), Path("b")), *FULL)
    source = sources.open_source(str(source_idx.DEBIAN), kind="fashion-mnist", split="test")
    images = np.stack([np.asarray(source.image(index)) for index in range(16)])
    return plain(torch.from_numpy(images), config.views).contiguous()


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_every_key_of_each_librarys_style_is_matched_and_gives_the_same_embeddings(
    style: Callable[[Path], tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    """Both networks' encoders begin with the trained one's; heads stay as the seed draws them."""
    path, model = style(tmp_path)
    names, others, unused = STYLES[style]
    state = state_of()
    first = origin.copy_weights(state, path)
    assert (first.names, first.others, first.unused) == (names, others, unused)
    assert (first.matched, first.missing) == (120, ())
    assert set(state.online.encoder.state_dict()) == set(state.target.encoder.state_dict())
    assert len(state.online.encoder.state_dict()) == 120
    images = real_images()
    if hasattr(model, "fc"):
        model.fc = nn.Identity()
    with torch.no_grad():
        expected = model.eval()(images)
        for network in (state.online, state.target):
            torch.testing.assert_close(
                network.encoder.eval()(images), expected, rtol=1e-5, atol=1e-5
            )
    assert expected.std() > 0.1
    drawn = state_of()
    for net, other in ((state.online, drawn.online), (state.target, drawn.target)):
        for name, tensor in other.projector.state_dict().items():
            assert torch.equal(net.projector.state_dict()[name], tensor)


def test_small_images_and_deep_networks(tmp_path: Path) -> None:
    """lightly's own ResNet for small images, its blocks' ``shortcut`` and all; torchvision's 50."""
    small = foreign_models.lightly_small_resnet()
    images = real_images()
    for model in (small, foreign_models.lightly_byol(small)):
        state = state_of("model.stem=small")
        first = origin.copy_weights(state, saved(model.state_dict(), tmp_path / "small.pth"))
        assert first.matched == 120
        small.linear = nn.Identity()
        with torch.no_grad():
            torch.testing.assert_close(
                state.online.encoder.eval()(images), small.eval()(images), rtol=1e-5, atol=1e-5
            )
    deep = saved(foreign_models.resnet("resnet50").state_dict(), tmp_path / "50.pth")
    assert origin.copy_weights(state_of("model.encoder=resnet50"), deep).matched == 318


@pytest.mark.parametrize(
    ("model", "sets", "pattern"),
    [
        ("resnet34", (), r"layer1\.2\.conv1\.weight of .*\(64, 64, 3, 3\) there and absent in"),
        ("resnet50", (), r"layer1\.0\.conv1\.weight of .*, 1, 1\) there and \(64, 64, 3, 3\) in"),
        ("resnet18", ("model.encoder=resnet34",), r"layer1\.2\.conv1\.weight .* is absent there"),
        ("resnet18", ("model.width=8",), r"conv1\.weight .* \(64, 3, 7, 7\) there and \(8, 3, 7"),
        ("resnet18", ("model.stem=small",), r"conv1\.weight .*7, 7\) there and \(64, 3, 3, 3\)"),
        ("resnet18", ("model.norm=gn",), r"bn1\.running_mean of .* \(64,\) there and absent in"),
        ("mobilenet_v2", (), r"only 6 of its 314 tensors, such as features\.0\.0\.weight, have na"),
    ],
)  # fmt: skip
def test_a_wrong_architecture_is_one_line_that_names_the_first_difference(
    tmp_path: Path, model: str, sets: tuple[str, ...], pattern: str
) -> None:
    file = saved(torchvision.models.get_model(model).state_dict(), tmp_path / "file.pth")
    state = state_of(*sets)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(UsageError, match=rf"^{file}: cannot start from it: .*{pattern}") as caught:
        origin.copy_weights(state, file)
    assert len(str(caught.value).splitlines()) == 1
    encoder = state.online.config.encoder
    assert f"(model.encoder {encoder}, norm " in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())


def test_numbers_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    state, good = state_of(), foreign_models.resnet().state_dict()
    for name, tensor, words in (
        ("conv1.weight", torch.full((64, 3, 7, 7), torch.inf), "holds NaN or infinity"),
        ("bn1.bias", torch.full((64,), torch.nan), "holds NaN or infinity"),
        ("bn1.running_var", torch.full((64,), -1.0), "holds variances below zero"),
        ("bn1.weight", torch.ones(64, dtype=torch.int8), "is of torch.int8"),
        ("bn1.weight", torch.ones(64, device="meta"), "without numbers"),
        ("bn1.weight", torch.ones(64).to_sparse(), "without numbers"),
    ):
        file = saved(good | {name: tensor}, tmp_path / "file.pth")
        with pytest.raises(UsageError, match=rf"cannot start from it: {name} .*{words}"):
            origin.copy_weights(state, file)
    whole = {name: t.half() if t.is_floating_point() else t for name, t in good.items()}
    first = origin.copy_weights(state, saved(whole, tmp_path / "file.pth"))
    assert first.matched == 120
    assert torch.equal(state.target.encoder.conv1.weight, whole["conv1.weight"].float())


def test_positions_of_a_transformer_are_the_networks_own_or_refused(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"model": {"encoder": "torchvision:swin_t"}, "views": {"size": 32}}
    )
    state = TrainState.create(resolve(config), steps_per_epoch=1)
    weights = torchvision.models.swin_t().state_dict()
    first = origin.copy_weights(state, saved(weights, tmp_path / "swin.pth"))
    assert first.missing == ()
    assert first.matched == len(state.online.encoder.state_dict())
    assert dict(first.unused or {}) == {"head": 2}
    index = "features.1.0.attn.relative_position_index"
    other = saved(weights | {index: weights[index] + 1}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=f"{index} has other numbers than this network's"):
        origin.copy_weights(state, other)


def test_files_without_counters_of_batches(tmp_path: Path) -> None:
    """Those from before torch 0.4.1."""
    whole = foreign_models.resnet().state_dict()
    old = {name: tensor for name, tensor in whole.items() if "num_batches" not in name}
    first = origin.copy_weights(state_of(), saved(old, tmp_path / "old.pth"))
    assert (first.matched, len(first.missing)) == (100, 20)
    assert "100 of the encoder's 120 tensors matched" in first.lines()[0]
    assert "missing: 20 num_batches_tracked, which nothing reads" in first.lines()[0]


def test_weight_standardization_changes_the_function_and_says_so(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Not of weights that are standardized already, as this library exports those of such runs."""
    path, _ = of_torchvision(tmp_path)
    first = origin.copy_weights(state_of("model.ws=true"), path)
    assert [note.partition(":")[0] for note in first.notes] == ["model.ws"]
    assert origin.copy_weights(state_of(), path).notes == ()
    sets = ("model.ws=true", "model.norm=gn")
    api.train(tiny_config(files, *sets, "train.epochs=1"), tmp_path / "run")
    for name in ("torchvision", "safetensors"):
        exported = api.export(tmp_path / "run", tmp_path / f"{name}.any", format=name)["out"]
        state = TrainState.create(resolve(tiny_config(files, *sets)), steps_per_epoch=6)
        source, _ = origin.source_of(exported)
        assert origin.copy_weights(state, source).notes == ()
        images = torch.rand(4, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(
                state.online.encoder.eval()(images),
                api.load_encoder(tmp_path / "run")(images),
                rtol=1e-3,
                atol=1e-4,
            )


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def small_file(folder: Path) -> tuple[Path, Config]:
    """Write weights of an encoder of ``tiny``'s size, as lightly's model has them."""
    files = beton_files(folder)
    config = tiny_config(files, "train.epochs=1", "probe.every_epochs=0", "run.keep_checkpoints=9")
    torch.manual_seed(3)
    encoder = draw_networks(config.model, 77)[0].encoder
    backbone = nn.Sequential(*(module for _, module in encoder.named_children()))
    state = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(2, 2)}).state_dict()
    return saved(state, folder / "foreign.pth"), config


def with_source(config: Config, source: object, *sets: str) -> Config:
    train = config.train.model_copy(update={"init_from": str(source)})
    return config.model_copy(update={"train": train})


def test_a_run_reports_and_records_its_first_weights_and_needs_their_file_no_longer(
    tmp_path: Path,
) -> None:
    file, config = small_file(tmp_path)
    notes = Notes()
    config = with_source(config, file)
    api.train(config, tmp_path / "run", observer=notes)
    (line,) = [line for line in notes.lines if line.startswith("starts from")]
    assert line.startswith(
        f"starts from {file}: 120 of the encoder's 120 tensors matched, by position in an "
        "nn.Sequential under backbone; missing: none; not used: head (2); the heads"
    )
    env = env_of(tmp_path / "run")
    record = FirstWeights(**env["first_weights"])
    assert (record.source, record.matched, record.unused) == (str(file), 120, {"head": 2})
    assert env["inputs"]["weights"] == record.digest
    first, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoint.load(first).meta["inputs"]["weights"] == record.digest
    whole = last.read_bytes()
    last.unlink()
    file.rename(tmp_path / "moved.pth")
    assert api.resume(tmp_path / "run").finished
    assert last.read_bytes() == whole
    card = api.export(tmp_path / "run", tmp_path / "out.pth")["card"]
    words = "foreign.pth, 120 tensors by position in an nn.Sequential under backbone, digest"
    text = Path(card).read_text()
    assert f"- Began with: {words} {record.digest}" in text
    assert str(tmp_path) not in text
    fork = api.fork(tmp_path / "run", 6, ["train.epochs=2"], tmp_path / "fork")
    assert env_of(Path(fork.run))["first_weights"] == env["first_weights"]


def test_a_run_that_was_killed_before_its_first_step_wants_the_same_file(tmp_path: Path) -> None:
    file, config = small_file(tmp_path)
    run = tmp_path / "run"
    api.train(with_source(config, file), run)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    (run / "metrics.jsonl").unlink()
    other = torch.load(file)
    other["backbone.0.weight"] *= 2
    torch.save(other, file)
    with pytest.raises(UsageError, match=r"foreign.pth: the weights to start from: changed since"):
        api.resume(run)


def test_ranks_begin_with_the_first_ones_weights(tmp_path: Path) -> None:
    file, config = small_file(tmp_path)
    train = config.train.model_copy(update={"ranks": 2})
    api.train(with_source(config.model_copy(update={"train": train}), file), tmp_path / "two")
    api.train(with_source(config, file), tmp_path / "one")
    two, one = (
        checkpoint.load(sorted((tmp_path / name / "checkpoints").iterdir())[0]).tensors
        for name in ("two", "one")
    )
    for name in ("arena.online", "arena.target"):
        size = len(one[name])
        assert torch.equal(two[name][:size], one[name])


def test_names_and_relative_files_are_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(
        foreign_models.resnet().state_dict(), folder / Path(ResNet18_Weights.DEFAULT.url).name
    )
    (tmp_path / "hub").mkdir()
    safetensors.torch.save_file(
        foreign_models.resnet().state_dict(), tmp_path / "hub" / "model.safetensors"
    )
    of_torchvision(tmp_path)
    for source, full in {
        "torchvision:resnet18": "torchvision:resnet18.IMAGENET1K_V1",
        "torchvision.pth": str(tmp_path / "torchvision.pth"),
        "hub": str(tmp_path / "hub" / "model.safetensors"),
    }.items():
        assert origin.source_of(source) == (full, ())
        (tmp_path / "grid.toml").write_text(
            f'[train]\ninit_from = "{source}"\n[grid]\n"optim.lr" = [0.1, 0.2]\n'
        )
        tasks = grid.read(tmp_path / "grid.toml").tasks
        assert {task.config.train.init_from for task in tasks} == {full}


def test_weights_of_images_with_another_mean_are_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(
        foreign_models.resnet().state_dict(), folder / Path(ResNet18_Weights.DEFAULT.url).name
    )
    views = tiny_config((Path("a"), Path("b"))).views
    state = state_of()
    assert origin.copy_weights(state, "torchvision:resnet18", views).notes == ()
    other = views.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    (note,) = origin.copy_weights(state, "torchvision:resnet18", other).notes
    assert "views.mean=[0.485, 0.456, 0.406] and views.std=[0.229, 0.224, 0.225]" in note
