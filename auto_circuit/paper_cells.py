"""The rows of Miller et al. 2024 as cells: of each task's circuit, and of each algorithm.

Scores are the same cells as a sweep's, so that what a sweep has computed is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from auto_circuit.cell_runs import CellNames
from auto_circuit.cells import Outcome, Work
from auto_circuit.errors import about
from auto_circuit.paper import (
    GridRow,
    PaperPlan,
    PaperResults,
    RocRow,
    TaskCircuit,
    circuit_algo,
    circuit_verdicts,
    grid_rows,
    roc_row,
    tested_circuit,
)
from auto_circuit.paper_config import PaperConfig
from auto_circuit.prune_algos.prune_algos import PruneAlgo
from auto_circuit.robustness import RobustnessRow
from auto_circuit.store import Cell, CellResult
from auto_circuit.sweep_cells import (
    OpenTask,
    found_scores,
    has_true_edges,
    scores_work,
    task_description,
)

if TYPE_CHECKING:
    from auto_circuit.tasks import Task


@dataclass(frozen=True)
class CircuitCells:
    """The cells of a task's circuit. algo: what finds it; name: what that is called."""

    task: Task
    algo: PruneAlgo
    name: str
    scores: Work
    verdicts: Work
    grid: Work

    @property
    def works(self) -> tuple[Work, ...]:
        """All of them, each after what it needs."""
        return self.scores, self.verdicts, self.grid


@dataclass(frozen=True)
class RocCells:
    """The cells of one algorithm on a task whose circuit is known."""

    task: Task
    algo: PruneAlgo
    scores: Work
    roc: Work

    @property
    def works(self) -> tuple[Work, ...]:
        """All of them, each after what it needs."""
        return self.scores, self.roc


@dataclass(frozen=True)
class PaperCells:
    """All cells."""

    circuits: tuple[CircuitCells, ...]
    rocs: tuple[RocCells, ...]

    @property
    def works(self) -> list[Work]:
        """Of all cells; what is found of one task twice is one cell."""
        works = [work for one in (*self.circuits, *self.rocs) for work in one.works]
        return list({work.cell: work for work in works}.values())

    @property
    def names(self) -> dict[Cell, CellNames]:
        """Their tasks and algorithms, by which some are chosen."""
        names: dict[Cell, CellNames] = {}
        for one in self.rocs:
            key, algo = one.task.key, one.algo.short_name
            names |= {work.cell: (key, (algo,)) for work in one.works}
        for one in self.circuits:
            names |= {work.cell: (one.task.key, ()) for work in one.works}
        return names


def paper_cells(plan: PaperPlan, config: PaperConfig) -> PaperCells:
    """All cells of a configuration that was checked.

    Raises ConfigError for an algorithm of which two cannot be told apart.
    """
    return PaperCells(
        tuple(_circuit_cells(task, config) for task in plan.tasks),
        tuple(cells for task in plan.tracr_tasks for cells in _roc_cells(task, plan)),
    )


def _circuit_cells(task: Task, config: PaperConfig) -> CircuitCells:
    algo, name = circuit_algo(config, is_published=has_true_edges(task))
    with about(f"Task {task.key!r}"):
        scores = scores_work(task, task_description(task), task.seed, algo)
    share = None if name == "published" else config.circuit_share
    what = {"scores": scores.cell.key, "share": None if share is None else share.hex()}

    def tested(kind: str, compute: _TestCircuit) -> Work:
        cell = Cell(f"paper-{kind}", what, f"{task.key}, {name}: {kind}")
        return Work(cell, compute, (scores.cell,), scores.uses)

    circuit = (config, algo, name)
    return CircuitCells(
        *(task, algo, name, scores),
        verdicts=tested("verdicts", _TestCircuit(*circuit, circuit_verdicts)),
        grid=tested("grid", _TestCircuit(*circuit, grid_rows)),
    )


def _roc_cells(task: Task, plan: PaperPlan) -> list[RocCells]:
    with about(f"Task {task.key!r}"):
        description = task_description(task)
    found = []
    for algo in plan.algos:
        algo = algo.with_seed(task.seed)
        scores = scores_work(task, description, task.seed, algo)
        cell = Cell(
            "paper-roc",
            {"scores": scores.cell.key},
            f"{task.key}, {algo.short_name}: ROC",
        )
        roc = Work(cell, _MeasureRoc(task.seed, algo), (scores.cell,), scores.uses)
        found.append(RocCells(task, algo, scores, roc))
    return found


# ---------------------------------------------------------------------------- computation


@dataclass(frozen=True)
class _TestCircuit:
    """Tests a task's circuit in one of two ways, given the scores that say which it is."""

    config: PaperConfig
    algo: PruneAlgo
    name: str
    test: Callable[[Task, TaskCircuit], Sequence[Any]]

    def __call__(self, opened: OpenTask, scores: CellResult) -> CellResult:
        import pandas

        task = opened.of_seed(self.config.seed)
        found = dict(scores.tensors)
        with about(f"Task {task.key!r}"):
            circuit = tested_circuit(task, self.config, found)
            rows = self.test(task, circuit)
        return CellResult(rows=pandas.DataFrame([asdict(row) for row in rows]))


@dataclass(frozen=True)
class _MeasureRoc:
    seed: int
    algo: PruneAlgo

    def __call__(self, opened: OpenTask, scores: CellResult) -> CellResult:
        task = opened.of_seed(self.seed)
        row = roc_row(task, found_scores(task, self.algo, scores))
        points = [list(point) for point in row.points]
        return CellResult(numbers={"auroc": row.auroc, "points": points})


# ------------------------------------------------------------------------ results <-> data


def paper_results(
    config: PaperConfig, cells: PaperCells, outcomes: Mapping[str, Outcome]
) -> PaperResults:
    """All rows that the cells have given."""

    def result(work: Work) -> CellResult | None:
        return outcomes[work.cell.key].result

    return PaperResults(
        config,
        verdicts=tuple(
            replace(RobustnessRow(**row), task=one.task.key, algo=one.algo.key)
            for one in cells.circuits
            for row in _rows(result(one.verdicts))
        ),
        grid=tuple(
            replace(GridRow(**row), task=one.task.key, circuit=one.name)
            for one in cells.circuits
            for row in _rows(result(one.grid))
        ),
        rocs=tuple(
            _roc_row(one, scores, roc)
            for one in cells.rocs
            if (scores := result(one.scores)) is not None
            and (roc := result(one.roc)) is not None
        ),
    )


def _rows(result: CellResult | None) -> list[dict[str, Any]]:
    if result is None or result.rows is None:
        return []
    return [{str(k): v for k, v in row.items()} for row in result.rows.to_dict("records")]


def _roc_row(one: RocCells, scores: CellResult, roc: CellResult) -> RocRow:
    return RocRow(
        one.task.key,
        one.algo.key,
        one.algo.short_name,
        roc.numbers["auroc"],
        float(scores.cost["scoring_seconds"]),
        tuple((x, y) for x, y in roc.numbers["points"]),
    )
