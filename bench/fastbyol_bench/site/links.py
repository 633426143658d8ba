"""Links that hold in the repository's own viewer and on the site.

Documents link to one another, and to other files of the repository, by relative paths. On the site
docs/ is the root, README.md is its first page, and what is linked outside of docs/ lies under
repository/: Markdown and source files as pages, pictures and HTML as they are.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
OUTSIDE = "repository"
# Files that are shown as pages of code, and the language to colour them by.
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".yml": "yaml", ".txt": "text"}
# Pages that no document needs to link to.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "bench/LOG.md")
_FENCE = re.compile(r"^[ ]*(```+).*?^[ ]*\1[ ]*$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(<?)([^\s()<>#]*)(#[^\s()<>]*)?(>?)(?=\))")
# The text of a link that is a file's name alone.
_NAMED = re.compile(r"\[[\w./-]+\.md\]\($")
_HEADING = re.compile(r"^(#{1,6})[ ]+(.+?)[ ]*#*$", re.MULTILINE)


class Link(NamedTuple):
    """A link of a document: its line, the path as written ('' for its own page), the anchor."""

    line: int
    path: str
    anchor: str


def prose(text: str) -> str:
    """Return Markdown with code and comments blanked, letter for letter."""
    for pattern in (_FENCE, _COMMENT, _CODE):
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def links(text: str) -> Iterator[Link]:
    """Yield the links of a Markdown document and its pictures."""
    for match in _LINK.finditer(prose(text)):
        line = text.count("\n", 0, match.start()) + 1
        yield Link(line, match[2], (match[3] or "").removeprefix("#"))


def is_external(path: str) -> bool:
    """Return whether a link names an address, and no file."""
    return re.match(r"[a-z][a-z0-9+.-]*:", path) is not None


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub and GitLab give the headings of a Markdown document.

    Letters become small, spaces become hyphens, punctuation goes; a repeated heading gets a number.
    """
    made: set[str] = set()
    for match in _HEADING.finditer(_COMMENT.sub("", _FENCE.sub("", text))):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[2]).replace("`", "")
        base = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number, name = 0, base
        while name in made:
            number += 1
            name = f"{base}-{number}"
        made.add(name)
    return made


def target(path: str, origin: str) -> str:
    """Return the path from the root that a relative ``path`` names in the file ``origin``."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)) if path else origin


def site_uri(path: str) -> str:
    """Return the place among the site's sources of the repository's file ``path``."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        uri = path.removeprefix("docs/")
        return uri.removesuffix(".ipynb") + ".md" if uri.endswith(".ipynb") else uri
    return f"{OUTSIDE}/{path}" + (".md" if posixpath.splitext(path)[1] in LANGUAGES else "")


def repository_path(uri: str) -> str:
    """Return the repository's path of a source of the site; a generated page counts as docs'."""
    if uri == "index.md":
        return "README.md"
    return uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else f"docs/{uri}"


def on_site(text: str, uri: str) -> str:
    """Return the Markdown of the page ``uri`` with its links to files of the repository rewritten.

    A link whose text is the page's file name gets the page's title.
    """
    origin, seen = repository_path(uri), prose(text)
    pieces, end = [], 0
    for match in _LINK.finditer(seen):
        path = match[2]
        if path and not is_external(path) and (ROOT / target(path, origin)).is_file():
            file = target(path, origin)
            to = posixpath.relpath(site_uri(file), posixpath.dirname(uri) or ".")
            before = text[end : match.start()]
            if named := _NAMED.search(before):
                before = f"{before[: named.start()]}[{title(ROOT / file)}]("
            pieces += [before, to, match[3] or ""]
            end = match.end()
    return "".join((*pieces, text[end:]))


def title(file: Path) -> str:
    """Return the first heading of a Markdown file, or its name."""
    heading = _HEADING.search(_FENCE.sub("", file.read_text("utf-8")))
    return heading[2] if heading else file.name


def documents() -> list[Path]:
    """Return the Markdown files that the site is made of, the generated ones aside."""
    docs = ROOT / "docs"
    return [*(ROOT / path for path in PAGES), *sorted(docs.rglob("*.md"))]


def outside() -> dict[str, Path]:
    """Return the files outside of docs/ that the site needs, by the repository's path.

    These are ``PAGES``, and what the pages link to, and what Markdown pages among these link to.
    """
    needed: dict[str, Path] = {path: ROOT / path for path in PAGES}
    pending = documents()
    while pending:
        page = pending.pop()
        origin = page.relative_to(ROOT).as_posix()
        for link in links(page.read_text("utf-8")):
            path = target(link.path, origin)
            file = ROOT / path
            if is_external(link.path) or path.startswith(("docs/", "..")) or not file.is_file():
                continue
            if path not in needed:
                needed[path] = file
                if file.suffix == ".md":
                    pending.append(file)
    return needed


def page_of(path: str, text: str) -> str:
    """Return the page that shows a source file of the repository."""
    language = LANGUAGES[posixpath.splitext(path)[1]]
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=2) + 1 if "```" in text else 3)
    return f"# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
