"""How much the circuits of different algorithms overlap.

The similarity of two circuits is the number of edges that are in both, divided by the size
of the larger one: 0 is no common edge, 1 the same circuit. Circuits are those that
`run_circuits` runs: the edges with the largest |score| and all that tie with the last of
them, so a circuit may be larger than asked for, and then is like a small one only in part.

Two random circuits of k of n edges have a similarity of k / n, on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement

import torch as t
from jaxtyping import Bool
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.metrics.official_circuits.known_circuits import tasks_with_circuits
from auto_circuit.metrics.protocols import PrunableTask
from auto_circuit.metrics.prune_scores_similarity_plot import Figure, similarity_fig
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.ranking import (
    circuit_mask,
    desc_prune_scores,
    flat_prune_scores,
    score_tensors,
)
from auto_circuit.types import AlgoKey, AlgoPruneScores, TaskKey, TaskPruneScores
from auto_circuit.utils.edge_counts import listed_edge_counts

AlgoSimilarities = dict[int, dict[AlgoKey, dict[AlgoKey, float]]]
"""{edges asked for: {algorithm: {algorithm: similarity}}}, each pair once."""


@checked
def prune_score_similarities(
    algo_prune_scores: AlgoPruneScores, edge_counts: Sequence[int | float]
) -> AlgoSimilarities:
    """The similarity, in [0, 1], of the circuits of each two algorithms; see the module.

    algo_prune_scores: algorithm key -> scores, all of one graph.
    edge_counts: the sizes of the circuits that are compared; a float is a share of all
        edges. Circuits of 0 edges are empty, so they are the same: 1.

    Returns {size: {first: {second: similarity}}}: each pair once, the first before the
    second in `algo_prune_scores` or the same. Raises ConfigError without sizes,
    GraphError for a size that the graph does not have, for NaN scores and for scores of
    different graphs.
    """
    if not len(edge_counts):
        raise ConfigError(
            "`edge_counts` is empty; give the sizes of the circuits to compare, such as "
            "[10, 100]."
        )
    algo_prune_scores = {
        algo: score_tensors(prune_scores)
        for algo, prune_scores in algo_prune_scores.items()
    }
    n_edges = _check_same_graph(algo_prune_scores)
    sizes = listed_edge_counts(n_edges, edge_counts, "edge_counts")
    circuits = {
        algo: _circuits(prune_scores, sizes)
        for algo, prune_scores in algo_prune_scores.items()
    }
    similarities: AlgoSimilarities = {
        size: {algo: {} for algo in circuits} for size in sizes
    }
    for edge_count, by_algo in similarities.items():
        for first, second in combinations_with_replacement(circuits, 2):
            by_algo[first][second] = _similarity(
                circuits[first][edge_count], circuits[second][edge_count]
            )
    return similarities


@checked
def task_prune_scores_similarities(
    task_prune_scores: TaskPruneScores,
    edge_counts: Sequence[int | float],
    true_edge_counts: bool = False,
    *,
    tasks: Sequence[PrunableTask] | None = None,
) -> dict[TaskKey, AlgoSimilarities]:
    """`prune_score_similarities` for every task.

    true_edge_counts: circuits of as many edges as the task has true edges are compared too.
    tasks: where the keys are looked up then; the predefined tasks if None.

    Raises as `prune_score_similarities` does, and, with `true_edge_counts`, ConfigError
    for a key without a task and for a task without true edges.
    """
    counts = {task_key: list(edge_counts) for task_key in task_prune_scores}
    if true_edge_counts:
        for task_key, task in tasks_with_circuits(task_prune_scores, tasks).items():
            counts[task_key].append(task.true_edge_count or 0)
    return {
        task_key: prune_score_similarities(algo_prune_scores, counts[task_key])
        for task_key, algo_prune_scores in task_prune_scores.items()
    }


@checked
def prune_score_similarities_plotly(
    task_prune_scores: TaskPruneScores,
    edge_counts: Sequence[int | float],
    ground_truths: bool = False,
    *,
    tasks: Sequence[PrunableTask] | None = None,
    algo_names: Mapping[AlgoKey, str] | None = None,
) -> Figure:
    """The figure of `task_prune_scores_similarities`: a panel for each task and size.

    ground_truths: circuits of as many edges as the task has true edges are compared too.
    algo_names: labels (else the keys). Errors: `task_prune_scores_similarities`.
    """
    similarities = task_prune_scores_similarities(
        task_prune_scores, edge_counts, ground_truths, tasks=tasks
    )
    return similarity_fig(similarities, algo_names)


def _circuits(
    prune_scores: dict[str, Tensor], edge_counts: Sequence[int]
) -> dict[int, Bool[Tensor, "edges"]]:
    """{size asked for: True at the edges in the circuit}"""
    desc_scores = desc_prune_scores(prune_scores)
    return {
        edge_count: _flat(circuit_mask(prune_scores, edge_count, desc_scores)[0])
        for edge_count in edge_counts
    }


def _flat(mask: Mapping[str, Tensor]) -> Bool[Tensor, "edges"]:
    """In an order that does not depend on that of the modules."""
    return flat_prune_scores({name: mask[name] for name in sorted(mask)}).cpu()


def _similarity(first: Bool[Tensor, "edges"], second: Bool[Tensor, "edges"]) -> float:
    larger = max(int(first.sum()), int(second.sum()))
    return int(t.logical_and(first, second).sum()) / larger if larger > 0 else 1.0


def _check_same_graph(algo_prune_scores: AlgoPruneScores) -> int:
    """The number of edges of the graph that all scores are of."""
    if not algo_prune_scores:
        raise ConfigError("There are no scores to compare: `algo_prune_scores` is empty.")
    shapes = {
        algo: {name: tuple(scores.shape) for name, scores in prune_scores.items()}
        for algo, prune_scores in algo_prune_scores.items()
    }
    for algo, found in shapes.items():
        first_algo, first = next(iter(shapes.items()))
        if found != first:
            raise GraphError(
                f"The scores of {first_algo!r} and of {algo!r} are of different graphs: "
                "their modules or shapes differ. Compare algorithms on one model, made "
                "patchable in one way."
            )
    return flat_prune_scores(next(iter(algo_prune_scores.values()))).numel()
