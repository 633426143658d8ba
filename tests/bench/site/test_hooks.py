"""The site is built strictly: no warning, nothing from elsewhere, every generated page in it."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from docs_rig import ROOT
from mkdocs.config import load_config

from fastbyol import config_io
from fastbyol_bench.site import hooks, links, reference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, made by the command of `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout, done.stdout
    return folder


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder), *options],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


class Loaded(HTMLParser):
    """The addresses that a browser fetches when it shows a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(values.get("href") or "")
        elif tag != "a" and values.get("src"):
            self.addresses.append(values["src"] or "")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        for address in Loaded(page.read_text("utf-8")).addresses:
            assert not re.match(r"(https?:)?//", address), f"{page}: {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text("utf-8")), sheet


def test_every_generated_page_is_there(site: Path) -> None:
    for uri in reference.pages():
        assert (site / uri).with_suffix(".html").is_file()
    for path in links.outside():
        uri = links.site_uri(path)
        assert (site / re.sub(r"\.md$", ".html", uri).replace("README.html", "index.html")).exists()


def test_search_finds_every_key(site: Path) -> None:
    """By its last part, too, as the browser splits the text into words."""
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    text = " ".join(re.sub("<[^>]+>", " ", page["text"]) for page in index["docs"])
    words = set(re.split(index["config"]["separator"], text))
    assert not [key for key in list(config_io.keys()) if key.rpartition(".")[2] not in words]
    assert not [key for key in list(config_io.keys()) if key not in text]


def test_the_reference_is_the_same_in_another_process() -> None:
    code = "from fastbyol_bench.site import reference; print(reference.pages())"
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "COLUMNS": columns},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed, columns in (("1", "40"), ("2", "200"))
    }  # fmt: skip
    assert made == {f"{reference.pages()}\n"}


def test_a_new_page_comes_last_under_how_to(tmp_path: Path) -> None:
    for name in ("a.md", "new.md"):
        (tmp_path / name).write_text("# A page\n")
    nav = [{"Home": "index.md"}, {"How to": [{"A": "a.md"}]}, {"All": "reference/commands"}]
    config = SimpleNamespace(nav=nav, docs_dir=str(tmp_path))
    sections = hooks.on_config(config).nav
    assert sections[1] == {"How to": [{"A": "a.md"}, "new.md"]}
    assert {"train": "reference/commands/fastbyol-train.md"} in sections[2]["All"]


def test_what_is_broken_ends_a_build() -> None:
    config = load_config(str(ROOT / "mkdocs.yml"))
    assert config.strict
    links = config.validation.links
    levels = (links.not_found, links.anchors, links.unrecognized_links, links.absolute_links)
    assert set(levels) == {logging.WARNING}
