"""Kernels for a processor: numba's machine code, run by the very threads that torch's own operations run on.

A kernel is a function over a table of 64-bit integers. It takes block after block until none is left, and writes what belongs
to that block alone, so that its results are the same bits for any number of threads:

    @kernel
    def double(table):
        values = floats(table, 0)
        index = take(table)
        while index < blocks(table):
            for i in range(index * 1024, (index + 1) * 1024):
                values[i] *= np.float32(2)
            index = take(table)

    double(len(values) // 1024, values)

A pool of threads of one's own would fight with torch's, which spin for a while after each operation: the optimizer's step took
twice as long beside them (bench/LOG.md, "one pass in machine code"). So the OpenMP library that torch has loaded is asked to
run the kernel. Machine code is kept in numba's cache beside the source, under names that change with any source here.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba.core.cgutils import ir
from numba.core.compiler import Compiler
from numba.core.types import CPointer  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload
from torch import Tensor

from fastbyol_kernels.dispatch import is_plain

# What every table begins with: the next block to take, how many there are, and how many workers have begun.
_NEXT, _BLOCKS, _WORKERS, _ARGUMENTS = 0, 1, 2, 3
# Sums may be added in any order, which vector instructions need; NaN and infinity stay what they are.
FASTMATH = {"reassoc", "contract", "nsz"}
# Where each library says that it is loaded; all of them know GNU's entry point.
_OPENMP = ("libgomp.so.1", "libiomp5.so", "libomp.so")
_SIGNATURE = numba.void(CPointer(numba.int64))
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Kernel:
    """A compiled kernel. Compiled, or read from the cache, at its first call, which takes up to a second."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @cached_property
    def _address(self) -> int:
        # numba asks whether a kernel's own file has changed, not what it imports; old code would read the table wrongly.
        self._function.__qualname__ += f"_{_sources()}"
        # Division by zero as in C, not an exception: nothing may be raised in a thread that Python does not know.
        options = {"nopython": True, "fastmath": FASTMATH, "error_model": "numpy"}
        try:
            self._compiled = numba.cfunc(_SIGNATURE, cache=True, **options)(self._function)
        except RuntimeError:  # numba found no folder to write its cache to
            self._compiled = numba.cfunc(_SIGNATURE, **options)(self._function)
        return int(self._compiled.address)

    def __call__(self, num_blocks: int, *arguments: Tensor | int) -> None:
        """Run blocks 0 to ``num_blocks`` - 1. Tensors must be contiguous in memory as the kernel reads them; the kernel trusts
        its caller. Waits until all is done; Python's other threads run meanwhile.

        Raises ValueError for a tensor that is not one of torch's own on the CPU: it may have no memory behind its address.
        """
        for a in arguments:
            if isinstance(a, Tensor) and not is_plain(a):
                what = f"{type(a).__name__} on {a.device}"
                raise ValueError(f'machine code takes plain tensors on a CPU, not a {what}: take kernels="reference"')
        if num_blocks < 1:
            return
        table = (ctypes.c_int64 * (_ARGUMENTS + len(arguments)))(
            0, num_blocks, 0, *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        )
        place, threads = ctypes.addressof(table), min(torch.get_num_threads(), num_blocks)
        team = _team() if threads > 1 else None
        if team is None:
            _FUNCTION(self._address)(place)
        else:
            team(self._address, place, threads, 0)


def kernel(function: Callable[[Any], None]) -> Kernel:
    """Make a kernel of ``function``, which takes the table and returns nothing."""
    return Kernel(function)


@cache
def _sources() -> str:
    """A fingerprint of this package's source."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@cache
def _team() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch runs on, None if there is none."""
    for name in _OPENMP:
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY if sys.platform != "win32" else 0)
            run = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return run
    return None


# What kernels are written with.


