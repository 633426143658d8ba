"""The command line as typed: what it prints, writes and returns, and one line for everything that
is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastbyol
import no_graph
from fastbyol.cli import doctor, main
from fastbyol.errors import NoGraphError

HEADS = [
    f"--set=model.{head}.{size}"
    for head in ("projector", "predictor")
    for size in ("hidden=16", "out=8")
]
TINY = [
    "--width=4",
    "--stem=small",
    "--res=16",
    "--batch-size=8",
    "--device=cpu",
    "--set=data.workers=1",
    *HEADS,
]


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastbyol.data.convert import convert

    path = tmp_path_factory.mktemp("cli") / "textures.beton"
    convert("textures", path, count=32, size=16, seed=3)
    return path


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    from fastbyol.data.convert import convert

    folder = tmp_path_factory.mktemp("cli")
    np.savez(
        folder / "images.npz",
        images=np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8),
    )
    convert(str(folder / "images.npz"), folder / "unlabelled.beton")
    return folder / "unlabelled.beton"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--nrom", "gn"], "--norm"),
        (["trian"], "train"),
        (["train", "--norm", "gm"], "model.norm"),
        (["train", "--epochs", "many"], "epochs"),
        (["train", "--epochs", "0"], "train.epochs"),
        (["train", "--lr", "-1"], "optim.lr"),
        (["train", "--width", "0"], "model.width"),
        (["train", "--batch-size", "1"], "train.batch_size"),
        (["train", "--set", "optim.momentun=0.9"], "optim.momentum"),
        (["train", "--set", "momentum"], "key=value"),
        (["train", "--preset", "blgo"], "blog"),
        (["train", "--config", "absent.toml"], "absent.toml"),
        (["train", "--data", "absent.beton"], "absent.beton"),
        (["train", "--device", "cuda:99"], "cuda:99"),
        (["train", "--lr-mult", "encoder"], "PATTERN=FACTOR"),
        (["resume", "absent"], "absent"),
        (["runs"], "train makes runs/NAME"),
        (["eval", "absent"], "absent"),
        (["eval", "absent", "--protocol", "logistic"], "protocol"),
        (["report", "absent"], "absent"),
        (["convert", "absent", "out.beton"], "absent"),
        (["convert", "textures", "no/such/folder/out.beton"], "no/such/folder"),
        (["convert", "textures", "out.beton", "--size", "4"], "size"),
        (["presets", "show", "blgo"], "blog"),
        (["explain"], "explain lars"),
        (["explain", "lras"], "lars"),
        (["explain", "lars", "--compare", "blgo"], "blog"),
        (["explain", "lars", "--run", "absent"], "absent"),
        (["explain", "lars", "--lr", "-1"], "--lr"),
        (["explain", "--diff", "blgo", "paper"], "blog"),
        (["presets", "copy", "blog", "no/such/folder/x.toml"], "no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(run, arguments: list[str], says: str) -> None:
    assert says in run.refusal(*arguments)


@pytest.mark.parametrize("group", [[], ["presets"], ["data"], ["ablate"]], ids=" ".join)
def test_a_group_without_a_command_says_which_it_has(run, group: list[str]) -> None:
    code, out, err = run(*group)
    assert code == 2
    assert out == ""
    assert err.startswith(f"Usage: {' '.join(['fastbyol', *group])} [OPTIONS] COMMAND")
    assert "\n\nCommands:\n" in err


def test_an_unknown_key_in_a_file_is_named_with_its_place_and_the_nearest_right_one(
    run, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text('[model]\nnorm = "gn"\n[optim]\nweigth_decay = 0.1\n')
    err = run.refusal("train", "--config", "mine.toml")
    assert "mine.toml:4" in err
    assert "optim.weight_decay" in err


def test_betons_that_do_not_do_are_refused(
    run, tmp_path: Path, beton: Path, unlabelled: Path
) -> None:
    """A truncated one, and one without labels to test on."""
    (tmp_path / "cut.beton").write_bytes(beton.read_bytes()[:-25])
    for files, says in (
        (["cut.beton"], "cut.beton"),
        ([beton, "--test-data", unlabelled], "label"),
    ):
        assert says in run.refusal("train", "--data", *files, "--epochs", 1, "--out", "run", *TINY)


def test_an_output_that_exists_is_refused(run, tmp_path: Path, beton: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    run.refusal("train", "--data", beton, "--out", "run", *TINY)
    assert (tmp_path / "run" / "mine.txt").read_text() == "precious"


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc/version").exists(),
    reason="needs a place that nobody may write to",
)
def test_an_unwritable_output_is_refused(run, beton: Path) -> None:
    assert "/proc" in run.refusal("train", "--data", beton, "--out", "/proc/run", *TINY)


def test_convert_train_eval_resume_report_runs(run, tmp_path: Path) -> None:
    """The whole path by its command lines, as JSON."""
    for split, count, seed in (("train", 40, 1), ("test", 60, 2)):
        textures = ("--count", count, "--size", 16, "--seed", seed)
        made = run.json("convert", "textures", f"{split}.beton", *textures)
        assert made["images"] == count
    files = ["--data", "train.beton", "--test-data", "test.beton"]
    options = ["--norm=gn", "--opt=lars", "--lr=0.2", "--mlp-norm=none", "--epochs=2"]
    summary = run.json("train", *files, *options, "--out=runs/mine", *TINY)
    assert (summary["finished"], summary["step"]) == (True, 10)
    folder = tmp_path / "runs" / "mine"
    made = {"config.toml", "env.json", "metrics.jsonl", "layers.npy", "checkpoints", "report.html"}
    assert {path.name for path in folder.iterdir()} >= made
    files[0] = "--train-data"
    for protocol in ("blog", "linear", "knn"):
        code, out, err = run("eval", "runs/mine", "--protocol", protocol, *files, "--json")
        assert code == 0, err
        assert ("--train-data: not looked at" in err) == (protocol == "blog")
        assert 0 <= json.loads(out)["accuracy"] <= 100
    assert run.json("resume", "runs/mine")["step"] == 10
    assert len(run.json("report", "runs/mine", "--png", "pictures")["written"]) == 5
    run.refusal("report", "runs/mine", "--png", "runs/mine/config.toml", code=1)
    (row,) = run.json("runs")
    assert (row["name"], row["epochs_done"]) == ("mine", 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "pipe"],
        ["train", "--init-from", "pipe"],
        ["train", "--data", "pipe"],
        ["train", "--test-data", "pipe"],
        ["train", "--opt", "lars", "--replay-rates", "folder"],
        ["train", "--opt", "lars", "--replay-rates", "pipe"],
        ["resume", "pipe"],
        ["eval", "pipe"],
        ["data", "info", "pipe"],
        ["data", "verify", "pipe"],
        ["data", "preview", "pipe"],
        ["data", "marker", "pipe"],
        ["explain", "--diff", "pipe", "paper"],
        ["bench", "--compare", "pipe", "pipe"],
    ],
    ids=" ".join,
)
def test_a_pipe_is_waited_for_by_nobody(
    run, tmp_path: Path, beton: Path, arguments: list[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "layers.npy")
    if arguments[0] == "train":
        arguments = ["train", "--preset", "demo", *TINY, "--data", str(beton), *arguments[1:]]
    run.refusal(*arguments)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_run_goes_on_with_its_own_data_alone(run, tmp_path: Path, beton: Path) -> None:
    """Replaced data are refused by file and change; moved data are named once, from whatever
    folder.
    """
    import shutil

    shutil.copy(beton, tmp_path / "d.beton")
    run.output("train", "--data", "d.beton", "--epochs", 1, "--out", "r", *TINY)
    run.output("convert", "textures", "d.beton", "--count", 24, "--size", 16, "--overwrite")
    err = run.refusal("resume", "r")
    assert (
        f"{tmp_path / 'd.beton'}: is not the training data that the run was made with: 32 samples "
        "then, 24 now" in err
    )
    assert "fastbyol resume r --data FILE" in err
    shutil.copy(beton, tmp_path / "there.beton")
    (tmp_path / "r").rename(tmp_path / "s")
    run.refusal("resume", "s", "--data", "d.beton")
    run.output("resume", "s", "--data", "there.beton")
    run.output("resume", "s")
    files = ("--test-data", "there.beton", "--train-data", beton)
    code, out, err = run("eval", "s", *files, "--protocol", "knn", "--json")
    assert code == 0
    assert json.loads(out)["num_repeated"] == 32
    assert "32 of 32 scored images are among those fitted" in err
    code, out, err = run("explain", "--diff", "s", "s")
    assert (code, err) == (0, "")


def test_the_controls_train_and_say_what_they_lack(run, beton: Path, tmp_path: Path) -> None:
    from fastbyol.config_io import read_run

    controls = ["--epochs", "1", "--opt", "lars", "--method", "simsiam", "--predictor-layers", "0"]
    options = ["--data", beton, *controls, *TINY]
    run.output("train", *options, "--out", "run")
    config = read_run(tmp_path / "run" / "config.toml")
    assert (config.method.name, config.model.predictor.layers) == ("simsiam", 0)
    err = run.refusal("train", *options, "--lars-on", "predictor", "--out", "other")
    assert "optim.lars_on: 'predictor' matches no parameter; nearest: projector" in err


def test_the_preset_that_nobody_named_fits_the_device(run, tmp_path: Path) -> None:
    """A batch of 256 is blog's; demo's fits 200 images, and the line says that the textures set was
    taken.
    """
    small = ["--set=data.textures_count=200", "--set=data.textures_test_count=64"]
    out = run.output("train", *TINY, *small, "--epochs=1", "--batch-size=64", "--out=run")
    assert "preset demo, no --data given, so the embedded textures set: 200 images of 16 px" in out
    assert 'preset = "demo"' in (tmp_path / "run" / "config.toml").read_text()


def test_presets_list_show_copy(run, tmp_path: Path) -> None:
    assert set(run.json("presets", "list")) == {"blog", "demo", "paper"}
    assert run.json("presets", "show", "paper")["optim"]["weight_decay"] == 1.5e-6
    run.output("presets", "copy", "paper", "mine.toml")
    assert "arXiv" in (tmp_path / "mine.toml").read_text()
    run.refusal("presets", "copy", "paper", "mine.toml")  # never over a file that is there


def test_the_version(run) -> None:
    assert run.output("--version") == f"fastbyol {fastbyol.__version__}\n"
    command = [sys.executable, "-m", "fastbyol", "--version"]
    assert subprocess.check_output(command, text=True) == run.output("--version")


def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    """As bash asks, by the script that ``--show-completion`` prints."""
    (tmp_path / "fastbyol").write_text(f'#!/bin/sh\nexec {sys.executable} -m fastbyol "$@"\n')
    (tmp_path / "fastbyol").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def completed(*words: str) -> list[str]:
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        ask = '_fastbyol_completion fastbyol; echo "${COMPREPLY[@]}"'
        script = f'eval "$(fastbyol --show-completion)"; {line}; {ask}'
        done = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("fastbyol", "tr") == ["train"]
    assert completed("fastbyol", "train", "--batch-") == ["--batch-size"]


def test_doctor_names_what_is_there(run) -> None:
    checks = {check["name"]: check for check in run.json("doctor")}
    lines = run.output("doctor").splitlines()
    assert all(any(f" {name}  " in line for line in lines) for name in checks), (
        "a column is as wide as its widest name"
    )
    assert checks["torch"]["ok"]
    assert checks["ffcv"]["ok"] or "not installed, torchvision decodes" in checks["ffcv"]["found"]
    assert checks["engine auto"]["found"].split(":")[0] in ("eager", "graph")
    assert checks["precision auto"]["found"].split(":")[0] in ("fp32", "bf16")


def test_a_missing_ffcv_is_a_choice_to_doctor(run, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ffcv" else find(name)
    )
    (line,) = (line for line in run.output("doctor").splitlines() if " ffcv " in line)
    assert line.startswith("none ")
    assert (
        f"not installed, torchvision decodes; `{sys.executable} -m fastbyol.build_ffcv` builds it"
        in line
    )


def test_doctor_misses_a_compiler_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    here, there = doctor._compiler(gpu=False), doctor._compiler(gpu=True)
    assert (here.needed, here.remedy) == (False, "")
    assert (there.ok, there.needed, there.remedy) == (False, True, "apt-get install gcc")


def test_doctor_says_whether_the_precision_gates_answer_is_kept(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from fastbyol.engine import precision

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(precision, "gradient_gap", lambda *_: precision.Gap(0.0, 0.0))

    def precision_line() -> str:
        checks = {check["name"]: check["found"] for check in run.json("doctor")}
        return checks["precision auto"]

    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    assert precision_line().endswith("; kept for the next run")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "a file"))
    assert precision_line().endswith("; not kept, the cache folder cannot be written")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "kept" not in precision_line()


def test_threads_that_wait_do_not_spin(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs on one machine would take the cores from each other."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    run.output("presets", "list")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_an_engine_that_is_not_here_is_refused_before_anything_is_made(run, tmp_path: Path) -> None:
    err = run.refusal("train", "--engine", "graph", "--device", "cpu", "--out", tmp_path / "run")
    assert "engine.mode: graph needs a CUDA device" in err
    assert not (tmp_path / "run").exists()


def test_data_commands(run, beton: Path, tmp_path: Path) -> None:
    info = run.json("data", "info", beton)
    assert (info["num_samples"], info["sealed"], sum(info["labels"].values())) == (32, True, 32)
    assert "textures" in run.output("data", "info", beton)
    whole = f"{beton}: 32 samples, structure and checksums, every image decoded: whole\n"
    assert run.output("data", "verify", beton, "--deep") == whole
    made = run.json("data", "preview", beton, "--set", "views.size=16", "--count", 5)
    assert made == {"written": "preview.png", "samples": [0, 8, 16, 23, 31]}
    damaged = tmp_path / "damaged.beton"
    data = bytearray(beton.read_bytes())
    data[(1 << 21) + 10 * 768] ^= 1
    damaged.write_bytes(data)
    code, out, err = run("data", "verify", damaged, "--json")
    verdict = json.loads(out)
    assert (code, verdict["whole"], len(verdict["damaged"])) == (2, False, 1)
    assert err.count("\n") == 1
    assert "1 of 32 samples are damaged" in err


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FFCV's own files of the same 24 pictures and labels under several names."""
    import numpy as np

    import ffcv_files
    import source_files

    folder = tmp_path_factory.mktemp("foreign")
    pictures, masks = source_files.random_images(24, 16, 16, 0), np.zeros((24, 16, 16, 3), np.uint8)
    plain = [(picture, k % 2) for k, picture in enumerate(pictures)]
    several = [(k, masks[k], float(k), picture, k % 2) for k, (picture, _) in enumerate(plain)]
    files = {
        "plain": ({"image": "raw", "label": "int"}, plain),
        "one": ({"img": "raw", "y": "int"}, plain),
        "several": (
            {"id": "int", "mask": "raw", "label": "float", "img": "raw", "kind": "int"},
            several,
        ),
        "alone": ({"img": "raw"}, [(picture,) for picture in pictures]),
    }
    paths = {name: folder / f"{name}.beton" for name in files}
    ffcv_files.write_all({paths[name]: made for name, made in files.items()})
    return paths


