"""The commands `report` and `compare`: pages of stored results, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from auto_circuit.errors import ConfigError, one_line
from auto_circuit.files import write_text
from auto_circuit.loaded_results import load_results, name_and_out
from auto_circuit.report_config import CompareConfig, ReportConfig
from auto_circuit.report_page.compare import ComparedRuns, changes_table, compare_page
from auto_circuit.report_page.page import report_page
from auto_circuit.report_page.tables import Table
from auto_circuit.reports import say
from auto_circuit.results_folder import PAGE_FILE, signed
from auto_circuit.store import folder_at
from auto_circuit.stored_report import stored_report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

MAX_ROWS = 20
"""The most rows that are shown on the screen."""


def report_and_print(config: ReportConfig, console: Console) -> None:
    """Write a report again, and say where it is and what could not be read.

    Raises as `stored_report` does, and FileError if it cannot be written.
    """
    folder = _named(config.folder, "report results/pocket-0123abcd")
    stored = stored_report(folder)
    page = signed(report_page(stored))
    if config.out is None:
        folder_at(folder).write(PAGE_FILE, page.encode())
    else:
        write_text(config.out, page)
    for line in stored.damaged:
        say(console, f"Damaged: {one_line(line)}")
    for label, error in stored.results.failed.items():
        say(console, f"Failed: {label}: {error}")
    say(console, f"Report: {config.out or f'{folder}/{PAGE_FILE}'}")


def _named(folder: str, example: str) -> str:
    if not folder:
        raise ConfigError(
            f"Name the results' folder, for example `experiments.py {example}`."
        )
    return folder.rstrip("/") or folder


def compare_and_print(config: CompareConfig, console: Console) -> None:
    """Write the page of two runs side by side, and print what differs most.

    Raises as `load_results` and `ComparedResults` do, and FileError.
    """
    example = "compare results/pocket-0123abcd results/pocket-4567cdef"
    first, second = (_named(one, example) for one in (config.first, config.second))
    compared = load_results(first).compare(load_results(second))
    runs = ComparedRuns(compared, first, second)
    out = config.out or _beside(first, second)
    write_text(out, compare_page(runs))
    console.print(_as_rich(changes_table(runs)))
    for line in runs.lines:
        say(console, line)
    say(console, f"Comparison: {out}")


def _beside(first: str, second: str) -> Path:
    (name, out), (other, _) = name_and_out(first), name_and_out(second)
    if "://" in first:
        out = "."
    return Path(out) / f"compare-{name}-{other}.html"


def _as_rich(table: Table) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=table.label)
    for title, is_number in table.columns:
        shown.add_column(Text(title), justify="right" if is_number else "left")
    for row in table.rows[:MAX_ROWS]:
        shown.add_row(*(Text(cell.text) for cell in row))
    return shown
