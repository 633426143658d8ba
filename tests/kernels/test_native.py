"""CPU kernels: typed arguments, blocks run once on torch's threads, equal bits for any number."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.files import cache_folder
from fastbyol_kernels import dispatch, native
from fastbyol_kernels.native import (
    F32,
    F64,
    I32,
    I64,
    U8,
    Activation,
    Worker,
    kernel,
    narrowed,
    widened,
)

SIZE = 64


@kernel
def _count(block: int, counts: I64, add: int) -> None:
    """Count how often each block runs."""
    counts[block] += add


@kernel
def _double(block: int, values: F32, sums: F32) -> None:
    """Double a tensor and sum it by blocks."""
    own, total = values[block * SIZE : (block + 1) * SIZE], np.float32(0)
    for i in range(len(own)):
        own[i] *= np.float32(2)
        total += own[i]
    sums[block] = total


@kernel
def _convert(block: int, values: F32, activations: Activation, back: F32) -> None:
    """Convert float32 to an activation and back."""
    activations[block] = narrowed(values[block], activations)
    back[block] = widened(activations[block])


@kernel
def _every_kind(
    block: int, f32: F32, f64: F64, i32: I32, i64: I64, u8: U8, number: float, count: int
) -> None:
    f32[block], f64[block], i32[block], i64[block], u8[block] = (
        np.float32(number),
        number,
        count,
        count,
        count,
    )


@kernel(backwards=True)
def _order(block: int, instants: I64, taken: I64) -> None:
    """Record, on one thread, the order of the blocks."""
    taken[0] += 1
    instants[block] = taken[0]


@kernel
def _workers(block: int, seen: I64, worker: Worker, add: int) -> None:
    seen[worker] += add


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 1000])
def test_every_block_is_taken_once(threads: int, num_blocks: int) -> None:
    torch.set_num_threads(threads)
    counts = torch.zeros(max(1, num_blocks), dtype=torch.int64)
    _count(num_blocks, counts, 3)
    assert counts.tolist() == [3] * num_blocks + [0] * (num_blocks == 0)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    source, results = torch.randn(1000 * SIZE), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        values, sums = source.clone(), torch.empty(1000)
        _double(1000, values, sums)
        assert torch.equal(values, 2 * source)
        results.append(sums)
    assert all(torch.equal(results[0], other) for other in results[1:])
    torch.testing.assert_close(
        results[0].double(), (2 * source.double()).view(-1, SIZE).sum(1), rtol=0, atol=1e-4
    )


def test_several_threads_of_python_may_call_at_once() -> None:
    torch.set_num_threads(2)
    tensors = [torch.full((200 * SIZE,), float(i)) for i in range(4)]

    def work(values: torch.Tensor) -> None:
        sums = torch.empty(200)
        for _ in range(20):
            _double(200, values, sums)

    threads = [threading.Thread(target=work, args=(values,)) for values in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bool((values == i * 2.0**20).all()) for i, values in enumerate(tensors))


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    source = torch.tensor(values, dtype=torch.float32)
    activations, back = torch.empty(len(source), dtype=torch.bfloat16), torch.empty_like(source)
    _convert(len(source), source, activations, back)
    expected = source.bfloat16()
    torch.testing.assert_close(activations, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(back.signbit() & ~back.isnan(), source.signbit() & ~source.isnan())
    same = torch.empty_like(source)
    _convert(len(source), source, same, back)
    assert torch.equal(same.view(torch.int32), source.view(torch.int32))
    assert torch.equal(back.view(torch.int32), source.view(torch.int32))


@given(st.floats(), st.integers(0, 127))
def test_every_kind_of_argument_arrives(number: float, count: int) -> None:
    dtypes = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)
    tensors = [torch.zeros(3, dtype=dtype) for dtype in dtypes]
    _every_kind(2, *tensors, number, count)
    for tensor in tensors[:2]:
        expected = torch.tensor([number, number, 0], dtype=torch.float64).to(tensor.dtype)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
    assert all(tensor.tolist() == [count, count, 0] for tensor in tensors[2:])


def test_blocks_go_backwards_where_a_kernel_says_so() -> None:
    torch.set_num_threads(1)
    instants = torch.zeros(5, dtype=torch.int64)
    _order(5, instants, torch.zeros(1, dtype=torch.int64))
    assert instants.tolist() == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_workers_are_numbered_below_the_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    seen = torch.zeros(8, dtype=torch.int64)
    _workers(1000, seen, 1)
    assert seen[:threads].sum() == 1000


def test_another_dtype_or_number_of_arguments_is_refused_by_name() -> None:
    counts, values = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"counts is torch\.int32, the kernel _count takes torch\.int64"
    ):
        _count(1, counts.int(), 1)
    with pytest.raises(
        ValueError, match=r"activations is torch\.float16, the kernel _convert takes bf16 or f32"
    ):
        _convert(1, values, values.half(), values)
    with pytest.raises(ValueError, match="argument"):
        _count(1, counts)
    with pytest.raises(TypeError, match="add"):
        _count(1, counts, counts)
    with pytest.raises(TypeError, match="counts"):
        _count(1, 7, 1)
    assert counts.tolist() == [0]


def test_without_torchs_threads_the_caller_does_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_team", lambda: None)
    torch.set_num_threads(4)
    counts = torch.zeros(50, dtype=torch.int64)
    _count(50, counts, 1)
    assert counts.tolist() == [1] * 50


def test_torchs_openmp_library_is_detected() -> None:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this build of torch runs without OpenMP")
    native._team.cache_clear()
    assert native._team() is not None


# Runs a kernel and tells how often the cache had it, after it has become another user than root.
_AS_ANOTHER = """
import os, sys, torch
from fastbyol_kernels import weight_standardization
from fastbyol_kernels.weight_standardization import cpu
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for _ in range(2):
    out = weight_standardization.weight_standardization(torch.tensor([[1.0, 3.0]]))
    torch.manual_seed(0)