def test_foreign_fields_are_chosen_by_name(run, foreign: dict[str, Path]) -> None:
    """The runs and their accuracies are those of the plain file."""
    fields = ("--image-field", "img", "--label-field", "kind")
    cases = {
        "plain": ("plain", "plain", ()),
        "one": ("one", "one", ()),
        "several": ("several", "several", fields),
        "unlabelled": ("alone", "several", fields),
    }
    summaries, scores, knn = {}, {}, ("--protocol", "knn", "--device", "cpu")
    for name, (data, test, options) in cases.items():
        files = ("--data", foreign[data], "--test-data", foreign[test], *options)
        summaries[name] = run.json("train", *files, "--epochs", 1, *TINY, "--out", name)
        del summaries[name]["run"]
        scores[name] = run.json("eval", name, *knn)["accuracy"]
    assert summaries["one"] == summaries["several"] == summaries["unlabelled"] == summaries["plain"]
    # The unlabelled file leaves knn the halves of the other.
    assert scores["one"] == scores["several"] == scores["plain"]
    files = ("--train-data", foreign["several"], "--test-data", foreign["several"])
    assert run.json("eval", "plain", *knn, *files, *fields)["accuracy"] == scores["plain"]


def test_data_commands_take_the_fields(run, foreign: dict[str, Path], tmp_path: Path) -> None:
    file, fields = foreign["several"], ("--image-field", "img", "--label-field", "kind")
    info = run.json("data", "info", file, *fields)
    assert (info["image_field"], info["label_field"]) == ("img", "kind")
    assert info["labels"] == {"0": 12, "1": 12}
    run.output("data", "verify", file, "--deep", *fields)

    def preview(name: str, out: str, *options: str) -> bytes:
        written = ("--out", out, "--set", "views.size=16")
        run.output("data", "preview", foreign[name], *options, *written)
        return (tmp_path / out).read_bytes()

    plain = preview("plain", "plain.png")
    assert preview("several", "several.png", *fields) == preview("one", "one.png") == plain
    assert preview("several", "mask.png", "--image-field", "mask") != plain


