"""What a run does on a GPU, on one that is only claimed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from claimed_gpu import GPU, claimed_gpu
from command_line import Command

from fastbyol import train
from fastbyol.engine import capture
from fastbyol.engine.step import TrainState
from fastbyol.model import convolution, resnet
from fastbyol.runs import checkpoint
from test_capture import batch_of, fp32, small_views
from test_step import assert_equal_states
from tiny import beton_files, tiny_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_host_and_gpu_meet_where_a_gpu_lets_them() -> None:
    with claimed_gpu():
        assert torch.cuda.is_available()
        x, host = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
        assert (
            x.device == x[:1].T.device == (x + 1).device == x.to("cuda", torch.half).device == GPU
        )
        assert x.is_cuda
        assert not host.is_cuda
        assert (x * torch.tensor(2.0)).is_cuda
        assert x[torch.tensor([0, 2])].is_cuda
        assert not x.cpu().is_cuda
        assert not torch.zeros_like(x, device="cpu").is_cuda
        assert x.to(host).device == host.device
        x.copy_(torch.from_numpy(np.zeros((3, 2), np.float32)))
        assert torch.equal(x.cpu(), torch.zeros(3, 2))
        weight = torch.nn.Linear(2, 2).to("cuda").weight
        (gradient,) = torch.autograd.grad((x @ weight).sum(), weight)
        assert (gradient + x[:2]).is_cuda
        for wrong in (
            lambda: x + host,
            lambda: torch.stack([x[0, 0], torch.tensor(1.0)]),
            lambda: host[torch.tensor([0, 2], device="cuda")],
            lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
    assert not torch.cuda.is_available()


def test_a_graph_plays_what_it_recorded() -> None:
    """It works on the same memory and keeps what the host passed it as it was."""
    with claimed_gpu():
        x, baked = torch.zeros(2, device="cuda"), [1.0]

        def work() -> torch.Tensor:
            return x.add_(baked[0]) * 2

        out, play = capture.record_cuda(work)
        assert x.tolist() == [capture.WARM_UP_STEPS] * 2
        x.zero_()
        baked[0] = 100.0
        for step in range(1, 3):
            play()
            assert out.tolist() == [2.0 * step] * 2
        for wrong in (
            lambda: x.sum().item(),
            x.cpu,
            lambda: torch.tensor(1.0, device="cuda"),
            lambda: torch.ones(2).to("cuda"),
        ):
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                capture.record_cuda(wrong)


def test_a_captured_step_in_kernels_is_the_eager_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, interpreted, give the same bits; nothing of another step is baked into it."""
    short = resnet.Architecture(resnet.BasicBlock, (1, 1, 1, 1))
    monkeypatch.setitem(resnet.ARCHITECTURES, "resnet18", short)
    monkeypatch.setattr(capture, "WARM_UP_STEPS", 1)
    with claimed_gpu():
        config = small_views(fp32("gn", "bn", ws=True, optimizer="blog"))
        states = [TrainState.create(config, steps_per_epoch=1, device=GPU) for _ in range(2)]
        assert {state.kernels for state in states} == {"triton"}
        eager, inner = (capture.Eager(state, config) for state in states)
        graph = capture.Captured(inner, capture.record_cuda)
        for step in range(2):
            batch = batch_of(step, 2, GPU)
            expected, got = eager(batch, step), graph(batch, step)
            assert torch.equal(expected.values, got.values)
            assert torch.equal(expected.layers, got.layers)
        assert_equal_states(*states)


RUNS: dict[str, tuple[str, ...]] = {
    "resident": (),
    "streamed in bf16": (
        *("model.norm=gn", "model.ws=true", "optim.name=lars", "optim.lars_lr=0.2"),
        *("train.precision=bf16", "data.cache=none", "run.checkpoint_every_s=1"),
    ),
    "contrastive, two streams": (
        *("method.name=contrastive", "method.queue=12", "engine.overlap=true"),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small runs on a CPU take one thread, and all others as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("data"))


def trained(
    files: tuple[Path, Path], out: Path, device: str, sets: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Train two epochs in plain torch, which computes the same wherever a tensor is said to be."""
    plain = ("engine.mode=eager", "engine.kernels=reference", f"train.device={device}")
    config = tiny_config(files, "train.epochs=2", *plain, *sets)
    train(config, out)
    return checkpoint.load_latest(out / "checkpoints").tensors


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_bits_of_a_run_on_the_cpu(
    tmp_path: Path, files: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "LIMITS", {})  # a CPU's own ways round otherwise
    monkeypatch.setattr(convolution, "SAFE_CHANNELS", 0)
    sets = RUNS[name]
    with claimed_gpu():
        on_gpu = trained(files, tmp_path / "gpu", "cuda", sets)
    sets = tuple(each for each in sets if each != "engine.overlap=true")  # there are no streams
    on_cpu = trained(files, tmp_path / "cpu", "cpu", sets)
    assert on_gpu.keys() == on_cpu.keys()
    for key, tensor in on_cpu.items():
        assert torch.equal(tensor, on_gpu[key]), key


def test_what_is_done_with_a_run(run: Command, files: tuple[Path, Path], tmp_path: Path) -> None:
    """All that takes a device."""
    with claimed_gpu():
        trained(files, tmp_path / "a", "cuda")
        for line in (
            "resume a",
            "fork a@6 --set optim.weight_decay=0.1",
            "eval a",
            "eval a --protocol linear --labels 0.5 --weights target",
            "eval a --protocol knn --per-class",
            "eval a --protocol finetune --epochs 1 --lr 0.1 --lr 0.2",
            "embed a --out y.npz",
            "export a --format safetensors --out weights",
        ):
            run.output(*line.split())
