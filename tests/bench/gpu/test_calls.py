"""The three calls without a GPU: their jobs, their files, and the end of their processes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from processes import wait_until

from fastbyol_bench import command
from fastbyol_bench.gpu import calls, rows
from fastbyol_bench.gpu.calls import Call, Job, jobs, lacks, parsed

SCRIPT = calls.ROOT / "bench" / "gpu.sh"
MOST_FILES, MOST_FILE_BYTES = 8, 16 << 20
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def options(call: str = "B", *words: str, out: Path = Path("out")) -> argparse.Namespace:
    return parsed([call, str(out), *words])


def python(name: str, code: str, most_s: float = 60.0, **needs: tuple[str, ...]) -> Job:
    return Job(name, (sys.executable, "-c", code), most_s, **{"modules": (), **needs})


@pytest.fixture
def call(tmp_path: Path) -> Call:
    return Call("B", tmp_path / "out", tmp_path / "work", options())


def test_every_path_to_the_end_and_few_files(tmp_path: Path) -> None:
    """Run the real script on a short job: the table comes last, and the files are few and small."""
    out = tmp_path / "out"
    wanted = ["B", str(out), "--dry", "--only", "limits-cudnn10", "--commit", "0123abcd"]
    done = subprocess.run(
        ["sh", SCRIPT, *wanted],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1].split() == [
        "limits-cudnn10",
        *done.stdout.split()[1:3],
        "exit",
        "code",
        "0",
    ]
    files = list(out.rglob("*"))
    assert len(files) <= MOST_FILES
    assert all(path.is_file() and path.stat().st_size < MOST_FILE_BYTES for path in files)
    # Every convolution forward and by weight, all but the stems by input as well, then the sum.
    assert sum(row["part"] == "conv" for row in rows.read(out / "rows.jsonl")) == 2 * 15 + 10 + 1
    assert json.loads((out / "jobs.json").read_text())["commit"] == "0123abcd"
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert "logs/limits-cudnn10.log" in archive.getnames()


def test_a_killed_call_leaves_its_rows_and_no_process_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "sh",
        SCRIPT,
        "B",
        out,
        "--dry",
        "--only",
        "limits-cudnn10",
        "--work",
        tmp_path / "work",
    ]
    process = subprocess.Popen(
        [str(word) for word in words], env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    wait_until(lambda: len(rows.read(out / "rows.jsonl")) >= 2)
    process.kill()
    process.wait()
    wait_until(lambda: not children_of(out))
    written = (out / "rows.jsonl").read_text().splitlines()
    assert len(written) >= 2
    assert len(rows.read(out / "rows.jsonl")) == len(written)


def children_of(out: Path) -> list[int]:
    """Return the processes with ``out`` on their command line."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if any(word.startswith(bytes(out)) for word in words):
            pids.append(int(path.parent.name))
    return pids


def test_asked_to_end_it_writes_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["sh", SCRIPT, "B", out, "--dry", "--only", "limits-cudnn10"]
    process = subprocess.Popen(
        [str(word) for word in words], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: bool(rows.read(out / "rows.jsonl")))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "ceiling   copy and products" in output
    assert (out / "table.txt").read_text().startswith("limits-cudnn10:")
    assert not children_of(out)


def test_runs_leaves_out_and_says_why(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LEAST_S", 0.5)
    hang = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; "
        "time.sleep(600)'])"
    )
    began = time.monotonic()
    call.run(
        [
            python("fine", "print('hello')"),
            python("fails", "raise SystemExit(3)"),
            python("module", "", modules=("no_such_module",)),
            python("program", "", under=("no-such-program",)),
            python("hangs", hang, most_s=3.0),
        ]
    )
    assert time.monotonic() - began < 500
    outcomes = {
        outcome.name: (outcome.code, outcome.why, outcome.failed) for outcome in call.outcomes
    }
    assert outcomes == {
        "fine": (0, "", False),
        "fails": (3, "", True),
        "module": (None, "not installed: no_such_module", True),
        "program": (None, "not installed: no-such-program", True),
        "hangs": (None, "cut off after 3 s", True),
    }
    assert (call.work / "logs" / "fine.log").read_text() == "hello\n"
    assert [
        job["name"] for job in json.loads((call.out / "jobs.json").read_text())["jobs"]
    ] == list(outcomes)
    assert call.finish() == 1


def test_a_row_that_failed_fails_the_call(call: Call) -> None:
    say = (
        "import sys; from pathlib import Path; from fastbyol_bench.gpu.rows import Rows; rows = "
        "Rows(Path(sys.argv[1]), 'job')"
    )
    call.run(
        [
            Job(
                "job",
                (
                    sys.executable,
                    "-c",
                    f"{say}; rows.add('engine', 'captured', mode='graph')",
                    "{rows}",
                ),
                60,
                modules=(),
            )
        ]
    )
    assert call.finish() == 0
    check = (
        "rows.check('engine', 'captured', holds=False, says='the mode is not graph', "
        "mode='compile')"
    )
    call.run([Job("job", (sys.executable, "-c", f"{say}; {check}", "{rows}"), 60, modules=())])
    assert call.finish() == 1


