"""Build FFCV 1.0.2 and install it into this environment, without root, on Debian or Ubuntu.

    python -m fastbyol.build_ffcv

FFCV is Python and one small C++ extension, which uses libturbojpeg, ``cv::Mat`` and ``cv::resize``.
Debian's packages are unpacked into a temporary folder, unless they are installed. The extension is
linked statically against OpenCV's; libturbojpeg and TBB, which OpenCV's core calls, are copied to
where the extension is.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from fastbyol.errors import FastbyolError
from fastbyol.output import say

REQUIREMENT = (
    "ffcv==1.0.2 --hash=sha256:42766a487c8a659b543d070f24732c4b65aab8d96980f5792c63e91e55511f00\n"
)
DEBIAN = ("libopencv-core-dev", "libopencv-imgproc-dev", "libturbojpeg0-dev", "libtbb12")
SHARED = ("libturbojpeg.so.0", "libtbb.so.12")
LIBRARIES = ("libopencv_imgproc.a", "libopencv_core.a", *SHARED)
# FFCV includes all of OpenCV. Debian's core names one entry of OpenGL that nothing here reaches.
HEADER = """\
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
extern "C" __attribute__((weak, visibility("hidden")))
void *glXGetProcAddressARB(const unsigned char *) { return nullptr; }
"""
FLAGS = {
    "CC": "g++",
    "CXX": "g++",
    "CFLAGS": "-O2 -g0 -ffunction-sections -fdata-sections",
    "LDFLAGS": "-Wl,--gc-sections -Wl,--exclude-libs,ALL -Wl,--as-needed -s -Wl,-rpath,$ORIGIN",
}


def main() -> None:
    """Build, install and import FFCV; end with one line on standard error if that fails."""
    try:
        _demand_tools()
        with TemporaryDirectory(prefix="fastbyol-ffcv-") as folder:
            root = Path("/")
            if not _has_all(root):
                say("ffcv: getting Debian's packages")
                root = _unpack(Path(folder))
            say("ffcv: building")
            _install(Path(folder), root)
    except FastbyolError as error:
        say(f"fastbyol.build_ffcv: error: {error}", err=True)
        sys.exit(error.exit_code)
    say("ffcv: installed")


def _demand_tools() -> None:
    """Raise FastbyolError, with the command that helps, if the build cannot succeed here."""
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            raise FastbyolError(
                f"no {tool}: FFCV is built from packages of Debian or Ubuntu; "
                "without FFCV torchvision decodes"
            )
    if packages := lacking():
        raise FastbyolError(
            f"no C++ compiler or no Python.h: ask an administrator for "
            f"`apt-get install {' '.join(packages)}`"
        )
    needed = ["tqdm", *(["setuptools"] if sys.version_info >= (3, 12) else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise FastbyolError(
            f"FFCV imports {' and '.join(missing)}, of fastbyol[ffcv]: "
            f"{shlex.join([*installer(), *missing])}"
        )
    if not has_pip() and not shutil.which("uv"):
        raise FastbyolError(f"neither pip nor uv: `{sys.executable} -m ensurepip` brings pip")


def installer() -> list[str]:
    """Return the first words of a command that installs packages into this environment."""
    if has_pip():
        return [sys.executable, "-m", "pip", "install"]
    return ["uv", "pip", "install", "--python", sys.executable]


def has_pip() -> bool:
    """Return True if this environment has pip, which those that uv makes lack."""
    return importlib.util.find_spec("pip") is not None


def lacking() -> list[str]:
    """Return the Debian packages that compile an extension of Python and are missing here."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    have = {"g++": shutil.which("g++"), "python3-dev": header.exists()}
    return [name for name, there in have.items() if not there]


def _unpack(folder: Path) -> Path:
    """Unpack Debian's packages into ``folder``; return the folder that stands for the root.

    apt's lists are private: those of the system may be old or missing, and only root renews them.
    """
    for name in ("lists/partial", "cache/archives/partial", "packages", "root"):
        (folder / name).mkdir(parents=True)
    options = {
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",  # whose name turns apt's own change of user off
    }
    apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]
    _run([*apt, "update"], folder)
    packages = folder / "packages"
    _run([*apt, "download", *DEBIAN], packages)
    (headers,) = packages.glob("libturbojpeg0-dev_*.deb")
    depends = _run(["dpkg", "--field", str(headers), "Depends"], folder)
    # Debian's name is libturbojpeg0, Ubuntu's libturbojpeg.
    _run([*apt, "download", *re.findall(r"libturbojpeg\w*", depends)[:1]], packages)
    for package in sorted(packages.glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(folder / "root")], folder)
    if not _has_all(folder / "root"):
        raise FastbyolError(f"{' or '.join(LIBRARIES)}: not in this system's {', '.join(DEBIAN)}")
    return folder / "root"


def _has_all(root: Path) -> bool:
    """Return True if what the extension is built from is below ``root``."""
    headers = root / "usr" / "include"
    needed = headers / "turbojpeg.h", headers / "opencv4/opencv2/imgproc.hpp"
    return all(path.exists() for path in (*needed, *_libraries(root)))


def _libraries(root: Path) -> list[Path]:
    folder = root / "usr" / "lib" / sysconfig.get_config_var("MULTIARCH")
    return [folder / name for name in LIBRARIES]


def _install(folder: Path, root: Path) -> None:
    """Build with FFCV's own setup.py, which asks pkg-config what to link; install; import."""
    include, program = folder / "include", folder / "bin" / "pkg-config"
    (include / "opencv2").mkdir(parents=True)
    (include / "opencv2" / "opencv.hpp").write_text(HEADER)
    headers, libraries = root / "usr" / "include", _libraries(root)
    words = [f"-I{include}", f"-I{headers / 'opencv4'}"]
    if root != Path("/"):  # else g++ has it, and -I would put it before its own headers
        words.append(f"-I{headers}")
    words += [f"-L{libraries[0].parent}", *(f"-l:{name}" for name in LIBRARIES)]
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{' '.join(words)}'\n")
    program.chmod(0o755)
    requirements = folder / "requirements.txt"
    requirements.write_text(REQUIREMENT)
    # A wheel in the installer's cache may have been linked against libraries that are gone.
    anew = ["--no-cache-dir", "--force-reinstall"] if has_pip() else ["--no-cache", "--reinstall"]
    options = ["--no-deps", "--no-binary", "ffcv", "--require-hashes", "-r", str(requirements)]
    environment = FLAGS | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    _run([*installer(), *anew, *options], folder, environment)
    python = [sys.executable, "-W", "ignore", "-c"]
    where = "import importlib.util as u; print(*u.find_spec('ffcv').submodule_search_locations)"
    package = _run([*python, where], folder).strip()
    for path in libraries:
        if path.name in SHARED:
            _put(path, Path(package))
    _run([*python, "import ffcv._libffcv"], folder)


def _put(library: Path, folder: Path) -> None:
    """Copy ``library`` into ``folder``, where a process may be running what it replaces.

    Written over, the old one's relocated pages would be lost, and the process die with SIGSEGV.
    """
    unfinished = folder / f".{library.name}.{os.getpid()}"
    shutil.copy(library, unfinished)
    unfinished.replace(folder / library.name)


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run ``command`` in ``folder``; return what it prints.

    If it fails, its last lines go to standard error, and FastbyolError is raised.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        say(*(done.stdout + done.stderr).splitlines()[-30:], err=True)
        raise FastbyolError(
            f"`{shlex.join(command[:4])} ...` ended with {done.returncode}, as above"
        )
    return done.stdout


if __name__ == "__main__":
    main()
