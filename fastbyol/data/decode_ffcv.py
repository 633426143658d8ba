"""The loop over a batch by FFCV's compiler and native decoders, without FFCV's Loader."""

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
    """Import FFCV without its side effects and return numba.

    A plain import takes 2.4 s instead of 0.3 (it compiles a typed dict of two entries that only
    Python reads), leaves torch and numba with one thread, and starts numba's thread pool, which is
    unused here. On one core, a process that forks after that never exits.

    Raises UsageError where FFCV, or the compiler that it needs, cannot be used.
    """
    other = "or take data.decoder = 'torchvision'"
    try:
        if importlib.util.find_spec("ffcv") is None:
            # Asked before the import of numba, which takes .14 s.
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
            # FFCV's own Loader needs it.
            ffcv.pipeline.compiler.set_num_threads = set_num_threads
    except (ImportError, OSError, ValueError) as error:
        what = f"FFCV cannot be used ({one_line(error, None)})"
        raise UsageError(f"{what}; `fastbyol doctor` says what to install, {other}") from error
    if numba.config.DISABLE_JIT:
        raise UsageError(
            f"NUMBA_DISABLE_JIT is set, and FFCV decodes by compiled code; unset it, {other}"
        )
    return numba


@functools.cache
def loop(crop: bool) -> Any:
    """Compile the loop over images, a ``decoder.Loop``. It takes half a second, once a process."""
    import_ffcv()
    from ffcv.libffcv import imdecode, memcpy, resize_crop
    from ffcv.pipeline.compiler import Compiler

    with _compiling:
        # Compiler reads this attribute; its set_num_threads would change torch's threads, too.
        Compiler.num_threads = 1
        calls = [Compiler.compile(call) for call in (imdecode, memcpy, resize_crop)]
        return Compiler.compile(_loop(crop, *calls))


# FFCV 1.0.2's own Loader drops the JPEG decoder's return code, so that damaged data trains
# unnoticed; overwrites a batch when the next is taken; for crops reserves five batches of the
# largest image (46 GB for 12 megapixels in batches of 256; here one picture a thread); compiles for
# every loader (0.5 s and more); and leaks a thread and that memory when an epoch ends early.
def _loop(crop: bool, imdecode: Any, memcpy: Any, resize_crop: Any) -> Any:
    def decode(images: Any, status: Any, data: Any, regions: Any) -> None:
        for row in range(len(regions)):
            region = regions[row]
            source, height, width = data[region.start : region.end], region.height, region.width
            if not region.raw:
                room = np.empty(height * width * 3, np.uint8) if crop else images[row].reshape(-1)
                status[row] = imdecode(
                    source, room, height, width, height, width, 0, 0, 1, 1, False, False
                )
                source = room
            if crop:
                side = min(height, width)
                top, left = (height - side) // 2, (width - side) // 2
                resize_crop(
                    source.reshape(height, width, 3),
                    top,
                    top + side,
                    left,
                    left + side,
                    images[row],
                )
            elif region.raw:
                memcpy(source, images[row])

    return decode
