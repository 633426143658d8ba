"""Every command line of the documents runs, in an empty folder with the files that it names.

Trainings are shortened by options behind those of the documents. What no test machine can run is
parsed by the command that it calls; ``PARSED`` says why.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import docs_rig
import pytest
import shellingham
import torch
import typer
from docs_rig import DOCUMENTS, FILES, ROOT, Call, Shell, blocks, lines, provide
from torch.distributed.run import get_args_parser
from torchvision import datasets
from typer.core import TyperCommand

import fastbyol
import source_files
from fastbyol.cli import fleet as cli_fleet
from fastbyol.data import source_idx
from fastbyol.fleet import launchers, worker
from fastbyol.fleet.node import Node, NodeEnd
from fastbyol.show import figures, live_server
from fastbyol_bench.gpu import calls as gpu_calls
from small import SETS

# Behind the options of a command that trains. The images are those that it names.
FEW = ("data.limit=16", "data.test_limit=32", "train.precision=fp32")
SMALL = [f"--set={text}" for text in (*SETS, *FEW) if "data.train=" not in text]
# Encoders of other libraries have one width, and few take 16 pixels.
OF_OTHER_LIBRARIES = [
    *(text for text in SMALL if not re.match(r"--set=(model\.(width|stem)|views\.size)=", text)),
    "--set=views.size=32",
]
# As many runs does a worker train.
RUNS = 1

# Command lines that are parsed, as a pattern of their words, and why they are not run.
PARSED = {
    r"--gpus|--nnodes|^torchrun|^srun": "several GPUs or machines",
    r"--launcher slurm": "SLURM; `make slurm-test` runs it",
    r"bench views step": "40 s; tests/bench/test_command.py types each suite with --quick",
    r"--init-from (torchvision|timm):": "network; tests/engine/test_pretrained.py has the files",
    r"fastbyol demo": "minutes; tests/test_demo.py has its parts",
    r"^python -m fastbyol_bench": "minutes, or it writes into the checkout; tests/bench has each",
    r"^bench/|^bash bench/": "a GPU, or minutes; tests/bench/gpu has the calls",
    r"^make ": "everything; `make -n` knows the target and its recipe",
    r"pip |^uv |^docker |^pixi |^python3 -m venv": "network; what they name is there",
}


class Parsed(Exception):  # noqa: N818 - no error
    """A command line was understood, and is not followed."""


@pytest.fixture(scope="module", autouse=True)
def _images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache and a home of their own, a Fashion-MNIST of 64 images as Debian has it, no network.

    CIFAR-10's checksums in torchvision's code are those of the true files.
    """

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FASTBYOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        debian = tmp_path_factory.mktemp("fashion")
        source_files.idx(debian, train=64, test=64)
        patched.setattr(source_idx, "DEBIAN", debian)
        patched.setenv("HOME", str(debian))
        patched.setattr(shellingham, "detect_shell", lambda *_: ("bash", "bash"))  # completion asks
        patched.setattr(urllib.request, "urlopen", no_network)
        for name in ("_check_integrity", "_load_meta"):
            patched.setattr(datasets.CIFAR10, name, lambda self: True)
        patched.setattr(datasets.CIFAR10, "classes", list(source_files.CIFAR10_NAMES), False)
        yield


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers are this process and train ``RUNS`` runs, and who watches looks once."""
    threads = torch.get_num_threads()
    claim = worker.Worker._claim_next

    def claim_some(self: worker.Worker) -> Any:
        self.num_claims = getattr(self, "num_claims", 0) + 1
        return claim(self) if self.num_claims <= RUNS else []

    class OneProcess(Node):
        def run(self, tick: Callable[[], None] = lambda: None) -> NodeEnd:
            worker.work(self._options, self._tell)
            tick()
            return NodeEnd()

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.Worker, "_claim_next", claim_some)
    monkeypatch.setattr(launchers, "Node", OneProcess)
    monkeypatch.setattr(cli_fleet, "time", types.SimpleNamespace(sleep=leave))
    monkeypatch.setattr(live_server.Server, "serve_forever", leave)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_says_to_type_works(
    path: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = mistakes(path.read_text("utf-8"), Document(run, tmp_path, monkeypatch))
    assert not wrong, "\n".join((str(path.relative_to(ROOT)), *wrong))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```\nfastbyol train --nrom gn\n```", "line 2.*--norm"),
        ("```\nfastbyol runs\nfastbyol train --gpus 8 --nrom gn\n```", "line 3.*--norm"),
        ("```\nfastbyol eval absent\n```", "line 2.*absent"),
        ("Type `fastbyol trian`.", "line 1.*train"),
        (
            "`make tset` or\n`python -m fastbyol_bench.lowered --fast`",
            "line 1.*tset.*line 2.*--fast",
        ),
        ("```\ntorchrun --nproc-per-node 2 -m fastbyol.cli.main train --nrom gn\n```", "--norm"),
        ("```\ncmake .\n```", "line 2.*cmake"),
        ("```\n.venv/bin/pip install '.[reprot]'\n```", "line 2.*reprot"),
        ("```python\nimport fastbyol\nfastbyol.tarin()\n```", "line 2.*tarin"),
        ("```perl\nprint\n```", "line 2.*perl"),
    ],
    ids=lambda value: value.strip("`\n").split("\n")[-1],
)
def test_what_is_wrong_is_named_with_its_line(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    found = " ".join(mistakes(text, Document(run, tmp_path, monkeypatch)))
    assert re.search(says, found, re.DOTALL), found


def test_what_is_typed_of_a_document() -> None:
    """Prompts with what they print, continued lines, comments, scripts, and code in sentences."""
    text = """Type `fastbyol runs`, and not `train` or `fastbyol`; `make
demo` takes longer.
```
# first
fastbyol train --set a=1 \\
  --set b=2  # a run
```
```
$ fastbyol runs
runs/one
```
```
#!/bin/sh
fastbyol runs
```
"""
    typed = [(block.language, *typed) for block in blocks(text) for typed in lines(block)]
    assert typed == [
        ("inline", 1, "fastbyol runs"),
        ("inline", 1, "make demo"),
        ("", 5, "fastbyol train --set a=1   --set b=2  # a run"),
        ("", 9, "fastbyol runs"),
        ("", 13, "#!/bin/sh\nfastbyol runs\n"),
    ]


def test_every_exception_is_for_something() -> None:
    typed = [
        text
        for path in DOCUMENTS
        for block in blocks(path.read_text("utf-8"))
        for _, text in lines(block)
    ]
    assert not [
        pattern for pattern in PARSED if not any(re.search(pattern, text) for text in typed)
    ]


def mistakes(text: str, document: Document) -> list[str]:
    """Follow the document's text; return what does not work, with its line."""
    wrong = []
    for block in blocks(text):
        for line, typed in document.parts(block):
            try:
                document.follow(block.language, typed)
            except (Exception, SystemExit) as error:
                wrong.append(f"line {line}: {typed.strip()}: {error}")
    return wrong


