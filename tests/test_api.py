"""The Python API: an encoder is handed out as it was asked for, every word is checked, and the
process is left as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbyol import api
from fastbyol.ablations import arms, plan
from fastbyol.ablations.rules import in_words
from fastbyol.cli import dialects
from fastbyol.config import Config, OptimConfig
from fastbyol.data import convert, loader
from fastbyol.engine import device, precision
from fastbyol.engine.step import TrainState, train_step
from fastbyol.errors import UsageError
from fastbyol.evaluation import protocol
from fastbyol.model.norm import make_norm, use_kernels
from fastbyol.model.objective import Objective
from fastbyol.runs import checkpoint
from fastbyol_kernels import dispatch
from tiny import beton_files, tiny_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    config = tiny_config(beton_files(folder), "train.epochs=1", "probe.every_epochs=0")
    api.train(config, folder / "run")
    return folder / "run"


def test_weights_are_those_that_were_asked_for(run: Path) -> None:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    tensors = checkpoint.load(newest).tensors
    encoders = {word: api.load_encoder(run, weights=word) for word in api.WEIGHTS}
    for word, net in (("trained", "online"), ("target", "target")):
        assert torch.isin(
            encoders[word].layer4[0].conv1.weight.flatten(), tensors[f"arena.{net}"]
        ).all()
        assert torch.equal(
            encoders[word].bn1.running_mean, tensors[f"{net}.encoder.bn1.running_mean"]
        )
    first = [encoders[word].conv1.weight for word in api.WEIGHTS]
    assert not any(
        torch.equal(a, b)
        for a, b in ((first[0], first[1]), (first[0], first[2]), (first[1], first[2]))
    )
    accuracies = {word: api.evaluate(run, weights=word)["weights"] for word in api.WEIGHTS}
    assert accuracies == {word: word for word in api.WEIGHTS}


def _step(name: Any) -> None:
    """A step under another objective."""
    state = TrainState.create(tiny_config((Path("a"), Path("b"))), steps_per_epoch=1)
    state = replace(state, recipe=replace(state.recipe, objective=Objective(name)))
    train_step(state, torch.randn(2, 2, 3, 16, 16))


def _open(run: Path, word: Any) -> None:
    loader.open_loader(
        run.parent / "train.beton",
        batch_size=8,
        seed=0,
        device="cpu",
        cache=word,
        workers=1,
        size=16,
    ).close()


def _resize(run: Path, word: Any) -> None:
    images = run.parent / "images.npz"
    np.savez(images, images=np.zeros((2, 16, 16, 3), np.uint8))
    convert.convert(str(images), run / "x.beton", size=8, resize=word)


# Everything that takes a word: a call, and one of the words that the error has to name.
WORDS: dict[str, tuple[Callable[[Path, Any], Any], str]] = {
    "load_encoder(weights)": (lambda run, word: api.load_encoder(run, weights=word), "target"),
    "evaluate(weights)": (lambda run, word: api.evaluate(run, weights=word), "target"),
    "evaluate(protocol)": (lambda run, word: api.evaluate(run, word), "linear"),
    "evaluate(device)": (lambda run, word: api.evaluate(run, device=word), "cuda"),
    "embed(weights)": (lambda run, word: api.embed(run, run / "y.npz", weights=word), "target"),
    "embed(by)": (lambda run, word: api.embed(run, run / "y.npz", by=word), "umap"),
    "embed(device)": (lambda run, word: api.embed(run, run / "y.npz", device=word), "cuda"),
    "export(weights)": (lambda run, word: api.export(run, weights=word), "target"),
    "export(format)": (lambda run, word: api.export(run, format=word), "torchvision"),
    "protocol.check": (lambda run, word: protocol.check(word, test=None, train=None), "linear"),
    "pick_device": (lambda run, word: device.pick_device(word), "cpu"),
    "dtype_of": (lambda run, word: device.dtype_of(word), "bf16"),
    "dispatch.resolve": (
        lambda run, word: dispatch.resolve(word, torch.device("cpu"), torch.float32),
        "cpu",
    ),
    "gradient_gap": (
        lambda run, word: precision.gradient_gap(Config(), torch.device("cpu"), word),
        "collapsed",
    ),
    "open_loader(cache)": (_open, "device"),
    "convert(mode)": (
        lambda run, word: convert.convert("textures", run / "x.beton", count=64, mode=word),
        "jpg",
    ),
    "convert(resize)": (_resize, "centre"),
    "convert(kind)": (
        lambda run, word: convert.convert("textures", run / "x.beton", kind=word),
        "idx",
    ),
    "make_norm": (lambda run, word: make_norm(word, 8, groups=2, num_views=2), "gn"),
    "use_kernels": (lambda run, word: use_kernels(torch.nn.Identity(), word), "cpu"),
    "objective": (lambda run, word: _step(word), "simsiam"),
    "Config(optim.dialect)": (
        lambda run, word: OptimConfig.model_validate({"dialect": word}),
        "deepmind",
    ),
    "model_copy(optim.dialect)": (
        lambda run, word: OptimConfig().model_copy(update={"dialect": word}),
        "bolts",
    ),
    "model_copy(schedule.lr)": (
        lambda run, word: Config().schedule.model_copy(update={"lr": word}),
        "cosine",
    ),
    "model_copy(model.stem)": (
        lambda run, word: Config().model.model_copy(update={"stem": word}),
        "small",
    ),
    "dialects.lars": (lambda run, word: dialects.lars([word]), "bolts"),
    "dialects.ceiling": (
        lambda run, word: dialects.ceiling(word, lr=0.1, weight_decay=0.1, eta=0.1),
        "bolts",
    ),
    "arms.load(scale)": (
        lambda run, word: arms.load(next(iter(arms.arms().values())), word, seed=0),
        "mini",
    ),
    "plan.chosen(scale)": (lambda run, word: plan.chosen(["C6"], word), "mini"),
    "rules.in_words": (lambda run, word: in_words(word), "C13"),
}


@pytest.mark.parametrize("what", WORDS)
@pytest.mark.parametrize("word", ["tarsed", ""])
def test_a_word_that_is_none_is_refused_and_the_right_ones_are_named(
    run: Path, what: str, word: str
) -> None:
    if what == "convert(kind)" and not word:
        pytest.skip("no kind is the kind that is found")
    call, one_of_them = WORDS[what]
    with pytest.raises((UsageError, ValueError)) as caught:
        call(run, word)
    assert one_of_them in str(caught.value)
    if isinstance(caught.value, UsageError):
        assert "\n" not in str(caught.value)


def test_lidar_comes_with_its_notes_and_not_with_finetune(run: Path) -> None:
    result = api.evaluate(run, lidar=True, lidar_images=20, lidar_views=3)
    assert (result["lidar_images"], result["lidar_views"]) == (20, 3)
    assert 0 < result["lidar_y"] < 20
    assert 0 < result["lidar_z"] < 9
    assert any("LiDAR of 32 embeddings wants more images" in note for note in result["notes"])
    assert not [key for key in api.evaluate(run) if "lidar" in key]
    with pytest.raises(UsageError, match="--lidar: is of the run's encoder"):
        api.evaluate(run, "finetune", lidar=True)
    with pytest.raises(UsageError, match="--lidar-views 1"):
        api.evaluate(run, lidar=True, lidar_views=1)


def test_the_nearest_word_is_named(run: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"^weights: 'targt' is none of trained, target, random; the nearest is target$",
    ):
        api.load_encoder(run, weights="targt")


CHILD = """
import json, multiprocessing, os, signal, socket, sys, warnings
from pathlib import Path
import torch
sys.path.insert(0, "tests/engine")
if sys.argv[2] == "odd":
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, True
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)

