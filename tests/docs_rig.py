"""The command lines of the documents: what they are, typed by a shell, and the files they name.

A block of code without a language is typed line by line. In one with a line that begins with ``$``
only such lines are. A script (``#!``) is run as a whole. The shell does what it always does with
words, variables, ``&&`` and ``{0,1}``, but the programs that it calls only write down how they were
called, and one that is not among ``PROGRAMS`` is not there.
"""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import source_files
import untrained
from fastbyol import api, config_io
from fastbyol.data.convert import convert
from fastbyol.exports import formats
from fastbyol.files import cache_folder
from fastbyol.model.byol import draw_networks
from fastbyol_bench import results
from sample_results import result
from small import SETS

ROOT = Path(__file__).resolve().parent.parent
# Accounts of what was done, with the commands of their time.
RECORDS = ("CHANGELOG.md", "bench/LOG.md", "tests/faults/REPORTS.md")
FOLDERS = ("", "docs/", "bench/", "tests/*/", "tests/*/*/")
DOCUMENTS = sorted(
    path
    for folder in FOLDERS
    for path in ROOT.glob(f"{folder}*.md")
    if str(path.relative_to(ROOT)) not in RECORDS
)

PROGRAMS = (
    *("fastbyol", "python", "python3", "make", "pip", "uv", "torchrun", "srun", "bash"),
    *("docker", "pixi"),
    *(".venv/bin/fastbyol", ".venv/bin/python", ".venv/bin/pip"),
    *(f"bench/{path.name}" for path in (ROOT / "bench").glob("*.sh")),
)
_RECORDER = """#!/bin/sh
printf '%s\\0' "$PWD" {name} "$@" >>"$TYPED"
echo >>"$TYPED"
"""
# Programs that answer a script, as far as it looks at the answer.
_ANSWERS = {
    "which": 'command -v "$1"',
    "scontrol": "echo node0",
    "head": 'read -r line; echo "$line"',
}
_VARIABLES = {"SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_NNODES": "4"}

_FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
# What torchrun and srun start is only ever named in a sentence.
_TYPED = (name for name in PROGRAMS if name not in ("torchrun", "srun"))
_PROGRAM = re.compile(rf"({'|'.join(map(re.escape, _TYPED))})\s+\S")


@dataclass(frozen=True)
class Block:
    """Code of a document: its language (``inline`` for what is in a sentence), line and text."""

    language: str
    line: int
    text: str


def blocks(text: str) -> list[Block]:
    """Return the code of a document: every fenced block, and inline code that is a command."""
    line_of = lambda start: text.count("\n", 0, start) + 1  # noqa: E731
    fenced = [Block(m[1], line_of(m.start(2)), m[2]) for m in _FENCE.finditer(text)]
    prose = _FENCE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    inline = [
        Block("inline", line_of(m.start()), " ".join(m[1].split()))
        for m in _INLINE.finditer(prose)
        if _PROGRAM.match(m[1])
    ]
    return sorted([*fenced, *inline], key=lambda block: block.line)


def lines(block: Block) -> Iterator[tuple[int, str]]:
    """Yield what is typed of a block, with its line: continued lines as one, a script whole."""
    if block.text.startswith("#!"):
        yield block.line, block.text
        return
    has_prompts = re.search(r"^\$ ", block.text, re.MULTILINE)
    for match in re.finditer(r"(?:.*\\\n)*.+", block.text):
        text = match[0].replace("\\\n", "").strip()
        is_typed = text.startswith("$ ") if has_prompts else not text.startswith("#")
        if text and is_typed:
            yield block.line + block.text.count("\n", 0, match.start()), text.removeprefix("$ ")


@dataclass(frozen=True)
class Call:
    """A program as the shell calls it: the folder, its name and its arguments."""

    folder: Path
    program: str
    arguments: tuple[str, ...]


