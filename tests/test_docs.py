"""The documentation site: it builds strictly, stands alone, and has every public name."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import auto_circuit as ac

REPO = Path(__file__).parents[1]
ASKS_FOR = {
    "link": "href",
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
}
"""Tags whose address a browser opens by itself -> the attribute that has it."""


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and what it opens by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.opened: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values.get("id", ""), values.get("name", "")} - {""}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        is_opened = values.get("rel", "stylesheet") in ("stylesheet", "icon", "preload")
        if is_opened and ASKS_FOR.get(tag) in values:
            self.opened.add(values[ASKS_FOR[tag]])


Pages = dict[Path, _Page]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; the build fails on any warning."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPO,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> Pages:
    return {path: _Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_no_page_asks_the_network(site: Path, pages: Pages) -> None:
    opened = {(path.name, url) for path, page in pages.items() for url in page.opened}
    assert len(opened) > len(pages)  # each has a style sheet
    assert [
        (name, url) for name, url in opened if re.match("(?i)([a-z]+:)?//", url)
    ] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", styles) == []


@pytest.mark.slow
def test_every_link_leads_somewhere(pages: Pages) -> None:
    n_anchors = 0
    for path, page in pages.items():
        for link in page.links - {"", "."}:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path}: {link}"
            if parts.fragment and target.suffix == ".html":
                n_anchors += 1
                anchors = pages[target].ids | {"__skip"}
                assert unquote(parts.fragment) in anchors, f"{path}: {link}"
    assert n_anchors > 100


def public_names() -> set[str]:
    """Every public class and function, as module.name, and the names that notebooks use."""
    names = {f"auto_circuit.{name}" for name in ac._HOME_OF}
    upstream = json.loads((REPO / "tests" / "upstream_api.json").read_text())
    names |= {entry.replace(":", ".") for entry in upstream}
    for path in (REPO / "auto_circuit").rglob("*.py"):
        parts = path.relative_to(REPO).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        names.add(module)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names |= {f"{module}.{node.name}"} - {f"{module}.__getattr__"}
    return {name for name in names if "._" not in name}


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path, pages: Pages) -> None:
    reference = {p: page for p, page in pages.items() if p.parent.name == "reference"}
    anchors = set().union(*(page.ids for page in reference.values()))
    assert len(public_names()) > 700
    assert sorted(public_names() - anchors) == []
    assert (site / "objects.inv").is_file()
