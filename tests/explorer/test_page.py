"""The explorer as a page, as a widget, and by `explore`."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch as t

import auto_circuit as ac
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.explorer.data import TaskView
from auto_circuit.explorer.explore import CircuitExplorer, explore
from auto_circuit.explorer.packing import packed
from auto_circuit.explorer.page import explorer_html, write_explorer
from auto_circuit.explorer.picture import circuit_picture
from auto_circuit.tasks import Task
from auto_circuit.types import MeasurementRow
from tests.explorer.views import made_algorithm, made_graph, made_view, micro_task

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "quo\"te's &amp; <!-- ",
    "\u202eright to left \u05d0\u05d1",
    "\U0001f600\u2028\u2029",
    "back\\slash",
)
SIZES = (0, 1, 5, 20, 40)


class Elements(HTMLParser):
    """The tags of a page, its attributes' names, and what is in scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def unzipped(text: str) -> tuple[dict[str, Any], bytes]:
    """The JSON that a page's data begin with, and the bytes of its arrays."""
    content = gzip.decompress(base64.b64decode(text, validate=True))
    end = 4 + int.from_bytes(content[:4], "little")
    return json.loads(content[4:end]), content[end:]


@pytest.fixture(scope="module")
def hostile_view() -> TaskView:
    graph = made_graph(2, 2, 6, position_labels=HOSTILE)
    algorithm = made_algorithm(graph, HOSTILE[0], sizes=SIZES)
    return made_view(graph, [algorithm], HOSTILE[1], HOSTILE)


def test_texts_stay_texts(hostile_view: TaskView) -> None:
    html = explorer_html([hostile_view])
    page = Elements()
    page.feed(html)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert "onerror" not in page.attributes
    assert re.fullmatch("[A-Za-z0-9+/=]+", page.scripts[0])
    (task,) = unzipped(page.scripts[0])[0]["tasks"]
    expected = hostile_view.as_data()
    for field in ("key", "name", "prompts"):
        assert task[field] == expected[field]
    assert task["graph"]["position_labels"] == list(HOSTILE)
    before_code = html[: html.index('<script type="module">')]
    assert before_code.isascii() or "\u2028" not in before_code


def test_arrays_are_packed_number_by_number_in_the_order_of_the_ranks() -> None:
    graph = made_graph(2, 2)
    algorithm = made_algorithm(graph, "A", (0, 1), SIZES)
    data, content = unzipped(packed([made_view(graph, [algorithm])]))
    (shown,) = data["tasks"][0]["algorithms"]

    def array(of: dict[str, Any]) -> np.ndarray:
        dtype, length = np.dtype(of["dtype"]), int(np.prod(of["shape"]))
        size = dtype.itemsize
        by_byte = content[of["at"] : of["at"] + size * length]
        numbers = [by_byte[place::length] for place in range(length)]
        return np.array([np.frombuffer(n, dtype.newbyteorder("<"))[0] for n in numbers])

    order = array(shown["order"])
    assert order.tolist() == algorithm.order.tolist() and len(order) == graph.n_edges
    assert algorithm.plus_minus is not None
    assert array(shown["scores"]).tolist() == algorithm.scores[order].tolist()
    assert array(shown["plus_minus"]).tolist() == algorithm.plus_minus[order].tolist()
    assert shown["name"] == "A" and len(shown["sizes"]) == len(SIZES)
    assert packed([made_view(graph, [algorithm])]) == packed(
        [made_view(graph, [algorithm])]
    )


def test_nothing_is_loaded(hostile_view: TaskView, tmp_path: Path) -> None:
    path = write_explorer(tmp_path / "page.html", [hostile_view], HOSTILE[0])
    page = Elements()
    page.feed(path.read_text(encoding="utf-8"))
    assert "src" not in page.attributes and "link" not in page.tags
    assert not {"href", "data"} & page.attributes
    with pytest.raises(ConfigError, match="there is no folder"):
        write_explorer(tmp_path / "no" / "page.html", [hostile_view])


def test_a_still_picture_shows_the_strongest_edges(hostile_view: TaskView) -> None:
    graph = made_graph(2, 2)
    algorithm = made_algorithm(graph, "A", sizes=SIZES)
    size = algorithm.sizes[algorithm.first_size]
    figure = circuit_picture(made_view(graph, [algorithm]), algorithm)
    root = ElementTree.fromstring(figure)
    texts = {text.text for text in root.iter("text")}
    assert {"A0.0", "MLP 1", "Resid End"} <= texts
    pairs = {
        (
            graph.sources[graph.src[edge]].node,
            graph.destinations[graph.dest[edge]].node,
        )
        for edge in algorithm.order[: size.n_drawn]
    }
    lines = list(root.iter("path"))
    assert len(lines) == len(pairs) > 5
    dashed = [line for line in lines if "stroke-dasharray" in line.attrib]
    assert 0 < len(dashed) < len(lines)
    assert {line.attrib["stroke"] for line in dashed} == {"#b84a00"}
    ElementTree.fromstring(circuit_picture(hostile_view, hostile_view.algorithms[0]))


