"""Running an experiment: check all, compute what is not stored, write the results.

A straight line: the configuration's plan, its cells (`sweep_cells`), a store that has some of
them, workers that compute the others (`run_cells`), and reports of them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from auto_circuit.cell_runs import (
    AS_IT_COMES,
    CellNames,
    at_work,
    choice_of,
    kept,
    watched,
)
from auto_circuit.cells import Work, is_missing, run_cells
from auto_circuit.errors import AutoCircuitError, ConfigError, about
from auto_circuit.fingerprints import described
from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_PERCENT_METRIC
from auto_circuit.progress import Bar, Watch
from auto_circuit.report_page.writing import GrowingPage
from auto_circuit.reports import write_results, write_robustness
from auto_circuit.robustness import RobustnessRow, checked_choices, robustness_rows
from auto_circuit.store import Cell, CellResult, open_store
from auto_circuit.summary import ExperimentResults, experiment_results
from auto_circuit.sweep import algos_of_seed, find_all_scores
from auto_circuit.sweep_cells import (
    ExamplesCell,
    FinishedCells,
    OpenTask,
    SweepCell,
    TaskInUse,
    examples_cells,
    sweep_cells,
    task_description,
)
from auto_circuit.sweep_config import (
    ExperimentConfig,
    Plan,
    RunOptions,
    check_config,
    check_options,
    check_tasks,
)
from auto_circuit.tasks import Task
from auto_circuit.types import AlgoPruneScores, TaskKey

# -------------------------------------------------------------------------------- sweeps


def run_experiment(
    config: ExperimentConfig,
    options: RunOptions = AS_IT_COMES,
    watch: Watch | None = None,
) -> ExperimentResults:
    """Run a sweep and write its results to `config.folder`; what is stored is not computed.

    watch: is told of every cell; a bar, if None.

    Raises, before anything is computed, ConfigError for unknown names, numbers and devices that
    make no sense, circuit sizes that a task's graph does not have, a folder that cannot be
    written, and a cluster that does not answer; DataError for a prompt file that is not there,
    and for prompts and metrics that do not fit a task's model; ModelError if no model can be
    had. A cell that fails is in `failed` of the results, with its error, and the others go
    on. If it is interrupted (KeyboardInterrupt), what is finished stays in `config.store`.
    """
    plan = check_config(config)
    check_options(options, plan)
    store = open_store(config.store)
    with at_work(options, config.device) as workers:
        cells, examples = sweep_cells(plan, config), examples_cells(plan, config)
        works = _works(cells, examples)
        choice = choice_of(options, {one.work.cell: one.names for one in works})
        missing = {one.task for one in works if is_missing(one.work.cell, store, choice)}
        tasks = [task for task in plan.tasks if task.key in missing]
        check_tasks(plan._replace(tasks=tasks), config)
        finished = FinishedCells(cells, examples)

        def results() -> ExperimentResults:
            runs = finished.runs()
            found = experiment_results(config, runs, plan.algos)
            return replace(
                found,
                failed=finished.failed,
                cells=finished.keys,
                examples=finished.examples,
                origin=finished.origin,
            )

        to_run = [one.work for one in works]
        running = run_cells(to_run, store, choice, workers)
        watch, page = watch or Bar(), GrowingPage(config, plan.algos, len(works))
        if missing:
            page.begin(results)
        with watch.watching(len(works)), kept(to_run, store, config.store):
            for outcome in running:
                finished.add(outcome)
                watch.ended(outcome, results)
                page.ended(results)
    found = results()
    if found.runs:
        write_results(found, plan.metrics, plan.algos, is_forced=options.force)
    return found


class _TaskWork(NamedTuple):
    """A work of a sweep. algos: the keys and names of the algorithms that it is for."""

    task: TaskKey
    algos: frozenset[str]
    work: Work

    @property
    def names(self) -> CellNames:
        return self.task, self.algos


def _works(
    cells: Sequence[SweepCell], examples: Sequence[ExamplesCell]
) -> list[_TaskWork]:
    """All works, task by task; a task's examples, which are for all algorithms, first."""
    ordered = []
    for one in examples:
        of_task = [
            _TaskWork(cell.task, frozenset({cell.algo, cell.algo_name}), work)
            for cell in cells
            if cell.task == one.task.key
            for work in cell.works
        ]
        every = frozenset[str]().union(*(work.algos for work in of_task))
        ordered += [_TaskWork(one.task.key, every, one.work), *of_task]
    return ordered


