"""The report of a sweep: from its results to the text of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from auto_circuit.comparisons import comparison_lines, comparisons
from auto_circuit.errors import AutoCircuitError, DataError
from auto_circuit.explorer.data import TaskView, algorithm_view
from auto_circuit.explorer.page import explorer_html
from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_PERCENT_METRIC
from auto_circuit.report_page import figures, words
from auto_circuit.report_page.agreement import (
    agreement_table,
    stability,
    stability_table,
)
from auto_circuit.report_page.rendering import rendered
from auto_circuit.report_page.tables import (
    Cell,
    Table,
    name_cell,
    number_cell,
    plain_table,
)
from auto_circuit.robustness import RobustnessRow, values_by_choice, verdict_text
from auto_circuit.summary import ExperimentResults, summary_columns
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import AlgoKey, MeasurementRow, PruneScores, TaskKey

N_PROMPTS = 3
"""How many example prompts are shown of each task."""


@dataclass(frozen=True)
class Progress:
    """How far a sweep is that still runs. at: the time of day."""

    n_done: int
    n_cells: int
    at: str


@dataclass(frozen=True)
class PageData:
    """All that a report is made of.

    names: algorithm -> short name. damaged: what could not be read, a line each.
    robustness: of the same tasks, if they were tested. made_from: a word that changes when
    the page has to be written again. experiment: what is typed to run it.
    """

    results: ExperimentResults
    names: Mapping[AlgoKey, str]
    robustness: Sequence[RobustnessRow] = ()
    damaged: Sequence[str] = ()
    progress: Progress | None = None
    made_from: str = "growing"
    experiment: str = "sweep"

    @property
    def config(self) -> ExperimentConfig:
        """The sweep's configuration."""
        return self.results.config

    @property
    def title(self) -> str:
        """What the page is called."""
        is_sweep = self.experiment == "sweep"
        return f"{'Circuits' if is_sweep else 'Six choices'} of {self.config.name}"


Content = Mapping[str, Any]
"""What a part's template shows."""


@dataclass(frozen=True)
class Section:
    """A part of the page. name: its place in links."""

    name: str
    title: str
    template: str
    content: Content = field(default_factory=dict)


def report_page(data: PageData) -> str:
    """The page, as text: complete in itself, and the same for the same data."""
    made = [_made(name, title, make, data) for name, title, make in SECTIONS]
    sections = [section for section in made if section is not None]
    return rendered(
        "page.html",
        data=data,
        made_from=data.made_from,
        title=data.title,
        sections=sections,
        needs_plotly=any(section.content.get("figures") for section in sections),
        plotly_js=figures.zipped_plotly_js,
    )


def _made(
    name: str, title: str, make: Callable[[PageData], Content | None], data: PageData
) -> Section | None:
    """A part of the page; one that cannot be made says why, and leaves the others alone."""
    try:
        content = make(data)
    except AutoCircuitError as error:
        return Section(name, title, "section_error.html", {"error": str(error)})
    if content is None:
        return None
    return Section(name, title, f"section_{name}.html", content)


# ------------------------------------------------------------------------- what was asked


def _asked(data: PageData) -> Content:
    tasks = [_task_view(data, key) for key in _tasks(data)]
    choices = words.choices_in_words(data.config)
    return {"tasks": tasks, "choices": choices}


def _tasks(data: PageData) -> list[TaskKey]:
    return list(data.config.tasks)


def _task_view(data: PageData, key: TaskKey) -> dict[str, Any]:
    origin = data.results.origin.tasks.get(key)
    examples = data.results.examples.get(key, {})
    return {
        "key": key,
        "name": key if origin is None else origin.name,
        "model": "" if origin is None else origin.model,
        "prompts_file": "" if origin is None else origin.prompts,
        "n_edges": _n_edges(data).get(key),
        "prompts": examples.get("prompts", [])[:N_PROMPTS],
    }


def _n_edges(data: PageData) -> dict[TaskKey, int]:
    """The number of edges of each task's graph."""
    return {
        run.task: sum(of_module.numel() for of_module in scores.values())
        for run in data.results.runs
        for scores in run.scores.values()
        if scores
    }


# --------------------------------------------------------------------------- the verdicts


def _verdicts(data: PageData) -> Content | None:
    if data.results.summary.empty:
        return None
    found = comparisons(data.results)
    facts = words.Facts(
        data.results.summary.to_dict("records"),
        _n_edges(data),
        found,
        data.config,
    )
    tasks = dict.fromkeys(data.results.summary["task"])
    verdicts = [words.verdict(task, facts) for task in tasks]
    heading, *lines = comparison_lines(found) or [""]
    return {"verdicts": verdicts, "heading": heading, "lines": lines}


def _summary(data: PageData) -> Content | None:
    if data.results.summary.empty:
        return None
    return {"tables": [_summary_table(data)]}


