"""The page of two sweeps side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from auto_circuit.compared_results import BOTH, ComparedResults
from auto_circuit.comparisons import COMPARED
from auto_circuit.report_page.page import Section
from auto_circuit.report_page.rendering import rendered
from auto_circuit.report_page.tables import (
    Cell,
    Table,
    name_cell,
    number_cell,
    plain_table,
)

MAX_MEASUREMENTS = 50
"""The most measurements that are listed, those first that differ most."""

TITLES = {
    **{name: (of.title, of.digits) for name, of in COMPARED.items()},
    "n_seeds": ("Seeds", 0),
    "seconds": ("Seconds", 1),
}
"""Number of the summary -> its title and digits."""


@dataclass(frozen=True)
class ComparedRuns:
    """Two sweeps: what was read of each, and where."""

    compared: ComparedResults
    first: str
    second: str

    @cached_property
    def lines(self) -> list[str]:
        """What is equal and what is not, in a few lines."""
        tables = {
            "Numbers of the summary": self.compared.summary,
            "Measurements": self.compared.measurements,
        }
        return [f"{title}: {_counted(table)}." for title, table in tables.items()]


def _counted(table: Any) -> str:
    in_both = table["found_in"] == BOTH
    n_equal = int(table["is_equal"].sum())
    counts = table["found_in"].value_counts()
    return (
        f"{n_equal:,} equal, {int((in_both & ~table['is_equal']).sum()):,} different, "
        f"{counts.get('this only', 0):,} only in the first, "
        f"{counts.get('other only', 0):,} only in the second"
    )


def compare_page(runs: ComparedRuns) -> str:
    """The page, as text: complete in itself."""
    tables = {
        ("asked", "What was asked"): _config_table(runs),
        ("summary", "Summary, side by side"): summary_table(runs),
        ("means", "What means something"): _statistics_table(runs),
        ("measurements", "Measurements"): _measurement_table(runs),
    }
    sections = [
        Section(name, title, "section_summary.html", {"tables": [table]})
        for (name, title), table in tables.items()
    ]
    return rendered(
        "compare.html",
        runs=runs,
        made_from="two results",
        title="Two runs side by side",
        sections=sections,
    )


def _config_table(runs: ComparedRuns) -> Table:
    rows = [
        (str(row["field"]), _shown(row["value"]), _shown(row["other"]))
        for row in runs.compared.configs.to_dict("records")
    ]
    return plain_table(
        "Where the configurations differ", ("Field", "First", "Second"), rows
    )


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def summary_table(runs: ComparedRuns) -> Table:
    """A row for each task, algorithm and number of the summary."""
    return _side_by_side(runs, "Summary of both runs", lambda row: True)


def changes_table(runs: ComparedRuns) -> Table:
    """The same of those that differ, but for times, which always do."""

    def is_changed(row: Mapping[str, Any]) -> bool:
        return not row["is_equal"] and row["number"] != "seconds"

    return _side_by_side(runs, "Numbers of the summary that differ", is_changed)


def _side_by_side(
    runs: ComparedRuns, label: str, is_shown: Callable[[Mapping[str, Any]], bool]
) -> Table:
    rows = [
        (
            name_cell(row["task"]),
            name_cell(row["algorithm"]),
            name_cell(title),
            _side(row["value"], row["plus_minus"], digits),
            _side(row["other"], row["other_plus_minus"], digits),
            _difference(row["difference"], digits),
        )
        for row in runs.compared.summary.to_dict("records")
        if is_shown(row) and not (_is_unknown(row["value"]) and _is_unknown(row["other"]))
        for title, digits in [TITLES.get(row["number"], (row["number"], 3))]
    ]
    columns = (
        *(("Task", False), ("Algorithm", False), ("Number", False)),
        *(("First", True), ("Second", True), ("Difference", True)),
    )
    return Table(label, columns, tuple(rows), is_sortable=True, n_headers=2)


def _is_unknown(value: Any) -> bool:
    return value is None or math.isnan(value)


def _side(value: Any, plus_minus: Any, digits: int) -> Cell:
    if _is_unknown(value):
        return Cell("–", None)
    half = math.nan if _is_unknown(plus_minus) else float(plus_minus)
    return number_cell(float(value), digits, half)


def _difference(value: Any, digits: int) -> Cell:
    if _is_unknown(value):
        return Cell("–", None)
    form = f"+,.{digits}f" if round(value, digits) or not value else "+.1g"
    return Cell(f"{value + 0.0:{form}}" if value else "0", float(value))


def _statistics_table(runs: ComparedRuns) -> Table:
    rows = [
        (
            name_cell(str(row["algorithm"])),
            name_cell(TITLES.get(row["number"], (row["number"], 3))[0]),
            _side(row["difference"], row["plus_minus"], 3),
            number_cell(row["n_draws"], 0),
            _side(row["p_holm"], None, 3),
        )
        for row in runs.compared.statistics.to_dict("records")
    ]
    columns = (
        *(("Algorithm", False), ("Number", False), ("First minus second", True)),
        *(("Draws", True), ("p (Holm)", True)),
    )
    label = "Paired by task and seed, over those that both runs have"
    return Table(label, columns, tuple(rows), is_sortable=True, n_headers=2)


def _measurement_table(runs: ComparedRuns) -> Table:
    table = runs.compared.measurements
    different: Any = table[(table["found_in"] == BOTH) & ~table["is_equal"]]
    order = different["difference"].abs().sort_values(ascending=False).index
    rows = [
        (
            *(name_cell(str(row[name])) for name in ("task", "algorithm", "metric")),
            number_cell(row["seed"], 0),
            number_cell(row["n_edges"], 0),
            Cell(f"{row['value']:.6g}", row["value"]),
            Cell(f"{row['other']:.6g}", row["other"]),
            Cell(f"{row['difference']:+.3g}", row["difference"]),
        )
        for row in different.loc[order[:MAX_MEASUREMENTS]].to_dict("records")
    ]
    columns = (
        *(("Task", False), ("Algorithm", False), ("Metric", False), ("Seed", True)),
        *(("Edges", True), ("First", True), ("Second", True), ("Difference", True)),
    )
    label = "Measurements that differ most"
    return Table(label, columns, tuple(rows), is_sortable=True, n_headers=3)
