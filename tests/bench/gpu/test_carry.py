"""bench/carry.sh: FFCV of the archive loads on another machine; a failure leaves no archive."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fastbyol_bench.gpu.calls import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed"
)
# An interpreter whose pip does no work on a network: it makes a package, or fails.
STAND_IN = """\
#!/bin/sh
[ "$1 $2" = "-m pip" ] || exec {python} {options} "$@"
while [ "$1" != --target ]; do shift; done
mkdir "$2/pydantic" && : >"$2/pydantic/__init__.py"
exit {code}
"""
# Whose FFCV it is, and what the process has mapped of the libraries beside it.
LOADED = """\
import ctypes, importlib.util, sys
sys.path.insert(0, sys.argv[1])
package = importlib.util.find_spec("ffcv").submodule_search_locations[0]
ctypes.CDLL(f"{package}/_libffcv.abi3.so")
with open("/proc/self/maps") as maps:
    print(*sorted({line.split()[-1] for line in maps if "/ffcv/" in line}), sep="\\n")
"""


def carry(
    folder: Path, file: Path, version: str, code: int = 0, options: str = ""
) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable, code=code, options=options))
    python.chmod(0o755)
    script = ROOT / "bench" / "carry.sh"
    return subprocess.run(
        ["sh", script, file, version],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_ffcv_of_the_archive_loads_with_the_libraries_beside_it(
    tmp_path: Path, version: str
) -> None:
    file, there = tmp_path / "carry.tar.gz", tmp_path / "there"
    done = carry(tmp_path, file, version)
    assert done.returncode == 0, done.stderr
    with tarfile.open(file) as archive:
        archive.extractall(there, filter="data")
    assert (there / "pydantic").is_dir()
    assert (there / "distutils").is_dir() == (version != "3.11")
    assert not list(there.rglob("__pycache__"))
    out = subprocess.check_output([sys.executable, "-I", "-c", LOADED, there], text=True)
    libraries = ("_libffcv.abi3.so", "libtbb.so.12", "libturbojpeg.so.0")
    assert out.split() == [str(there / "ffcv" / name) for name in libraries]
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "python", there.name]
    again = carry(tmp_path, file, version)
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_a_failed_download_leaves_no_archive(tmp_path: Path) -> None:
    assert carry(tmp_path, tmp_path / "carry.tar.gz", "3.12", code=3).returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_an_interpreter_without_ffcv_is_said(tmp_path: Path) -> None:
    done = carry(tmp_path, tmp_path / "carry.tar.gz", "3.12", options="-I -S")
    assert done.returncode == 1
    assert done.stderr == f"carry.sh: no FFCV in {tmp_path / 'python'}: run make setup\n"
