"""`fastbyol ablate` as typed: what it lists, shows, runs and refuses; and the full scale, end to
end, on STL-10's own files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastbyol.data.convert import convert
from fastbyol.evaluation import protocol
from fastbyol.fleet import ledger
from fastbyol.runs.folder import RunFolder
from small import SETS
from source_files import stl10

NARROW = [f"--set={text}" for text in SETS if not text.startswith(("views.", "data."))]


COMMAND = ("ablate",)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "--all"),
        (["run", "C99"], "no such arm"),
        (["run", "C6", "--scale", "full"], "--stl10"),
        (["run", "C6", "--scale", "big"], "big"),
        (
            ["run", "C6", "--scale", "full", "--stl10", "here", "--data", "x.beton"],
            "leave out --data",
        ),
        (["run", "C6", "--scale", "full", "--stl10", "nowhere"], "nowhere"),
        (["run", "C6", "--set", "optim.lrr=1"], "optim.lr"),
        (["run", "C6", "--device", "cuda:7"], "cuda:7"),
        (["run", "C6", "--address", "auto"], "--launcher ray"),
        (["run", "C6", "--time", "1:00:00"], "--launcher slurm"),
        (["run", "gn-lars-0.2@bf16"], "--scale short and full"),
        (["show", "C99"], "no such arm"),
        (["report", "--out", "nowhere"], "fastbyol ablate run"),
    ],
)
def test_what_cannot_work_is_one_line(run, arguments: list[str], says: str) -> None:
    assert says in run.refusal(*arguments)


def test_list_names_all_claims_and_arms(run) -> None:
    assert "C13" in run.output("list")
    told = run.json("list", "--scale", "short")
    ids = [row["id"] for row in told["claims"]]
    assert ids == [*(f"C{number}" for number in range(1, 14)), "M1"]
    rows = {row["arm"]: row for row in told["arms"]}
    assert rows["gn-lars-0.2"] | {"about": ""} == {
        "arm": "gn-lars-0.2", "about": "", "claims": ["C6"], "seeds": 3, "done": 0, "stopped": 0,
        "damaged": 0,
    }  # fmt: skip
    assert "gn-lars-0.1@bf16" in rows


def test_show_tells_a_claim_and_an_arm(run) -> None:
    out = run.output("show", "c6")
    for part in (
        "LARS at lr 0.2 recovers",
        "accuracy_gn_encoder",
        "accuracy@100: 64.4",
        "verdict",
        "optim.lr = 0.2",
    ):
        assert part in out
    claim = run.json("show", "C6")
    assert claim["published"]["accuracy@10"] == 40.9
    assert claim["arms"]["gn-lars-0.2-capped"]["optim.rate_cap"] == 0.8
    out = run.output("show", "gn-lars-0.1@exclude")
    assert 'lars_exclude = "substring"  # arm gn-lars-0.1@exclude' in out
    assert run.json("show", "random")["config"]["optim"]["lr"] == 0.0


def test_run_then_report_and_check(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs do not let LARS at .1 collapse, so its claim is not reproduced."""
    monkeypatch.setenv("COLUMNS", "200")
    sets = [f"--set={text}" for text in (*SETS, "train.epochs=2", "probe.every_epochs=1")]
    told = run.json("run", "C7", "--seeds=5", "--jobs=1", *sets)
    assert sorted(told["finished"]) == [f"gn-lars-0.1 seed {seed}" for seed in range(5)]
    verdicts = {row["claim"]: row["outcome"] for row in told["verdicts"]}
    assert verdicts == {"C7": "not reproduced", "C12": "not reproduced"}
    assert (tmp_path / "ablations/mini/runs/gn-lars-0.1/seed4/config.toml").exists()
    code, out, error = run("report", "--check")
    assert code == 4
    assert error == "fastbyol: error: not reproduced: C7, C12\n"
    assert "It is collapsed at the end." in " ".join(out.split())
    rows = {row["arm"]: row for row in run.json("list")["arms"]}
    assert rows["gn-lars-0.1"]["done"] == 5
    run.refusal("run", "C7", "--seeds=5", "--scale=short", "--out=ablations/mini", *sets)


