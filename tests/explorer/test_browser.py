"""The explorer in Chromium: what is moved, found, pointed at and chosen does what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auto_circuit.explorer.data import AlgorithmView, TaskView
from auto_circuit.explorer.packing import packed
from auto_circuit.explorer.page import built_javascript, write_explorer
from tests.browser import violations
from tests.explorer.test_page import HOSTILE
from tests.explorer.views import made_algorithm, made_graph, made_view

pytestmark = pytest.mark.slow

SIZES = (0, 1, 5, 20, 60, 150)
WIDTHS = (1400, 390)
EXPLORER = "document.querySelector('[data-auto-circuit-explorer]').explorer"


@pytest.fixture(scope="module")
def views() -> list[TaskView]:
    graph = made_graph(3, 4)
    known = np.arange(0, graph.n_edges, 5, dtype=np.uint32)
    graph = replace(graph, true_edges=known)
    algorithms = [
        made_algorithm(graph, "EAP", (0, 1, 2), SIZES),
        made_algorithm(graph, "ACDC", (5,), SIZES),
    ]
    by_position = made_graph(2, 2, 6, position_labels=HOSTILE)
    hostile = made_algorithm(by_position, HOSTILE[0], (0,), SIZES)
    return [
        made_view(graph, algorithms, "Heads"),
        made_view(by_position, [hostile], HOSTILE[1], HOSTILE),
    ]


class Opened:
    """The page, and what went wrong in it."""

    def __init__(self, browser: Any, path: Path, width: int, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("request", self._note_request)
        self.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            self.page.wait_for_selector(".ace-outcome")

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith("file:"):
            self.wrong.append(request.url)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def drawn(self) -> dict[int, str]:
        """Edge -> how it is drawn."""
        pairs = self.page.evaluate(
            f"[...{EXPLORER}.wanted].map(([edge, look]) => [edge, look.kind])"
        )
        return {edge: kind for edge, kind in pairs}

    def place(self, name: str) -> tuple[float, float]:
        """Where a node or an edge (e3) is on the page."""
        box = self.page.locator(".ace-canvas").bounding_box()
        at = self.page.evaluate(
            f"""(name) => {{
              const {{ graph, task }} = {EXPLORER};
              const key = [...graph.places.keys()].find((k) => task.nodeName(k) === name);
              return graph.renderedPosition(key ?? name);
            }}""",
            name,
        )
        return box["x"] + at["x"], box["y"] + at["y"]

    def check(self) -> None:
        """No error, no request, no sideways scrolling."""
        assert not self.wrong
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= self.page.viewport_size["width"]
        self.page.close()


@pytest.fixture(scope="module")
def path(views: list[TaskView], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_explorer(tmp_path_factory.mktemp("page") / "explorer.html", views)


@pytest.fixture(params=WIDTHS)
def opened(request: pytest.FixtureRequest, browser: Any, path: Path) -> Iterator[Opened]:
    opened = Opened(browser, path, request.param)
    opened.page.get_by_label("Show", exact=True).select_option("sign")
    yield opened
    opened.check()


def circuit(algorithm: AlgorithmView, n_edges: int) -> set[int]:
    return set(algorithm.order[:n_edges].tolist())


def test_the_slider_goes_through_the_measured_sizes(
    opened: Opened, views: list[TaskView]
) -> None:
    algorithm = views[0].algorithms[0]
    slider = opened.page.get_by_label("Circuit size")
    slider.press("Home")
    for size in algorithm.sizes:
        value = size.values["Logit Diff Percent"]
        shown = opened.text(".ace-outcome")
        assert shown.startswith(f"{size.n_edges} edge")
        assert value.mean is not None and value.plus_minus is not None
        numbers = [float(text) for text in re.findall(r"[\d.]+(?= %| of the m)", shown)]
        assert numbers[0] == pytest.approx(value.mean, rel=0.005)
        assert f"± {value.plus_minus:.3g}" in shown
        drawn = opened.drawn()
        assert set(drawn) == circuit(algorithm, size.n_edges)
        for edge, kind in drawn.items():
            assert kind == ("negative" if algorithm.scores[edge] < 0 else "positive")
        assert slider.get_attribute("aria-valuetext") == shown
        slider.press("ArrowRight")
    opened.page.wait_for_function(
        "document.querySelector('[aria-live]').textContent.startsWith('EAP: 150 edges')"
    )


def test_a_node_is_found_and_its_edges_are_listed(
    opened: Opened, views: list[TaskView]
) -> None:
    graph, algorithm = views[0].graph, views[0].algorithms[0]
    search = opened.page.get_by_label("Find a node")
    search.fill("a1.2")
    search.press("Enter")
    assert opened.text(".ace-panel h3") == "A1.2"
    into, out = (opened.page.locator(".ace-edges").nth(i) for i in (0, 1))
    node = next(i for i, one in enumerate(graph.nodes) if one.name == "A1.2")
    ends = {
        "into": [graph.destinations[i].node for i in graph.dest],
        "out": [graph.sources[i].node for i in graph.src],
    }
    for listed, end in ((into, "into"), (out, "out")):
        expected = [
            graph.edge_name(edge) for edge in algorithm.order if ends[end][edge] == node
        ]
        assert listed.locator(".ace-name").all_inner_texts() == expected[:10]
    first = into.locator("button").first
    edge = next(e for e in algorithm.order if ends["into"][e] == node)
    score = float(algorithm.scores[edge])
    shown = first.inner_text().replace("−", "-")
    assert f"{score:+.3g}"[:5] in shown and "rank" in shown and "±" in shown
    search.fill("nobody")
    search.press("Enter")
    assert "no node “nobody”" in opened.text(".ace-choices")


def test_what_the_mouse_is_over_is_named(opened: Opened, views: list[TaskView]) -> None:
    graph, algorithm = views[0].graph, views[0].algorithms[0]
    opened.page.get_by_label("Circuit size").press("Home")
    opened.page.get_by_label("Circuit size").press("ArrowRight")
    opened.page.locator(".ace-graph").scroll_into_view_if_needed()
    best = int(algorithm.order[0])
    x, y = opened.place(f"e{best}")
    opened.page.mouse.move(x - 60, y)
    opened.page.mouse.move(x, y)
    opened.page.wait_for_selector(".ace-tip", state="visible")
    tip = opened.text(".ace-tip")
    assert tip.startswith(graph.edge_name(best))
    assert "rank 1 of" in tip and "95 % interval over 3 seeds: ±" in tip
    opened.page.mouse.move(*opened.place("Resid Start"))
    assert opened.text(".ace-tip").startswith("Resid Start")
    opened.page.mouse.click(*opened.place("A0.1"))
    assert opened.text(".ace-panel h3") == "A0.1"


def test_the_keyboard_alone_is_enough(opened: Opened) -> None:
    page = opened.page
    graph = page.get_by_label("Graph of the circuit")
    for _ in range(8):
        page.keyboard.press("Tab")
        if graph.evaluate("(element) => element === document.activeElement"):
            break
    assert opened.text(".ace-tip").startswith("Resid Start")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    name = opened.text(".ace-tip").split("\n")[0]
    assert re.fullmatch(r"A0\.\d", name)
    page.keyboard.press("Enter")
    heading = page.locator(".ace-panel h3")
    assert heading.inner_text() == name
    assert heading.evaluate("(element) => element === document.activeElement")
    page.keyboard.press("Tab")  # Close
    page.keyboard.press("Tab")  # the first edge
    edge = page.locator(".ace-edge").first
    assert edge.evaluate("(element) => element === document.activeElement")
    edge_name = edge.locator(".ace-name").inner_text()
    assert opened.text(".ace-tip").startswith(edge_name)
    page.keyboard.press("Enter")  # to the other end of the edge
    other = heading.inner_text()
    assert other != name and other in edge_name
    graph.focus()
    page.keyboard.press("Escape")
    assert heading.inner_text() == "The circuit"
    width = page.evaluate(f"{EXPLORER}.graph.cy.zoom()")
    page.keyboard.press("+")
    assert page.evaluate(f"{EXPLORER}.graph.cy.zoom()") > width


def test_two_algorithms_lie_over_each_other(
    opened: Opened, views: list[TaskView]
) -> None:
    one, other = views[0].algorithms
    opened.page.get_by_label("Show", exact=True).select_option("Compare with ACDC")
    opened.page.get_by_label("Circuit size").press("End")
    a, b = circuit(one, 150), circuit(other, 150)
    drawn = opened.drawn()
    for kind, edges in {"both": a & b, "onlyA": a - b, "onlyB": b - a}.items():
        assert {edge for edge, of in drawn.items() if of == kind} == edges != set()
    legend = opened.text(".ace-legend")
    assert f"both: {len(a & b)}" in legend and f"only EAP: {len(a - b)}" in legend
    assert f"only ACDC: {len(b - a)}" in legend
    assert f"Jaccard index {len(a & b) / len(a | b):.3f}"[:-1] in legend


def test_the_known_circuit_is_marked(opened: Opened, views: list[TaskView]) -> None:
    opened.page.get_by_label("Show", exact=True).select_option("known")
    algorithm, known = views[0].algorithms[0], views[0].graph.true_edges
    opened.page.get_by_label("Circuit size").press("End")
    found = circuit(algorithm, 150)
    assert known is not None
    true = set(known.tolist())
    drawn = opened.drawn()
    kinds = {"hit": found & true, "extra": found - true, "missed": true - found}
    for kind, edges in kinds.items():
        assert {edge for edge, of in drawn.items() if of == kind} == edges != set()
    legend = opened.text(".ace-legend")
    assert f"hit: in both: {len(kinds['hit'])}" in legend
    assert f"{len(true)} edges found" in legend


def test_attention_and_words_of_a_head(opened: Opened, views: list[TaskView]) -> None:
    search = opened.page.get_by_label("Find a node")
    search.fill("A2.3")
    search.press("Enter")
    panel = opened.page.locator(".ace-panel")
    maps = panel.locator("canvas")
    assert maps.count() == 2
    attention = views[0].attention
    assert attention is not None
    head = [views[0].graph.nodes[i].name for i in attention.nodes].index("A2.3")
    row = attention.clean[head, -1] / 255
    token = views[0].prompts[0].clean.tokens[int(row.argmax())]
    label = maps.first.get_attribute("aria-label")
    assert f"looks most at {token} ({round(100 * row.max())} %)" in label
    panel.get_by_label("From token").select_option("3")
    table = panel.locator("table").first.inner_text()
    assert f"{round(100 * int(attention.clean[head, 3].max()) / 255)} %" in table
    effects = views[0].effects
    assert effects is not None
    source = [one.name for one in views[0].graph.sources].index("A2.3")
    value = float(effects.clean.values[source, 0])
    assert f"{value:+.3g}"[:5] in panel.inner_text().replace("−", "-")


def test_only_so_many_edges_are_drawn_as_is_said(opened: Opened) -> None:
    opened.page.get_by_label("Circuit size").press("End")
    opened.page.evaluate(f"{EXPLORER}.cap = 40; {EXPLORER}.update()")
    assert len(opened.drawn()) == 40
    assert "40 of 150 edges drawn, the strongest" in opened.text(".ace-under")


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_texts_are_shown_as_text(
    width: int, browser: Any, views: list[TaskView], tmp_path: Path
) -> None:
    path = write_explorer(tmp_path / "hostile.html", views[1:], HOSTILE[0])
    opened = Opened(browser, path, width)
    page = opened.page
    assert page.locator("h1").inner_text() == HOSTILE[0]
    assert HOSTILE[0] in page.get_by_label("Algorithm").inner_text()
    page.get_by_label("Circuit size").press("End")
    page.get_by_text("Example prompts").click()
    page.get_by_label("Circuit size").press("ArrowLeft")
    page.wait_for_timeout(300)  # the panel is made again, and the prompts stay open
    shown = page.locator(".ace-prompts").inner_text()
    assert all(text.split("\u2028")[0].strip() in shown for text in HOSTILE)
    page.get_by_label("Find a node").fill(HOSTILE[1])
    page.keyboard.press("Enter")
    page.get_by_label("Find a node").fill("A0.1")
    page.keyboard.press("Enter")
    page.wait_for_selector(".ace-panel table")
    assert HOSTILE[1] in page.locator(".ace-panel").inner_text()
    assert page.locator("img").count() == 0
    opened.check()


@pytest.mark.parametrize("which, width", [(0, 1400), (0, 390), (1, 390)])
def test_no_violation_of_accessibility(
    width: int,
    which: int,
    browser: Any,
    views: list[TaskView],
    tmp_path: Path,
    explorer_packages: Path,
) -> None:
    path = write_explorer(tmp_path / "page.html", [views[which]])
    opened = Opened(browser, path, width)
    for node in ("", "A1.1")[which:]:
        opened.page.get_by_label("Find a node").fill(node)
        opened.page.keyboard.press("Enter")
        opened.page.get_by_label("Graph of the circuit").focus()
        opened.page.wait_for_timeout(200)
        assert violations(opened.page, explorer_packages) == []
    opened.check()


def test_a_notebook_renders_the_same_explorer(
    browser: Any, views: list[TaskView]
) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_content("<!DOCTYPE html><title>Notebook</title><main></main>")
    page.evaluate(
        """async ([code, data]) => {
          const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
          const { default: widget } = await import(url);
          const model = { get: (name) => (name === "data" ? data : null) };
          window.remove = await widget.render({ model, el: document.querySelector("main") });
        }""",
        [built_javascript(), packed(views)],
    )
    assert "edges of 262" in page.locator(".ace-outcome").inner_text()
    # A notebook takes keys for its own commands, wherever they are pressed.
    page.evaluate("""() => {
      document.addEventListener("keydown", (event) => {
        event.preventDefault();
      });
    }""")
    size = page.locator("input[type=range]").first
    before = size.input_value()
    size.press("ArrowRight")
    assert int(size.input_value()) == int(before) + 1
    assert page.locator("[data-lm-suppress-shortcuts=true]").count() == 1
    page.evaluate("window.remove()")
    assert page.locator(".ace-outcome").count() == 0
    page.close()


def test_without_javascript_there_is_a_picture(browser: Any, path: Path) -> None:
    opened = Opened(browser, path, 390, java_script_enabled=False)
    assert opened.page.locator("svg").is_visible()
    assert "Heads task, EAP" in opened.page.locator("figcaption").inner_text()
    assert not opened.wrong
    opened.page.close()


def test_less_motion_is_respected(browser: Any, path: Path) -> None:
    opened = Opened(browser, path, 1400, reduced_motion="reduce")
    assert opened.page.evaluate(f"{EXPLORER}.graph.calm") is True
    opened.check()