print(out.tolist(), cpu._forward._compiled[torch.float32]._cache_hits)
"""
_STANDARDIZED = "[[-0.7071017622947693, 0.7071017622947693]]"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can look into: pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def _run_installed(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a kernel from an install in ``folder`` that cannot be written, without a home folder."""
    install = folder / "install"
    if not install.exists():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(native.__file__).parent, install / "fastbyol_kernels", ignore=ignored)
        for path in (*install.rglob("*"), install):
            path.chmod(0o555 if path.is_dir() else 0o444)
    names = ("NUMBA_CACHE_DIR", "FASTBYOL_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(install), "HOME": "/proc", **variables}
    run = [sys.executable, "-c", _AS_ANOTHER]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_without_a_cache_folder_kernels_are_compiled_anew_and_a_line_says_so(
    open_folder: Path,
) -> None:
    done = _run_installed(open_folder)
    assert done.stdout == f"{_STANDARDIZED} 0\n"
    assert done.stderr == (
        "no folder for compiled kernels that is this user's alone and can be written: kernels are "
        "compiled at every start; name another with FASTBYOL_CACHE=DIR\n"
    )


def test_where_the_install_cannot_be_written_kernels_are_kept_with_what_can_be_made_again(
    open_folder: Path,
) -> None:
    own = open_folder / "own"
    own.mkdir()
    if os.geteuid() == 0:
        os.chown(own, 65534, 65534)
    results = [_run_installed(open_folder, FASTBYOL_CACHE=str(own)) for _ in range(2)]
    assert [done.stdout for done in results] == [f"{_STANDARDIZED} {hits}\n" for hits in (0, 1)]
    assert not any(done.stderr for done in results)
    (folder,) = own.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.suffix for path in sorted(folder.iterdir())] == [".nbc", ".nbi"]
    # Another CPU: the kept code may have instructions that it lacks.
    other = _run_installed(open_folder, FASTBYOL_CACHE=str(own), NUMBA_CPU_NAME="x86-64")
    assert other.stdout.endswith(" 0\n"), other.stdout


