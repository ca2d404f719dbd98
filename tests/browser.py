"""Open a figure in headless Chromium, and compare what it shows with what it holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from auto_circuit.explorer.page import BUILT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOW_TO_GET = (
    "no Chromium or Chrome is installed, which opens the figures. Install one, for example "
    "with `apt-get install chromium` (Debian), `snap install chromium` (Ubuntu) or `brew "
    "install --cask chromium` (macOS), and run this again with --runslow."
)
EXPLORER = BUILT.parents[1]
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
LAYER_CLASSES = ("trace scatter", "trace bars", "sankey", "hm")
"""The first words of the class of the element that each kind of trace is drawn as."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


class _Shown(HTMLParser):
    """The texts that plotly.js drew, and how many traces of which kind."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: set[str] = set()
        self.n_traces = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.texts.add(values.get("data-unformatted") or "")
        css_class = values.get("class") or ""
        self.n_traces += tag == "g" and any(
            f"{css_class} ".startswith(f"{known} ") for known in LAYER_CLASSES
        )

    def handle_data(self, data: str) -> None:
        self.texts.add(data.strip())


def find_browser() -> str:
    """Chromium's path; skips the test, and says how to get it, where there is none."""
    for name in BROWSERS:
        if (path := shutil.which(name)) is not None:
            return path
    pytest.skip(HOW_TO_GET)


def figure_in(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(traces, layout) of a plotly figure's HTML file."""
    html = path.read_text(encoding="utf-8")
    start = re.search(r'Plotly\.newPlot\(\s*"[^"]*",\s*', html)
    assert start is not None, f"{path} holds no plotly figure"
    decoder = json.JSONDecoder()
    traces, end = decoder.raw_decode(html, start.end())
    layout, _ = decoder.raw_decode(html, html.index("{", end))
    return traces, layout


def labels(traces: list[dict[str, Any]], layout: dict[str, Any]) -> Counter[str]:
    """Every text that must be readable: legend, titles, axes, panels, nodes."""
    named = [trace for trace in traces if "name" in trace]
    texts = [trace["name"] for trace in named if trace.get("showlegend") is not False]
    if len(traces) == 1 or layout.get("showlegend") is False:
        texts = []  # plotly.js draws no legend of its own
    for trace in traces:
        texts += (
            trace.get("node", {}).get("label", []) if trace["type"] == "sankey" else []
        )
    texts += [note["text"] for note in layout.get("annotations", [])]
    for key, value in layout.items():
        if key == "title" or key.startswith(("xaxis", "yaxis")):
            title = value if key == "title" else value.get("title", {})
            texts.append(title.get("text", ""))
    return Counter(text for text in texts if text)


def drawn(path: Path) -> str:
    """The HTML of a page when its scripts have run."""
    done = subprocess.run(
        [
            find_browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-dev-shm-usage"),
            *("--virtual-time-budget=20000", "--dump-dom"),
            path.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_shown(path: Path) -> None:
    """Chromium draws each trace of a figure, and writes each of its labels."""
    shown = _Shown()
    shown.feed(drawn(path))
    traces, layout = figure_in(path)
    assert shown.n_traces == len(traces) > 0, path
    missing = set(labels(traces, layout)) - shown.texts
    assert not missing, f"{path} does not show {missing}"


def explorer_with_packages(folder: Path) -> Path:
    """The explorer's source in a folder, with its packages installed."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, which builds the explorer's JavaScript")
    ignored = shutil.ignore_patterns("node_modules", "__pycache__", "*.py", "built")
    shutil.copytree(EXPLORER, folder, ignore=ignored)
    (folder / "built").mkdir()
    install = ["npm", "ci", "--no-audit", "--no-fund"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True)
    if done.returncode and re.search("ENOTFOUND|EAI_AGAIN|ECONN|network", done.stderr):
        pytest.skip("npm cannot be reached: this machine has no network")
    assert done.returncode == 0, done.stderr
    return folder


def violations(page: Any, packages: Path) -> list[tuple[str, str]]:
    """(rule, element) of what axe finds against WCAG 2.1 A and AA; packages: with npm's."""
    if page.evaluate("typeof axe") == "undefined":
        axe = packages / "node_modules" / "axe-core" / "axe.min.js"
        page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate(
        "(tags) => axe.run({runOnly: {type: 'tag', values: tags}})", WCAG
    )
    assert len(found["passes"]) > 10
    return [(one["id"], one["nodes"][0]["html"][:200]) for one in found["violations"]]