LISTED = "id (int), mask (image), label (float), img (image), kind (int)"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ((), ("2 image fields", "--image-field")),
        (("--image-field", "picture"), ("no RGB image field 'picture'",)),
        (("--image-field", "kind"), ("no RGB image field 'kind'",)),
        (("--image-field", "img", "--label-field", "label"), ("no int field 'label'",)),
        (("--image-field", "img", "--label-field", "y"), ("no int field 'y'",)),
    ],
)
def test_fields_that_are_not_there_are_refused_in_a_line(
    run, foreign: dict[str, Path], tmp_path: Path, fields: tuple[str, ...], says: tuple[str, ...]
) -> None:
    file = foreign["several"]
    commands = [("data", what, file, *fields) for what in ("info", "verify", "preview")]
    for command in (
        *commands,
        ("train", "--data", file, "--test-data", file, *TINY, *fields, "--out", "run"),
    ):
        err = run.refusal(*command)
        assert err.startswith(f"fastbyol: error: {file}: ")
        assert all(word in err for word in (*says, LISTED)), err
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("**/*.safetensors"))


def test_several_int_fields_are_refused_only_where_labels_are_needed(
    run, foreign: dict[str, Path]
) -> None:
    file, image, knn = foreign["several"], ("--image-field", "img"), ("--protocol", "knn")
    assert run.json("data", "info", file, *image)["labels"] is None
    run.output("train", "--data", file, *TINY, "--epochs", 1, *image, "--out", "run")
    for command in (
        ("train", "--data", file, "--test-data", file, *TINY, *image, "--out", "other"),
        ("eval", "run", "--test-data", file, "--device=cpu"),
        ("eval", "run", "--test-data", foreign["one"], "--train-data", file, *knn, "--device=cpu"),
    ):
        err = run.refusal(*command)
        assert "does not say which int field" in err
        assert LISTED in err
        assert "--label-field" in err


