"""Links of the documents hold in the repository's viewer; on the site they lead to the same."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import markdown
import nbformat
import pytest
from docs_rig import DOCUMENTS, RECORDS, ROOT
from markdown_it import MarkdownIt

from fastbyol_bench.site import links

NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
PAGES = [*DOCUMENTS, *(ROOT / record for record in RECORDS), *NOTEBOOKS]
# What the site renders, with its extensions (mkdocs.yml).
EXTENSIONS = ["tables", "attr_list", "toc", "pymdownx.superfences"]


def text_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def mistakes(text: str, origin: str) -> list[str]:
    """Return what is wrong with the links of ``text``, the file ``origin``, with their lines."""
    wrong = []
    for link in links.links(text):
        if links.is_external(link.path):
            parts = urlsplit(link.path)
            if parts.scheme != "https" or "." not in parts.netloc:
                wrong.append(f"{origin}:{link.line}: {link.path}: no address")
            continue
        file = ROOT / links.target(link.path, origin)
        if link.path and not file.is_file():
            wrong.append(f"{origin}:{link.line}: {link.path}: no file")
        elif link.anchor and link.anchor not in links.anchors(text_of(file) if link.path else text):
            wrong.append(f"{origin}:{link.line}: {link.path}#{link.anchor}: no heading")
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert not mistakes(text_of(path), path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\n[b](absent.md)", "docs/x.md:2: absent.md: no file"),
        ("[b](../README.md#absent)", "../README.md#absent: no heading"),
        ("# One\n[b](#two)", "#two: no heading"),
        ("[b](http://example.org/)", "no address"),
        ("[b](https://nowhere)", "no address"),
        ("![b](../bench/absent.png)", "no file"),
    ],
)
def test_a_broken_link_is_named(text: str, says: str) -> None:
    (wrong,) = mistakes(text, "docs/x.md")
    assert says in wrong


def test_code_and_comments_hold_no_links() -> None:
    text = "`[a](b.md)` <!-- [a](b.md) -->\n```\n[a](b.md)\n```\n[c](README.md#x)"
    assert list(links.links(text)) == [links.Link(5, "README.md", "x")]


def test_anchors_are_those_of_repositories_viewers() -> None:
    """By GitHub's rule: lower case, hyphens for spaces, no punctuation, numbers for repetitions."""
    text = (
        "# One, two & three\n## `make demo`\n## A [link](x.md)\n## One, two & three\n```\n# no\n```"
    )
    assert links.anchors(text) == {"one-two--three", "make-demo", "a-link", "one-two--three-1"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_site_gives_headings_the_same_anchors(path: Path) -> None:
    from pymdownx.slugs import slugify

    settings = {"toc": {"slugify": slugify(case="lower"), "separator": "-"}}
    text = text_of(path)
    html = markdown.markdown(text, extensions=EXTENSIONS, extension_configs=settings)
    wanted = {anchor.partition("#")[2] for anchor in anchored().get(path, ())}
    assert wanted <= set(re.findall(r' id="([^"]+)"', html))


def anchored() -> dict[Path, list[str]]:
    """Return the anchors that any page links to, by file."""
    found: dict[Path, list[str]] = {}
    for page in PAGES:
        origin = page.relative_to(ROOT).as_posix()
        for link in links.links(text_of(page)):
            if link.anchor and not links.is_external(link.path):
                file = ROOT / links.target(link.path, origin)
                found.setdefault(file, []).append(f"#{link.anchor}")
    return found


class Outline(HTMLParser):
    """How often each kind of block occurs, and the text of all code, spaces aside."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("li", "ul", "ol", "table", "tr", "td", "pre", "h1", "h2", "h3", "img", "a"):
            self.tags[tag] += 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_have_the_same_blocks_on_the_site_as_in_a_viewer(path: Path) -> None:
    """Python-Markdown, the site's, wants blank lines that CommonMark does not: both must agree."""
    text = text_of(path)
    viewer = Outline(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    site = Outline(markdown.markdown(text, extensions=EXTENSIONS))
    assert site.tags == viewer.tags


@pytest.mark.parametrize(
    ("uri", "text", "on_site"),
    [
        ("index.md", "[d](docs/data.md#x)", "[d](data.md#x)"),
        ("data.md", "[r](../README.md)", "[r](index.md)"),
        ("data.md", "[runs.md](runs.md)", "[Many runs](runs.md)"),
        ("speed.md", "[p](../configs/blog.toml)", "[p](repository/configs/blog.toml.md)"),
        ("tasks.md", "[n](notebooks/own_step.ipynb)", "[n](notebooks/own_step.md)"),
        ("repository/CONTRIBUTING.md", "![p](docs/assets/site.css)", "![p](../assets/site.css)"),
        ("data.md", "[a](https://arxiv.org/abs/2006.07733) `[r](../README.md)`", None),
        ("data.md", "[g](reference/metrics.md) [h](#x)", None),
    ],
)  # fmt: skip
def test_links_are_rewritten_for_the_site(uri: str, text: str, on_site: str | None) -> None:
    assert links.on_site(text, uri) == (text if on_site is None else on_site)


def test_what_pages_link_to_outside_of_docs_comes_along() -> None:
    needed = links.outside()
    assert set(links.PAGES) <= needed.keys()
    assert "configs/ablations/phases.toml" in needed
    for path, file in needed.items():
        assert file.is_file()
        assert posixpath.normpath(path) == path
        assert links.repository_path(links.site_uri("docs/x.md")) == "docs/x.md"


def test_a_source_file_is_shown_whole() -> None:
    page = links.page_of("a.py", "x = '''\n```python\n'''\n")
    assert page == "# a.py\n\n````python\nx = '''\n```python\n'''\n````\n"
