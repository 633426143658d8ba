"""What the commands of a document print, typed anew.

    python -m fastbyol_bench.site.transcript docs/tutorial.md FOLDER

types every line behind a prompt (``$ ``) of the document's blocks of code in the new FOLDER, one
after the other, and replaces what stands below each line by what it printed. Of a long answer the
first and the last lines are kept. Pictures that the document shows from bench/results/tutorial are
copied from FOLDER/pictures. docs/tutorial.md takes some minutes on one core.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fastbyol.files import cache_folder
from fastbyol.runs.durable import write_text

# A longer answer loses its middle.
HEAD, TAIL = 10, 6
# How fast a CPU was when a document was typed says nothing to its readers.
_PACE = re.compile(r" \d+ img/s eta \S+|^compiled .* in \d+ s\n", re.MULTILINE)
_PICTURE = re.compile(r"\]\((\.\./bench/results/tutorial/([\w-]+\.png))\)")
_BLOCK = re.compile(r"^```\n(\$ .*?)^```$", re.DOTALL | re.MULTILINE)


def retyped(text: str, answer: Callable[[str], str]) -> str:
    """Return the document's ``text`` with what ``answer`` returns below each typed line."""

    def block(match: re.Match[str]) -> str:
        typed = re.findall(r"^\$ ((?:.*\\\n)*.+)$", match[1], re.MULTILINE)
        lines = "".join(f"$ {line}\n{shortened(answer(line))}" for line in typed)
        return f"```\n{lines}```"

    return _BLOCK.sub(block, text)


def shortened(printed: str) -> str:
    """Return whole lines of what was ``printed``, without the middle of many."""
    lines = printed.splitlines()
    if len(lines) > HEAD + TAIL + 1:
        lines[HEAD:-TAIL] = ["..."]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def typed_in(folder: Path) -> Callable[[str], str]:
    """Return what types a line into a shell in ``folder`` and returns both of its outputs.

    It raises CalledProcessError where a line fails.
    """
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))

    def answer(line: str) -> str:
        print(f"$ {line}", flush=True)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=os.environ | {"PATH": programs, "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout, end="", flush=True)
        done.check_returncode()
        return shown(done.stdout, folder)

    return answer


def shown(printed: str, folder: Path) -> str:
    """Return what was ``printed`` without what only this machine has: its paths and its pace."""
    paths = {
        str(cache_folder()): "~/.cache/fastbyol",
        str(folder.resolve()): ".",
        str(Path.home()): "~",
    }
    for path, name in paths.items():
        printed = printed.replace(path, name)
    return _PACE.sub("", printed)


def copy_pictures(text: str, document: Path, pictures: Path) -> None:
    """Copy the tutorial's pictures that ``document``, which has ``text``, shows."""
    for link, name in _PICTURE.findall(text):
        target = document.parent / link
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / name, target)


def main() -> None:
    """Run the commands of the document named first, in the folder named second."""
    document, folder = map(Path, sys.argv[1:])
    (folder / "pictures").mkdir(parents=True)
    text = retyped(document.read_text("utf-8"), typed_in(folder))
    copy_pictures(text, document, folder / "pictures")
    write_text(document, text)


if __name__ == "__main__":
    main()
