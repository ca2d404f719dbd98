"""Does a circuit still do what the model does when both lose the same edges?

A circuit may predict as the model does and still lack parts of the mechanism: backups,
which take over when something else is missing. To find out, knock out a set K of the
circuit's edges in the circuit and in the model. If the circuit is complete, the two
still agree, whatever K is. Choose K at random, or train it to make them differ
(`train_same_under_knockouts`).

Source: the completeness criterion of Wang et al. 2022 (arXiv 2211.00593).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.circuits import Circuit, as_circuit, circuit_of_scores
from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ConfigError, near_matches
from auto_circuit.metrics.circuit_outs import iter_circuit_outs
from auto_circuit.metrics.completeness_metrics.same_under_knockouts_plot import (
    same_under_knockouts_fig,
)
from auto_circuit.metrics.protocols import SlicedModel, TaskLike
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts, Side
from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div
from auto_circuit.metrics.prune_metrics.measure_prune_metrics import tasks_of_scores
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.ranking import desc_prune_scores
from auto_circuit.types import (
    AlgoKey,
    AlgoPruneScores,
    BatchOutputs,
    PruneScores,
    TaskKey,
    TaskPruneScores,
)

__all__ = [
    "AlgoCompletenessScores",
    "CompletenessScore",
    "CompletenessScores",
    "TaskCompletenessScores",
    "measure_same_under_knockouts",
    "same_under_knockout",
    "same_under_knockouts_fig",
]


class CompletenessScore(NamedTuple):
    """How far a circuit is from the model, before and after a knockout.

    n_edges, n_knockouts: how many edges the circuit has, and K.
    kl_div: KL(model || circuit), in nats, mean over prompts: 0 or more.
    knockout_kl_div: KL(model without K || circuit without K). For a complete circuit it
        is as small as `kl_div`.
    """

    n_edges: int
    n_knockouts: int
    kl_div: float
    knockout_kl_div: float


CompletenessScores = list[CompletenessScore]
AlgoCompletenessScores = dict[AlgoKey, CompletenessScores]
TaskCompletenessScores = dict[TaskKey, AlgoCompletenessScores]


@checked
def same_under_knockout(
    task: TaskLike,
    circuit_ps: PruneScores,
    knockout_ps: PruneScores,
    circuit_size: int,
    knockout_threshold: int | float = 0.0,
    full_model_outs: FullModelOuts | None = None,
) -> CompletenessScores:
    """Compare circuit and model, both whole and both without the knocked-out edges.

    circuit_ps: scores; the circuit has the `circuit_size` edges of largest |score|.
    knockout_ps: scores; knocked out are the circuit's edges whose score is above
        `knockout_threshold`. (The score, not its absolute value.)
    full_model_outs: of the task's model and test prompts, to be shared.

    On the task's test prompts: the input is clean, and the corrupt prompts' activations
    are patched in along the edges that are missing. Returns a list of one score. If nothing
    is knocked out, its two divergences are the same.

    Raises ConfigError if the circuit is empty, or is so without the knocked-out edges;
    GraphError for scores of another graph or NaN, and for a size that the graph does not
    have.
    """
    circuit = circuit_of_scores(task.model, circuit_ps, circuit_size)
    if not circuit.n_edges:
        raise ConfigError(
            "The circuit's 0 edges do nothing that could be compared. Give a `circuit_size` "
            "of at least 1."
        )
    knockouts = knocked_out_edges(task, circuit, knockout_ps, knockout_threshold)
    if circuit == knockouts:
        raise ConfigError(
            f"All {circuit.n_edges} edges of the circuit have a knockout score "
            f"above {knockout_threshold:g}: without them it is empty, and there is nothing "
            "to compare. Raise `knockout_threshold`, or give other scores."
        )
    outs = _circuit_outs(
        task, [circuit, knockouts.complement(), circuit.without(knockouts)]
    )
    circuit_outs, model_without_outs, circuit_without_outs = outs
    full = full_model_outs or FullModelOuts(task.model, task.test_loader)
    model_without = _GivenOuts(task.model, task.test_loader, model_without_outs)
    return [
        CompletenessScore(
            n_edges=circuit.n_edges,
            n_knockouts=knockouts.n_edges,
            kl_div=_kl_div(task, circuit_outs, full),
            knockout_kl_div=_kl_div(task, circuit_without_outs, model_without),
        )
    ]


@checked
def measure_same_under_knockouts(
    circuit_ps: TaskPruneScores,
    knockout_ps: TaskPruneScores,
    *,
    circuit_size: int | None = None,
    knockout_threshold: int | float = 0.0,
    tasks: Sequence[TaskLike] | None = None,
) -> TaskCompletenessScores:
    """`same_under_knockout` for every task and algorithm of `circuit_ps`.

    circuit_size: the number of edges of every circuit; that of the task's true edges
        if None. tasks: where the keys are looked up; the predefined tasks if None.

    Raises ConfigError, before anything is measured, for a key without a task or without
    knockout scores, and for a size that is not known.
    """
    sizes = {}
    for task_key, algo_scores in circuit_ps.items():
        task = find_task_like(task_key, tasks)
        sizes[task_key] = known_circuit_size(task, circuit_size)
        _check_has_knockouts(task_key, algo_scores, knockout_ps)
    found: TaskCompletenessScores = {}
    for task_key, algo_scores in circuit_ps.items():
        task = find_task_like(task_key, tasks)
        full = FullModelOuts(task.model, task.test_loader)
        found[task_key] = {
            algo: same_under_knockout(
                task,
                scores,
                knockout_ps[task_key][algo],
                sizes[task_key],
                knockout_threshold,
                full,
            )
            for algo, scores in algo_scores.items()
        }
    return found


@checked
def knocked_out_edges(
    task: TaskLike,
    circuit: Circuit,
    knockout_ps: PruneScores,
    knockout_threshold: int | float,
) -> Circuit:
    """The circuit's edges whose score is above a threshold.

    Raises GraphError for scores of another graph or NaN.
    """
    desc_prune_scores(knockout_ps)  # Raises for NaN, which is not above anything.
    above = {name: scores > knockout_threshold for name, scores in knockout_ps.items()}
    return as_circuit(task.model, circuit).intersection(above)


@checked
def find_task_like(key: TaskKey, tasks: Sequence[TaskLike] | None) -> Any:
    """The task with this key: one of `tasks`, or a predefined one if they are None.

    Raises ConfigError if there is none.
    """
    return tasks_of_scores([key], tasks)[key]


@checked
def known_circuit_size(task: TaskLike, circuit_size: int | None) -> int:
    """The given size, or that of the task's true edges. Raises ConfigError if none."""
    size = task.true_edge_count if circuit_size is None else circuit_size
    if size is None:
        raise ConfigError(
            f"The circuit of the task {task.key!r} is not known, so neither is its size. "
            "Give `circuit_size`."
        )
    return size