def test_stops_when_its_time_is_used_up(tmp_path: Path) -> None:
    brief = Call("A", tmp_path / "out", tmp_path / "work", options("A", "--minutes", "0.5"))
    brief.run([python("late", "")])
    assert brief.outcomes[0].code is None
    assert "were left" in brief.outcomes[0].why
    assert brief.finish() == 0  # it says so, and nothing went wrong


def test_an_archive_that_could_not_come_back_is_left_out(
    call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (call.work / "caches" / "code").write_bytes(os.urandom(200_000))
    call.finish()
    assert (call.out / "caches.tar.gz").exists()
    monkeypatch.setattr(calls, "MOST_BYTES", 100_000)
    call.finish()
    assert not (call.out / "caches.tar.gz").exists()
    assert "caches.tar.gz: 0 MiB, left out" in capsys.readouterr().out


def test_runs_come_back_without_checkpoints(call: Call) -> None:
    run = call.work / "runs" / "train-bn" / "checkpoints"
    run.mkdir(parents=True)
    (run / "ckpt-000000001.safetensors").write_bytes(b"weights")
    (run.parent / "metrics.jsonl").write_text("{}\n")
    call.finish()
    with tarfile.open(call.out / "logs.tar.gz") as archive:
        assert [name for name in archive.getnames() if name.startswith("runs")] == [
            "runs/train-bn/metrics.jsonl"
        ]


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", calls.CALLS)
def test_the_jobs_can_be_asked(name: str, dry: bool) -> None:
    """Check that modules accept their arguments, files exist, names differ and limits are kept."""
    carried = ["--data", "train.beton", "--test-data", "test.beton", "--set", "views.size=32"]
    listed = jobs(name, options(name, *carried, *(["--dry"] if dry else [])))
    assert len({job.name for job in listed}) == len(listed)
    for job in listed:
        words = [
            word.format(rows="R", work="W", out="O", seconds="9", dry="--dry")
            for word in job.command
        ]
        module = words[2]
        if module.startswith("fastbyol_bench.gpu."):
            importlib.import_module(module).parser().parse_intermixed_args(words[3:])
        elif module == "fastbyol.cli.main":
            assert command.chosen(words[4:8]) == tuple(
                name for name in command.SUITES if name in words[4:8]
            )
        assert all((calls.ROOT / word).exists() for word in words if word.startswith("tests/"))
        assert job.most_s <= 60 * calls.MINUTES
    if name == "C" and not dry:
        from fastbyol.ablations.plan import chosen

        assert len(chosen(calls.CLAIMS, "short")) >= len(calls.CLAIMS)


def test_its_tests_are_those_with_the_gpu_marker(request: pytest.FixtureRequest) -> None:
    """Of all tests: where this session has only some, another one collects them."""
    items = request.session.items
    files = {
        str(item.path.relative_to(calls.ROOT)) for item in items if item.get_closest_marker("gpu")
    }
    if {item.path for item in items} < set((calls.ROOT / "tests").rglob("test_*.py")):
        words = "-m pytest -q --collect-only -m gpu -p no:cacheprovider"
        done = subprocess.run(
            [sys.executable, *words.split()],
            cwd=calls.ROOT,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:]
        files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == set(calls.GPU_TESTS)


def test_says_what_is_missing() -> None:
    job = python(
        "both", "", modules=("no_such_module", "json"), under=("no-such-program", "--flag")
    )
    assert lacks(job, dry=False) == "not installed: no_such_module, no-such-program"
    assert lacks(job, dry=True) == "not installed: no_such_module"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["D", "out"], "invalid choice"),
        (["A", "out", "--only", "nothing"], "take some of engine-bn"),
        (["C", "out", "--data", "a.beton"], "go together"),
        (["A", "out", "--caches", "no.tar.gz"], "is no file"),
    ],
)
def test_wrong_words_end_in_a_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(words)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_compiled_code_of_a_call_before_is_unpacked(tmp_path: Path) -> None:
    first = Call("A", tmp_path / "first", tmp_path / "work", options("A"))
    (first.work / "caches" / "triton").mkdir()
    (first.work / "caches" / "triton" / "kernel.cubin").write_bytes(b"code")
    first.finish()
    with tarfile.open(tmp_path / "first" / "caches.tar.gz") as archive:
        archive.extractall(tmp_path / "other", filter="data")
    assert (tmp_path / "other" / "caches" / "triton" / "kernel.cubin").read_bytes() == b"code"
