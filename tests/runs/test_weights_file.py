"""Files of torch.save and safetensors: read without running what they hold."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from fastbyol.errors import UsageError
from fastbyol.runs import checkpoint, weights_file

NAMES = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def refusal(path: Path, pattern: str) -> str:
    with pytest.raises(UsageError, match=pattern) as caught:
        weights_file.read(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_format_gives_the_same_tensors_and_the_digest_of_its_bytes(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "weights.any"
    if kind == "safetensors":
        safetensors.torch.save_file(NAMES, path)
    else:
        torch.save(NAMES, path, _use_new_zipfile_serialization=kind == "zip")
    read = weights_file.read(path)
    assert read.tensors.keys() == NAMES.keys()
    assert all(torch.equal(read.tensors[name], NAMES[name]) for name in NAMES)
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    assert weights_file.read(copy).digest == read.digest
    assert not weights_file.is_checkpoint(path)
    other = {**NAMES, "b": NAMES["b"] * 2}
    torch.save(other, copy)
    assert weights_file.read(copy).digest != read.digest


def test_what_training_scripts_save_beside_weights_is_read(tmp_path: Path) -> None:
    """Lightning's and timm's: nested state dicts, arguments, numpy's numbers, optimizers."""
    content: dict[str, Any] = {
        "state_dict": nn.Linear(2, 2).state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(71.5),
        "epoch": np.int64(3),
        "loss": np.float32(0.5),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": [{}]},
        1: {"2": {"3": {"4": {"5": {"too deep": torch.zeros(1)}}}}},
    }
    torch.save(content, tmp_path / "a.ckpt")
    assert set(weights_file.read(tmp_path / "a.ckpt").tensors) == {
        *("state_dict.weight", "state_dict.bias", "optimizer.state.0.momentum_buffer"),
    }
    loop: dict[str, Any] = {"w": torch.zeros(1)}
    loop["itself"] = loop
    torch.save(loop, tmp_path / "loop")
    assert set(weights_file.read(tmp_path / "loop").tensors) == {"w"}


class Runs:
    """An object whose unpickling makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("new", [True, False])
def test_no_code_of_a_file_is_run(tmp_path: Path, new: bool) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"w": torch.ones(1), "x": Runs(trace)}, path, _use_new_zipfile_serialization=new)
    message = refusal(path, r"holds an object of \S*mkdir beside tensors")
    assert "torch.save(loaded['state_dict'], NEW_FILE), of a module torch.save(loaded.s" in message
    path.write_bytes(pickle.dumps(Runs(trace)))
    refusal(path, "damaged, or not of torch.save|object of")
    torch.save(nn.Linear(1, 1), path)
    refusal(path, r"holds an object of torch\.nn\.modules\.linear\.Linear beside")
    assert not trace.exists()


def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    refusal(path, "cannot read: No such file")
    refusal(tmp_path, "is a folder, not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path / "pipe", "is a named pipe, not a regular file")
    for content in (b"", b"text\n", bytes(100), b"\x80", b"PK\x03\x04", (1 << 60).to_bytes(8)):
        path.write_bytes(content)
        refusal(path, "damaged")
    torch.save([torch.ones(1)], path)
    refusal(path, "holds no tensors by name")
    torch.save(torch.ones(1), path)
    refusal(path, "holds no tensors by name")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is an old format by now
        torch.jit.save(torch.jit.script(nn.ReLU()), path)
    refusal(path, "damaged, or not of torch.save")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"not a pickle")
    refusal(path, "damaged, or not of torch.save")


def test_files_that_would_grow_in_memory_are_refused_before_they_do(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(1 << 20)}, path)
    with (
        zipfile.ZipFile(path) as whole,
        zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    refusal(tmp_path / "packed", "holds more than its size")
    with path.open("wb") as file:
        file.truncate(17 << 30)
    refusal(path, r"has 18\.\d GB, which no file of an encoder has")


def test_checkpoints_of_ours_are_told_apart(tmp_path: Path) -> None:
    file = checkpoint.save(tmp_path, 3, NAMES, {})
    assert weights_file.is_checkpoint(file)
    assert not weights_file.is_checkpoint(tmp_path / "none")
    assert not weights_file.is_checkpoint(tmp_path)


# Reads each damaged file. Where it dies, the last line says at which.
CHILD = """
import sys
from pathlib import Path
from fastbyol.errors import UsageError
from fastbyol.runs import weights_file
for path in sorted(Path(sys.argv[1]).iterdir()):
    print("at", path.name, flush=True)
    try:
        weights_file.read(path)
        print("read", flush=True)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        print("refused", flush=True)
"""


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_refused_or_read_and_nothing_else(tmp_path: Path, kind: str) -> None:
    path, draw = tmp_path / "whole", random.Random(kind)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    if kind == "safetensors":
        safetensors.torch.save_file(model, path)
    else:
        torch.save({"state_dict": model}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    (tmp_path / "damaged").mkdir()
    for number in range(250):
        damaged = bytearray(content)
        at = draw.randrange(len(content))
        match number % 4:
            case 0:
                damaged[at] ^= 1 << draw.randrange(8)
            case 1:
                damaged[at:] = b""
            case 2:
                damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
            case _:
                damaged[at : at + 8] = draw.choice((b"\xff" * 8, draw.randbytes(8)))
        (tmp_path / "damaged" / f"{number:04}").write_bytes(damaged)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "damaged")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.split()
    assert done.returncode == 0, (lines[-3:], done.stderr[-500:])
    assert lines.count("refused") + lines.count("read") == 250
    assert lines.count("refused") >= 100
