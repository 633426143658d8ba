"""``fastbyol runs`` as typed."""

from __future__ import annotations

import csv
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Command
from made_runs import make_run

from fastbyol.show import figures

COMMAND = ["runs"]
MARKUP = "<img src=x onerror=alert(1)>&\u202e"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    epochs = ({"accuracy": 40.0}, {"accuracy": 30.0, "rank_y": 4.0})
    make_run(root / "a", "optim.name=lars", "train.epochs=2", epochs=epochs)
    make_run(root / "b", "optim.name=sgd", "train.seed=1", epochs=[{"accuracy": 90.0}])
    make_run(root / "c", "optim.name=lars", "train.seed=2", epochs=[{"accuracy": 60.0}])
    make_run(root / "new", "optim.name=lars")
    return root


def first_words(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()]


@pytest.mark.usefixtures("root")
def test_runs_are_listed_chosen_and_ordered(run: Command, tmp_path: Path) -> None:
    assert run.output().splitlines()[:2] == [
        "run  status   epochs  state    neg cos  accuracy",
        "a    done     2/2     healthy  0.25     30.0% (21.9 to 39.6)",
    ]
    assert first_words(run.output()) == ["run", "a", "b", "c", "new"]
    chosen = ("--sort", "accuracy", "--where", "optim.name=lars")
    assert first_words(run.output(*chosen)) == ["run", "c", "a", "new"]
    assert run.output(*chosen).splitlines()[1].split()[-1] == "lars"
    assert first_words(run.output("runs", *chosen, "--where", "accuracy<50")) == ["run", "a"]
    assert first_words(run.output(*chosen, "--limit", 1)) == ["run", "c"]
    assert first_words(run.output("list", "runs", "--reverse")) == ["run", "new", "c", "b", "a"]
    assert run.output("--show", "train.seed").splitlines()[0].split()[-1] == "train.seed"
    rows = run.json("runs", *chosen)
    assert [row["name"] for row in rows] == ["c", "a", "new"]
    assert rows[1] | {"settings": 0} == {
        "name": "a", "path": "runs/a", "status": "done", "state": "healthy", "epochs_done": 2,
        "epochs": 2, "accuracy": 30.0, "accuracy_low": pytest.approx(21.9, abs=0.05),
        "accuracy_high": pytest.approx(39.6, abs=0.05), "best_accuracy": 40.0, "best_epoch": 0,
        "untrained_accuracy": 20.0, "num_scored": 100, "started": "2026-11-05T08:20:00+00:00",
        "forked_from": None, "loss": 1.0, "pos_cos": 0.9, "neg_cos": 0.25, "rank_y": 4.0,
        "settings": 0,
        **dict.fromkeys(("std_z", "std_y", "dead_y", "grad_norm", "lr", "tau", "skipped")),
    }  # fmt: skip
    assert rows[1]["settings"]["optim.name"] == "lars"
    assert "no run for which --where holds" in run("--where", "optim.name=larz")[2]
    (tmp_path / "best").mkdir()
    assert run.json("./best") == run.json("list", "best") == []


def test_runs_of_sweeps_and_forks_are_listed_from_above(
    run: Command, tmp_path: Path, root: Path
) -> None:
    for n, name in enumerate(("lr=0.1/seed0", "lr=0.1/seed1", "lr=0.2/seed0")):
        make_run(tmp_path / "sweeps/lr/runs" / name, epochs=[{"accuracy": 10.0 + n}])
    make_run(root / "a.forks" / "5-unchanged")
    (tmp_path / "sweeps/lr/up").symlink_to(tmp_path)
    assert first_words(run.output("sweeps/lr", "--sort", "accuracy"))[1:] == [
        "runs/lr=0.2/seed0", "runs/lr=0.1/seed1", "runs/lr=0.1/seed0",
    ]  # fmt: skip
    assert first_words(run.output("sweeps/lr/runs"))[1] == "lr=0.1/seed0"
    assert run("best", "sweeps/lr")[1] == "sweeps/lr/runs/lr=0.2/seed0\n"
    # As after the first call, from what is kept.
    assert first_words(run.output()) == ["run", "a", "a.forks/5-unchanged", "b", "c", "new"]
    assert first_words(run.output()) == ["run", "a", "a.forks/5-unchanged", "b", "c", "new"]


