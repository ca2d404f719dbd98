"""A sweep's report, driven as a reader does, and compared with the files beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_PERCENT_METRIC
from auto_circuit.prune_algos.prune_algos import find_prune_algo
from tests.browser import violations

EXPLORER = "document.querySelector('[data-auto-circuit-explorer]').explorer"


class OpenedReport:
    """A page with what it has complained of and asked for."""

    def __init__(self, browser: Any, path: Path, width: int, **options: Any) -> None:
        viewport = {"width": width, "height": 900}
        self.page = browser.new_page(viewport=viewport, **options)
        self.path, self.width = path, width
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def read(self) -> None:
        """Scroll from the top to the end, as a reader does; every figure is drawn."""
        height = self.page.evaluate("document.documentElement.scrollHeight")
        for y in range(0, height, 700):
            self.page.evaluate(f"window.scrollTo(0, {y})")
            self.page.wait_for_timeout(50)
        self.page.wait_for_function(
            "[...document.querySelectorAll('.drawn')]"
            ".every((place) => place.querySelector('.main-svg'))"
        )

    def column(self, title: str) -> list[str]:
        """The texts of a column of the summary."""
        table = self.page.locator("#summary table")
        titles = table.locator("thead th").all_inner_texts()
        (place,) = [i for i, text in enumerate(titles) if text.startswith(title)]
        cells = table.locator(f"tbody tr > :nth-child({place + 1})")
        return [text.strip() for text in cells.all_inner_texts()]

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def check(self) -> None:
        """No complaint, nothing asked of the network, nothing to be scrolled sideways."""
        assert self.said == [] and self.asked == [self.path.as_uri()]
        assert self.page.evaluate("document.documentElement.scrollWidth") == self.width


class DrivenExplorer:
    """The explorer of an opened report, beside what was measured.

    task, algorithm: what it shows.
    """

    def __init__(self, report: OpenedReport, task: str, algorithm: str) -> None:
        self.report, self.page = report, report.page
        self.task, self.algorithm = task, algorithm
        page = report.page
        page.get_by_label("Task", exact=True).select_option(label=task)
        page.get_by_label("Algorithm", exact=True).select_option(label=algorithm)
        page.get_by_label("Show", exact=True).select_option("sign")
        page.locator(".ace-graph").scroll_into_view_if_needed()

    def place(self, name: str) -> tuple[float, float]:
        """Where the middle of a node or of an edge is, in the window."""
        box = self.page.locator(".ace-canvas").bounding_box()
        at = self.page.evaluate(
            f"""(name) => {{
              const {{ graph, task, wanted }} = {EXPLORER};
              const key = [...graph.places.keys()].find((k) => task.nodeName(k) === name);
              const edge = [...wanted.keys()].find((e) => task.edgeName(e) === name);
              return graph.renderedPosition(key ?? `e${{edge}}`);
            }}""",
            name,
        )
        return box["x"] + at["x"], box["y"] + at["y"]

    def slide(self) -> None:
        """Through all sizes: each says what the sweep's file has, as a mean of the seeds."""
        key = find_prune_algo(self.algorithm).key
        rows = pd.read_parquet(self.report.path.parent / "measurements.parquet")
        is_shown = (rows["task"] == self.task) & (rows["algo"] == key)
        is_percent = rows["metric"] == LOGIT_DIFF_PERCENT_METRIC.key
        means = rows[is_shown & is_percent].groupby("n_edges")["value"].mean()
        slider = self.page.get_by_label("Circuit size")
        slider.press("Home")
        for n_edges, mean in means.items():
            shown = self.report.text(".ace-outcome").replace("\u2212", "-")
            found = re.match(r"([\d,]+) edges? of [\d,]+ · (\S+) %", shown)
            assert found is not None, shown
            asked = re.match(
                r"size ([\d,]+); with all", self.report.text(".ace-note >> nth=1")
            )
            of = found[1] if asked is None else asked[1]
            assert int(of.replace(",", "")) == n_edges
            assert float(found[2]) == pytest.approx(mean, rel=0.006, abs=1e-3)
            slider.press("ArrowRight")
        assert len(means) > 10

    def search(self, name: str) -> None:
        """A node is found by its name, and the edges that are listed are its own."""
        search = self.page.get_by_label("Find a node")
        search.fill(name.lower())
        search.press("Enter")
        assert self.report.text(".ace-panel h3") == name
        listed = self.page.locator(".ace-edges .ace-name").all_inner_texts()
        assert len(listed) > 5 and all(name in edge for edge in listed)

    def point(self) -> None:
        """The mouse over the strongest edge names it; a click on a node lists its edges."""
        best = self._strongest()
        slider = self.page.get_by_label("Circuit size")
        slider.press("Home")
        slider.press("ArrowRight")
        self.page.locator(".ace-graph").scroll_into_view_if_needed()
        middle, end = self.place(best), self.place(best.split("->")[1])
        tip = ""
        for step in range(9):  # where no node lies over it
            share = step / 10
            x, y = (m + share * (e - m) for m, e in zip(middle, end, strict=True))
            self.page.mouse.move(x - 30, y)
            self.page.mouse.move(x, y)
            self.page.wait_for_timeout(50)
            tip = self.page.locator(".ace-tip").text_content()
            if tip.startswith(best):
                break
        assert tip.startswith(best) and re.search(r"ranks? 1 ", tip), tip
        node = best.split("->")[0]
        self.page.mouse.click(*self.place(node))
        assert self.report.text(".ace-panel h3") == node

    def _strongest(self) -> str:
        """The edge with the largest |score|, by the circuit that the sweep wrote.

        That is the first seed's, so the algorithm must have run for one only.
        """
        names = [
            re.sub("[^a-z0-9]+", "-", n.lower()) for n in (self.task, self.algorithm)
        ]
        path = self.report.path.parent / "circuits" / names[0] / f"{names[1]}.json"
        edges = json.loads(path.read_text())["edges"]
        return max(edges, key=lambda name: abs(edges[name]))

    def type(self) -> None:
        """Arrow keys go from node to node, Enter lists a node's edges, Escape lets go."""
        graph = self.page.get_by_label("Graph of the circuit")
        self.page.keyboard.press("Escape")
        graph.focus()
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("ArrowUp")
        self.page.keyboard.press("ArrowUp")
        name = self.report.text(".ace-tip").split("\n")[0]
        self.page.keyboard.press("Enter")
        heading = self.page.locator(".ace-panel h3")
        assert heading.inner_text() == name
        assert heading.evaluate("(element) => element === document.activeElement")
        graph.focus()
        self.page.keyboard.press("Escape")
        assert heading.inner_text() == "The circuit"

    def overlay(self, other: str) -> None:
        """Another algorithm's circuit lies over it: both, only this one, only that one."""
        self.page.get_by_label("Circuit size").press("ArrowRight")
        show = self.page.get_by_label("Show", exact=True)
        show.select_option(label=f"Compare with {other}")
        legend = self.report.text(".ace-legend")
        found = {
            kind: int(re.search(rf"{kind}: ([\d,]+)", legend)[1].replace(",", ""))  # type: ignore[index]
            for kind in ("both", f"only {self.algorithm}", f"only {other}")
        }
        both, union = found["both"], sum(found.values())
        jaccard = re.search(r"Jaccard index ([\d.]+)", legend)
        assert jaccard is not None and union > 0
        assert float(jaccard[1]) == pytest.approx(both / union, rel=0.006, abs=1e-9)


def drive(
    browser: Any, path: Path, width: int, packages: Path, nodes: dict[str, str]
) -> None:
    """All that a report of the default sweep lets its reader do.

    nodes: {task: a node of its circuits to search for}, of the tasks to be explored.
    """
    report = OpenedReport(browser, path, width)
    report.read()
    report.check()
    title = report.page.locator("#summary th", has_text="Area")
    for _ in range(2):
        title.get_by_role("button").click()
    areas = [
        float(re.split("[ ±]", text)[0].replace("\u2212", "-"))
        for text in report.column("Area")
    ]
    assert areas == sorted(areas, reverse=True) and len(set(areas)) > 10
    for task, node in nodes.items():
        explorer = DrivenExplorer(report, task, "EAP")
        explorer.slide()
        explorer.search(node)
        explorer.type()
        explorer.overlay("MAttr quick")
        DrivenExplorer(report, task, "MAttr quick").point()
    for details in report.page.locator("details").all():
        details.evaluate("it => it.open = true")
    assert violations(report.page, packages) == []
    report.check()
    report.page.close()