class Shell:
    """A shell in ``folder``, for one document; ``programs`` is a folder for those that it calls.

    ``cd`` and ``export`` hold for the lines after them.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs, self._before = folder, programs, ""
        for name in PROGRAMS:
            _write_program((folder if "/" in name else programs) / name, _recorder(name))
        for name, answer in _ANSWERS.items():
            _write_program(programs / name, f"#!/bin/sh\n{answer}\n")

    def calls(self, text: str, folder: Path | None = None) -> list[Call]:
        """Return the programs that ``text`` calls. Raises AssertionError if the shell refuses."""
        typed = self._programs / "typed"
        typed.unlink(missing_ok=True)
        variables = {"PATH": str(self._programs), "TYPED": str(typed), **_VARIABLES}
        shell = [shutil.which("bash") or "bash", "--norc", "-c", self._before + text]
        done = subprocess.run(
            shell,
            cwd=folder or self.folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.strip()
        if re.match(r"(cd|export) ", text):
            self._before += f"{text}\n"
        written = typed.read_text("utf-8").split("\0\n") if typed.exists() else []
        records = [line.split("\0") for line in written if line]
        return [Call(Path(record[0]), record[1], tuple(record[2:])) for record in records]


def _betons(path: Path) -> None:
    """Write a beton of three classes in folders."""
    pictures = path.with_name(f".{path.name}.pictures")
    source_files.class_folders(pictures, per_class=16)
    convert(str(pictures), path, size=16, resize="resize", workers=1)


def _parts(folder: Path) -> None:
    for part in ("train", "val", "test"):
        source_files.class_folders(folder / part, per_class=16)


def _arrays(path: Path) -> None:
    """Write ``X_train.npy``, and its labels beside it."""
    np.save(path, source_files.random_images(20, 16, 16))
    np.save(path.with_name("y_train.npy"), np.arange(20) % 5)


def _archive(path: Path) -> None:
    """Write a packed folder of classes."""
    pictures = path.with_name(f".{path.name}.pictures")
    source_files.class_folders(pictures)
    source_files.packed(pictures, path)


def _shards(path: Path) -> None:
    """Write a hundred shards, from shard-000.tar on, of a picture each."""
    source_files.webdataset(path.parent, shards=100, per_shard=1)
    for k in range(100):
        (path.parent / f"shard-{k:06d}.tar").rename(path.parent / f"shard-{k:03d}.tar")


def _of_torchvision(_: Path) -> None:
    """Write CIFAR-10 where torchvision would put it."""
    source_files.cifar10(cache_folder() / "torchvision")


def _within(folder: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a maker of what ``folder`` writes into a folder under its own name."""
    return lambda path: folder(path.parent)


def _result(path: Path) -> None:
    results.write(result(), path)


def _kinds(folder: Path) -> None:
    folder.mkdir()
    for kind in ("noise", "terrain", "photographs", "digits"):
        _betons(folder / f"{kind}-train.beton")


def _documented_grid(path: Path) -> None:
    """Write the sweep that docs/commands.md shows."""
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    (grid,) = (block for block in blocks(text) if block.language == "toml")
    path.write_text(grid.text, "utf-8")


_FEW = ("data.textures_test_count=64", "views.size=16")


def _exported(norm: str, path: Path) -> None:
    """Write an export of an untrained encoder; its name tells the format."""
    run = path.with_name(f".{path.name}.run")
    untrained.write_run(run, f"model.norm={norm}", "model.width=64", "data.train=textures", *_FEW)
    names = [name for name, kind in formats.FORMATS.items() if kind.file == path.name]
    api.export(run, path, format=names[0])


def _of_lightly(path: Path) -> None:
    """Write an encoder of the small runs' size as lightly's example has it."""
    config = config_io.load(preset="demo", sets=[*SETS, "data.train=textures"]).config
    children = nn.Sequential(*draw_networks(config.model, 1)[0].encoder.children())
    torch.save({f"backbone.{name}": t for name, t in children.state_dict().items()}, path)


def _embedded(path: Path) -> None:
    """Write the embeddings of an untrained encoder."""
    run = path.with_name(f".{path.name}.run")
    untrained.write_run(run, "data.train=textures", *_FEW)
    api.embed(run, path)


# What documents name, and what writes it: made where a command names it and nothing made it before.
FILES: Mapping[str, Callable[[Path], object]] = {
    **dict.fromkeys(("train.beton", "test.beton", "moved.beton", "fake.beton"), _betons),
    **dict.fromkeys(("DIR", "FOLDER"), _parts),
    "pictures.tar.gz": _archive,
    "shard-{000..099}.tar": _shards,
    "HUB_FOLDER": source_files.parquet,
    "SAVED_SET": source_files.saved_set,
    "torchvision:CIFAR10": _of_torchvision,
    "stl10_binary": _within(source_files.stl10),
    "stl10_matlab": _within(source_files.stl10_matlab),
    "cifar-10-batches-py": _within(source_files.cifar10),
    "MNIST_FOLDER": source_files.idx,
    "arrays.npz": source_files.npz,
    **dict.fromkeys(("y.npz", "y.parquet"), _embedded),
    "X_train.npy": _arrays,
    **dict.fromkeys(("lr.toml", "GRID.toml"), _documented_grid),
    **dict.fromkeys(("old.json", "new.json", "A", "B"), _result),
    "kinds": _kinds,
    "bench/fastbyol_bench": lambda path: path.symlink_to(ROOT / "bench" / "fastbyol_bench"),
    "study": Path.mkdir,
    "lightly.pth": _of_lightly,
    "runs/mine/exports/timm.pth": partial(_exported, "gn"),
    **{
        f"runs/mine/exports/{name}": partial(_exported, "bn")
        for name in ("torchvision.pth", "safetensors", "encoder.onnx", "encoder.pt2")
    },
    **dict.fromkeys(("caches.tar.gz", "env/bin/activate"), Path.touch),
}


def provide(text: str, folder: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Make the ``files`` below ``folder`` that ``text`` names, but for its --out."""
    for word in re.sub(r"--out[ =]\S+", "", text).replace("=", " ").split():
        for name, make in files.items():
            is_named = word.strip("\"'(),") == name or word.startswith(f"{name}/")
            if is_named and not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                make(folder / name)


def _recorder(name: str) -> str:
    return _RECORDER.format(name=shlex.quote(name))


def _write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
