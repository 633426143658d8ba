"""What the build of FFCV refuses. That it builds, `make setup` shows, and test_decode_ffcv uses."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol import build_ffcv
from fastbyol.errors import FastbyolError
from foreign_betons import needs_ffcv


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("apt-get", "no apt-get: FFCV is built from packages of Debian"),
        ("g++", "apt-get install g++`"),
        ("tqdm", "pip install tqdm"),
        ("pip", "-m ensurepip"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str, says: str
) -> None:
    """On a machine that has everything else, uv not."""
    tools, modules = {"apt-get", "dpkg", "g++"} - {missing}, {"tqdm", "setuptools", "pip"}
    find = importlib.util.find_spec
    monkeypatch.setattr(shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (name != missing or None) if name in modules else find(name),
    )
    monkeypatch.setattr(Path, "exists", lambda path: True)
    with pytest.raises(SystemExit) as ended:
        build_ffcv.main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastbyol.build_ffcv: error: ")
    assert says in err
    assert err.count("\n") == 1


def test_python_without_headers_needs_a_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build_ffcv.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "python3-dev" in build_ffcv.lacking()
    (tmp_path / "Python.h").touch()
    assert "python3-dev" not in build_ffcv.lacking()


def test_an_environment_of_uv_is_installed_into_by_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_ffcv, "has_pip", lambda: False)
    assert build_ffcv.installer() == ["uv", "pip", "install", "--python", sys.executable]


def test_a_tool_that_fails_shows_its_last_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FastbyolError, match=r"^`sh -c .*` ended with 3, as above$"):
        build_ffcv._run(["sh", "-c", "seq 100; echo no libopencv >&2; exit 3"], tmp_path)
    assert capsys.readouterr().err.splitlines()[-2:] == ["100", "no libopencv"]


# Looks up a name that it has not had, and calls the function.
RUNNING = """\
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print("loaded", flush=True)
sys.stdin.read()
library.tjInitDecompress.restype = ctypes.c_void_p
assert library.tjInitDecompress()
"""


@needs_ffcv
def test_built_again_it_leaves_a_process_alone_that_runs_it(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("ffcv")
    assert spec is not None
    (package,) = spec.submodule_search_locations or ()
    name = "libturbojpeg.so.0"
    build_ffcv._put(Path(package, name), tmp_path)
    words = [sys.executable, "-c", RUNNING, str(tmp_path / name)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loaded\n"
        build_ffcv._put(Path(package, name), tmp_path)
        process.communicate()
    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
