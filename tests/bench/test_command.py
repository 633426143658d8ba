"""``fastbyol bench`` as typed, every suite in its tiny size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fastbyol import cli
from fastbyol_bench import command, results, waterfall
from sample_results import result, timed


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def typed(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastbyol", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return typed


# What a suite must have measured, and what it must say that it needs on a machine without a GPU.
EXPECTED = {
    "kernels": ({"ours", "F.conv2d", "loop over torch.std_mean"}, {"fused, Triton", "one kernel, Triton"}),
    "views": ({"ours, bf16", "ours, fp32", "Pillow and torchvision, one process"}, {"fused, Triton"}),
    "loader": ({"streamed", "resident", "torch's DataLoader over an array"}, set()),
    "optimizer": ({"ours", "torch's multi-tensor operations", "per-tensor loop, as the post's"}, {"three kernels, Triton"}),
    "step": (
        {"ours, fastest", "ours, fp32", "the post's code path, fp32, a pass per view"},
        {"torch.compile of the same, bf16"},
    ),
    "train": ({"ours, fastest", "the post's code path, fp32, a pass per view", "ours"}, set()),
}


# The tiny probe's liblinear may stop at its 100 iterations, as the post's did.
@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
@pytest.mark.skipif(torch.cuda.is_available(), reason="what needs a GPU is there")
@pytest.mark.parametrize("suite", command.SUITES)
def test_every_suite_measures_and_keeps(suite: str, run) -> None:
    before = torch.get_num_threads()
    code, out, err = run(suite, "--quick", "--device", "cpu", "--out", "kept", "--json")
    assert code == 0, err
    assert torch.get_num_threads() == before
    kept = results.read(Path("kept") / f"cpu-{suite}.json")
    assert results.Result.model_validate_json(out) == kept
    assert kept.suites == (suite,)
    assert kept.quick
    measured, needing = EXPECTED[suite]
    assert {row.variant for row in kept.rows if row.timing} >= measured
    assert {row.variant for row in kept.rows if row.needs} >= needing
    assert all(row.needs == "a GPU" for row in kept.rows if "Triton" in row.variant)
    if suite == "step":
        assert tuple(part.name for part in kept.waterfall) == waterfall.PARTS
        for part in kept.waterfall[:-1]:
            assert part.seconds > 0, f"{part.name}: its seam was never crossed"
        assert (Path("kept") / "cpu-step.png").read_bytes().startswith(b"\x89PNG") or not waterfall.available()
    if suite == "train":
        epochs = [row for row in kept.rows if row.name.startswith("epoch of")]
        assert len(epochs) == 4
        ours, theirs = epochs[:2]
        step = next(row for row in kept.rows if row.name.startswith("batches"))
        probe = next(row for row in kept.rows if row.name.startswith("probe"))
        assert ours.timing.median_s == pytest.approx(105_000 // 4 * step.timing.median_s + probe.timing.median_s)
        assert theirs.ratio.median == pytest.approx(theirs.timing.median_s / ours.timing.median_s)


def test_compares_kept_results(run, tmp_path: Path) -> None:
    a = result()
    results.write(a, tmp_path / "a.json")
    results.write(result(rows=(a.rows[0].model_copy(update={"timing": timed(0.05)}),)), tmp_path / "b.json")
    code, out, _ = run("--compare", "a.json", "b.json")
    assert code == 0
    assert "2.00" in out
    assert "faster" in out
    code, out, _ = run("--compare", "a.json", "b.json", "--json")
    assert json.loads(out)["changes"][0]["verdict"] == "faster"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speed"], "no suite 'speed'"),
        (["views", "--compare", "a", "b"], "leave the suites out"),
        (["--compare", "none.json", "none.json"], "none.json"),
        (["views", "--out", "/proc/none/it.json"], "/proc/none/it.json"),
        (["--device", "cuda:7", "views", "--quick"], "cuda:7"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], said: str, run) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert said in err.splitlines()[-1]


def test_without_matplotlib_it_says_so(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run", lambda *a, **k: result())
    monkeypatch.setattr(waterfall, "available", lambda: False)
    code, out, err = run("views", "--out", "it.json")
    assert code == 0
    assert "matplotlib" in err
    assert "needs a GPU" in out
    assert sorted(path.name for path in Path().iterdir()) == ["it.json"]


def test_all_is_all() -> None:
    assert command.chosen([]) == command.chosen(["all"]) == command.SUITES
    assert command.chosen(["train", "views"]) == ("views", "train")
