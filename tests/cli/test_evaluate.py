"""``eval`` as typed: every protocol's line and JSON, other data sets, classes, refusals, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import untrained
from fastbyol.data.convert import convert

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ("eval",)
TINY = ("model.width=4", "views.size=16", "train.precision=fp32")
TEXTURES = ("data.textures_count=96", "data.textures_test_count=64", "data.textures_size=16")
FAST = ("--protocol", "finetune", "--epochs", 2, "--batch-size", 16, "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained run on betons of textures, and the betons."""
    folder = tmp_path_factory.mktemp("eval")
    for name, seed in (("train", 0), ("test", 1)):
        convert("textures", folder / f"{name}.beton", count=96, size=16, seed=seed, workers=1)
    data = (f"data.train={folder / 'train.beton'}", f"data.test={folder / 'test.beton'}")
    untrained.write_run(folder / "run", *TINY, *TEXTURES, *data)
    return folder


def contents(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def documented() -> set[str]:
    """The keys of the table in docs/evaluation.md."""
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8").partition("## JSON")[2]
    heads = (line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    return {key for head in heads for key in re.findall(r"`(\w+)`", head)}


@pytest.mark.parametrize("protocol", ["blog", "linear", "knn", "finetune"])
def test_json_has_the_documented_keys_and_the_run_stays_as_it_was(
    run, made: Path, protocol: str
) -> None:
    before = contents(made / "run")
    options = FAST[2:] if protocol == "finetune" else ("--device", "cpu")
    result = run.json(made / "run", "--protocol", protocol, *options, "--per-class")
    assert result.keys() == documented()
    assert result["accuracy_low"] < result["accuracy"] < result["accuracy_high"]
    assert result["accuracy"] <= result["top5_accuracy"] <= result["top5_accuracy_high"]
    assert result["num_test"] == (48 if protocol == "blog" else 96)
    assert sum(row["num_test"] for row in result["classes"]) == result["num_test"]
    right = sum(row["num_test"] * row["accuracy"] for row in result["classes"])
    assert right / result["num_test"] == pytest.approx(result["accuracy"])
    assert result["train_data"] == (None if protocol == "blog" else str(made / "train.beton"))
    assert contents(made / "run") == before
    assert "classes" not in run.json(made / "run", "--protocol", protocol, *options)


def test_a_line_has_intervals_and_lines_say_how_it_goes(run, made: Path) -> None:
    code, out, err = run(made / "run", *FAST, "--per-class")
    assert code == 0
    first, ranks, head, *rows = out.splitlines()
    assert ranks.startswith("RankMe ")
    share = r"\d+\.\d% \(\d+\.\d to \d+\.\d\)"
    counts = r"finetune, 96 fitted, 96 scored, \d+ classes"
    assert re.fullmatch(rf".*run: {share}, top-5 {share} \({counts}\)", first)
    assert re.split(r"  +", head) == ["class", "images", "accuracy", "mostly mistaken for"]
    assert rows
    assert all(re.search(rf"  \d+ +{share}(  .* \(\d+\))?$", row) for row in rows)
    assert re.fullmatch(
        r"(fine-tuning epoch [12]/2 loss [\d.]+, \d+ s left\n){2}", re.sub(r"compil.*\n", "", err)
    )


def test_the_same_seed_has_the_same_answer(run, made: Path) -> None:
    first, again, other = (
        run.json(made / "run", *FAST, "--per-class", "--seed", seed) for seed in (1, 1, 2)
    )
    for result in (first, again, other):
        del result["seconds"]
    assert first == again
    assert first["rank"] != other["rank"]


def test_a_share_of_the_labels(run, made: Path) -> None:
    whole = run.json(made / "run", "--protocol", "linear")
    tenth = run.json(made / "run", "--protocol", "linear", "--labels", 0.1)
    assert 8 <= tenth["num_train"] <= 16 < whole["num_train"] == 96
    assert tenth["num_classes"] == whole["num_classes"]
    assert tenth["num_test"] == whole["num_test"]


def test_other_data_sets_are_a_table(run, made: Path) -> None:
    """One of another size and another number of classes, in grey; each as if asked for alone."""
    sets = ("--data", "textures", "--data", "fashion-mnist")
    options = (made / "run", "--protocol", "knn", "--device", "cpu")
    results = run.json(*options, *sets)["results"]
    assert [result["test_data"] for result in results] == ["textures", "fashion-mnist"]
    assert [result["num_test"] for result in results] == [64, 10_000]
    assert [result["image_size"] for result in results] == [[16, 16], [32, 32]]
    alone = run.json(*options, "--data", "textures")
    assert {k: v for k, v in alone.items() if k != "seconds"} == {
        k: v for k, v in results[0].items() if k != "seconds"
    }
    head, *rows = run.output(*options, *sets, "--per-class").splitlines()
    assert re.split(r"  +", head)[:3] == ["data", "protocol", "fitted"]
    assert [row.split()[0] for row in rows[:2]] == ["textures", "fashion-mnist"]
    assert sum(row.startswith("Ankle boot") for row in rows) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--epochs", "3"], "--epochs: is of --protocol finetune, not blog"),
        (["--lr", "0.1", "--protocol", "knn"], "--lr: is of --protocol finetune"),
        (["--protocol", "finetune", "--lr", "-1"], "--lr -1: must be above 0"),
        (["--protocol", "finetune", "--epochs", "-1"], "--epochs -1"),
        (["--protocol", "finetune", "--batch-size", "1"], "--batch-size 1"),
        (["--labels", "0"], "--labels 0: must be above 0"),
        (["--protocol", "linear", "--labels", "1.5"], "--labels 1.5"),
        (["--seed", "-1"], "--seed -1"),
        (["--data", "textures", "--test-data", "x"], "leave out --test-data x"),
        (["--data", "train.beton"], "no test part that is labelled: name its parts"),
        (["--data", "absent"], "absent"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(
    run, made: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(made)
    assert says in run.refusal("run", *options)


def test_ctrl_c_ends_it_and_leaves_nothing(made: Path) -> None:
    """Without a word, as it ends other commands that have nothing to save."""
    before = contents(made / "run")
    command: list[Any] = [sys.executable, "-m", "fastbyol.cli.main", "eval", made / "run"]
    with subprocess.Popen(
        [*map(str, command), *map(str, FAST), "--epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "fine-tuning epoch" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        # Not ``communicate``, which would miss what the line's reader has read ahead.
        err, out = process.stderr.read(), process.stdout.read()
    lines = [line for line in err.splitlines() if not line.startswith("fine-tuning epoch")]
    assert (process.returncode, out, lines) == (130, "", [])
    assert contents(made / "run") == before


def test_notes_are_on_standard_error(run, made: Path) -> None:
    """JSON has them, too."""
    options = ("--protocol", "knn", "--device", "cpu")
    same = ("--train-data", made / "test.beton", "--test-data", made / "test.beton")
    code, out, err = run(made / "run", *options, *same, "--json")
    assert code == 0
    assert json.loads(out)["num_repeated"] == 96
    assert "96 of 96 scored images are among those fitted" in err
