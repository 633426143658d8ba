"""The loop over a batch as FFCV's compiler makes it of FFCV's native decoders, without FFCV's Loader.

FFCV 1.0.2's Loader drops the JPEG decoder's return code, so that damaged data trains without a word;
overwrites a batch when the next is taken; where it crops, sets aside room for the largest image
times five batches (46 GB for 12-megapixel pictures in batches of 256; here one picture a thread);
compiles anew for every loader (0.5 s and more); and leaks a thread and that room when an epoch ends
early. So the loop is ours, in the form that FFCV's compiler takes; what it calls is FFCV's.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from typing import Any

import numpy as np

from fastbyol.errors import UsageError, one_line
from fastbyol.process import left_as_found

_compiling = threading.Lock()


@functools.cache
def import_ffcv() -> Any:
    """Import FFCV, slow and full of side effects, without these. Return numba.

    Left to itself the import takes 2.4 s instead of 0.3 (it compiles a typed dict of two entries
    that only Python reads), leaves torch and numba with one thread, and starts numba's pool of
    threads, which nothing here uses: on a machine of one core a process that has forked since then
    waits at its exit for ever for a thread of it.

    Raises UsageError where FFCV, or the compiler that it needs, cannot be used.
    """
    other = "or take data.decoder = 'torchvision'"
    try:
        if importlib.util.find_spec("ffcv") is None:
            # Before numba is imported for it, .14 s that a machine with a GPU need not spend.
            raise ModuleNotFoundError("No module named 'ffcv'")
        with left_as_found(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import numba
            import numba.typed

            typed_dict, numba.typed.Dict = numba.typed.Dict, dict
            set_num_threads, numba.set_num_threads = numba.set_num_threads, lambda _: None
            try:
                import ffcv.loader
            finally:
                numba.typed.Dict, numba.set_num_threads = typed_dict, set_num_threads
            # For FFCV's own Loader, should anybody use it.
            ffcv.pipeline.compiler.set_num_threads = set_num_threads
    except (ImportError, OSError, ValueError) as error:
        what = f"FFCV cannot be used ({one_line(error, None)})"
        raise UsageError(f"{what}; `fastbyol doctor` says what to install, {other}") from error
    if numba.config.DISABLE_JIT:
        raise UsageError(f"NUMBA_DISABLE_JIT is set, and FFCV decodes by compiled code; unset it, {other}")
    return numba


@functools.cache
def loop(crop: bool) -> Any:
    """Compile the loop over images, with or without cropping them: a ``decoder.Loop``.

    It stays for the process's life: compiling takes half a second.
    """
    import_ffcv()
    from ffcv.libffcv import imdecode, memcpy, resize_crop
    from ffcv.pipeline.compiler import Compiler

    with _compiling:
        # What Compiler reads; its set_num_threads would set torch's too.
        Compiler.num_threads = 1
        calls = [Compiler.compile(call) for call in (imdecode, memcpy, resize_crop)]
        return Compiler.compile(_loop(crop, *calls))


def _loop(crop: bool, imdecode: Any, memcpy: Any, resize_crop: Any) -> Any:
    def decode(images: Any, status: Any, data: Any, places: Any) -> None:
        for row in range(len(places)):
            place = places[row]
            source, height, width = data[place.start : place.end], place.height, place.width
            if not place.raw:
                room = np.empty(height * width * 3, np.uint8) if crop else images[row].reshape(-1)
                status[row] = imdecode(source, room, height, width, height, width, 0, 0, 1, 1, False, False)
                source = room
            if crop:
                side = min(height, width)
                top, left = (height - side) // 2, (width - side) // 2
                resize_crop(source.reshape(height, width, 3), top, top + side, left, left + side, images[row])
            elif place.raw:
                memcpy(source, images[row])

    return decode
