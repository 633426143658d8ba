"""What the commands of a document print, typed anew.

    python -m fastbyol_bench.site.transcript docs/tutorial.md FOLDER

types every line behind a prompt (``$ ``) of the document's blocks of code in FOLDER, one after the
other, and replaces what stands below each line by what it printed. With ``--only PATTERN`` lines
that do not match keep their answers: FOLDER must then have what they made. Of a long answer the
first and the last lines are kept. Pictures that the document shows from bench/results/tutorial are
copied from FOLDER. docs/tutorial.md takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastbyol.files import cache_folder
from fastbyol.runs.durable import write_text

# A longer answer loses its middle.
HEAD, TAIL = 10, 6
# How fast a CPU was when a document was typed says nothing to its readers.
_PACE = re.compile(r" \d+ img/s eta \S+|^compiled .* in \d+ s\n", re.MULTILINE)
_PICTURE = re.compile(r"\]\((\.\./bench/results/tutorial/([\w-]+\.png))\)")
# A line, which goes on behind a backslash, and what stands below it.
_TYPED = re.compile(r"^\$ ((?:.*\\\n)*.+)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
_BLOCK = re.compile(r"^```\n(\$ .*?)^```$", re.DOTALL | re.MULTILINE)


def retyped(text: str, answer: Callable[[str], str], only: str = "") -> str:
    """Return the document's ``text`` with what ``answer`` returns below each typed line.

    Lines that the pattern ``only`` does not match keep what stands below them.
    """

    def block(match: re.Match[str]) -> str:
        lines = "".join(
            f"$ {line}\n{shortened(answer(line)) if re.search(only, line) else printed}"
            for line, printed in _TYPED.findall(match[1])
        )
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


def copy_pictures(text: str, document: Path, folder: Path) -> None:
    """Copy the tutorial's pictures that ``document``, which has ``text``, shows from ``folder``."""
    for link, name in _PICTURE.findall(text):
        target = document.parent / link
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(folder.rglob(name)), target)


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("document", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", metavar="PATTERN")
    asked = parser.parse_args(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    text = asked.document.read_text("utf-8")
    text = retyped(text, typed_in(asked.folder), asked.only)
    copy_pictures(text, asked.document, asked.folder)
    write_text(asked.document, text)


if __name__ == "__main__":
    main()
