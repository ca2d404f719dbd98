"""The report of an experiment, made again from what is stored. No model is loaded.

What is damaged is named, and the rest is shown: each file of the results' folder is compared with
its checksum, and so is each cell of the sweep, where the store lies beside the folder. What the
folder has lost, the cells give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, DataError, about
from auto_circuit.fingerprints import digest
from auto_circuit.loaded_results import (
    name_and_out,
    nothing_there,
    read_report,
    rows_in,
    scores_in,
    summary_in,
)
from auto_circuit.origins import CellOrigin, Origin
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.report_page.page import PageData
from auto_circuit.report_page.rendering import page_version
from auto_circuit.results_folder import (
    CONFIG_FILE,
    FAILED_FILE,
    ORIGIN_FILE,
    ROBUSTNESS_FILE,
    ROCS_FILE,
    ROWS_FILE,
    SUMMARY_FILE,
    examples_file,
    made_from,
    robustness_beside,
    robustness_rows_of,
    scores_file,
)
from auto_circuit.store import STORE_FILE, CellResult, Folder, Store, folder_at
from auto_circuit.summary import ExperimentResults, circuit_stem, summarize
from auto_circuit.sweep import FoundScores, ScoreMeasurements, TaskRun
from auto_circuit.sweep_cells import EXAMPLES, MEASUREMENTS, SCORES, measurement_rows
from auto_circuit.sweep_config import ExperimentConfig, config_of_json
from auto_circuit.types import AlgoKey, MeasurementRow, PruneScores, TaskKey

if TYPE_CHECKING:
    import pandas

Read = TypeVar("Read")


@checked
def stored_report(folder: str | Path) -> PageData:
    """What the report of a results' folder is made of, as far as it can be read.

    folder: of a sweep or a test of robustness (`results/<name>-<hash>`), or its address.
    What could not be read is in `damaged`, a line each.

    Raises ConfigError if there is no result, or one of another version; DataError if its
    report.json or config.json is damaged; FileError where the system refuses.
    """
    place = folder_at(str(folder))
    report = read_report(place, str(folder))
    if report is None:
        raise ConfigError(nothing_there(folder, {}, can_be_several=False))
    _, out = name_and_out(folder)
    content = place.read(CONFIG_FILE)
    if content is None or digest(content) != report["files"].get(CONFIG_FILE):
        raise DataError(
            f"{folder}/{CONFIG_FILE} is damaged or missing, so that nothing is known of what "
            "was asked. Run the same experiment again: it writes the folder anew."
        )
    with about(f"{folder}/{CONFIG_FILE}"):
        config = config_of_json(content.decode(), out)
    stored = _Stored(place, report, config)
    is_sweep = "algorithms" in report
    data = _sweep_data(stored) if is_sweep else _robustness_data(stored)
    # Once it is mended, the page of what is damaged has to be written again.
    source = "damaged" if data.damaged else made_from(config, report, page_version())
    return replace(data, made_from=source)


@dataclass
class _Stored:
    """What is stored of an experiment; `damaged` grows while it is read."""

    folder: Folder
    report: Mapping[str, Any]
    config: ExperimentConfig
    damaged: list[str] = field(default_factory=list)

    @cached_property
    def contents(self) -> dict[str, bytes]:
        """The files that are as they were written."""
        sound = {}
        for name, expected in self.report["files"].items():
            content = self.folder.read(name)
            if content is None:
                self.damaged.append(f"{self.what(name)}: the file {name} is missing.")
            elif digest(content) != expected:
                self.damaged.append(
                    f"{self.what(name)}: the file {name} is damaged, or was changed."
                )
            else:
                sound[name] = content
        return sound

    def what(self, name: str) -> str:
        """What a file is of: the task, algorithm and seed, if it is of one."""
        return self._places.get(name, name)

    @cached_property
    def _places(self) -> dict[str, str]:
        places = {ROWS_FILE: "All measurements", SUMMARY_FILE: "The summary"}
        for task in self.config.tasks:
            places[examples_file(task)] = f"{task}: example prompts"
            for seed in self.config.seeds:
                name = scores_file(task, seed)
                places[name] = f"{task}, seed {seed}, all algorithms: scores"
            for algo in self.report.get("algorithms", {}).values():
                for suffix in (".json", ".html"):
                    name = circuit_stem(task, algo) + suffix
                    what = f"{task}, seed {self.config.seed}, {algo}: circuit"
                    places[name] = what
        return places

    def read(self, name: str, read: Callable[[bytes], Read]) -> Read | None:
        """What a file holds; None if it is damaged, or is not there."""
        content = self.contents.get(name)
        if content is None:
            return None
        try:
            return read(content)
        except DataError as error:
            self.damaged.append(f"{self.what(name)}: {error}")
            return None

    # ------------------------------------------------------------------------ the store

    @cached_property
    def store(self) -> Store | None:
        """The store beside the folder, if there is one."""
        place = folder_at(self.config.store)
        return None if place.read(STORE_FILE) is None else Store(place)

    @cached_property
    def origin(self) -> Origin:
        """Where the numbers come from."""
        origin = self.read(ORIGIN_FILE, lambda text: Origin.of_data(json.loads(text)))
        return origin or Origin()

    @cached_property
    def cells(self) -> list[tuple[CellOrigin, CellResult]]:
        """The cells of the experiment that are stored, and are sound."""
        looked_at = self.origin.cells if self.store else ()
        found = [(cell, self._cell(cell)) for cell in looked_at]
        return [(cell, result) for cell, result in found if result is not None]

    def _cell(self, cell: CellOrigin) -> CellResult | None:
        assert self.store is not None
        what = f"{cell.label}: its cell in {self.config.store}"
        try:
            result = self.store.stored(cell.kind, cell.key)
        except DataError as error:
            self.damaged.append(f"{what} is damaged: {error}")
            return None
        if result is None:
            self.damaged.append(f"{what} is missing.")
        return result

    def results_of(self, kind: str) -> Iterable[tuple[CellOrigin, CellResult]]:
        """The sound cells of a kind."""
        return [(cell, one) for cell, one in self.cells if cell.kind == kind]


# ------------------------------------------------------------------------------- a sweep


def _sweep_data(stored: _Stored) -> PageData:
    names: dict[AlgoKey, str] = stored.report["algorithms"]
    runs = _runs(stored, names)
    algos = [_named(key, name) for key, name in names.items()]
    summary = summarize(runs, algos, stored.config.reverse_clean_corrupt)
    if not runs:
        summary = _or_empty(stored.read(SUMMARY_FILE, summary_in), summary)
    results = ExperimentResults(
        stored.config,
        runs,
        summary,
        failed=stored.read(FAILED_FILE, json.loads) or {},
        cells=tuple(stored.report["cells"]),
        examples=_examples(stored),
        origin=stored.origin,
    )
    stored.cells  # looks at them all  # noqa: B018
    return PageData(
        results,
        names,
        robustness=robustness_beside(stored.config),
        damaged=tuple(dict.fromkeys(stored.damaged)),
    )


def _or_empty(
    table: pandas.DataFrame | None, empty: pandas.DataFrame
) -> pandas.DataFrame:
    return empty if table is None else table


def _named(key: AlgoKey, name: str) -> PruneAlgo:
    """An algorithm that only has a name, for the summary."""
    return PruneAlgo(key, name, dict, name)


def _runs(stored: _Stored, names: Mapping[AlgoKey, str]) -> list[TaskRun]:
    rows: dict[tuple[TaskKey, int], dict[AlgoKey, list[MeasurementRow]]] = {}
    for row in _rows(stored):
        of_run = rows.setdefault((row.task, row.seed or 0), {})
        of_run.setdefault(row.algo, []).append(row)
    rocs = _rocs(stored)
    return [_run(stored, names, place, of_run, rocs) for place, of_run in rows.items()]


def _rows(stored: _Stored) -> list[MeasurementRow]:
    table = stored.read(ROWS_FILE, rows_in)
    if table is not None:
        return measurement_rows(table)
    return [
        replace(row, task=cell.task, algo=cell.algo or "")
        for cell, result in stored.results_of(MEASUREMENTS)
        if result.rows is not None
        for row in measurement_rows(result.rows)
    ]


Rocs = Mapping[tuple[TaskKey, int, AlgoKey], Mapping[str, Any]]


def _rocs(stored: _Stored) -> Rocs:
    found = stored.read(ROCS_FILE, json.loads)
    if found is not None:
        return {(one["task"], one["seed"], one["algo"]): one for one in found}
    return {
        (cell.task, cell.seed, cell.algo or ""): {
            "points": result.numbers["roc"],
            "auroc": result.numbers["auroc"],
        }
        for cell, result in stored.results_of(MEASUREMENTS)
        if result.numbers.get("roc") is not None
    }


def _run(
    stored: _Stored,
    names: Mapping[AlgoKey, str],
    place: tuple[TaskKey, int],
    rows: Mapping[AlgoKey, list[MeasurementRow]],
    rocs: Rocs,
) -> TaskRun:
    scores = _scores(stored, *place)
    found, measured = [], []
    for algo, of_algo in rows.items():
        seconds = stored.origin.seconds.get((*place, algo), math.nan)
        name = names.get(algo, algo)
        found.append(FoundScores(*place, algo, name, scores.get(algo, {}), seconds))
        roc = rocs.get((*place, algo), {})
        points = None if not roc else [(x, y) for x, y in roc["points"]]
        measured.append(
            ScoreMeasurements(algo, tuple(of_algo), None, points, roc.get("auroc"))
        )
    return TaskRun(*place, tuple(found), tuple(measured))


def _scores(stored: _Stored, task: TaskKey, seed: int) -> Mapping[AlgoKey, PruneScores]:
    by_algo = stored.read(scores_file(task, seed), scores_in)
    if by_algo is not None:
        return by_algo
    return {
        cell.algo or "": dict(result.tensors)
        for cell, result in stored.results_of(SCORES)
        if (cell.task, cell.seed) == (task, seed)
    }


def _examples(stored: _Stored) -> dict[TaskKey, Mapping[str, Any]]:
    of_cells = {
        cell.task: result.numbers
        for cell, result in (stored.results_of(EXAMPLES) if stored.damaged else ())
    }
    found = {
        task: stored.read(examples_file(task), json.loads) or of_cells.get(task)
        for task in stored.config.tasks
    }
    return {task: shown for task, shown in found.items() if shown is not None}


# ---------------------------------------------------------------------------- robustness


def _robustness_data(stored: _Stored) -> PageData:
    rows = stored.read(ROBUSTNESS_FILE, robustness_rows_of) or []
    algos = [find_prune_algo(name) for name in stored.config.algos]
    results = ExperimentResults(stored.config, [], summarize([], algos))
    return PageData(
        results,
        {algo.key: algo.short_name for algo in algos},
        robustness=rows,
        damaged=tuple(dict.fromkeys(stored.damaged)),
        experiment="robustness",
    )
