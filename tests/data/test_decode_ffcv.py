"""FFCV's import without side effects, and its compiler. For what it decodes see test_decoder."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import foreign_betons as foreign
from fastbyol.data import decode_ffcv
from fastbyol.data.beton import inspect
from fastbyol.data.decoder import Decoder
from fastbyol.errors import UsageError

pytestmark = foreign.needs_ffcv

IMPORT = """
import warnings, torch
torch.set_num_threads({threads})
from fastbyol.data.decode_ffcv import import_ffcv
numba = import_ffcv()
import numba.typed
from ffcv.fields.rgb_image import IMAGE_MODES
assert torch.get_num_threads() == {threads}, torch.get_num_threads()
assert numba.typed.Dict.__module__.startswith("numba"), numba.typed.Dict
assert dict(IMAGE_MODES) == dict(jpg=0, raw=1)
"""


def test_import_leaves_no_side_effects() -> None:
    """Import it in a process where every warning is an error."""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT.format(threads=2)], check=True, timeout=600
    )


FORKED = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from fastbyol.data.decoder import Decoder
from fastbyol.data.beton import inspect
with Decoder(inspect(%r), size=16, workers=2, in_memory=True, decoder="ffcv"):
    pass
child = os.fork()
if not child:
    os._exit(0)
os.waitpid(child, 0)
"""


def test_on_one_core_a_process_that_forks_after_the_import_ends() -> None:
    """Use numba's default layer: TBB's pool, once started, would wait for ever here."""
    environment = {
        name: value for name, value in os.environ.items() if name != "NUMBA_THREADING_LAYER"
    }
    code = FORKED % str(foreign.made() / "raw.beton")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env=environment)


@pytest.mark.usefixtures("two_threads")
def test_missing_ffcv_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads = torch.get_num_threads()
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(
        UsageError, match=r"FFCV cannot be used \(.*ffcv.*\); `fastbyol doctor`"
    ) as caught:
        decode_ffcv.import_ffcv.__wrapped__()
    assert "\n" not in str(caught.value)
    assert torch.get_num_threads() == num_threads


def test_one_compilation_serves_all_loaders() -> None:
    for name in ("raw", "jpg", "unlabelled"):
        for in_memory in (True, False):
            info = inspect(foreign.made() / f"{name}.beton")
            with Decoder(info, size=16, workers=1, in_memory=in_memory, decoder="ffcv") as decoder:
                decoder.decode(np.arange(3), np.empty((3, *decoder.shape), np.uint8))
    loop = decode_ffcv.loop(False)
    assert len(loop.signatures) == 1


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(UsageError, match="NUMBA_DISABLE_JIT is set"):
        decode_ffcv.import_ffcv.__wrapped__()