# ---------------------------------------------------------------------------- robustness


def run_robustness(
    config: ExperimentConfig,
    options: RunOptions = AS_IT_COMES,
    watch: Watch | None = None,
) -> list[RobustnessRow]:
    """Test the same circuits in other ways, and write how the verdicts change.

    Raises, before anything is computed, as `run_experiment` does, and ConfigError for other
    metrics than the logit difference's percentage, in which verdicts are stated, for sizes
    that are no shares, and for several seeds. Each task is one cell. A task that fails
    raises AutoCircuitError when the others are finished.
    """
    plan = check_config(config)
    check_options(options, plan)
    _check_robustness(config, options)
    store = open_store(config.store)
    works = [_robustness_work(task, plan, config) for task in plan.tasks]
    names = {
        work.cell: (task.key, ()) for task, work in zip(plan.tasks, works, strict=True)
    }
    choice = choice_of(options, names)
    with at_work(options, config.device) as workers:
        for task, work in zip(plan.tasks, works, strict=True):
            if is_missing(work.cell, store, choice):
                with about(f"Task {task.key!r}"):
                    checked_choices(task, config, config.circuit_shares)
        running = run_cells(works, store, choice, workers)
        outcomes = watched(running, works, watch or Bar(), store, config.store)
    rows = [
        replace(row, task=task.key)
        for task, work in zip(plan.tasks, works, strict=True)
        for row in _rows_of(outcomes[work.cell.key].result)
    ]
    if rows:
        write_robustness(config, rows, plan.algos)
    failed = [outcome for outcome in outcomes.values() if outcome.error]
    if failed:
        raise AutoCircuitError("; ".join(f"{o.cell.label}: {o.error}" for o in failed))
    return rows


def _check_robustness(config: ExperimentConfig, options: RunOptions) -> None:
    if config.metrics != (LOGIT_DIFF_PERCENT_METRIC.key,) or config.circuit_sizes:
        raise ConfigError(
            "Robustness states verdicts in 'Logit Diff Percent', of circuits whose size is "
            "a share of the graph: leave `metrics` and `circuit_sizes` out."
        )
    if config.n_seeds != 1:
        raise ConfigError(f"Robustness has one seed; `n_seeds` is {config.n_seeds}.")
    if not {*options.only} <= {*config.tasks}:
        raise ConfigError(
            f"`only` names {list(options.only)}; robustness is computed task by task, with all "
            f"its algorithms: name some of {list(config.tasks)}."
        )


def _robustness_work(task: Task, plan: Plan, config: ExperimentConfig) -> Work:
    task = replace(task, seed=config.seed)
    compute = _TestInOtherWays(plan, config)
    what = {"task": task_description(task), **compute.description}
    cell = Cell("robustness", what, f"{task.key}, seed {config.seed}: robustness")
    return Work(cell, compute, uses=TaskInUse(task))


@dataclass(frozen=True)
class _TestInOtherWays:
    plan: Plan
    config: ExperimentConfig

    @property
    def description(self) -> dict[str, Any]:
        """All but the task that changes the result."""
        choices = asdict(self.config)
        names = ("token_positions", "nodes", "mean_of_ratios", "reverse_clean_corrupt")
        algos = algos_of_seed(self.plan, self.config, self.config.seed)
        return {
            "algorithms": [[algo.key, described(algo.func)] for algo in algos],
            "seed": self.config.seed,
            "shares": described(self.config.circuit_shares),
            **{name: choices[name] for name in names},
            "ablation": described(self.config.ablation),
            "patch_type": described(self.config.patch_type),
        }

    def __call__(self, opened: OpenTask) -> CellResult:
        import pandas

        config = self.config
        algos = algos_of_seed(self.plan, config, config.seed)

        def find_scores(task: Task) -> AlgoPruneScores:
            return {found.algo: found.scores for found in find_all_scores(task, algos)}

        task = opened.of_seed(config.seed)
        rows = robustness_rows(task, config, config.circuit_shares, find_scores)
        return CellResult(rows=pandas.DataFrame([asdict(row) for row in rows]))


def _rows_of(result: CellResult | None) -> list[RobustnessRow]:
    if result is None or result.rows is None:
        return []
    return [RobustnessRow(**row) for row in result.rows.to_dict("records")]
