"""The page of many runs: what a browser would show of it, by the standard library's parser."""

from __future__ import annotations

import base64
import hashlib
import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from made_runs import make_run

from fastbyol.registry.index import list_runs
from fastbyol.show import runs_page

NAMES = (
    "plain", "<img src=x onerror=alert(1)>", 'quo"te &amp; \'s', "a\nb", "\u202eright", "\udce9",
    "]]>", "<!--", "{{ 7 * 7 }}", "javascript:alert(1)", "100%25", "#q=x?y",
)  # fmt: skip
TEXTS = ("</script><script>alert(1)</script>", "</td></table>", "&lt;b&gt;")


class Page(HTMLParser):
    """Elements, the text of the table's cells, and whatever could run or load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.script, self.is_script = "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.is_script = tag == "script"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.is_script = False

    def handle_data(self, data: str) -> None:
        if self.is_script:
            self.script += data
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.replace("\n", "")

    def values(self, tag: str, name: str) -> list[str]:
        return [each[2] for each in self.attributes if each[:2] == (tag, name)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for number, name in enumerate(NAMES):
        epochs = [{"accuracy": 5.0 * number, "neg_cos": 0.5}]
        make_run(root / name, f"train.seed={number}", f"optim.lr=0.{number}1", epochs=epochs)
        (root / name / "report.html").write_text(str(number))
    for number, text in enumerate(TEXTS):
        make_run(root / f"text{number}", f"data.train={text}", f"data.test={text}")
    return root


def test_every_run_and_setting_is_only_text(root: Path) -> None:
    rows = list_runs(root)
    page = Page(runs_page.page(rows, "Runs", root))
    assert set(page.tags) <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "b", "form", "label"),
        *("input", "div", "table", "thead", "tbody", "tr", "th", "td", "svg", "polyline", "a"),
        "script",
    }
    assert (page.tags.count("script"), page.tags.count("table")) == (1, 1)
    head, *lines = page.rows
    assert head[:3] == ["run", "curves", "accuracy"]
    assert {"train.seed", "optim.lr", "data.train"} < set(head)
    shown = {row.name: row.name.encode("unicode_escape").decode("ascii") for row in rows}
    assert [line[0] for line in lines] == [shown[row.name] for row in rows]
    assert all(len(line) == len(head) for line in lines)
    assert {line[head.index("data.train")] for line in lines} >= set(TEXTS)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert page.script == (Path(runs_page.__file__).parent / "templates/runs.js").read_text()


def test_only_its_own_script_may_run_and_nothing_be_loaded(root: Path) -> None:
    page = Page(runs_page.page(list_runs(root), "Runs", root))
    (policy,) = (text for text in page.values("meta", "content") if "default-src" in text)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'",
        "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    for banned in ("innerHTML", "insertAdjacentHTML", "outerHTML", "eval(", "document.write"):
        assert banned not in page.script


@pytest.mark.parametrize("where", [".", "pages/deep"])
def test_links_lead_to_reports(root: Path, where: str) -> None:
    out = root / where / "runs.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = list_runs(root)
    runs_page.write(rows, root, out)
    links = Page(out.read_text()).values("a", "href")
    assert len(links) == len(NAMES)
    assert not [link for link in links if {":", "?", "#", "<"} & set(link)]
    paths = [Path(os.fsdecode(unquote_to_bytes(link))) for link in links]
    reports = [root / row.name / "report.html" for row in rows if row.name in NAMES]
    assert [(out.parent / path).read_text() for path in paths] == [p.read_text() for p in reports]


def test_columns_say_what_is_a_number_and_what_has_choices(tmp_path: Path) -> None:
    for n in range(60):
        name = ("lars", "sgd")[n % 2]
        make_run(tmp_path / f"{n}", f"train.seed={n}", f"optim.name={name}", epochs=[{}] * (n % 3))
    page = Page(runs_page.page(list_runs(tmp_path), "Runs", tmp_path))
    keys = page.values("th", "data-key")
    flags = dict.fromkeys(keys, "")
    key = ""
    for tag, name, value in page.attributes:
        if tag == "th" and name == "data-key":
            key = value
        elif tag == "th" and name in ("class", "data-down", "data-choices"):
            flags[key] += value or name.removeprefix("data-")[0]
    assert flags["train.seed"] == "n"
    assert flags["optim.name"] == "c"
    assert flags["accuracy"] == "nd"
    assert flags["neg_cos"] == "n"
    assert (flags["name"], flags["started"]) == ("", "d")
    assert "optim.momentum" not in keys


def test_curves_stay_in_their_picture(tmp_path: Path) -> None:
    epochs = [{"accuracy": 50.0, "neg_cos": -0.5}, {"accuracy": 100.0, "neg_cos": 1.5}]
    make_run(tmp_path / "run", "train.epochs=4", epochs=epochs)
    make_run(tmp_path / "one", epochs=[{"accuracy": 0.0}])
    page = Page(runs_page.page(list_runs(tmp_path), "Runs", tmp_path))
    assert page.values("polyline", "points") == [
        "0,26.0 0,26.0", "0,20.0 0,20.0", "30,14.0 60,2.0", "30,26.0 60,2.0",
    ]  # fmt: skip


def test_a_page_of_500_runs_is_small(tmp_path: Path) -> None:
    epochs = [{"accuracy": 40.0 + n, "neg_cos": n / 61} for n in range(60)]
    make_run(tmp_path / "run", "train.epochs=60", epochs=epochs)
    make_run(tmp_path / "other", "train.epochs=61", "optim.name=lars", "train.seed=2")
    one, two = list_runs(tmp_path)
    text = runs_page.page([one] + [two] * 499, "Runs", tmp_path)
    assert len(text) < 2_000_000


def test_no_run_makes_an_empty_table(tmp_path: Path) -> None:
    page = Page(runs_page.page([], "Runs", tmp_path))
    assert len(page.rows) == 1
