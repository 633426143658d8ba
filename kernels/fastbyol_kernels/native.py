"""CPU kernels: numba functions with named, typed arguments that run on torch's OpenMP threads."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import IO, Annotated, Any, get_type_hints

import numba
import numpy as np
import torch
from numba.core import caching, registry
from numba.core.ccallback import CFunc
from numba.core.cgutils import ir
from numba.core.compiler import Compiler
from numba.core.types import CPointer  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array
from torch import Tensor

from fastbyol_kernels.dispatch import is_plain

# The types of a kernel's arguments, beside ``int`` and ``float``, which are 64 bits wide. A kernel
# sees a tensor as a flat array without bounds.
F32 = Annotated[Any, numba.float32]
F64 = Annotated[Any, numba.float64]
I32 = Annotated[Any, numba.int32]
I64 = Annotated[Any, numba.int64]
U8 = Annotated[Any, numba.uint8]
# bf16, seen as its bits (see ``widened`` and ``narrowed``), or f32. All activations of a call have
# the same dtype, and the kernel is compiled for each.
_ACTIVATION, _WORKER = "bf16 or f32", "worker"
Activation = Annotated[Any, _ACTIVATION]
# The number of the thread, from 0, below torch.get_num_threads(). The caller does not pass it.
Worker = Annotated[int, _WORKER]

_BF16 = numba.uint16
_DTYPES = {
    numba.float32: torch.float32,
    numba.float64: torch.float64,
    numba.int32: torch.int32,
    numba.int64: torch.int64,
    numba.uint8: torch.uint8,
}
_ELEMENTS = {torch.float32: numba.float32, torch.bfloat16: _BF16}
# A call is a table of 64-bit words: the next block, the number of blocks, the number of workers
# that have started, then the arguments.
_NEXT, _BLOCKS, _WORKERS, _ARGUMENTS = range(4)
# The length of every array that a kernel sees: it has to know the ends of its blocks itself.
_ENDLESS = 1 << 40
# Sums may be reordered, which vector instructions need; NaN and infinity are kept. Division by zero
# is C's, not an exception: nothing may be raised in a thread that Python did not start.
_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
# The OpenMP libraries that torch may have loaded. All of them export GNU's entry point.
_OPENMP = ("libgomp.so.1", "libiomp5.so", "libomp.so")
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_SIGNATURE = (CPointer(numba.int64),), numba.void
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# More would wait for one kernel, that of the views, which takes a third of the time of all.
_MOST_PROCESSES = 4
_log = logging.getLogger(__name__)


class Kernel:
    """A kernel that is compiled, or read from numba's cache, at its first call: up to a second."""

    def __init__(self, function: Callable[..., None], *, backwards: bool) -> None:
        self._function, self._backwards, self.__doc__ = function, backwards, function.__doc__
        hints = get_type_hints(function, include_extras=True)
        names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        self._kinds = {
            name: getattr(hints[name], "__metadata__", (hints[name],))[0] for name in names
        }
        self._passed = tuple((name, kind) for name, kind in self._kinds.items() if kind != _WORKER)
        self._compiled: dict[torch.dtype, Any] = {}

    def __call__(self, num_blocks: int, *arguments: Tensor | float) -> None:
        """Run blocks 0 to ``num_blocks`` - 1 and wait for them, without holding the GIL.

        The caller answers for the sizes of tensors and for the memory layout that the kernel
        expects. Raises ValueError, naming the argument, for a tensor of another dtype than declared
        and for one that is not a plain CPU tensor: there may be no memory behind its address.
        """
        words: list[Any] = [0, num_blocks, 0]
        activation = None
        for (name, kind), value in zip(self._passed, arguments, strict=True):
            if isinstance(value, Tensor) == (kind in (int, float)):
                raise TypeError(
                    f"{name} is a {type(value).__name__}, the kernel {self._function.__name__} "
                    f"takes {kind}"
                )
            if not isinstance(value, Tensor):
                words.append(
                    value if kind is int else struct.unpack("q", struct.pack("d", value))[0]
                )
                continue
            if not is_plain(value):
                what = f"a {type(value).__name__} on {value.device}"
                raise ValueError(
                    f"{name} is {what}, compiled code takes plain tensors on a CPU: take "
                    'kernels="reference"'
                )
            if kind == _ACTIVATION and activation is None and value.dtype in _ELEMENTS:
                activation = value.dtype
            expected = activation if kind == _ACTIVATION else _DTYPES[kind]
            if value.dtype != expected:
                raise ValueError(
                    f"{name} is {value.dtype}, the kernel {self._function.__name__} takes "
                    f"{expected or kind}"
                )
            words.append(value.data_ptr())
        if num_blocks < 1:
            return
        table = (ctypes.c_int64 * len(words))(*words)
        address, threads = (
            self._address(activation or torch.float32),
            min(torch.get_num_threads(), num_blocks),
        )
        team = _team() if threads > 1 else None
        if team is None:
            _FUNCTION(address)(ctypes.addressof(table))
        else:
            team(address, ctypes.addressof(table), threads, 0)

    def _address(self, activation: torch.dtype) -> int:
        compiled = self._compiled.get(activation)
        if compiled is None:
            # If two threads compile at once, both use the first result: code without a reference is
            # freed.
            compiled = self._compiled.setdefault(activation, self._compile(_ELEMENTS[activation]))
        return int(compiled.address)

    def _compile(self, activation: Any) -> Any:
        """Compile the loop over blocks, or read it from the cache, for one dtype of activations."""
        made: Any = CFunc(self._loop(activation), _SIGNATURE, {}, {"nopython": True, **_OPTIONS})
        with _cache_folder() as folder:
            if folder is None:
                made.compile()
                return made
            made._cache = _kept(made._pyfunc, folder)
            try:
                made.compile()
            except Exception as error:
                # A full disk, or a damaged file, which goes. What else fails does so again below.
                if isinstance(error, OSError):
                    _say_once(f"{Path(folder).resolve()}: {error.strerror}")
                with suppress(OSError):
                    Path(made._cache._cache_file._index_path).unlink()
                made._cache = caching.NullCache()
                made.compile()
        return made

    def _loop(self, activation: Any) -> FunctionType:
        """Return the loop over blocks with the kernel in it, under a name of its own."""
        body = inlined(self._function)
        unpack = _unpack(
            [activation if kind == _ACTIVATION else kind for kind in self._kinds.values()]
        )
        code = (_backwards if self._backwards else _forwards).__code__
        # The name identifies the kernel, its sources and what compiles it, because numba looks at
        # less: at one file, at its own version, and at the CPU in an index that two machines on one
        # disk may write at once.
        name = f"{self._function.__module__}.{self._function.__qualname__}.{activation}"
        name += "." + _fingerprint(Path(self._function.__code__.co_filename))
        loop = FunctionType(code, {**globals(), "body": body, "unpack": unpack}, name)
        loop.__module__ = __name__
        loop.__qualname__ = "".join(letter if letter.isalnum() else "_" for letter in name)
        return loop

    def _fitting(self, activation: torch.dtype) -> torch.dtype:
        """Return ``activation``, or what stands for it where the kernel takes none."""
        return activation if _ACTIVATION in self._kinds.values() else torch.float32