def test_the_first_size_does_the_task() -> None:
    graph = made_graph(2, 2)
    # 100 * (size / n_edges) ** 0.25 is 80 at 41 % of the edges.
    sizes = (0, 1, 5, 15, 20, 40, graph.n_edges)
    algorithm = made_algorithm(graph, "A", sizes=sizes)
    expected = next(s for s in sizes if s >= 0.8**4 * graph.n_edges)
    assert algorithm.sizes[algorithm.first_size].n_edges == expected
    unmeasured = made_algorithm(made_graph(4, 4), "A")
    shown = [size.n_edges for size in unmeasured.sizes]
    assert shown[:5] == [0, 1, 2, 4, 7] and shown[-1] == len(unmeasured.scores)
    assert unmeasured.sizes[unmeasured.first_size].n_edges == 100


@pytest.mark.slow
def test_pages_stay_small() -> None:
    """With Plotly, which takes 2 MB, reports of 3 tasks and 10 algorithms stay below 10."""
    views = []
    for n_positions in (None, 13, 34):
        graph = made_graph(4, 8, n_positions)
        algorithms = [made_algorithm(graph, f"A{i}", (0, 1), SIZES) for i in range(10)]
        views.append(made_view(graph, algorithms))
    assert len(explorer_html(views)) < 6e6
    gpt2 = made_graph(12, 12)
    assert gpt2.n_edges == 32_491
    algorithms = [made_algorithm(gpt2, f"A{i}", (0, 1), (20_000,)) for i in range(10)]
    assert len(explorer_html([made_view(gpt2, algorithms)])) < 3.2e6


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return micro_task(tmp_path_factory.mktemp("micro"))


def test_explore_takes_scores_of_one_seed_or_of_several(
    task: Task, tmp_path: Path
) -> None:
    one = task.model.new_prune_scores(1.0)
    two = task.model.new_prune_scores(3.0)
    row = MeasurementRow("Micro", "B", "Logit Diff Percent", "R", "T", 1, 50.0, seed=0)
    explorer = ac.explore(task, {"A": one, "B": [one, two]}, {"B": [row]})
    assert isinstance(explorer, CircuitExplorer)
    (view,) = explorer.views
    a, b = view.algorithms
    assert (a.scores == 1).all() and (b.scores == 2).all() and b.n_seeds == 2
    assert [size.n_edges for size in b.sizes] == [1]
    assert b.sizes[0].n_drawn == view.graph.n_edges  # all tie
    path = explorer.write(tmp_path / "circuits.html")
    assert "<title>Circuits: Micro</title>" in path.read_text(encoding="utf-8")
    assert repr(explorer).startswith("CircuitExplorer('Micro': A, B)")
    assert explore([view]).views == (view,)


def test_explore_says_what_does_not_fit(task: Task) -> None:
    scores = task.model.new_prune_scores()
    with pytest.raises(ConfigError, match="`scores` is empty"):
        explore(task)
    with pytest.raises(ConfigError, match="`measurements` names 'B', which `scores`"):
        explore(task, {"A": scores}, {"B": []})
    with pytest.raises(GraphError, match="do not fit the graph"):
        explore(task, {"A": {"no module": t.zeros(3)}})
    views = explore(task, {"A": scores}).views
    with pytest.raises(ConfigError, match="views have theirs already"):
        explore(views, {"A": scores})


def test_the_widget_has_the_same_javascript_and_data(task: Task) -> None:
    explorer = explore(task, {"A": task.model.new_prune_scores(1.0)})
    widget = explorer.widget()
    assert "AutoCircuit's circuit explorer" in str(widget._esm)
    assert widget.data == packed(explorer.views)
    shown, _ = explorer._repr_mimebundle_()
    assert any("widget-view" in kind for kind in shown)
    assert shown["text/html"].startswith("<figure") and "<svg" in shown["text/html"]
    widget.close()


@pytest.mark.slow
def test_without_anywidget_it_says_how_to_get_it() -> None:
    program = """
import sys
sys.modules["anywidget"] = None
from auto_circuit.errors import ConfigError
from auto_circuit.explorer.explore import CircuitExplorer
try:
    CircuitExplorer([]).widget()
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert re.search(r"pip install anywidget", done.stdout), done.stderr
