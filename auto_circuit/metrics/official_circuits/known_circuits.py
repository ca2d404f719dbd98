"""Find the tasks of scores, and ask for their true edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.protocols import PrunableTask
from auto_circuit.metrics.prune_metrics.measure_prune_metrics import tasks_of_scores
from auto_circuit.types import TaskKey


@checked
def tasks_with_circuits(
    task_keys: Iterable[TaskKey], tasks: Sequence[PrunableTask] | None = None
) -> dict[TaskKey, PrunableTask]:
    """The tasks with these keys, all of which have true edges.

    tasks: where the keys are looked up; the predefined tasks if None.
    Raises ConfigError for a key without a task and for a task without true edges.
    """
    found = tasks_of_scores(task_keys, tasks)
    unknown = [key for key, task in found.items() if task.true_edges is None]
    if unknown:
        raise ConfigError(
            f"No true edges are known for the tasks {', '.join(map(repr, unknown))}, so "
            "their scores have nothing to be compared with. Leave them out, or give the "
            "task a `_true_edge_func`."
        )
    return found
