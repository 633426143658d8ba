"""Code that torch.compile keeps on disk belongs to the kernels that it was compiled with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastbyol_kernels

KEY = """
import fastbyol_kernels, torch
from torch._inductor.codecache import FxGraphHashDetails
print(torch.compiler.config.cache_key_tag)
print(FxGraphHashDetails(None, [], {}, []).cache_key_tag)
"""


def _keys(package: Path) -> tuple[str, ...]:
    """Return the tag, and the part that Inductor puts into its keys, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", KEY],
        env={"PYTHONPATH": str(package), "TORCH_COMPILE_CACHE_KEY_TAG": "mine-", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.split())


@pytest.mark.slow
def test_another_source_has_another_key(tmp_path: Path) -> None:
    """Inductor does not ask what shapes an operation returns: its sources must be in the key."""
    source = Path(fastbyol_kernels.__file__).parent
    same, other = (tmp_path / name for name in ("same", "other"))
    for copy in (same, other):
        shutil.copytree(source, copy / source.name)
    with (other / source.name / "group_norm" / "triton.py").open("a") as file:
        file.write("\n")
    key, unchanged, changed = _keys(source.parent), _keys(same), _keys(other)
    assert key[0].startswith("mine-fastbyol-")
    assert key[0] == key[1]
    assert key == unchanged != changed