@pytest.mark.parametrize("own", [None, "own"])
@pytest.mark.parametrize("users", [None, "users"])
def test_kernels_are_kept_where_fastbyol_keeps_what_can_be_made_again(
    own: str | None, users: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FASTBYOL_CACHE", own), ("XDG_CACHE_HOME", users)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    beside, first = list(native._parents())[:2]
    assert (beside, first) == (Path(native.__file__).parent / "__pycache__", cache_folder())


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where kernels are kept: a new one, and there is no other."""
    monkeypatch.setattr(native, "_parents", lambda: iter([tmp_path]))
    return tmp_path / f"kernels-{os.geteuid()}"


def _fresh() -> native.Kernel:
    """Return a kernel that is compiled or read anew."""

    @kernel
    def fresh(block: int, counts: I64) -> None:
        counts[block] += 1

    assert isinstance(fresh, native.Kernel)
    return fresh


def _hits(fresh: native.Kernel) -> int:
    """Run a kernel; return whether the cache had it."""
    counts = torch.zeros(1, dtype=torch.int64)
    fresh(1, counts)
    assert counts.tolist() == [1]
    return int(fresh._compiled[torch.float32]._cache_hits)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_not_read(own_cache: Path, mode: int) -> None:
    """Such as one in /tmp: unpickling what somebody has put there would run their code."""
    assert [_hits(_fresh()) for _ in range(2)] == [0, 1]
    own_cache.chmod(mode)
    assert _hits(_fresh()) == 0
    own_cache.chmod(0o700)
    assert _hits(_fresh()) == 1


def test_a_folder_of_another_user_or_behind_a_link_is_not_read(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [_hits(_fresh()) for _ in range(2)] == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        own_cache.rename(own_cache.with_name(f"kernels-{os.geteuid()}"))
        assert _hits(_fresh()) == 0
        own_cache.with_name(f"kernels-{os.geteuid()}").rename(own_cache)
    own_cache.rename(own_cache.with_name("elsewhere"))
    own_cache.symlink_to("elsewhere")
    assert _hits(_fresh()) == 0


def test_a_kept_kernel_is_of_this_compiler_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__)
    digests = {native._fingerprint.__wrapped__(source)}
    with monkeypatch.context() as patch:
        patch.setattr(native.numba, "__version__", "0.0")
        digests.add(native._fingerprint.__wrapped__(source))
    with monkeypatch.context() as patch:
        patch.setattr(native, "version", lambda _: "0.0")
        digests.add(native._fingerprint.__wrapped__(source))
    with monkeypatch.context() as patch:
        codegen = native.registry.cpu_target.target_context.codegen()
        triple, name, features = codegen.magic_tuple()
        patch.setattr(type(codegen), "magic_tuple", lambda _: (triple, name, features + ",+other"))
        digests.add(native._fingerprint.__wrapped__(source))
    assert len(digests) == 4
    assert digests - {native._fingerprint.__wrapped__(source)} != digests


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("left", [0, 7, 40])
def test_damaged_files_of_the_cache_are_replaced(own_cache: Path, suffix: str, left: int) -> None:
    assert _hits(_fresh()) == 0
    for path in own_cache.glob(f"*{suffix}"):
        os.truncate(path, left)
    assert [_hits(_fresh()) for _ in range(3)] == [0, 0, 1]


def test_a_full_disk_is_said_once_and_the_kernel_runs(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(native.caching.IndexDataCacheFile, "_save_data", full)
    native._say_once.cache_clear()
    assert [_hits(_fresh()) for _ in range(2)] == [0, 0]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [str(own_cache)]
    assert "No space left on device" in caplog.text


def test_kernels_are_compiled_ahead_by_processes_that_end(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    children, fork = [], native._forked
    monkeypatch.setattr(native, "_forked", lambda *a: children.append(fork(*a)) or children[-1])

    @kernel
    def broken(block: int, counts: I64) -> None:
        counts[block] += "no number"

    good = [_fresh(), _fresh_of_activations()]
    progress: list[tuple[int, int]] = []
    assert native.missing([*good, broken], torch.bfloat16) == [*good, broken]
    done = native.compile_ahead(
        [*good, broken], torch.bfloat16, lambda *numbers: progress.append(numbers)
    )
    assert (done, progress) == (2, [(1, 3), (2, 3)])
    assert native.missing([*good, broken], torch.bfloat16) == [broken]
    assert _hits(good[0]) == 1
    assert len(children) == 2
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def _fresh_of_activations() -> native.Kernel:
    @kernel
    def fresh(block: int, x: Activation) -> None:
        x[block] = narrowed(widened(x[block]), x)

    assert isinstance(fresh, native.Kernel)
    return fresh


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_compiling_process_outlives_the_one_that_asked(tmp_path: Path, number: int) -> None:
    code = (
        "import torch\n"
        "from fastbyol_kernels import native\n"
        "from fastbyol_kernels.views import cpu\n"
        "torch.set_num_threads(2)\n"
        "fork = native._forked\n"
        "def told(*arguments):\n"
        "    print(child := fork(*arguments), flush=True)\n"
        "    return child\n"
        "native._forked = told\n"
        "native.compile_ahead([cpu._views, cpu._views], torch.float32, print)\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as asking:
        assert asking.stdout is not None
        children = [int(asking.stdout.readline()) for _ in range(2)]
        asking.send_signal(number)
        # The children have its standard output: it ends when the last of them does.
        assert asking.stdout.read() == ""
    assert asking.returncode == -number
    processes.wait_for_end(children)  # the last of their exit


def test_code_of_other_sources_is_never_taken_from_the_cache(tmp_path: Path) -> None:
    """Change the package's sources, which numba does not check: it looks at one file only."""
    package = tmp_path / "fastbyol_kernels"
    package.mkdir()
    source = Path(native.__file__).read_text("utf-8")
    (package / "__init__.py").touch()
    shutil.copy(dispatch.__file__, package)
    mine = (
        "import torch\nfrom fastbyol_kernels.native import I64, kernel\n"
        "@kernel\ndef number(block: int, out: I64, first: int, second: int) -> None:\n    "
        "out[block] = first\n"
        "out = torch.zeros(1, dtype=torch.int64)\nnumber(1, out, 7, 8)\nprint(int(out))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for text, program, expected in (
        (source, mine, "7"),
        (source, mine, "7"),
        (source.replace("index += 1", "index = min(index + 2, 5)"), mine, "8"),
        (source, mine.replace("= first", "= second"), "8"),
    ):
        (package / "native.py").write_text(text)
        (tmp_path / "mine.py").write_text(program)
        run = [sys.executable, str(tmp_path / "mine.py")]
        done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
        assert done.stdout.strip() == expected, done.stderr
    assert len(list((package / "__pycache__").glob("kernels-*/native.*number*.nbi"))) == 3


@pytest.mark.slow
def test_code_from_the_cache_gives_the_bits_of_code_just_compiled(tmp_path: Path) -> None:
    """Compare two processes, like a run that started without a cache and is resumed with one."""
    code = (
        "import torch\n"
        "from fastbyol_kernels.batch_norm import batch_norm\n"
        "from fastbyol_kernels.weight_standardization import weight_standardization\n"
        "torch.manual_seed(0)\n"
        "w = torch.randn(64, 32, 3, 3, requires_grad=True)\n"
        "weight_standardization(w).backward(torch.randn(64, 32, 3, 3))\n"
        "x = torch.randn(64, 32, 16, "
        "16).contiguous(memory_format=torch.channels_last).requires_grad_()\n"
        "affine = torch.rand(2, 32).unbind()\n"
        "y = batch_norm(x, *affine, torch.zeros(32), torch.ones(32), 2, momentum=0.1, eps=1e-5, "
        "relu=True)\n"
        "y.backward(torch.randn(64, 32, 16, 16))\n"
        "print(*(t.view(torch.int32).sum(dtype=torch.int64).item() for t in (w.grad, y, x.grad)))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    results = [
        subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
        for _ in range(2)
    ]
    assert results[0].stdout, results[0].stderr
    assert results[0].stdout == results[1].stdout
    assert list(tmp_path.rglob("*.nbc"))


def test_a_forked_child_works_alone() -> None:
    """Fork, as DataLoader's workers are, to a child without torch's threads."""
    torch.set_num_threads(2)
    _count(10, torch.zeros(10, dtype=torch.int64), 1)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        counts = torch.zeros(10, dtype=torch.int64)
        _count(10, counts, 1)
        os._exit(0 if counts.tolist() == [1] * 10 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_two_threads_that_compile_at_once_run_code_that_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @kernel
    def once(block: int, counts: I64) -> None:
        counts[block] += 1

    made, both = [], threading.Barrier(2)

    def compile_slowly(self: native.Kernel, activation: object) -> object:
        both.wait()
        made.append(compiled(self, activation))
        return made[-1]

    compiled = native.Kernel._compile
    monkeypatch.setattr(native.Kernel, "_compile", compile_slowly)
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    threads = [threading.Thread(target=once, args=(1, each)) for each in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(each) for each in counts] == [1, 1]
    assert len(made) == 2
    assert next(iter(once._compiled.values())) in made
