"""Kernels for a processor: blocks are taken once, by torch's own threads, with the same bits for any number of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbyol_kernels import dispatch, processor
from fastbyol_kernels.processor import argument, blocks, floats, halves, integers, kernel, narrowed, take, widened

SIZE = 64


@kernel
def _count(table):  # type: ignore[no-untyped-def]
    """How often each block is taken."""
    counts, add = integers(table, 0), argument(table, 1)
    block = take(table)
    while block < blocks(table):
        counts[block] += add
        block = take(table)


@kernel
def _double(table):  # type: ignore[no-untyped-def]
    """Twice a tensor's values, and their sums by blocks."""
    sums = floats(table, 1)
    block = take(table)
    while block < blocks(table):
        values = floats(table, 0)[block * SIZE : (block + 1) * SIZE]
        total = np.float32(0)
        for i in range(SIZE):
            values[i] *= np.float32(2)
            total += values[i]
        sums[block] = total
        block = take(table)


@kernel
def _through_bf16(table):  # type: ignore[no-untyped-def]
    """float32 to bfloat16, and back."""
    values, bits, back = floats(table, 0), halves(table, 1), floats(table, 2)
    block = take(table)
    while block < blocks(table):
        bits[block] = narrowed(values[block])
        back[block] = widened(bits[block])
        block = take(table)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 1000])
def test_every_block_is_taken_once(threads: int, num_blocks: int) -> None:
    torch.set_num_threads(threads)
    counts = torch.zeros(max(1, num_blocks), dtype=torch.int64)
    _count(num_blocks, counts, 3)
    assert counts.tolist() == [3] * num_blocks + [0] * (num_blocks == 0)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    source, found = torch.randn(1000 * SIZE), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        values, sums = source.clone(), torch.empty(1000)
        _double(1000, values, sums)
        assert torch.equal(values, 2 * source)
        found.append(sums)
    assert all(torch.equal(found[0], other) for other in found[1:])
    torch.testing.assert_close(found[0].double(), (2 * source.double()).view(-1, SIZE).sum(1), rtol=0, atol=1e-4)


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
    bits, back = torch.empty(len(source), dtype=torch.bfloat16), torch.empty_like(source)
    _through_bf16(len(source), source, bits, back)
    expected = source.bfloat16()
    torch.testing.assert_close(bits, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(back.signbit() & ~back.isnan(), source.signbit() & ~source.isnan())


def test_without_torchs_threads_the_caller_does_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_team", lambda: None)
    torch.set_num_threads(4)
    counts = torch.zeros(50, dtype=torch.int64)
    _count(50, counts, 1)
    assert counts.tolist() == [1] * 50


def test_torchs_own_threads_are_found() -> None:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this build of torch runs without OpenMP")
    processor._team.cache_clear()
    assert processor._team() is not None


def test_code_of_other_sources_is_never_taken_from_the_cache(tmp_path: Path) -> None:
    """numba itself would: it looks at the file of the kernel alone."""
    package = tmp_path / "fastbyol_kernels"
    package.mkdir()
    source = Path(processor.__file__).read_text("utf-8")
    (package / "__init__.py").touch()
    shutil.copy(dispatch.__file__, package)
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom fastbyol_kernels.processor import argument, integers, kernel, take\n"
        "@kernel\ndef number(table):\n    integers(table, 0)[take(table)] = argument(table, 1)\n"
        "out = torch.zeros(1, dtype=torch.int64)\nnumber(1, out, 7, 8)\nprint(int(out))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for text, found in (
        (source, "7"),
        (source, "7"),
        (source.replace("_ARGUMENTS + index", "_ARGUMENTS + index + index"), "8"),
    ):
        (package / "processor.py").write_text(text)
        run = [sys.executable, str(tmp_path / "mine.py")]
        done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
        assert done.stdout.strip() == found, done.stderr
    assert len(list((tmp_path / "__pycache__").glob("mine.number_*.nbi"))) == 2


@pytest.mark.slow
def test_code_from_the_cache_gives_the_bits_of_code_just_compiled(tmp_path: Path) -> None:
    """A run is resumed from the cache that was begun without one."""
    code = (
        "import torch\n"
        "from fastbyol_kernels.batch_norm import batch_norm\n"
        "from fastbyol_kernels.weight_standardization import weight_standardization\n"
        "torch.manual_seed(0)\n"
        "w = torch.randn(64, 32, 3, 3, requires_grad=True)\n"
        "weight_standardization(w).backward(torch.randn(64, 32, 3, 3))\n"
        "x = torch.randn(64, 32, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()\n"
        "affine = torch.rand(2, 32).unbind()\n"
        "y = batch_norm(x, *affine, torch.zeros(32), torch.ones(32), 2, momentum=0.1, eps=1e-5, relu=True)\n"
        "y.backward(torch.randn(64, 32, 16, 16))\n"
        "print(*(t.view(torch.int32).sum(dtype=torch.int64).item() for t in (w.grad, y, x.grad)))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    found = [subprocess.run(run, capture_output=True, text=True, env=environment, check=False) for _ in range(2)]
    assert found[0].stdout, found[0].stderr
    assert found[0].stdout == found[1].stdout
    assert list(tmp_path.rglob("*.nbc"))


def test_a_forked_child_works_alone() -> None:
    """torch's threads do not live on in it; DataLoader's workers are such, with one thread set."""
    torch.set_num_threads(2)
    _count(10, torch.zeros(10, dtype=torch.int64), 1)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        counts = torch.zeros(10, dtype=torch.int64)
        _count(10, counts, 1)
        os._exit(0 if counts.tolist() == [1] * 10 else 1)
    assert os.waitpid(child, 0)[1] == 0
