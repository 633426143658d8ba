"""What MkDocs calls while it builds the site: generated pages, the navigation to them, links."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

from fastbyol_bench.site import links, notebooks, reference

# The section of the navigation that a new page of docs/ comes into.
OTHERS = "How to"


def on_config(config: Any) -> Any:
    """Put the commands' pages where the navigation names their folder, and add pages it lacks."""
    entries = [
        {words.removeprefix("fastbyol "): reference.command_uri(words)}
        for words in reference.command_pages()
    ]
    config.nav = _with_pages(config.nav, reference.COMMANDS_FOLDER, entries)
    docs = Path(config.docs_dir)
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    others = next(section[OTHERS] for section in config.nav if OTHERS in section)
    others += sorted(pages - set(_uris(config.nav)))
    return config


def _uris(nav: Any) -> Iterator[str]:
    """Yield the pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _uris(item)


def _with_pages(nav: Any, folder: str, entries: list[dict[str, str]]) -> Any:
    """Return a navigation with ``entries`` in place of ``folder``."""
    if isinstance(nav, list):
        return [_with_pages(item, folder, entries) for item in nav]
    if isinstance(nav, dict):
        return {title: _with_pages(item, folder, entries) for title, item in nav.items()}
    return entries if nav == folder else nav


def on_files(files: Files, config: Any) -> Files:
    """Add generated pages, notebooks as pages, and the repository's files that pages link to."""
    for uri, text in reference.pages().items():
        files.append(File.generated(config, uri, content=text))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page, pictures = notebooks.converted(links.ROOT / "docs" / file.src_uri)
        uri = links.site_uri(f"docs/{file.src_uri}")
        files.append(File.generated(config, uri, content=page))
        for name, content in pictures.items():
            picture = posixpath.join(posixpath.dirname(uri), name)
            files.append(File.generated(config, picture, content=content))
    for path, source in links.outside().items():
        uri = links.site_uri(path)
        if source.suffix in links.LANGUAGES:
            text = links.page_of(path, source.read_text("utf-8"))
            file = File.generated(config, uri, content=text)
        else:
            file = File.generated(config, uri, abs_src_path=str(source))
        # Pages that others link to, whether or not the navigation has them.
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to where these lie on the site.

    Blocks of what is typed and printed are marked as such, and the first page has no sections
    beside it.
    """
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]
    typed = re.sub(r"^```\n(?=\$ )", "``` { .console .typed }\n", markdown, flags=re.MULTILINE)
    return links.on_site(typed, page.file.src_uri)
