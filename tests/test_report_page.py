"""The report in a browser: sorting, figures, narrow windows, no network, and without JavaScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from auto_circuit.runner import run_experiment
from auto_circuit.sweep_config import ExperimentConfig
from tests.browser import violations
from tests.report_in_browser import OpenedReport

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two algorithms on a task, one of them with two seeds."""
    config = ExperimentConfig(
        tasks=("Pocket IOI",),
        algos=("EAP", "Random", "Act Mag"),
        metrics=("Logit Diff Percent",),
        circuit_sizes=(0, 10, 50, 100, 1519),
        n_seeds=2,
        once=("Random",),
        out=tmp_path_factory.mktemp("report"),
    )
    run_experiment(config)
    return config.folder / "report.html"


@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_in_a_browser(width: int, browser: Any, report: Path) -> None:
    opened = OpenedReport(browser, report, width)
    page = opened.page
    opened.read()
    assert page.locator(".drawn .main-svg").count() >= page.locator(".drawn").count() == 2
    assert page.locator("#explorer input[type=range]").is_visible()
    assert page.locator("#explorer select").nth(1).input_value() == "0"
    opened.check()


@pytest.mark.parametrize("width", [1400, 390])
def test_a_click_or_a_key_sorts(width: int, browser: Any, report: Path) -> None:
    opened = OpenedReport(browser, report, width)
    assert opened.column("Algorithm") == ["EAP", "Random", "Act Mag"]
    title = opened.page.locator("#summary th", has_text="Area")
    title.get_by_role("button").click()
    areas = [float(text.split(" ")[0]) for text in opened.column("Area")]
    assert areas == sorted(areas) and areas[0] < areas[-1]
    assert title.get_attribute("aria-sort") == "ascending"
    title.get_by_role("button").focus()
    opened.page.keyboard.press("Enter")
    assert opened.column("Algorithm")[0] == "EAP"
    assert title.get_attribute("aria-sort") == "descending"
    name = opened.page.locator("#summary th", has_text="Algorithm")
    name.get_by_role("button").click()
    assert opened.column("Algorithm") == ["Act Mag", "EAP", "Random"]
    assert title.get_attribute("aria-sort") is None and opened.said == []


@pytest.mark.parametrize("width", [1400, 390])
def test_axe_finds_nothing(
    width: int, browser: Any, report: Path, explorer_packages: Path
) -> None:
    opened = OpenedReport(browser, report, width)
    opened.read()
    for details in opened.page.locator("details").all():
        details.evaluate("it => it.open = true")
    assert violations(opened.page, explorer_packages) == []


def test_without_javascript_there_are_tables(browser: Any, report: Path) -> None:
    opened = OpenedReport(browser, report, 1400, java_script_enabled=False)
    page = opened.page
    assert opened.column("Algorithm") == ["EAP", "Random", "Act Mag"]
    assert page.locator("#summary button").count() == 0
    numbers = page.locator("#faithfulness details")
    numbers.locator("summary").first.click()
    assert numbers.first.locator("tbody tr").count() >= 5
    assert numbers.first.locator("tbody tr").first.is_visible()
    assert page.get_by_text("drawn by JavaScript, which is off").first.is_visible()
    picture = page.locator("#explorer svg").first
    assert picture.is_visible() and picture.locator("text", has_text="MLP 0").count()
