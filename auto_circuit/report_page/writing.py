"""Writing the page of an experiment: when it has finished, and while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from auto_circuit.errors import FileError
from auto_circuit.files import write_text
from auto_circuit.prune_algos.prune_algos import PruneAlgo
from auto_circuit.report_page.page import PageData, Progress, report_page
from auto_circuit.report_page.rendering import page_version
from auto_circuit.results_folder import (
    PAGE_FILE,
    REPORT_FILE,
    is_sound_page,
    made_from,
    read_report_file,
    robustness_beside,
    signed,
)
from auto_circuit.robustness import RobustnessRow
from auto_circuit.store import folder_at
from auto_circuit.summary import ExperimentResults, experiment_results
from auto_circuit.sweep_config import ExperimentConfig

SECONDS_BETWEEN_PAGES = 10.0
SHARE_OF_PAGES = 0.02
"""The most of the time that goes into pages while a sweep runs."""


def page_data(results: ExperimentResults, algos: Sequence[PruneAlgo]) -> PageData:
    """Of a sweep, with what tests of robustness beside it say of its tasks."""
    names = {algo.key: algo.short_name for algo in algos}
    return PageData(results, names, robustness=robustness_beside(results.config))


def robustness_page_data(
    config: ExperimentConfig, rows: Sequence[RobustnessRow], algos: Sequence[PruneAlgo]
) -> PageData:
    """Of a test of robustness, which has no other results."""
    names = {algo.key: algo.short_name for algo in algos}
    results = experiment_results(config, [], algos)
    return PageData(results, names, robustness=rows, experiment="robustness")


def write_page(folder: Path, data: PageData) -> None:
    """Write the page of finished results, beside the files that it is made from."""
    write_text(folder / PAGE_FILE, finished_page(folder, data))


def finished_page(folder: Path, data: PageData) -> str:
    """The page of the results in a folder; it says what it was made from."""
    source = made_from(data.config, read_report_file(folder), page_version())
    return signed(report_page(replace(data, made_from=source)))


def has_sound_page(config: ExperimentConfig) -> bool:
    """Would the page of finished results be the same if it was written again?"""
    source = made_from(config, read_report_file(config.folder), page_version())
    return is_sound_page(config.folder / PAGE_FILE, source)


@dataclass
class GrowingPage:
    """The page of a sweep that runs. The page of results that are all there stays.

    n_cells: how many cells there are in all.
    """

    config: ExperimentConfig
    algos: Sequence[PruneAlgo]
    n_cells: int
    n_done: int = 0
    _next: float = field(default_factory=lambda: time.monotonic())

    def begin(self, results: Callable[[], ExperimentResults]) -> None:
        """Write the page of what is asked."""
        self._write(results)

    def ended(self, results: Callable[[], ExperimentResults]) -> None:
        """A cell has come to its end: write the page again, if it is time."""
        self.n_done += 1
        if self.n_done < self.n_cells and time.monotonic() >= self._next:
            self._write(results)

    def _write(self, results: Callable[[], ExperimentResults]) -> None:
        place = folder_at(self.config.address)
        if place.read(REPORT_FILE) is not None:
            return
        start = time.monotonic()
        progress = Progress(self.n_done, self.n_cells, time.strftime("%H:%M:%S"))
        data = replace(page_data(results(), self.algos), progress=progress)
        with suppress(FileError):  # the sweep itself will say what is wrong with the disk
            place.write(PAGE_FILE, report_page(data).encode())
        seconds = time.monotonic() - start
        wait = max(SECONDS_BETWEEN_PAGES, seconds / SHARE_OF_PAGES)
        self._next = time.monotonic() + wait
