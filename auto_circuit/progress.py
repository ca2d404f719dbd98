"""What is seen of an experiment while it runs: bars, a table that grows, or plain lines.

A terminal shows the table of what has been measured, rewritten as cells finish, and under it a
bar for cells and one for what is at work inside the cell; a notebook shows two bars; a file
or a pipe gets a line per cell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from auto_circuit.cells import Outcome
from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_PERCENT_METRIC
from auto_circuit.reports import summary_table
from auto_circuit.summary import ExperimentResults
from auto_circuit.sweep import edges_that_do_it, percents
from auto_circuit.sweep_cells import measurement_rows
from auto_circuit.utils.custom_tqdm import reported_to, tqdm

if TYPE_CHECKING:
    from rich.console import Console

Results = Callable[[], ExperimentResults]
"""What a sweep's finished cells say so far."""

SECONDS_BETWEEN_TABLES = 1.0
SHARE_OF_TABLES = 0.05
"""The most of the time that goes into tables: one of thousands of cells takes seconds."""


@runtime_checkable
class Watch(Protocol):
    """What is told of an experiment's cells."""

    def watching(self, n_cells: int) -> AbstractContextManager[None]:
        """Around all cells."""
        ...

    def ended(self, outcome: Outcome, results: Results | None) -> None:
        """A cell has come to its end. results: of a sweep, so far."""
        ...


class Bar:
    """A bar for cells, and one for what is at work inside. In terminals and notebooks."""

    @contextmanager
    def watching(self, n_cells: int) -> Iterator[None]:
        """As `Watch.watching`."""
        self._at_work: Any = None
        with (
            tqdm(total=n_cells, desc="Cells") as self._bar,
            tqdm(total=1, desc="Inside", leave=False) as self._inside,
            reported_to(self._inner),
        ):
            yield

    def ended(self, outcome: Outcome, results: Results | None) -> None:
        """As `Watch.ended`."""
        with reported_to(None):
            self._bar.update()
            self._bar.set_postfix_str(outcome.cell.label)

    def _inner(self, bar: Any) -> None:
        """A loop inside the cell at work has come so far."""
        with reported_to(None):
            if bar is not self._at_work:  # the time left begins anew
                self._at_work = bar
                self._inside.reset(total=bar.total)
            self._inside.n = bar.n
            self._inside.set_description(bar.desc or "Inside")


class Lines:
    """A line for every cell that is computed. How many were stored is said before the first of
    these and, if they have become more, at the end."""

    def __init__(self, console: Console, is_reversed: bool = False) -> None:
        self._console, self._is_reversed = console, is_reversed

    @contextmanager
    def watching(self, n_cells: int) -> Iterator[None]:
        """As `Watch.watching`."""
        self._n_cells, self._n_ended, self._n_stored = n_cells, 0, 0
        self._is_first, self._n_said = True, 0
        self._start = time.monotonic()
        yield
        self._say_stored()

    def ended(self, outcome: Outcome, results: Results | None) -> None:
        """As `Watch.ended`."""
        self._n_ended += 1
        if not (outcome.is_new or outcome.error):
            self._n_stored += outcome.result is not None
            return
        if self._is_first:
            self._say_stored()
            self._is_first = False
        said = f": failed: {outcome.error}" if outcome.error else self._numbers(outcome)
        seconds = time.monotonic() - self._start
        place = f"[{self._n_ended}/{self._n_cells}, {seconds:.0f} s]"
        self._say(f"{place} {outcome.cell.label}{said}")

    def _numbers(self, outcome: Outcome) -> str:
        """How long scores took, and what measurements say of the algorithm."""
        result = outcome.result
        assert result is not None
        if "scoring_seconds" in result.cost:
            return f" ({result.cost['scoring_seconds']:.1f} s)"
        if result.rows is None or "metric" not in result.rows:
            return ""
        rows = measurement_rows(result.rows)
        curve = percents(rows, LOGIT_DIFF_PERCENT_METRIC, self._is_reversed)
        n_edges = edges_that_do_it(curve)
        if n_edges is None or math.isnan(n_edges):
            return ""
        return f": 80 % of the task from {n_edges:,.0f} edges on"

    def _say_stored(self) -> None:
        if self._n_stored > self._n_said:
            self._say(f"{self._n_stored} of {self._n_cells} cells were stored")
            self._n_said = self._n_stored

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


class Live:
    """A table that grows, and bars under it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def watching(self, n_cells: int) -> Iterator[None]:
        """As `Watch.watching`."""
        from rich.live import Live as RichLive
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=self._console, expand=False)
        self._cells = self._bars.add_task("Cells", total=n_cells)
        self._inside = self._bars.add_task("", total=None, visible=False)
        self._next_table = time.monotonic()
        with RichLive(self._bars, console=self._console, transient=True) as self._live:
            with reported_to(self._inner):
                yield

    def ended(self, outcome: Outcome, results: Results | None) -> None:
        """As `Watch.ended`."""
        from rich.console import Group

        self._bars.update(
            self._cells, advance=1, description=f"Done: {outcome.cell.label}"
        )
        self._bars.update(self._inside, visible=False)
        if outcome.error:
            line = f"{outcome.cell.label}: failed: {outcome.error}"
            self._console.print(line, highlight=False, markup=False)
        start = time.monotonic()
        if results is None or start < self._next_table:
            return
        found = results()
        if found.runs:
            self._live.update(Group(summary_table(found), self._bars))
        seconds = time.monotonic() - start
        self._next_table = start + max(SECONDS_BETWEEN_TABLES, seconds / SHARE_OF_TABLES)

    def _inner(self, bar: Any) -> None:
        """A loop inside the cell at work has come so far."""
        self._bars.update(
            self._inside,
            description=f"  {bar.desc or 'Inside'}",
            completed=bar.n,
            total=bar.total,
            visible=bar.n < (bar.total or 0),
        )