def _check_has_knockouts(
    task_key: TaskKey, algo_scores: AlgoPruneScores, knockout_ps: TaskPruneScores
) -> None:
    known = knockout_ps.get(task_key, {})
    for algo in algo_scores:
        if algo not in known:
            raise ConfigError(
                f"There are no knockout scores for the algorithm {algo!r} on the task "
                f"{task_key!r}.{near_matches(algo, known)} `knockout_ps` needs the keys "
                "of `circuit_ps`."
            )


class _GivenOuts(FullModelOuts):
    """Outputs that were computed already, in the place of the full model's."""

    def __init__(
        self,
        model: SlicedModel,
        dataloader: Iterable[PromptPairBatch],
        outs: BatchOutputs,
    ) -> None:
        super().__init__(model, dataloader)
        self._outs = outs

    def _run(self, batch: PromptPairBatch, side: Side) -> Tensor:
        return self._outs[batch.key]


def _circuit_outs(task: TaskLike, circuits: Sequence[Circuit]) -> list[BatchOutputs]:
    outs: list[BatchOutputs] = [{} for _ in circuits]
    for batch, idx, out in iter_circuit_outs(task.model, task.test_loader, circuits):
        outs[idx][batch.key] = out
    return outs


def _kl_div(task: TaskLike, outs: BatchOutputs, target: FullModelOuts) -> float:
    ((_, kl_div),) = measure_kl_div(
        task.model, task.test_loader, {0: outs}, full_model_outs=target
    )
    return float(kl_div)
