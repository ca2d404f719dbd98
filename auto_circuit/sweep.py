"""A sweep: tasks x seeds x algorithms, from a frozen configuration to data.

The smallest pieces are the scores of one task, algorithm and seed (`find_scores`), and what
is measured of them (`measure_scores`): functions of what they are given, whose results are
frozen and hold no model. `iter_runs` is a straight line of them; nothing here writes a file,
prints, or draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch as t

from auto_circuit.circuit_files import circuit_document
from auto_circuit.circuits import Circuit, circuit_of_scores
from auto_circuit.errors import about
from auto_circuit.metrics.area_under_curve import edges_for_share
from auto_circuit.metrics.official_circuits.measure_roc import measure_task_roc, roc_auc
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
)
from auto_circuit.metrics.prune_metrics.task_measurements import task_measurement_rows
from auto_circuit.prune_algos.prune_algos import (
    PruneAlgo,
    find_prune_algo,
    run_prune_algo,
)
from auto_circuit.sweep_config import ExperimentConfig, Plan, check_config, check_tasks
from auto_circuit.tasks import Task
from auto_circuit.types import (
    AlgoKey,
    AlgoMeasurements,
    AlgoPruneScores,
    MeasurementRow,
    Measurements,
    PruneScores,
    TaskKey,
)
from auto_circuit.utils.custom_tqdm import tqdm

if TYPE_CHECKING:
    from auto_circuit.visualize import Drawing

SHARE = 0.8
"""A circuit does the task if it does this much of it, and all larger ones do."""

MAX_DRAWN = 500
"""The most edges in the picture of a circuit: of a larger one, the strongest."""


# ------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class FoundScores:
    """What one algorithm found on one task with one seed.

    name: the algorithm's short name. seconds: the time that it took to score the edges.
    """

    task: TaskKey
    seed: int
    algo: AlgoKey
    name: str
    scores: PruneScores
    seconds: float


@dataclass(frozen=True)
class FoundCircuit:
    """The smallest tested circuit of some scores from which on all do 80 % of the task.

    The whole graph is none. percent: how much it does. n_graph_edges: of the whole graph.
    document: what `save_circuit` would write. drawing: what its picture shows, of at most
    `MAX_DRAWN` edges.
    """

    n_edges: int
    percent: float
    n_graph_edges: int
    document: dict[str, Any]
    drawing: Drawing


@dataclass(frozen=True)
class ScoreMeasurements:
    """What was measured of the circuits that one algorithm's scores make.

    circuit: of the sweep's first seed, the only one of which all algorithms have scores; None
        if no tested size below the whole graph does 80 % of the task, or if 'Logit Diff
        Percent' was not measured. roc, auroc: points enough for a figure, and the exact area,
        of a task whose circuit is known; see `measure_task_roc`.
    """

    algo: AlgoKey
    rows: tuple[MeasurementRow, ...]
    circuit: FoundCircuit | None = None
    roc: Measurements | None = None
    auroc: float | None = None


@dataclass(frozen=True)
class TaskRun:
    """What all algorithms found on one task with one seed."""

    task: TaskKey
    seed: int
    found: tuple[FoundScores, ...]
    measured: tuple[ScoreMeasurements, ...]

    @property
    def scores(self) -> AlgoPruneScores:
        """Algorithm -> scores."""
        return {found.algo: found.scores for found in self.found}

    @property
    def seconds(self) -> dict[AlgoKey, float]:
        """Algorithm -> the time that it took."""
        return {found.algo: found.seconds for found in self.found}

    @property
    def rows(self) -> list[MeasurementRow]:
        """All measurements."""
        return [row for of_algo in self.measured for row in of_algo.rows]

    @property
    def circuits(self) -> dict[AlgoKey, FoundCircuit]:
        """Algorithm -> its circuit, if it found one."""
        return {m.algo: m.circuit for m in self.measured if m.circuit is not None}

    @property
    def rocs(self) -> AlgoMeasurements:
        """Algorithm -> its ROC, if the task's circuit is known."""
        return {m.algo: m.roc for m in self.measured if m.roc is not None}

    @property
    def aurocs(self) -> dict[AlgoKey, float]:
        """Algorithm -> the exact area under its ROC, if the task's circuit is known."""
        return {m.algo: m.auroc for m in self.measured if m.auroc is not None}


# ------------------------------------------------------------------------ the whole sweep


def run_sweep(config: ExperimentConfig) -> list[TaskRun]:
    """Each task's and seed's run.

    Raises, before anything is computed, ConfigError, DataError and ModelError as
    `check_config` and `check_tasks` do; while it computes, the error of an algorithm or a
    metric, whose text then begins with the task, the seed and the algorithm.
    """
    plan = check_config(config)
    check_tasks(plan, config)
    return list(iter_runs(plan, config))


def iter_runs(plan: Plan, config: ExperimentConfig) -> Iterator[TaskRun]:
    """The runs of a sweep that was checked, one after the other."""
    todo = [(task, seed) for task in plan.tasks for seed in config.seeds]
    for task, seed in tqdm(todo, desc="Tasks and seeds"):
        algos = algos_of_seed(plan, config, seed)
        yield run_task(task.with_seed(seed), algos, plan.metrics, config)
        if seed == config.seeds[-1]:
            task.free()


