"""The notebooks of docs/: executed, with their outputs kept, and as pages of the site.

    python -m fastbyol_bench.site.notebooks docs/notebooks/*.ipynb

executes each in an empty folder and writes it with what it shows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

from fastbyol.runs.durable import write_text

# Of a cell, in seconds.
LIMIT_S = 600
PARAMETERS = "parameters"


def executed(path: Path, folder: Path, settings: str = "") -> Any:
    """Return the notebook in ``path`` after a new kernel has run it in ``folder``.

    ``settings`` are lines of Python that follow the cell tagged ``parameters``. What only this
    execution has, such as clock times, is left out. Raises nbclient's CellExecutionError.
    """
    notebook = nbformat.read(path, as_version=4)
    if settings:
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        after = [PARAMETERS in words for words in tags].index(True) + 1
        notebook.cells.insert(after, nbformat.v4.new_code_cell(settings))
    NotebookClient(
        notebook,
        timeout=LIMIT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def converted(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by the names that the page calls them."""
    resources = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    page, made = MarkdownExporter().from_filename(str(path), resources=resources)
    return page, made["outputs"]


def main(words: Sequence[str] | None = None) -> None:
    """Run the notebooks of the command line and write them with their outputs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("notebooks", type=Path, nargs="+")
    for path in parser.parse_args(words).notebooks:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        write_text(path, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main()
