"""What is installed: the wheel and the sdist, built here, and the files that name versions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import fastbyol

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Folders of the checkout, and where a wheel has them.
INSTALLED = {
    "fastbyol": "fastbyol",
    "kernels/fastbyol_kernels": "fastbyol_kernels",
    "bench/fastbyol_bench": "fastbyol_bench",
    "configs": "fastbyol/configs",
}
ALL = (".ci", "bench", "configs", "docs", "fastbyol", "kernels", "tests")


def build(source: Path, out: Path, *targets: str) -> None:
    """Build an sdist and a wheel, or ``targets``, of the tree ``source``."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    command += [word for target in targets for word in ("-t", target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def files(folder: str) -> dict[str, bytes]:
    """Every file under ``folder`` of the checkout, by its path there."""
    top = ROOT / folder
    paths = (path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(top).as_posix(): path.read_bytes() for path in paths}


def content(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(
    made: tuple[Path, Path],
) -> None:
    expected = {
        f"{target}/{name}": data
        for folder, target in INSTALLED.items()
        for name, data in files(folder).items()
    }
    inside = content(made[0])
    info = f"fastbyol-{fastbyol.__version__}.dist-info/"
    assert {name: data for name, data in inside.items() if not name.startswith(info)} == expected
    assert inside[f"{info}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_has_the_whole_tree_and_builds_the_same_wheel(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    wheel, sdist = made
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    for folder in ALL:
        for name, data in files(folder).items():
            assert (tree / folder / name).read_bytes() == data
    build(tree, tmp_path / "dist", "wheel")
    assert content(tmp_path / "dist" / wheel.name) == content(wheel)


def test_the_unpacked_wheel_has_its_settings_claims_and_templates(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    """With nothing of the checkout beside it."""
    with ZipFile(made[0]) as archive:
        archive.extractall(tmp_path / "site")
    shutil.copytree(ROOT / "tests" / "runs" / "old" / "finished", tmp_path / "run")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def output(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)

    where = "import fastbyol, fastbyol_bench as b, fastbyol_kernels as k; "
    where += "print(fastbyol.__file__, b.__file__, k.__file__)"
    assert all(name.startswith(str(tmp_path / "site")) for name in output("-c", where).split())
    presets = json.loads(output("-m", "fastbyol", "presets", "list", "--json"))
    assert set(presets) == {path.stem for path in (ROOT / "configs").glob("*.toml")}
    claims = "from fastbyol.ablations import curves, plan; print(curves._DATA)"
    published = Path(output("-c", claims).strip())
    assert published.is_relative_to(tmp_path)
    output("-m", "fastbyol", "report", "run")
    assert "<svg" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_the_metadata(made: tuple[Path, Path]) -> None:
    (name,) = (name for name in content(made[0]) if name.endswith("/METADATA"))
    metadata = Parser().parsestr(content(made[0])[name].decode())
    assert metadata["Version"] == fastbyol.__version__
    assert metadata.get_payload() == (ROOT / "README.md").read_text("utf-8")
    pythons = [word.split(" :: ")[-1] for word in metadata.get_all("Classifier", [])]
    allowed = SpecifierSet(metadata["Requires-Python"])
    assert all(word in allowed for word in pythons if word.startswith("3."))


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for lines in (PROJECT["dependencies"], *extras) for line in lines]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower(): Version(version) for package, version in pairs}


def test_constraints_pin_all_that_pyproject_names_within_its_ranges() -> None:
    pinned = pins("constraints.txt")
    for requirement in requirements():
        assert pinned[requirement.name.lower()] in requirement.specifier, requirement


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds = {
        requirement.name.lower(): Version(specifier.version).release
        for requirement in requirements()
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    floor = pins("constraints-floor.txt")
    floor.pop("pyparsing")  # what matplotlib's lower bound works with
    for package, version in floor.items():
        assert version.release[: len(bounds[package])] == bounds[package], package


def test_pixi_has_the_python_versions_that_pyproject_allows() -> None:
    pixi = tomllib.loads((ROOT / "pixi.toml").read_text("utf-8"))
    allowed = SpecifierSet(PROJECT["requires-python"])
    lower, upper = (
        Version(word.lstrip("<>=")) for word in pixi["dependencies"]["python"].split(",")
    )
    assert lower in allowed
    classifiers = [Version(word.split()[-1]) for word in PROJECT["classifiers"] if " 3." in word]
    assert lower == min(classifiers)
    assert upper.minor == max(classifiers).minor + 1
    extras = pixi["pypi-dependencies"]["fastbyol"]["extras"]
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert pixi["workspace"]["platforms"] == ["linux-64"]


def test_the_image_is_built_from_what_the_wheel_needs_on_a_python_that_is_allowed() -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    (base,) = (line.split()[1] for line in lines if line.startswith("FROM "))
    python = base.removeprefix("python:").removesuffix("-slim")
    assert python in SpecifierSet(PROJECT["requires-python"])
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    copied = {line[1:] for line in lines if line.startswith("!")}
    needed = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    assert copied == needed | set(INSTALLED)
