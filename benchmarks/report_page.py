"""How large a report is, and how soon it opens.

    python benchmarks/report_page.py

Writes reports of made-up results (3 tasks x 10 algorithms x 3 seeds) of a small graph and of that
of GPT-2 small (32,491 edges), opens them in headless Chromium, and prints for each how long it
took to write, the file's size and the time until the page is loaded and its circuits are drawn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from auto_circuit.explorer.data import GraphView  # noqa: E402
from auto_circuit.prune_algos.prune_algos import (
    PRUNE_ALGOS,
    find_prune_algo,
)  # noqa: E402
from auto_circuit.report_page.page import PageData, report_page  # noqa: E402
from tests.browser import find_browser  # noqa: E402
from tests.explorer.views import made_graph  # noqa: E402
from tests.stub_results import stub_config, stub_results  # noqa: E402

TASKS = ("First", "Second", "Third")
ALGOS = tuple(algo.short_name for algo in PRUNE_ALGOS[:10])
GRAPHS = {
    "small": made_graph(n_blocks=4, n_heads=4),
    "GPT-2 small": made_graph(n_blocks=12, n_heads=12),
}


def written(graph: GraphView, path: Path) -> float:
    """Write a report; the seconds that it took."""
    config = replace(stub_config(path.parent, TASKS, ALGOS), n_seeds=3, once=())
    results = stub_results(config, graph)
    names = {find_prune_algo(name).key: name for name in ALGOS}
    start = time.perf_counter()
    path.write_text(report_page(PageData(results, names)), encoding="utf-8")
    return time.perf_counter() - start


def main() -> None:
    """Write and open each of them."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, graph in GRAPHS.items():
            path = Path(folder) / "report.html"
            seconds = written(graph, path)
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector(".ace-outcome", state="attached")
            opened = time.perf_counter() - start
            print(
                f"{name}, {graph.n_edges:,} edges: written in {seconds:.1f} s, "
                f"{path.stat().st_size / 1e6:.1f} MB, opened in {opened:.2f} s"
            )
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