def test_a_set_of_ones_own_at_every_scale(run, tmp_path: Path) -> None:
    """With as many steps as the scale has where it is smaller, and with the epochs that are said;
    its images are told first.
    """
    for name, count, seed in (("train", 48, 0), ("test", 40, 1)):
        convert("textures", tmp_path / f"{name}.beton", count=count, size=16, seed=seed)
    own = ["--data", "train.beton", "--test-data", "test.beton", "--seeds=1", "--jobs=1"]
    sets = [f"--set={text}" for text in SETS if not text.startswith("data.t")]
    for scale, more, steps in (
        ("mini", ["data.limit=96"], 20 * 12),
        ("short", ["train.epochs=2"], 2 * 6),
    ):
        more = [f"--set={text}" for text in more]
        command = ("run", "gn-lars-0.2", "--scale", scale, *own, *sets, *more)
        out = run.output(*command).replace("\n", "")
        assert f"data {tmp_path / 'train.beton'}" in out
        longer = ", as many steps in 40 epochs" if scale == "mini" else ""
        assert f", 48 images{longer}: " in out
        assert "image share r = " in out
        folder = tmp_path / "ablations" / scale / "runs/gn-lars-0.2/seed0"
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(row) for row in rows if "event" in row]
        assert [event["step"] for event in events if event["event"] == "epoch"][-1] == steps
        assert [event["num_scored"] for event in events if event["event"] == "untrained"] == [20]
        assert "1 were done before" in run.output(*command)
    calls = ledger.read(tmp_path / "ablations/mini")["calls"]
    assert 0.0 < calls[0]["image_share"] < 1.0


def test_test_data_that_cannot_be_scored_are_refused_before_a_run(run, tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", images=np.zeros((40, 16, 16, 3), np.uint8))
    convert(str(tmp_path / "plain.npz"), tmp_path / "plain.beton")
    error = run.refusal("run", "C6", "--data", "plain.beton", "--test-data", "plain.beton")
    assert "labels of two classes or more" in error
    assert not (tmp_path / "ablations").exists()


def test_full_scale_from_stl10s_own_files(run, tmp_path: Path) -> None:
    """From the archive's binaries to a probed run, at 96x96 with the post's protocol; narrow, one
    epoch, random network too.
    """
    stl10(tmp_path / "source", train=20, test=40, unlabeled=12)
    full = ("--scale=full", "--stl10", tmp_path / "source", "--seeds=1", "--jobs=1")
    told = run.json("run", "C1", "random", *full, "--set=train.epochs=1", *NARROW)
    assert len(told["finished"]) == 2
    folder = tmp_path / "ablations/full"
    with RunFolder.open(folder / "runs/bn-sgd-mlp-bn/seed0", lock=False) as opened:
        config = opened.config
    assert (config.views.size, config.train.precision) == (96, "fp32")
    assert config.probe.protocol == "blog"
    assert Path(config.data.train) == folder / "data/stl10-train-unlabeled.beton"
    events = (folder / "runs/bn-sgd-mlp-bn/seed0/metrics.jsonl").read_text().splitlines()
    assert json.loads(events[-1])["step"] == 4  # 32 images of train and unlabeled, batches of 8
    assert all(
        json.loads(row)["accuracy"] is not None
        for row in events
        if row.startswith('{"event": "epoch"')
    )


def test_full_scale_fits_and_scores_the_posts_rows() -> None:
    import torch

    labels = torch.arange(8000) % 10
    fit, score, _ = protocol.split_rows(labels)
    assert torch.equal(fit, torch.arange(3968))
    assert torch.equal(score, torch.arange(3968, 7936))