@pytest.mark.usefixtures("root")
def test_a_list_without_runs_says_so(run: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("empty")[2] == "empty: no run in it\n"
    assert run("runs/a")[2] == "runs/a: is a run itself: name the folder above it, runs/a/..\n"


def cpu_s(*arguments: object) -> float:
    """The processor's time of a command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "fastbyol.cli.main", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_500_runs_are_listed_in_a_fraction_of_a_second(tmp_path: Path) -> None:
    epochs = [{"accuracy": 40.0 + n / 10} for n in range(100)]
    pattern = make_run(tmp_path / "pattern", "train.epochs=100", epochs=epochs)
    for n in range(500):
        shutil.copytree(pattern, tmp_path / "runs" / f"run{n}")
    first = cpu_s("runs", tmp_path / "runs")
    # Beyond what it takes to start the program, which other machines do at other speeds.
    start = cpu_s("--version")
    for words in (("--sort", "accuracy", "--where", "optim.name=sgd"), ("--json",)):
        assert cpu_s("runs", tmp_path / "runs", *words) - start < min(0.5, first - start)


@pytest.mark.usefixtures("root")
def test_the_best_run_is_one_path(run: Command) -> None:
    assert run("best")[:2] == (0, "runs/b\n")
    assert run("best", "runs", "--where", "optim.name=lars")[:2] == (0, "runs/c\n")
    code, out, err = run("best", "--by", "best_accuracy", "--where", "train.seed!=1")
    assert (code, out) == (0, "runs/c\n")
    assert err == "best_accuracy 60.0% (50.2 to 69.1): the best of 2 runs that have it\n"
    assert run.json("best")["name"] == "b"
    assert "no run that --where asks for" in run.refusal("best", "--where", "accuracy>99")
    assert "lozz (--by): no such key; the nearest is loss" in run.refusal("best", "--by", "lozz")
    assert "--by state: healthy is no number" in run.refusal("best", "--by", "state")
    assert "no run with a value of std_z" in run.refusal("best", "--by", "std_z")


def test_names_of_runs_are_only_text(run: Command, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / MARKUP, epochs=[{"accuracy": 10.0}])
    make_run(tmp_path / "runs" / "-x\n[red]y", "train.seed=3")
    listed = run.output("--show", "data.train")
    assert "<img src=x onerror=alert(1)>&\\u202e" in listed
    assert "-x\\n[red]y" in listed
    assert len(listed.splitlines()) == 3
    assert "rename the run" in run.refusal("best")
    make_run(tmp_path / "runs" / "two words", epochs=[{"accuracy": 20.0}])
    assert run("best")[1] == "runs/two words\n"


def test_runs_are_compared_and_drawn(
    run: Command, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = run.output("compare", "runs/a", "runs/c").splitlines()
    words = [line.split() for line in lines]
    assert words[:4] == [
        ["a", "c"], ["train.epochs", "2", "320"], ["train.seed", "0", "2"],
        ["status", "done", "stopped"],
    ]  # fmt: skip
    assert lines[-1] == "runs/compare.html"
    assert "<svg" in (root / "compare.html").read_text()
    shown = run.json("compare", "runs/a", "runs/b", "runs/c", "--out", "page.html")
    assert shown["page"] == "page.html"
    assert shown["differences"]["optim.name"] == ["lars", "sgd", "lars"]
    assert [row["name"] for row in shown["runs"]] == ["a", "b", "c"]
    monkeypatch.chdir(root / "a")
    assert run.output("compare", ".", "../b").splitlines()[-1] == str(root / "compare.html")
    monkeypatch.chdir(root.parent)
    assert "name 2 to 24 runs, not 1" in run.refusal("compare", "runs/a")
    assert "no run here" in run.refusal("compare", "runs/a", "runs/x")


@pytest.mark.usefixtures("root")
def test_without_matplotlib_runs_are_compared_in_words(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(figures, "available", lambda: False)
    code, out, err = run("compare", "runs/a", "runs/b")
    assert code == 0
    assert "optim.name" in out
    assert "pip install 'fastbyol[report]'" in err
    assert "fastbyol[report]" in run.refusal("compare", "runs/a", "runs/b", "--out", "x.html")


@pytest.mark.usefixtures("root")
def test_runs_are_exported(run: Command) -> None:
    chosen = ("--where", "optim.name=lars", "--sort", "accuracy")
    assert run.output("export", "--csv", "runs.csv", "--parquet", "runs.parquet", *chosen) == (
        "runs.csv: 3 runs\nruns.parquet: 3 runs\n"
    )
    with Path("runs.csv").open(newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)] == ["c", "a", "new"]
    assert run.json("export", "runs", "--csv", "x.csv") == {"written": ["x.csv"], "runs": 4}
    assert "--csv FILE or --parquet FILE" in run.refusal("export")
    assert "name two files" in run.refusal("export", "--csv=x", "--parquet=./x")
    assert "cannot write" in run.refusal("export", "--csv", "absent/x.csv", code=1)


@pytest.mark.usefixtures("root")
def test_a_page_is_written(run: Command) -> None:
    assert run.output("page") == "runs/runs.html: 4 runs\n"
    assert run.output("page", "runs", "--out", "p.html", "--where", "accuracy>50") == (
        "p.html: 2 runs\n"
    )
    assert "<td" in Path("p.html").read_text()
    assert first_words(run.output()) == ["run", "a", "b", "c", "new"]


@pytest.mark.usefixtures("root")
def test_bad_input_is_one_line(run: Command) -> None:
    assert "no such folder of runs" in run.refusal("absent")
    assert "the nearest is optim.name" in run.refusal("--where", "optim.nam=lars")
    assert "the nearest is accuracy" in run.refusal("--sort", "acc")
    assert "the nearest is train.seed" in run.refusal("--show", "seed")
    assert "expected KEY OP VALUE" in run.refusal("--where", "lars")
    assert "no such folder" in run.refusal("best", "absent")
    assert "no such folder" in run.refusal("page", "absent")
    assert "no such folder" in run.refusal("export", "absent", "--csv", "x")
    assert "unexpected extra argument" in run.refusal("comapre", "runs/a", "runs/b")


def test_help_names_the_commands(run: Command) -> None:
    text = run.output("--help")
    assert all(f"\n  {name} " in text for name in ("list", "compare", "best", "export", "page"))
    assert "--where" in run.output("list", "--help")
