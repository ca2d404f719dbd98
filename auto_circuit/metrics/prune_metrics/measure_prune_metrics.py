"""Measure the circuits of many tasks, algorithms and metrics, and draw the results.

This is a driver: it may look up the predefined tasks, which the metrics may not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, near_matches
from auto_circuit.metrics.protocols import TaskLike
from auto_circuit.metrics.prune_metrics.prune_metrics import PruneMetric
from auto_circuit.metrics.prune_metrics.prune_metrics_plot import measurement_figs
from auto_circuit.metrics.prune_metrics.task_measurements import (
    nest_rows,
    task_measurement_rows,
)
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import (
    AblationMeasurements,
    AblationType,
    MeasurementRow,
    PatchType,
    TaskKey,
    TaskPruneScores,
    TestEdges,
)
from auto_circuit.utils.custom_tqdm import tqdm

__all__ = ["measure_prune_metrics", "measurement_figs", "measurement_rows"]


@checked
def measure_prune_metrics(
    ablation_types: Sequence[AblationType],
    metrics: Sequence[PruneMetric],
    task_prune_scores: TaskPruneScores,
    patch_type: PatchType,
    reverse_clean_corrupt: bool = False,
    test_edge_counts: TestEdges | None = None,
    *,
    tasks: Sequence[TaskLike] | None = None,
) -> AblationMeasurements:
    """Measure, on the test prompts, the circuits that prune scores make.

    task_prune_scores: task key -> algorithm key -> scores.
    patch_type, reverse_clean_corrupt: what is patched into what; see `run_circuits`.
    test_edge_counts: a list: exactly these sizes. An EdgeCounts rule or None: see
        `edge_counts_util`; the number of true edges is tested too.
    tasks: where the keys are looked up; the predefined tasks if None.

    Returns ablation -> metric key -> task key -> algorithm key -> [(edges, value)].
    Raises ConfigError for a key without a task.
    """
    return nest_rows(
        measurement_rows(
            ablation_types,
            metrics,
            task_prune_scores,
            patch_type,
            reverse_clean_corrupt,
            test_edge_counts,
            tasks=tasks,
        )
    )


@checked
def measurement_rows(
    ablation_types: Sequence[AblationType],
    metrics: Sequence[PruneMetric],
    task_prune_scores: TaskPruneScores,
    patch_type: PatchType,
    reverse_clean_corrupt: bool = False,
    test_edge_counts: TestEdges | None = None,
    *,
    tasks: Sequence[TaskLike] | None = None,
) -> list[MeasurementRow]:
    """`measure_prune_metrics` as one flat table, with deviations and prompt counts.

    A row's `ablation` is the name of the AblationType; its `patch_type` that of the
    PatchType, with "_REVERSED" appended for reverse_clean_corrupt.
    """
    known = tasks_of_scores(task_prune_scores, tasks)
    rows = []
    for task_key, algo_prune_scores in tqdm(task_prune_scores.items(), leave=False):
        rows += task_measurement_rows(
            known[task_key],
            algo_prune_scores,
            ablation_types,
            metrics,
            patch_type,
            reverse_clean_corrupt,
            test_edge_counts,
        )
    return rows


AnyTask = TypeVar("AnyTask", bound=TaskLike)


def tasks_of_scores(
    task_keys: Iterable[TaskKey], tasks: Sequence[AnyTask] | None
) -> dict[TaskKey, AnyTask]:
    """The tasks with these keys, among the given ones, or those of `TASK_DICT` if None.

    Raises ConfigError for a key without a task.
    """
    candidates: Sequence[Any] = _known_tasks() if tasks is None else tasks
    known = {task.key: task for task in candidates}
    keys = list(task_keys)
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"There are scores for the task {key!r}, but no such task."
                f"{near_matches(key, known)} Give your own with `tasks=`."
            )
    return {key: known[key] for key in keys}


def _known_tasks() -> Sequence[TaskLike]:
    """The predefined tasks, and those that a user has put beside them, as in auto-circuit."""
    # Imported when asked for: whoever gives tasks of their own needs none of these.
    from auto_circuit.tasks import TASK_DICT

    return tuple(TASK_DICT.values())
