"""The documentation site: it builds strictly, stands alone, and has every public name."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import auto_circuit as ac
from auto_circuit.experiments import parse
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRIC_DICT
from auto_circuit.model_utils.adapters import ADAPTERS
from auto_circuit.model_utils.transformer_lens_utils import REFUSED, TRIED
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
from auto_circuit.tasks import TASK_DICT
from scripts.docs_docstrings import as_markdown
from scripts.docs_tables import TABLES

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
WIDTHS = (1400, 390)
SEEN = (
    *("index.html", "find-a-circuit.html", "how-patching-works.html", "own-prompts.html"),
    *("coming-from-auto-circuit.html", "reference/auto_circuit.data.html"),
)
"""Pages that a browser opens: those with pictures, wide tables, long code."""


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


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served."""
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_browser_asks_nobody_else_fits_and_finds_pages(
    site: Path, browser: Any
) -> None:
    asked: list[str] = []
    wrong: list[str] = []
    with served(site) as address:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for width, name in product(WIDTHS, SEEN):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(address + name)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        page.set_viewport_size({"width": 1400, "height": 900})
        page.keyboard.press("/")
        page.keyboard.type("minimality")
        result = page.locator(".md-search a[href*='how-to/minimality.html']").first
        result.wait_for(timeout=30_000)
    assert len(asked) > len(SEEN) and wrong == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


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


DOCSTRING = """What it does, at <n> most.

key: its name, such as `<a>`;
    on two lines.
other, more: two at once.

Raises Error: never.

    code < here
"""
MARKDOWN = """What it does, at &lt;n> most.


- `key`: its name, such as `<a>`;
    on two lines.
- `other`, `more`: two at once.

Raises Error: never.

    code < here"""


def test_docstrings_become_lists_where_they_say_what_arguments_are() -> None:
    assert as_markdown(DOCSTRING, {"key", "other", "more"}) == MARKDOWN
    assert as_markdown("Raises Error: never.", set()) == "Raises Error: never."


def test_tables_have_every_object_and_keep_their_columns() -> None:
    found = {name: make().splitlines() for name, make in TABLES.items()}
    algorithms = found["algorithms"][2:] + found["number_algorithms"][2:]
    assert {row.split("`")[1] for row in algorithms} == {
        a.short_name for a in PRUNE_ALGOS
    }
    assert [row.split("`")[1] for row in found["metrics"][2:]] == [*PRUNE_METRIC_DICT]
    assert [row.split("`")[1] for row in found["tasks"][2:]] == [*TASK_DICT]
    assert len(found["architectures"][2:]) == len(ADAPTERS)
    for rows in found.values():
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


# ------------------------------------------------------------------- what pages tell to type

FAST = ("engine.md",)
"""Pages whose blocks run without --runslow: those that load no model."""
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.S | re.M)
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")


class Block(NamedTuple):
    """Python that a page tells to type, and what it says that this prints."""

    page: str
    place: int
    code: str
    printed: str


def _blocks() -> Iterator[Block]:
    for path in sorted((REPO / "docs").rglob("*.md")):
        page = path.relative_to(REPO / "docs").as_posix()
        for place, found in enumerate(BLOCK.finditer(path.read_text())):
            yield Block(page, place, found[1], found[2] or "")


BLOCKS = list(_blocks())
on_all_blocks = pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            id=f"{block.page}-{block.place}",
            marks=() if block.page in FAST else pytest.mark.slow,
        )
        for block in BLOCKS
    ],
)


@on_all_blocks
def test_a_block_runs_and_prints_what_the_page_says(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(
        compile(block.code, f"{block.page}, {block.place}", "exec"), {"__name__": "page"}
    )
    said, printed = block.printed, capsys.readouterr().out
    if "print(" in block.code or said:
        assert said, f"{block.page} does not say what its block {block.place} prints"
        assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", said).split(), printed
        assert numbers(printed) == pytest.approx(
            numbers(said), rel=0.05, abs=0.05
        ), printed


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def test_every_block_is_found_and_short_where_it_answers_a_question() -> None:
    pages = (REPO / "docs").rglob("*.md")
    assert len(BLOCKS) == sum(page.read_text().count("```python") for page in pages)
    for block in BLOCKS:
        lines = [line for line in block.code.splitlines() if line.strip()]
        assert len(lines) <= 10 or not block.page.startswith("how-to/"), block


def test_links_of_pages_lead_somewhere_where_the_code_is_read_too() -> None:
    for path in (REPO / "docs").rglob("*.md"):
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_readme_names_the_architectures_that_the_adapter_names() -> None:
    rows = re.findall(
        r"^\| (run|refused) \| (.*) \|$", (REPO / "README.md").read_text(), re.M
    )
    said = {word: names.partition(":")[0] for word, names in rows}
    assert said == {"run": ", ".join(TRIED), "refused": ", ".join(REFUSED)}


COMMANDS = ("cd", "git", "hf", "ls", "pip", "ray", "xdg-open")
"""What pages tell to type that is not ours."""
HEREDOC = re.compile(r"^cat > \S+ <<'(\w+)'\n.*?^\1\n", re.S | re.M)
EXPERIMENTS = (["python", "experiments.py"], ["python", "-m", "auto_circuit.experiments"])


def shell_lines() -> Iterator[tuple[str, str]]:
    """(page, command) of every line of the shell blocks; `\\` joins lines."""
    for path in [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.S | re.M):
            for line in HEREDOC.sub("", block).replace("\\\n", " ").splitlines():
                if line.strip():
                    yield path.name, line


@pytest.mark.parametrize("page,line", sorted(set(shell_lines())))
def test_a_command_can_be_typed(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.M)
        assert words[1] in targets
        assert all("=" in word for word in words[2:])
        if words[1] != "run":
            return
        words = [*EXPERIMENTS[0], *shlex.split(" ".join(words[2:]).removeprefix("ARGS="))]
    for start in EXPERIMENTS:
        if words[: len(start)] == start:
            parse(words[len(start) :])
            return
    assert words[0] in COMMANDS or (REPO / words[1]).is_file(), words