def algos_of_seed(plan: Plan, config: ExperimentConfig, seed: int) -> list[PruneAlgo]:
    """The algorithms that run for this seed, drawing from it."""
    once = [find_prune_algo(name) for name in config.once]
    return [
        algo.with_seed(seed)
        for algo in plan.algos
        if seed == config.seed or algo not in once
    ]


def run_task(
    task: Task,
    algos: Sequence[PruneAlgo],
    metrics: Sequence[PruneMetric],
    config: ExperimentConfig,
) -> TaskRun:
    """One task with one seed: every algorithm's scores, and what is measured of them."""
    found = find_all_scores(task, algos)
    full = FullModelOuts(task.model, task.test_loader)
    measured = tuple(measure_scores(task, one, metrics, config, full) for one in found)
    return TaskRun(task.key, task.seed, found, measured)


# ------------------------------------------------------------------------------- pieces


def find_all_scores(task: Task, algos: Sequence[PruneAlgo]) -> tuple[FoundScores, ...]:
    """Each algorithm's scores; those that need true edges are left out without them."""
    task.model  # loads now, so that no algorithm's time includes it  # noqa: B018
    for algo in algos:
        algo.check_prompts(task.train_loader)
    return tuple(
        find_scores(task, algo)
        for algo in tqdm(algos, desc=f"{task.key}, seed {task.seed}", leave=False)
        if task.true_edges is not None or not algo.needs_true_edges
    )


def find_scores(task: Task, algo: PruneAlgo) -> FoundScores:
    """The scores of one algorithm, which draws from its own seed, on one task's prompts."""
    with about(f"{_of_task(task)}, algorithm {algo.short_name!r}"):
        start = time.perf_counter()
        scores = run_prune_algo(task, algo)
        seconds = time.perf_counter() - start
    return FoundScores(task.key, task.seed, algo.key, algo.short_name, scores, seconds)


def measure_scores(
    task: Task,
    found: FoundScores,
    metrics: Sequence[PruneMetric],
    config: ExperimentConfig,
    full: FullModelOuts | None = None,
) -> ScoreMeasurements:
    """Measure the circuits that scores make, in the way that the configuration says.

    full: the full model's outputs on the task's test prompts, to be shared.
    """
    with about(f"{_of_task(task)}, algorithm {found.name!r}"):
        rows = task_measurement_rows(
            task,
            {found.algo: found.scores},
            [config.ablation],
            metrics,
            config.patch_type,
            config.reverse_clean_corrupt,
            config.test_edges,
            full_model_outs=full,
        )
        curve = percents(rows, LOGIT_DIFF_PERCENT_METRIC, config.reverse_clean_corrupt)
        roc, auroc = _roc(task, found.scores)
        is_first = task.seed == config.seed
        return ScoreMeasurements(
            algo=found.algo,
            rows=tuple(replace(row, seed=task.seed) for row in rows),
            circuit=_found_circuit(task, found, curve) if is_first else None,
            roc=roc,
            auroc=auroc,
        )


def _of_task(task: Task) -> str:
    return f"Task {task.key!r}, seed {task.seed}"


def percents(
    rows: Sequence[MeasurementRow], metric: PruneMetric, is_reversed: bool
) -> Measurements:
    """The curve of a metric in percent, in one task, of one algorithm; [] if there is none.

    is_reversed: in tests that take the circuit out of the model, what is lost counts.
    """
    return [
        (row.n_edges, 100 - row.value if is_reversed else row.value)
        for row in rows
        if row.metric == metric.key
    ]


def edges_that_do_it(curve: Measurements) -> int | float | None:
    """The smallest size of a curve in percent from which on all do 80 % of the task.

    None if there is none, NaN if a percentage is.
    """
    return edges_for_share(curve, SHARE, target=100, stay=True) if curve else None


def _roc(
    task: Task, scores: PruneScores
) -> tuple[Measurements, float] | tuple[None, None]:
    """Points enough for a figure, and the exact area; none without true edges."""
    edges = task.true_edges
    if edges is None:
        return None, None
    exact = measure_task_roc(task.model, edges, scores, all_edges=True)
    return measure_task_roc(task.model, edges, scores), roc_auc(exact)


def _found_circuit(
    task: Task, found: FoundScores, curve: Measurements
) -> FoundCircuit | None:
    from auto_circuit.visualize import drawing  # plotly takes half a second to import

    n_edges = edges_that_do_it(curve)
    if n_edges is None or math.isnan(n_edges):
        return None
    circuit = circuit_of_scores(task.model, found.scores, int(n_edges))
    if circuit.n_edges == task.model.n_edges:
        return None
    scores = scores_inside(circuit, found.scores)
    return FoundCircuit(
        n_edges=circuit.n_edges,
        percent=dict(curve)[n_edges],
        n_graph_edges=task.model.n_edges,
        document=circuit_document(task.model, scores, task.key),
        drawing=drawing(
            task.model,
            scores,
            seq_labels=task.model.position_labels(task.test_loader.seq_labels),
        ).strongest(MAX_DRAWN),
    )


def scores_inside(circuit: Circuit, scores: PruneScores) -> PruneScores:
    """The scores of a circuit's edges, and 0 for all others.

    1 for each of its edges if some of them score 0, which in files and figures means that an
    edge is not in it.
    """
    inside = {
        name: scores[name].where(mask, t.zeros_like(scores[name]))
        for name, mask in circuit.items()
    }
    n_scored = sum(int((of_module != 0).sum()) for of_module in inside.values())
    return inside if n_scored == circuit.n_edges else circuit.scores