def kernel(function: Callable[..., None] | None = None, *, backwards: bool = False) -> Any:
    """Turn ``function`` into a ``Kernel``. Its first parameter is a block's number.

        @kernel
        def double(block: int, values: F32) -> None:
            for i in range(block * 1024, (block + 1) * 1024):
                values[i] *= np.float32(2)

        double(len(values) // 1024, values)

    Threads take blocks one by one. A kernel writes only what belongs to its block, so its results
    are the same bits for any number of threads. With ``backwards`` the last block runs first: a
    pass then starts with the data that the pass before has left in the caches.
    """
    if function is None:
        return lambda function: Kernel(function, backwards=backwards)
    return Kernel(function, backwards=backwards)


# Placeholders in the two loops below, which ``Kernel._compile`` replaces.
unpack: Any = None
body: Any = None


def _forwards(table):
    arguments = unpack(table)
    block = _next_block(table)
    while block < _num_blocks(table):
        body(block, *arguments)
        block = _next_block(table)


def _backwards(table):
    arguments = unpack(table)
    block = _next_block(table)
    while block < _num_blocks(table):
        body(_num_blocks(table) - 1 - block, *arguments)
        block = _next_block(table)


@cache
def _fingerprint(source: Path) -> str:
    """Return a digest of what changes a kernel: ``source``, this package, the compiler, the CPU."""
    files = sorted({source, *Path(__file__).parent.rglob("*.py")})
    cpu = registry.cpu_target.target_context.codegen().magic_tuple()
    compiler = repr((numba.__version__, version("llvmlite"), cpu)).encode()
    return hashlib.sha256(b"".join([compiler, *map(Path.read_bytes, files)])).hexdigest()[:16]


class _Locator:
    """Numba's way to one folder, for functions whose name says what they were compiled from."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @classmethod
    def from_function(cls, function: Any, file: str) -> _Locator:
        return cls(function.cache_folder)

    def get_cache_path(self) -> str:
        return self._folder

    def ensure_cache_path(self) -> None:
        """Do nothing: ``_cache_folder`` has made it."""

    def get_source_stamp(self) -> str:
        return ""

    def get_disambiguator(self) -> str:
        return ""


class _InFolder(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _InFolder


def _kept(loop: Any, folder: str) -> Any:
    """Return numba's cache of ``loop`` in ``folder``."""
    loop.cache_folder = folder
    return _Cache(loop)