def _counter(place: int, meaning: str) -> Any:
    def counter(typing: Any, table: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            at = builder.gep(arguments[0], [context.get_constant(numba.int64, place)])
            return builder.atomic_rmw("add", at, context.get_constant(numba.int64, 1), "monotonic")

        return numba.int64(table), generate

    counter.__doc__ = meaning
    return intrinsic(counter)


take = _counter(_NEXT, "The next block's index, handed out once.")
worker = _counter(_WORKERS, "To be called once: this thread's number, from 0, among at most as many as torch has threads.")


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Have the cache line at an address brought to the nearest cache, if there is such memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, number = context.get_value_type(CPointer(numba.int8)), context.get_value_type(numba.int32)
        of_four = ir.FunctionType(ir.VoidType(), [place, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place], of_four)
        # To read, with the highest locality, data.
        builder.call(function, [builder.inttoptr(arguments[0], place), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return numba.void(numba.int64), generate


def _pointer(dtype: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(CPointer(dtype)))

        return CPointer(dtype)(address), generate

    return pointer


_float32, _float64, _int64, _uint16, _uint8 = (
    _pointer(dtype) for dtype in (numba.float32, numba.float64, numba.int64, numba.uint16, numba.uint8)
)
# A kernel knows the ends of its blocks; the arrays it sees have none.
_ENDLESS = 1 << 40


@numba.njit(inline="always")
def argument(table, index):
    """An integer that was passed."""
    return numba.carray(table, _ENDLESS)[_ARGUMENTS + index]


@numba.njit(inline="always")
def blocks(table):
    """How many blocks there are."""
    return numba.carray(table, _ENDLESS)[_BLOCKS]


@numba.njit(inline="always")
def floats(table, index):
    """A float32 tensor that was passed, flat."""
    return numba.carray(_float32(argument(table, index)), _ENDLESS)


@numba.njit(inline="always")
def doubles(table, index):
    """A float64 tensor that was passed, flat."""
    return numba.carray(_float64(argument(table, index)), _ENDLESS)


@numba.njit(inline="always")
def halves(table, index):
    """A bfloat16 tensor that was passed, flat, as its bits: see ``widened`` and ``narrowed``."""
    return numba.carray(_uint16(argument(table, index)), _ENDLESS)


@numba.njit(inline="always")
def widened(bits):
    """The value of a bfloat16, float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always")
def narrowed(value):
    """The bits of a float32 rounded to bfloat16, to the nearest and ties to even; NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16((np.uint32(0x7FC00000) if value != value else rounded) >> np.uint32(16))


@numba.njit(inline="always")
def integers(table, index):
    """An int64 tensor that was passed, flat."""
    return numba.carray(_int64(argument(table, index)), _ENDLESS)


@numba.njit(inline="always")
def octets(table, index):
    """A uint8 tensor that was passed, flat."""
    return numba.carray(_uint8(argument(table, index)), _ENDLESS)


def value(element):
    """An element of a bfloat16 or float32 tensor, float32: for kernels that are written once for both."""
    raise NotImplementedError("in a kernel only")


def rounded(number, array):
    """``number``, float32, as an element of ``array``, a bfloat16 or float32 tensor."""
    raise NotImplementedError("in a kernel only")


@overload(value, jit_options={"forceinline": True})
def _value(element):
    return (lambda element: widened(element)) if element == numba.uint16 else (lambda element: element)


@overload(rounded, jit_options={"forceinline": True})
def _rounded(number, array):
    return (lambda number, array: narrowed(number)) if array.dtype == numba.uint16 else (lambda number, array: number)


class _Apart(Compiler):  # type: ignore[misc]
    """Compiles on the promise that arrays passed to a function do not overlap."""

    def __init__(self, *arguments: Any) -> None:
        *before, flags, local = arguments
        flags = flags.copy()
        flags.noalias = True
        super().__init__(*before, flags, local)


# For functions that kernels call. They must become part of each: a process that has just compiled a kernel would call such a
# function as it was compiled by itself, one that reads the kernel from the cache as it was compiled in it, and sums differ.
shared = numba.njit(fastmath=FASTMATH, error_model="numpy", forceinline=True)
# And for functions over parts of tensors: their arguments do not overlap, which the compiler would else check at every call,
# or, with more than a few, not make vectors at all.
apart = numba.njit(fastmath=FASTMATH, error_model="numpy", forceinline=True, pipeline_class=_Apart)