def _summary_table(data: PageData) -> Table:
    columns = summary_columns(data.results)
    keys = {name: key for key, name in data.names.items()}
    rows = []
    for row in data.results.summary.to_dict("records"):
        memory = data.results.origin.peak_bytes(
            row["task"], keys.get(row["algorithm"], "")
        )
        numbers = [
            number_cell(row[name], digits, _interval(row, name))
            for name, (_, digits) in columns.items()
        ]
        gigabytes = math.nan if memory is None else memory / 2**30
        rows.append(
            (
                name_cell(row["task"]),
                name_cell(row["algorithm"]),
                number_cell(row["n_seeds"], 0),
                *numbers,
                number_cell(gigabytes, 2),
            )
        )
    titles = [(title.replace("\n", " "), True) for title, _ in columns.values()]
    return Table(
        label="Summary: a row for each task and algorithm",
        columns=(
            *(("Task", False), ("Algorithm", False), ("Seeds", True)),
            *titles,
            ("Memory (GiB)", True),
        ),
        rows=tuple(rows),
        is_sortable=True,
        n_headers=2,
        note=(
            "Means over seeds ± half of their 95 % interval; numbers without ± are of one seed. "
            "Seconds: to score the edges. Memory: the most that the process had by the end "
            "of the algorithm's cells, so what ran before it in the same process counts too."
        ),
    )


def _interval(row: Mapping[str, Any], name: str) -> int | float:
    return math.nan if name == "seconds" else row[f"{name}_plus_minus"]


# ---------------------------------------------------------------------- curves and areas


def _faithfulness(data: PageData) -> Content | None:
    curves = _curves_percent_first(data)
    if not curves:
        return None
    figs = [
        figures.curve_figure(one, data.names, f"curve-{place}")
        for place, one in enumerate(curves)
    ]
    return {"figures": figs}


def _curves_percent_first(data: PageData) -> list[figures.Curves]:
    """The metric first in which verdicts are stated."""
    curves = figures.all_curves(data.results)
    main = LOGIT_DIFF_PERCENT_METRIC.key
    return sorted(curves, key=lambda one: one.metric.key != main)


def _areas(data: PageData) -> Content | None:
    main = LOGIT_DIFF_PERCENT_METRIC.key
    curves = [one for one in _curves_percent_first(data) if one.metric.key == main]
    if not curves:
        return None
    fig = figures.area_figure(curves, data.names, "areas", _area_table(data))
    return {"figures": [fig]}


def _area_table(data: PageData) -> Table:
    rows = tuple(
        (
            name_cell(row["task"]),
            name_cell(row["algorithm"]),
            number_cell(row["area"], 3, row["area_plus_minus"]),
            number_cell(row["off"], 3, row["off_plus_minus"]),
        )
        for row in data.results.summary.to_dict("records")
    )
    columns = (
        *(("Task", False), ("Algorithm", False)),
        *(("Area (CPR)", True), ("Off the model (CMD)", True)),
    )
    return Table("Areas: the numbers", columns, rows, is_sortable=True, n_headers=2)


def _roc(data: PageData) -> Content | None:
    figs = figures.roc_figures(data.results, data.names)
    return {"figures": figs} if figs else None


# ------------------------------------------------------------------ agreement, stability


def _scores(data: PageData) -> dict[TaskKey, dict[str, dict[int, PruneScores]]]:
    """Task -> algorithm's name -> seed -> scores."""
    by_task: dict[TaskKey, dict[str, dict[int, PruneScores]]] = {}
    for run in data.results.runs:
        for found in run.found:
            if found.scores:
                of_task = by_task.setdefault(run.task, {})
                of_task.setdefault(found.name, {})[run.seed] = found.scores
    return by_task


