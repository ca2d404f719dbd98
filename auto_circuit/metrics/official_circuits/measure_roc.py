"""How well scores tell a task's true edges from all others.

A circuit of the edges with the largest |score| has a *true positive rate*, the share of
the true edges that is in it, and a *false positive rate*, the share of all other edges
that is in it. The curve of these over all circuit sizes is the ROC.

Edges with equal |score| have no order, so they are in a circuit together or not at all: a
group of ties is one step of the curve. `roc_auc` joins the points by straight lines, which
is the mean over all orders of the ties; `pessimistic` puts each group's wrong edges first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch as t
from jaxtyping import Int
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.circuit_pruning import Selection, selection_ranks
from auto_circuit.metrics.official_circuits.known_circuits import tasks_with_circuits
from auto_circuit.metrics.protocols import PrunableTask
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.ranking import desc_prune_scores, flat_prune_scores
from auto_circuit.types import (
    AlgoKey,
    Edge,
    Measurements,
    PruneScores,
    TaskKey,
    TaskMeasurements,
    TaskPruneScores,
)
from auto_circuit.utils.edge_counts import edge_counts_util
from auto_circuit.utils.patchable_model import PatchableModel

ROC_ENDS: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (1.0, 1.0))


@checked
def measure_roc(
    task_prune_scores: TaskPruneScores,
    *,
    tasks: Sequence[PrunableTask] | None = None,
    selection: Selection = "best",
) -> TaskMeasurements:
    """The ROC of every algorithm's scores for every task, from (0, 0) to (1, 1).

    task_prune_scores: task key -> algorithm key -> scores.
    tasks: where the keys are looked up; the predefined tasks if None.
    selection: see `measure_task_roc`.

    Returns task key -> algorithm key -> points; see `measure_task_roc`.
    Raises ConfigError, before anything is measured, for a key without a task and for a
    task without true edges.
    """
    return {
        task_key: {
            algo: measure_task_roc(
                task.model, task.true_edges or (), prune_scores, selection=selection
            )
            for algo, prune_scores in task_prune_scores[task_key].items()
        }
        for task_key, task in tasks_with_circuits(task_prune_scores, tasks).items()
    }


@checked
def measure_task_roc(
    model: PatchableModel,
    official_edges: Collection[Edge],
    prune_scores: PruneScores,
    all_edges: bool = False,
    selection: Selection = "best",
) -> Measurements:
    """The ROC of scores against the true edges: [(false, true positive rate)].

    Rates are in [0, 1]; the points rise from (0, 0) to (1, 1). Each is a circuit: the
    edges with the largest |score|, and all that tie with the last of them.

    official_edges: the true edges.
    all_edges: a point for every circuit that the scores make, for an exact curve. False:
        for those of the sizes of `edge_counts_util`, enough for a figure.
    selection: "greedy": circuits that grow from the output by the best |score|, as for the
        AUROC of MIB, and no ties (see `circuit_pruning.greedy_ranks`).

    Raises GraphError for edges and scores of another graph and for NaN scores;
    ConfigError if no edge is a true edge, or every one.
    """
    if selection != "best":
        prune_scores = selection_ranks(model, prune_scores, selection, "absolute")
    true_counts, sizes = _true_counts(model, official_edges, prune_scores)
    if not all_edges:
        counts = edge_counts_util(range(model.n_edges), None, prune_scores)
        wanted = t.tensor([count for count in counts if count > 0], dtype=sizes.dtype)
        # The first group of ties that makes a circuit at least as large as wanted.
        idxs = t.searchsorted(sizes, wanted).unique()
        true_counts, sizes = true_counts[idxs], sizes[idxs]
    n_true = len(set(official_edges))
    true_rates = true_counts.double() / n_true
    false_rates = (sizes - true_counts).double() / (model.n_edges - n_true)
    points = zip(false_rates.tolist(), true_rates.tolist(), strict=True)
    return list(dict.fromkeys([ROC_ENDS[0], *points, ROC_ENDS[1]]))


@checked
def roc_auc(points: Measurements, pessimistic: bool = False) -> float:
    """The area under a ROC, in [0, 1]: 1 is perfect, 0.5 is chance.

    It is the probability that a random true edge has a larger |score|
    than a random other edge; a tie counts as a half, or not at all if `pessimistic`. It
    is exact for points of `measure_task_roc(..., all_edges=True)`.

    points: [(false, true positive rate)], rising from (0, 0) to (1, 1). Raises
        ConfigError for others.
    """
    _check_points(points)
    return sum(
        (x1 - x0) * (y0 if pessimistic else (y0 + y1) / 2)
        for (x0, y0), (x1, y1) in pairwise(points)
    )


@checked
def measure_roc_auc(
    task_prune_scores: TaskPruneScores,
    *,
    tasks: Sequence[PrunableTask] | None = None,
    pessimistic: bool = False,
    selection: Selection = "best",
) -> dict[TaskKey, dict[AlgoKey, float]]:
    """Task key -> algorithm key -> exact area under the ROC: `roc_auc`.

    Arguments and errors are those of `measure_roc`.
    """
    return {
        task_key: {
            algo: roc_auc(
                measure_task_roc(
                    task.model, task.true_edges or (), scores, True, selection
                ),
                pessimistic,
            )
            for algo, scores in task_prune_scores[task_key].items()
        }
        for task_key, task in tasks_with_circuits(task_prune_scores, tasks).items()
    }


def _true_counts(
    model: PatchableModel, official_edges: Collection[Edge], prune_scores: PruneScores
) -> tuple[Int[Tensor, "groups"], Int[Tensor, "groups"]]:
    """(true edges, all edges) in each circuit, best tie group first."""
    prune_scores = model.check_scores(prune_scores)
    n_true = len(set(official_edges))
    if not 0 < n_true < model.n_edges:
        raise ConfigError(
            f"{n_true} of the graph's {model.n_edges} edges are true edges; a ROC "
            "needs some that are and some that are not."
        )
    true_edges = model.circuit_prune_scores(official_edges, bool=True)
    is_true = flat_prune_scores({name: true_edges[name] for name in prune_scores}).cpu()
    _, group_sizes = desc_prune_scores(prune_scores).unique_consecutive(
        return_counts=True
    )
    sizes = group_sizes.cumsum(0).cpu()
    # The order inside a group of ties does not matter: counts are read at its end.
    magnitudes = (flat_prune_scores(prune_scores).cpu() * 1.0).abs()
    order = magnitudes.argsort(descending=True)
    return is_true[order].cumsum(0)[sizes - 1], sizes


def _check_points(points: Measurements) -> None:
    ends = (points[:1], points[-1:])
    rises = all(x0 <= x1 and y0 <= y1 for (x0, y0), (x1, y1) in pairwise(points))
    if ends != ([ROC_ENDS[0]], [ROC_ENDS[1]]) or not rises:
        raise ConfigError(
            "The points are no ROC: they must rise from (0, 0) to (1, 1), as those of "
            "`measure_task_roc` do."
        )
