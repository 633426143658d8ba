"""The notebooks run as they stand, on fewer images, and are shown with their outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from docs_rig import ROOT
from nbclient.exceptions import CellExecutionError

from fastbyol_bench.site import notebooks

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# Behind the parameters of each. Textures need nothing on the machine.
SMALL = """
SETTINGS += ["data.train=textures", "data.textures_count=64", "data.textures_test_count=64"]
SETTINGS += ["views.size=16", "model.width=4", "train.batch_size=16"]
EPOCHS = 2
"""


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter's files of a running kernel, and IPython's, are in the test's folder."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    made = notebooks.executed(path, tmp_path, SMALL)
    kept = nbformat.read(path, as_version=4)
    assert num_pictures(made) == num_pictures(kept)
    assert SMALL not in {cell.source for cell in kept.cells}


def num_pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_nothing_of_the_machine_that_ran_it(path: Path) -> None:
    text = path.read_text("utf-8")
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert "iopub" not in text
    assert str(Path.home()) not in re.sub(r'"image/png": "[^"]*"', "", text)
    assert len(text) < 250_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_s_page_has_its_code_outputs_and_pictures(path: Path) -> None:
    page, pictures = notebooks.converted(path)
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.source.splitlines()[0] in page
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                assert output.text.splitlines()[0] in page
    assert set(re.findall(r"!\[\w+\]\(([^)]+)\)", page)) == set(pictures)
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_a_cell_that_fails_is_named(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.executed(tmp_path / "bad.ipynb", tmp_path)
