"""The command ``fastbyol bench``, with every suite at its tiny size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import torch

from fastbyol_bench import command, results, table, train, views, waterfall
from sample_results import result, timed

COMMAND = ("bench",)

# What a suite must have measured, and what it must say that it needs on a machine without a GPU.
EXPECTED = {
    "kernels": (
        {"ours", "F.conv2d", "loop over torch.std_mean"},
        {"fused, Triton", "one kernel, Triton"},
    ),
    "views": (
        {"ours, bf16", "ours, fp32", "Pillow and torchvision, one process"},
        {"fused, Triton"},
    ),
    "loader": (
        {"streamed", "streamed without FFCV", "torch's DataLoader over an array"},
        set(),
    ),
    "optimizer": (
        {"ours", "torch's multi-tensor operations", "per-tensor loop, as the post's"},
        {"three kernels, Triton"},
    ),
    "step": (
        {"ours, fastest", "ours, fp32", "the post's code path, fp32, a pass per view"},
        {"torch.compile of the same, bf16"},
    ),
    "train": ({"ours, fastest", "the post's code path, fp32, a pass per view", "ours"}, set()),
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(torch.cuda.is_available(), reason="what needs a GPU is there")
@pytest.mark.parametrize("suite", command.SUITES)
def test_every_suite_measures_and_keeps(suite: str, run) -> None:
    before = torch.get_num_threads()
    out = run.output(suite, "--quick", "--device", "cpu", "--out", "kept", "--json")
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
        assert (Path("kept") / "cpu-step.png").read_bytes().startswith(
            b"\x89PNG"
        ) or not waterfall.available()
    if suite == "train":
        epochs = [row for row in kept.rows if row.name.startswith("epoch of")]
        assert len(epochs) == 4
        ours, theirs = epochs[:2]
        step = next(row for row in kept.rows if row.name.startswith("batches"))
        end = next(row for row in kept.rows if row.name == train.END)
        steps_s = 105_000 // 4 * step.timing.median_s
        # Beside steps and the end as measured an epoch of so many images costs their order, some
        # milliseconds.
        assert (
            steps_s + end.timing.median_s
            < ours.timing.median_s
            < steps_s + end.timing.median_s + 5.0
        )
        assert theirs.ratio.median == pytest.approx(theirs.timing.median_s / ours.timing.median_s)


def test_a_killed_run_keeps_every_finished_row(tmp_path: Path) -> None:
    """Kill a real process as soon as it has rows of a second suite."""
    path = tmp_path / "it.json"
    arguments = ["bench", "optimizer", "kernels", "--quick", "--device", "cpu", "--out", str(path)]
    seen: tuple[results.Row, ...] = ()
    with subprocess.Popen(
        [sys.executable, "-m", "fastbyol.cli.main", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 300.0
        while len(seen) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if path.exists():
                # Valid at each instant, and it never loses a row.
                rows = results.read(path).rows
                assert rows[: len(seen)] == seen
                seen = rows
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
    left = results.read(path)
    assert left.rows[: len(seen)] == seen
    assert len(seen) >= 5
    assert not left.finished
    assert left.suites == ("kernels", "optimizer")
    assert table.text(left).startswith("unfinished")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_while_peers_start_it_leaves_none(number: signal.Signals, tmp_path: Path) -> None:
    """Send SIGINT to the whole group, as a terminal does, or SIGKILL to the parent alone."""
    arguments = ["bench", "step", "--quick", "--device", "cpu", "--out", str(tmp_path / "it.json")]
    command_line = [sys.executable, "-m", "fastbyol.cli.main", *arguments]
    with subprocess.Popen(
        command_line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        processes.wait_until(
            lambda: any("spawn_main" in peer for peer in processes.of_group(process.pid)), process
        )
        time.sleep(0.5)
        os.kill(-process.pid if number == signal.SIGINT else process.pid, number)
        messages = process.communicate()[1].decode()
    assert processes.left(process.pid, 60.0) == []
    assert "Traceback" not in messages
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert messages.splitlines()[-1] == "interrupted: no row was kept"


def test_rows_are_kept_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that each row is kept before the next is measured, and the last result is finished."""
    kept: list[results.Result] = []

    def rows(setting: object) -> Iterator[results.Row]:
        for number, row in enumerate(result().rows):
            assert len(kept) == number
            yield row

    monkeypatch.setattr(views, "rows", rows)
    whole = command.run(["views"], device="cpu", quick=True, note=lambda _: None, keep=kept.append)
    assert [len(part.rows) for part in kept] == [1, 2, 3, 4]
    assert not any(part.finished for part in kept)
    assert whole.finished
    assert whole.rows == result().rows


def test_compares_kept_results(run, tmp_path: Path) -> None:
    a = result()
    results.write(a, tmp_path / "a.json")
    results.write(
        result(rows=(a.rows[0].model_copy(update={"timing": timed(0.05)}),)), tmp_path / "b.json"
    )
    out = run.output("--compare", "a.json", "b.json")
    assert "2.00" in out
    assert "faster" in out
    assert run.json("--compare", "a.json", "b.json")["changes"][0]["verdict"] == "faster"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "no suite 'speed'"),
        (["views", "--compare", "a", "b"], "leave the suites out"),
        (["--compare", "none.json", "none.json"], "none.json"),
        (["views", "--out", "/proc/none/it.json"], "/proc/none/it.json"),
        (["--device", "cuda:7", "views", "--quick"], "cuda:7"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, run) -> None:
    assert message in run.refusal(*arguments)


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