@contextmanager
def _cache_folder() -> Iterator[str | None]:
    """Yield the path of the folder of compiled kernels while the body runs, or None without one.

    It is the first of ``_parents`` that can be written. What lies in it is run, and unpickled
    before that: so it has to be this user's own, and nobody else may write it. Its path leads
    through an open descriptor, so that it stays the folder that was checked, whoever may rename
    those above it.
    """
    for parent in _parents():
        own = parent / f"kernels-{os.geteuid()}"
        try:
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            status = os.fstat(descriptor)
            is_private = status.st_uid == os.geteuid() and not status.st_mode & 0o022
            if is_private and os.access(own, os.W_OK | os.X_OK):
                yield f"/proc/self/fd/{descriptor}" if sys.platform == "linux" else str(own)
                return
        finally:
            os.close(descriptor)
    _say_once("no folder for compiled kernels that is this user's alone and can be written")
    yield None


def _parents() -> Iterator[Path]:
    """Yield where the folder of compiled kernels may be: beside them, or where fastbyol caches."""
    variables = ("NUMBA_CACHE_DIR", "FASTBYOL_CACHE", "XDG_CACHE_HOME")
    numbas, own, users = (Path(os.environ.get(name, "")) for name in variables)
    if numbas.name:
        yield numbas
    yield Path(__file__).parent / "__pycache__"
    if own.name:
        yield own
    with suppress(RuntimeError):  # no home folder
        yield (users if users.name else Path.home() / ".cache") / "fastbyol"


@cache
def _say_once(reason: str) -> None:
    _log.warning(
        "%s: kernels are compiled at every start; name another with FASTBYOL_CACHE=DIR", reason
    )


def missing(kernels: Sequence[Kernel], activation: torch.dtype) -> list[Kernel]:
    """Return those of ``kernels`` that the cache lacks for ``activation``: none without a cache."""
    with _cache_folder() as folder:
        return [] if folder is None else [k for k in kernels if not _is_kept(k, activation, folder)]


def _is_kept(kernel: Kernel, activation: torch.dtype, folder: str) -> bool:
    loop = kernel._loop(_ELEMENTS[kernel._fitting(activation)])
    return Path(_kept(loop, folder)._cache_file._index_path).exists()


def compile_ahead(
    kernels: Sequence[Kernel], activation: torch.dtype, progress: Callable[[int, int], None]
) -> int:
    """Compile ``kernels``, 255 at most, for ``activation`` into the cache, several at once.

    ``progress`` is called with how many are done, and of how many. Return how many are: what fails
    is left to the first call. Numba compiles in one thread at a time, so forked processes do it,
    as many as torch has threads, up to four. None outlives this call, an error in it or this
    process. Call it in a program's main thread, while no other one compiles.
    """
    children: list[int] = []
    done = 0
    with ExitStack() as opened:
        tasks, into, finished, finish = (
            opened.enter_context(os.fdopen(descriptor, mode, buffering=0))
            for pipe in (os.pipe(), os.pipe())
            for descriptor, mode in zip(pipe, ("rb", "wb"), strict=True)
        )
        into.write(bytes(range(len(kernels))))
        into.close()
        try:
            with suppress(OSError):  # no more processes are allowed
                children.extend(
                    _forked(kernels, activation, tasks, finish)
                    for _ in range(min(torch.get_num_threads(), _MOST_PROCESSES, len(kernels)))
                )
            finish.close()
            while finished.read(1):
                done += 1
                progress(done, len(kernels))
        finally:
            for child in children:
                with suppress(ProcessLookupError, ChildProcessError):
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
    return done


def _forked(
    kernels: Sequence[Kernel], activation: torch.dtype, tasks: IO[bytes], finish: IO[bytes]
) -> int:
    """Fork a process that compiles the kernels whose numbers it reads; return its number."""
    parent = os.getpid()
    with warnings.catch_warnings():
        # Of other threads; what they may hold, such as a lock of the screen, is not asked for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        while os.getppid() == parent and (task := tasks.read(1)):
            kernel = kernels[task[0]]
            kernel._address(kernel._fitting(activation))
            finish.write(task)
    finally:
        os._exit(0)


@cache
def _team() -> Callable[[int, int, int, int], None] | None:
    """Return GOMP_parallel(function, data, threads, flags) of torch's OpenMP library, or None."""
    # A pool of our own would compete with torch's threads, which spin for a while after each
    # operation: the optimizer's step took twice as long (bench/LOG.md has the measurement).
    for name in _OPENMP:
        try:
            library = ctypes.CDLL(
                name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY if sys.platform != "win32" else 0
            )
            run = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        run.argtypes, run.restype = (
            (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint),
            None,
        )
        return run
    return None