def state():
    b = torch.backends
    precisions = [m.fp32_precision for m in (b, b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn,
    b.mkldnn.matmul, b.mkldnn.conv)]
    return {
        "precisions": precisions, "matmul": torch.get_float32_matmul_precision(),
        "tf32": b.cudnn.allow_tf32,
        "cudnn": [b.cudnn.enabled, b.cudnn.benchmark, b.cudnn.deterministic],
        "exact": torch.are_deterministic_algorithms_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "new": [str(torch.get_default_dtype()), str(torch.get_default_device()),
        torch.is_grad_enabled()],
        "drawn": torch.get_rng_state().tolist(), "environment": dict(os.environ),
        "folder": os.getcwd(),
        "filters": list(map(str, warnings.filters)),
        "signals": [str(signal.getsignal(s)) for s in signal.Signals],
        "start": multiprocessing.get_start_method(allow_none=True),
        "timeout": socket.getdefaulttimeout(),
        "hooks": [str(sys.excepthook), str(sys.unraisablehook)],
    }

def same(what, before):
    import numba
    from numba.np.ufunc import parallel
    after = state()
    changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
    # Asking starts numba's pool, which settles the start method of processes.
    if parallel._is_initialized and numba.get_num_threads() != numba.config.NUMBA_NUM_THREADS:
        changed["numba"] = numba.get_num_threads()
    print(json.dumps([what, changed]))

class Interrupting:
    def start(self, message): pass
    def progress(self, message): os.kill(os.getpid(), signal.SIGTERM)
    def epoch_end(self, message): pass
    def note(self, text): pass

import fastbyol
from fastbyol_kernels import dispatch
from tiny import beton_files, tiny_config
folder, before = Path(sys.argv[1]), state()
files = beton_files(folder)
after = state()
print(json.dumps(["convert", {key: [before[key],
after[key]] for key in before if before[key] != after[key]}]))
run = folder / "run"
summary = fastbyol.train(tiny_config(files), run, observer=Interrupting())
assert not summary.finished
same("train, interrupted", before)
assert fastbyol.resume(run).finished
same("resume", before)
try:
    fastbyol.train(tiny_config(files, "data.train=nowhere"), folder / "other")
except fastbyol.UsageError:
    same("train, refused", before)
fastbyol.evaluate(run, "linear")
same("evaluate", before)
fastbyol.embed(run, folder / "y.parquet", picture=folder / "y.png")
same("embed", before)
fastbyol.load_encoder(run)
assert all(p.dtype == torch.float32 for p in fastbyol.load_encoder(run,
weights="random").parameters())
same("load_encoder", before)
for name in ("timm", "safetensors", "onnx", "torch-export"):
    try:
        fastbyol.export(run, format=name)
    except fastbyol.UsageError:
        assert name in ("timm", "onnx")  # another width, an extra that may be missing
same("export", before)
"""


@pytest.mark.parametrize("how", ["usual", "odd"])
def test_the_process_is_left_as_it_was_found(tmp_path: Path, how: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), how]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(reports) == 8
    assert [line for line in reports if line[1]] == []