def test_explain_compares_dialects_and_configurations(run) -> None:
    told = run.json("explain", "lars", "--compare", "blog,bolts")
    assert list(told["dialects"]) == ["blog", "bolts"]
    differences = run.json("explain", "--diff", "blog", "paper")["differences"]
    (row,) = (row for row in differences if row["key"] == "optim.dialect")
    assert (row["a"], row["b"]) == ("blog", "deepmind")
    lines = run.output("explain", "--diff", "blog", "paper").splitlines()
    (cells,) = (line.split() for line in lines if line.startswith("optim.dialect"))
    assert " ".join(cells) == 'optim.dialect "blog" "deepmind" preset blog preset paper'
    assert run.output("explain", "--diff", "blog", "blog") == "blog and blog: no key differs\n"


def started(
    folder: Path, *arguments: object
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """What the command line did as a program on a GPU without graphs, and [process number,
    *arguments] of its every start.
    """
    starts = folder / "starts"
    done = subprocess.run(
        [sys.executable, no_graph.__file__, *map(str, arguments)],
        cwd=folder, env={**os.environ, "NO_GRAPH_STARTS": str(starts)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    return done, [line.split() for line in starts.read_text().splitlines()]


def test_a_run_whose_graph_cannot_be_recorded_ends_compiled_in_a_process_of_the_same_number(
    beton: Path, tmp_path: Path
) -> None:
    """One line says so, the exit code is 0, and the run's bytes are those of one that was compiled
    from the first step.
    """
    from safetensors.numpy import load_file

    options = ["--data", beton, "--epochs", 2, *TINY, "--json"]
    done, starts = started(tmp_path, "train", *options, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"]
    (message,) = (line for line in done.stderr.splitlines() if "no CUDA graph" in line)
    why = f"run: no CUDA graph ({no_graph.WHY})"
    assert (
        message
        == f"{why}: its steps are compiled from now on, in a fresh process: fastbyol resume run"
    )
    number = starts[0][0]
    assert [start[0] for start in starts] == [number, number]
    assert starts[1][1:] == ["resume", "run", "--json"]
    done, starts = started(tmp_path, "train", *options, "--out", "compiled", "--engine", "compile")
    assert (done.returncode, len(starts)) == (0, 3)
    for name in ("metrics.jsonl", "layers.npy"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()
    one, other = (
        max((tmp_path / name / "checkpoints").glob("*.safetensors")) for name in ("run", "compiled")
    )
    one_tensors, other_tensors = load_file(one), load_file(other)
    assert one.name == other.name
    assert [(name, value.tobytes()) for name, value in one_tensors.items()] == [
        (name, value.tobytes()) for name, value in other_tensors.items()
    ]


class BecameAnotherError(Exception):
    """os.execv does not return."""


@pytest.mark.parametrize(
    ("way_in", "typed", "becomes"),
    [
        (
            ["-W", "error", "-m", "fastbyol.cli.main"],
            ["train", "--json"],
            ["resume", "runs/a b", "--json"],
        ),
        (["/venv/bin/fastbyol"], ["resume", "runs/a b"], ["resume", "runs/a b"]),
        (
            ["-P", "/venv/bin/fastbyol"],
            ["demo", "here", "--seed", "3"],
            ["demo", "here", "--seed", "3"],
        ),
    ],
    ids=str,
)
def test_a_fresh_process_is_started_as_this_one_was(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way_in: list[str],
    typed: list[str],
    becomes: list[str],
) -> None:
    from fastbyol import api, demo

    def refuse(*_: object, **__: object) -> None:
        raise NoGraphError("runs/a b: no CUDA graph", Path("runs/a b"))

    def become(program: str, arguments: list[str]) -> None:
        assert (program, arguments) == (sys.executable, [sys.executable, *way_in, *becomes])
        raise BecameAnotherError

    monkeypatch.chdir(tmp_path)
    for module, name in ((api, "train"), (api, "resume"), (demo, "run")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(sys, "argv", ["fastbyol", *typed])
    monkeypatch.setattr(sys, "orig_argv", ["python", *way_in, *typed])
    with pytest.raises(BecameAnotherError):
        main.main()