class Document:
    """A document that somebody follows: typed commands in one folder, Python in another."""

    def __init__(self, run: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.run, self.folder, self.patch = run, folder, patch
        for name in ("shell", "python"):
            (folder / name).mkdir()
        self.shell = Shell(folder / "shell", folder / "programs")
        self.names: dict[str, Any] = {}
        train = ("train", "--data=train.beton", "--test-data=test.beton", "--preset=demo")
        made = {
            **dict.fromkeys(("runs/mine", "RUN"), (*train, *SMALL, "--epochs=2")),
            "runs36": ("ablate", "run", "C6", *SMALL),
        }
        self.runs = {name: partial(self._make_run, words) for name, words in made.items()}

    def _make_run(self, words: tuple[str, ...], path: Path) -> None:
        provide("train.beton test.beton", self.shell.folder, FILES)
        self._fastbyol([*words, f"--out={path}"], is_run=True)

    def parts(self, block: docs_rig.Block) -> list[tuple[int, str]]:
        """What is done at a time of a block, with its line."""
        if block.language in ("python", "toml", "text"):
            return [(block.line, block.text)]
        return list(lines(block))

    def follow(self, language: str, text: str) -> None:
        """Do what the document says. Raises AssertionError, or whatever does not work."""
        if language == "python":
            self._execute(text)
        elif language == "toml":
            tomllib.loads(text)
        elif language in ("", "inline"):
            self._type(text, only_named=language == "inline")
        else:
            assert language == "text", f"a block of {language}, which nobody follows"

    def _execute(self, text: str) -> None:
        folder = self.folder / "python"
        self.patch.chdir(folder)
        provide(text, folder, FILES)
        with pytest.MonkeyPatch.context() as patched:
            load = fastbyol.load_config
            small = [*(text.removeprefix("--set=") for text in SMALL), "train.epochs=2"]
            patched.setattr(
                fastbyol,
                "load_config",
                lambda preset="blog", sets=(), **how: load(preset, [*small, *sets], **how),
            )
            exec(compile(text, "document", "exec"), self.names)

    def _type(self, text: str, *, only_named: bool) -> None:
        text = text.replace("RUN@STEP", "runs/mine@5000").replace("KEY=VALUE", "optim.lr=0.5")
        self.patch.chdir(self.shell.folder)
        wanted = re.sub(r"@\d+", "", text)
        provide(wanted, self.shell.folder, FILES)
        if not is_parsed(text):
            provide(wanted, self.shell.folder, self.runs)
        calls = self.shell.calls(text)
        if text.startswith("#!"):  # in an empty folder, too, where it may do otherwise
            (self.folder / "empty").mkdir(exist_ok=True)
            calls += self.shell.calls(text, self.folder / "empty")
        assert calls or re.match(r"(cd|export) ", text), "no program is called"
        for call in calls:
            self.patch.chdir(call.folder)
            self._call(call, only_named=only_named)

    def _call(self, call: Call, *, only_named: bool) -> None:
        program, words = call.program.rpartition("/")[2], list(call.arguments)
        is_run = not is_parsed(" ".join((call.program, *words)))
        if program == "fastbyol":
            if only_named and all(word.isalpha() and word.islower() for word in words):
                words.append("--help")  # the name of a command, and no line to type
            self._fastbyol(words, is_run=is_run)
        elif program in ("torchrun", "srun"):
            self._fastbyol(started(program, words), is_run=False)
        elif program == "make":
            demand_target(words)
        elif program in ("pip", "uv"):
            demand_requirements(words)
        elif program in ("docker", "pixi"):
            demand_recipe(program, words)
        elif program in ("bash", "gpu.sh", "gpu_ranks.sh", "carry.sh"):
            demand_script(program, words)
        elif words[:2] == ["-m", "venv"]:
            assert len(words) == 3
        else:
            assert words[0] == "-m", f"{program} runs no module"
            if words[1] in ("fastbyol", "fastbyol.cli.main"):
                self._fastbyol(words[2:], is_run=is_run)
            else:
                parse_module(words[1], words[2:])

    def _fastbyol(self, words: list[str], *, is_run: bool) -> None:
        words = [with_kept_step(word) for word in words]
        try:
            with pytest.MonkeyPatch.context() as patched:
                if not is_run:
                    patched.setattr(TyperCommand, "invoke", _stop, raising=False)
                if words[0] in ("train", "resume", "fork"):  # `report` draws, which takes a second
                    patched.setattr(figures, "available", lambda: False)
                code, _, err = self.run(*words, *(shorter(words) if is_run else []))
        except Parsed:
            return
        assert code == 0, err.strip()
        assert is_run or "--help" in words


def is_parsed(text: str) -> bool:
    """Whether a command line is parsed alone."""
    return any(re.search(pattern, text) for pattern in PARSED)


def _stop(*_: object) -> None:
    raise Parsed


def shorter(words: list[str]) -> list[str]:
    """The options that make a command of ``fastbyol`` small, behind its own."""
    match words:
        case [*_, "--help"]:
            return []
        case ["convert", "textures", *_]:
            return ["--count=40", "--overwrite", "--workers=1"]
        case ["convert", *_]:
            return ["--overwrite", "--workers=1"]
        case ["train", *_]:
            ranks = ["--processes=1"] if "--ranks" in words else []
            small = OF_OTHER_LIBRARIES if any(":" in word for word in words) else SMALL
            return [*small, "--epochs=2", *ranks]
        case ["ablate", "run", *_]:
            return [*SMALL, "--set=train.epochs=1", "--jobs=1"]
        case ["sweep", target, *_] | ["ablate", "phase", target, *_] if not Path(target).is_dir():
            return [*SMALL, "--set=train.epochs=1", "--jobs=1"]
        case ["bench", *_] if "--compare" not in words:
            return ["--quick", "--device=cpu"]
    return []


def with_kept_step(word: str) -> str:
    """``RUN@STEP`` with the first step that the run kept."""
    run, _, step = word.rpartition("@")
    if not run or not step.isdecimal():
        return word
    kept = sorted(Path(run, "checkpoints").glob("*.safetensors"))
    assert kept, f"{run}: no run was made here"
    return f"{run}@{int(kept[0].stem.rpartition('-')[2])}"


def started(program: str, words: list[str]) -> list[str]:
    """The words of ``fastbyol`` that torchrun or srun starts."""
    if program == "torchrun":
        asked = get_args_parser().parse_args(words)
        name = "fastbyol.cli.main" if asked.module else "fastbyol"
        assert asked.training_script.rpartition("/")[2] == name
        return list(asked.training_script_args)
    return words[words.index("fastbyol") + 1 :]


def demand_target(words: list[str]) -> None:
    """Raise AssertionError unless the Makefile makes it."""
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    done = subprocess.run(
        ["make", "--dry-run", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def demand_requirements(words: list[str]) -> None:
    """Raise AssertionError for an extra or a file that is not there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    for word in words:
        if match := re.fullmatch(r"(?:fastbyol|\.|\S+\.whl)\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= set(extras), word
        elif re.fullmatch(r"[\w./-]+\.(txt|toml|lock)", word):
            assert (ROOT / word).is_file(), word


def demand_recipe(program: str, words: list[str]) -> None:
    """Raise AssertionError unless an image is built from the Dockerfile, or pixi has the task."""
    if program == "docker":
        assert words[0] == "build"
        assert words[-1] == "."
        assert (ROOT / "Dockerfile").is_file()
    else:
        tasks = tomllib.loads((ROOT / "pixi.toml").read_text("utf-8"))["tasks"]
        assert words[0] == "run"
        assert words[1] in tasks, f"pixi.toml has no task {words[1]}"


def demand_script(program: str, words: list[str]) -> None:
    """Raise AssertionError for a script that a shell cannot read, or what a GPU's call refuses."""
    name = words[0] if program == "bash" else f"bench/{program}"
    shell = shutil.which("bash") or "bash"
    subprocess.run([shell, "-n", str(ROOT / name)], check=True)
    if program == "gpu.sh":
        try:
            gpu_calls.parsed(words)
        except SystemExit:
            raise AssertionError(f"{name} does not take {words}") from None


def parse_module(name: str, words: list[str]) -> None:
    """Parse the command line of a module, which shall not run. Raises AssertionError if it cannot.

    One without a parser takes no words.
    """
    module = vars(importlib.import_module(name))
    if not {"argparse", "typer"} & module.keys():
        assert not words, f"{name} takes none of {words}"
        assert callable(module["main"])
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, arguments: Any = None) -> None:
        parse(self, arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [name, *words])
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patched.setattr(TyperCommand, "invoke", _stop, raising=False)
        try:
            if "app" in module:
                module["app"]()
            elif "typer" in module:
                typer.run(module["main"])
            else:
                module["main"](*([words] if signature(module["main"]).parameters else []))
        except Parsed:
            return
        except SystemExit:
            pass
    raise AssertionError(f"{name} does not take {words}")