# Intrinsics that read the table of a call.


def _word(context: Any, builder: Any, table: Any, index: int) -> Any:
    return builder.gep(table, [context.get_constant(numba.int64, index)])


def _count(context: Any, builder: Any, table: Any, index: int) -> Any:
    return builder.atomic_rmw(
        "add",
        _word(context, builder, table, index),
        context.get_constant(numba.int64, 1),
        "monotonic",
    )


@intrinsic
def _next_block(typing: Any, table: Any) -> Any:
    """Return the next block, each to one thread only."""
    return numba.int64(table), lambda context, builder, _, arguments: _count(
        context, builder, arguments[0], _NEXT
    )


@intrinsic
def _num_blocks(typing: Any, table: Any) -> Any:
    """Return the number of blocks."""
    return numba.int64(table), lambda context, builder, _, arguments: builder.load(
        _word(context, builder, arguments[0], _BLOCKS)
    )


def _unpack(kinds: list[Any]) -> Any:
    """Return an intrinsic that reads arguments of the types ``kinds`` from a table into a tuple."""
    types = [
        numba.int64
        if kind in (int, _WORKER)
        else numba.float64
        if kind is float
        else numba.types.Array(kind, 1, "C")
        for kind in kinds
    ]
    unpacked = numba.types.Tuple(types)

    @intrinsic
    def unpack(typing: Any, table: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values, index = [], _ARGUMENTS
            for kind, of in zip(kinds, types, strict=True):
                if kind == _WORKER:
                    values.append(_count(context, builder, arguments[0], _WORKERS))
                    continue
                word = builder.load(_word(context, builder, arguments[0], index))
                index += 1
                if kind is float:
                    word = builder.bitcast(word, ir.DoubleType())
                values.append(word if kind in (int, float) else _array(context, builder, of, word))
            return context.make_tuple(builder, unpacked, values)

        return unpacked(table), generate

    return unpack


def _array(context: Any, builder: Any, of: Any, address: Any) -> Any:
    """Return an array without bounds at ``address``."""
    array = context.make_array(of)(context, builder)
    data = builder.inttoptr(address, context.get_data_type(of.dtype).as_pointer())
    size = context.get_constant(numba.types.intp, of.dtype.bitwidth // 8)
    shape = [context.get_constant(numba.types.intp, _ENDLESS)]
    populate_array(array, data=data, shape=shape, strides=[size], itemsize=size, meminfo=None)
    return array._getvalue()


# Functions for use in kernels.


def widened(element):
    """Return ``element`` of an Activation as float32."""
    raise NotImplementedError("in a kernel only")


def narrowed(number, array):
    """Round float32 ``number`` to the element type of the Activation ``array``.

    Rounds to nearest, ties to even; NaN stays NaN.
    """
    raise NotImplementedError("in a kernel only")


@overload(widened, jit_options={"forceinline": True})
def _widened(element):
    if element == _BF16:
        return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    return lambda element: element


@overload(narrowed, jit_options={"forceinline": True})
def _narrowed(number, array):
    return (
        (lambda number, array: _to_bf16(number))
        if array.dtype == _BF16
        else (lambda number, array: number)
    )


@numba.njit(inline="always")
def _to_bf16(value):
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16((np.uint32(0x7FC00000) if value != value else rounded) >> np.uint32(16))


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z of float32, rounded once if the CPU can."""
    # Left to the compiler, the choice of products that it fuses, and the bits, would depend on its
    # version.

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FloatType()
        of_three = ir.FunctionType(kind, [kind] * 3)
        return builder.call(
            builder.module.declare_intrinsic("llvm.fmuladd", [kind], of_three), arguments
        )

    return numba.float32(numba.float32, numba.float32, numba.float32), generate


class _NoAlias(Compiler):  # type: ignore[misc]
    """A compiler that may assume that the arrays passed to a function do not overlap."""

    def __init__(self, *arguments: Any) -> None:
        *before, flags, local = arguments
        flags = flags.copy()
        flags.noalias = True
        super().__init__(*before, flags, local)


# For functions that kernels call. They must be inlined: otherwise a process that has just compiled
# a kernel calls the function's own compiled code, one that reads the kernel from the cache calls
# the copy inside it, and their sums differ.
inlined = numba.njit(forceinline=True, **_OPTIONS)
# For functions over disjoint parts of tensors. Without this promise the compiler checks for overlap
# at every call, or gives up vectorising if there are more than a few arguments.
noalias = numba.njit(forceinline=True, pipeline_class=_NoAlias, **_OPTIONS)
