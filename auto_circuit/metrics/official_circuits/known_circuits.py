"""Find the tasks of scores, and ask for their known circuits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, near_matches
from auto_circuit.metrics.protocols import PrunableTask
from auto_circuit.types import TaskKey


@checked
def tasks_with_circuits(
    task_keys: Iterable[TaskKey], tasks: Sequence[PrunableTask] | None = None
) -> dict[TaskKey, PrunableTask]:
    """The tasks with these keys, all of which have a known circuit.

    tasks: where the keys are looked up; the predefined tasks if None.
    Raises ConfigError for a key without a task and for a task without a known circuit.
    """
    candidates = _predefined_tasks() if tasks is None else tasks
    by_key = {task.key: task for task in candidates}
    task_keys = list(task_keys)
    for key in task_keys:
        if key not in by_key:
            raise ConfigError(
                f"There are scores for the task {key!r}, but no such task."
                f"{near_matches(key, by_key)} Give your own with `tasks=`."
            )
    found = {key: by_key[key] for key in task_keys}
    unknown = [key for key, task in found.items() if task.true_edges is None]
    if unknown:
        raise ConfigError(
            f"No circuit is known for the tasks {', '.join(map(repr, unknown))}, so "
            "their scores have nothing to be compared with. Leave them out, or give the "
            "task a `_true_edge_func`."
        )
    return found


def _predefined_tasks() -> Sequence[PrunableTask]:
    # Imported when asked for: whoever gives tasks of their own needs none of these.
    from auto_circuit.tasks import TASK_DICT

    return tuple(TASK_DICT.values())
