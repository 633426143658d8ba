"""CPU kernels: typed arguments, blocks run once on torch's threads, equal bits for any number."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_without_a_cache_folder_a_kernel_is_compiled_anew() -> None:
    """Run as in a read-only container."""
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from fastbyol_kernels.weight_standardization import weight_standardization\n"
        "import torch\n"
        "print(weight_standardization(torch.tensor([[1.0, 3.0]])).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[[-0.7071017622947693, 0.7071017622947693]]\n", done.stderr


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
    assert len(list((package / "__pycache__").glob("native.*number*.nbi"))) == 3


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