def compared_sizes(data: PageData) -> dict[TaskKey, int]:
    """The size at which each task's circuits are compared: what its best algorithm needs.

    1 % of the edges where no circuit smaller than the graph does the task.
    """
    sizes = {}
    for task, n_edges in _n_edges(data).items():
        rows = data.results.summary.to_dict("records")
        needed = [row["edges_for_80_percent"] for row in rows if row["task"] == task]
        smaller = [int(n) for n in needed if 0 < n < n_edges]
        sizes[task] = min(smaller, default=max(1, n_edges // 100))
    return sizes


def _agreement(data: PageData) -> Content | None:
    sizes = compared_sizes(data)
    tables = [
        agreement_table(task, scores, sizes[task])
        for task, scores in _scores(data).items()
        if len(scores) > 1
    ]
    return {"tables": tables} if tables else None


def _stability(data: PageData) -> Content | None:
    scores, sizes = _scores(data), compared_sizes(data)
    found = {task: stability(of_task, sizes[task]) for task, of_task in scores.items()}
    tables = [
        stability_table(task, stable, sizes[task])
        for task, stable in found.items()
        if stable
    ]
    return {"tables": tables} if scores else None


# --------------------------------------------------------------------------- six choices


def _choices(data: PageData) -> Content:
    if not data.robustness:
        return {"figures": [], "tables": []}
    fig = figures.robustness_figure(data.robustness, data.names, "robustness")
    return {"figures": [fig], "tables": [_verdict_table(data)]}


def _verdict_table(data: PageData) -> Table:
    rows = data.robustness
    columns = list(dict.fromkeys((row.task, row.algo) for row in rows))
    shares = " / ".join(f"{100 * share:g}" for share in sorted({r.share for r in rows}))
    return Table(
        label="Verdicts: % of the task that the same circuit does in other tests",
        columns=(
            *(("Choice", False), ("Value", False)),
            *((f"{task}, {data.names.get(algo, algo)}", True) for task, algo in columns),
        ),
        rows=tuple(
            (
                name_cell(choice),
                name_cell(value + " (as in the experiment)" * is_base),
                *(Cell(verdict_text(rows, column, choice, value)) for column in columns),
            )
            for choice, value, is_base in values_by_choice(rows)
        ),
        n_headers=2,
        note=f"Circuits of {shares} % of the edges.",
    )


# --------------------------------------------------------------------------- the explorer


def _explorer(data: PageData) -> Content | None:
    views, notes = [], []
    for task, scores in _scores(data).items():
        if task not in data.results.examples:
            continue
        try:
            views.append(_explored(data, task, scores))
        except DataError as error:
            notes.append(f"{task}: {error}")
    if not views:
        return {"html": "", "notes": notes} if notes else None
    return {"html": explorer_html(views), "notes": notes}


def _explored(
    data: PageData, task: TaskKey, scores: Mapping[str, Mapping[int, PruneScores]]
) -> TaskView:
    """A task with all algorithms, the best first. Raises DataError for another version's."""
    view = TaskView.of_data(data.results.examples[task])
    needed = {
        row["algorithm"]: words.rank(row)
        for row in data.results.summary.to_dict("records")
        if row["task"] == task
    }
    keys = {name: key for key, name in data.names.items()}
    algorithms = [
        algorithm_view(
            view.graph,
            name,
            list(of_seeds.values()),
            _rows_of(data, task, keys[name]),
        )
        for name, of_seeds in sorted(scores.items(), key=lambda one: needed[one[0]])
    ]
    # Two tasks that differ in their names alone share what was computed.
    return replace(view, key=task, name=task).with_algorithms(algorithms)


def _rows_of(data: PageData, task: TaskKey, algo: AlgoKey) -> list[MeasurementRow]:
    return [
        row
        for run in data.results.runs
        if run.task == task
        for measured in run.measured
        if measured.algo == algo
        for row in measured.rows
    ]


# ---------------------------------------------------------------------- how to reproduce


def _reproduce(data: PageData) -> Content:
    origin = data.results.origin
    return {
        "command": words.command_line(data.config, data.experiment),
        "json": data.config.json,
        "where": _where_table(data),
        "hashes": _hash_table(data),
        "n_cells": len(origin.cells),
        "seconds": sum(float(cell.cost.get("seconds", 0)) for cell in origin.cells),
    }


def _where_table(data: PageData) -> Table:
    """On which machines, and with which versions, cells were computed."""
    counts: dict[tuple[str, str], int] = {}
    for cell in data.results.origin.cells:
        machine = cell.cost.get("machine", {})
        versions = cell.cost.get("versions", {})
        where = f"{machine.get('host', '?')}, {machine.get('cores', '?')} cores"
        what = ", ".join(f"{name} {version}" for name, version in versions.items())
        counts[where, what] = counts.get((where, what), 0) + 1
    rows = [
        (name_cell(where), name_cell(what), number_cell(n, 0))
        for (where, what), n in counts.items()
    ]
    columns = (("Machine", False), ("Versions", False), ("Cells", True))
    return Table("Where the cells were computed", columns, tuple(rows))


def _hash_table(data: PageData) -> Table:
    """What determines the numbers, by the hash of its content."""
    rows = [("Configuration", data.config.name, data.config.digest)]
    for key, task in data.results.origin.tasks.items():
        rows += [
            (f"{key}: {name}", of_what, str(task.what[name]))
            for name, of_what in (("weights", task.model), ("prompts", task.prompts))
            if isinstance(task.what.get(name), str)
        ]
    return plain_table(
        "Hashes of configuration, weights and prompts", ("What", "Name", "Hash"), rows
    )


SECTIONS: tuple[tuple[str, str, Callable[[PageData], Content | None]], ...] = (
    ("asked", "What was asked", _asked),
    ("verdict", "The verdict", _verdicts),
    ("summary", "Summary", _summary),
    ("faithfulness", "Faithfulness", _faithfulness),
    ("areas", "Areas: CPR and CMD", _areas),
    ("roc", "The true edges: ROC", _roc),
    ("agreement", "Agreement of algorithms", _agreement),
    ("stability", "Stability over prompts and seeds", _stability),
    ("choices", "The six choices of a test", _choices),
    ("explorer", "The circuits", _explorer),
    ("reproduce", "How to reproduce it", _reproduce),
)
"""(name, title, content) from top to bottom; what there is nothing of has None."""
