"""Measure the circuits of one task: scores in, a flat table of rows out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from auto_circuit.checks import checked
from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import about
from auto_circuit.metrics.protocols import SlicedModel, TaskLike
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_vals
from auto_circuit.metrics.prune_metrics.prune_metrics import PruneMetric
from auto_circuit.prune import run_circuits
from auto_circuit.types import (
    AblationMeasurements,
    AblationType,
    AlgoPruneScores,
    CircuitOutputs,
    MeasurementRow,
    PatchType,
    PruneScores,
    TestEdges,
)
from auto_circuit.utils.edge_counts import edge_counts_util, listed_edge_counts

MeasuredValue = tuple[int, float, float | None, int | None]
"""(number of edges, value, standard deviation, number of prompts)"""


@checked
def task_measurement_rows(
    task: TaskLike,
    algo_prune_scores: AlgoPruneScores,
    ablation_types: Sequence[AblationType],
    metrics: Sequence[PruneMetric],
    patch_type: PatchType,
    reverse_clean_corrupt: bool = False,
    test_edge_counts: TestEdges | None = None,
    full_model_outs: FullModelOuts | None = None,
) -> list[MeasurementRow]:
    """Measure every (ablation, algorithm, metric) of one task on its test prompts.

    The circuits of an algorithm are run once for all metrics, the full model at most
    twice (clean, corrupt) for everything. See `measure_prune_metrics`.
    full_model_outs: to be shared with other calls for this task.
    """
    for metric in metrics:
        metric.check_prompts(task.test_loader)
    full = full_model_outs or FullModelOuts(task.model, task.test_loader)
    rows = []
    for ablation_type in ablation_types:
        for algo, prune_scores in algo_prune_scores.items():
            circuit_outs = run_circuits(
                task.model,
                task.test_loader,
                _test_counts(task, prune_scores, test_edge_counts),
                prune_scores,
                patch_type,
                ablation_type,
                reverse_clean_corrupt,
            )
            rows += [
                MeasurementRow(
                    task=task.key,
                    algo=algo,
                    metric=metric.key,
                    ablation=ablation_type.name,
                    patch_type=_direction(patch_type, reverse_clean_corrupt),
                    n_edges=n_edges,
                    value=value,
                    std=std,
                    n_prompts=n_prompts,
                )
                for metric in metrics
                for n_edges, value, std, n_prompts in measured_values(
                    metric, task.model, task.test_loader, circuit_outs, full
                )
            ]
    return rows


@checked
def measured_values(
    metric: PruneMetric,
    model: SlicedModel,
    dataloader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    full: FullModelOuts,
) -> list[MeasuredValue]:
    """A metric's value for each circuit, with its spread if it is per prompt.

    Errors begin with the metric's key.
    """
    with about(f"metric {metric.key!r}"):
        if metric.prompt_func is None:
            points = metric.measure(model, dataloader, circuit_outs)
            return [(int(n_edges), float(value), None, None) for n_edges, value in points]
        circuits = prompt_vals(model, dataloader, circuit_outs, metric.prompt_func, full)
        return [
            (
                circuit.n_edges,
                circuit.mean,
                None if math.isnan(circuit.std) else circuit.std,
                len(circuit.vals),
            )
            for circuit in circuits
        ]


@checked
def nest_rows(rows: Iterable[MeasurementRow]) -> AblationMeasurements:
    """The rows as ablation -> metric -> task -> algorithm -> [(edges, value)]."""
    nested: AblationMeasurements = {}
    for row in rows:
        by_metric = nested.setdefault(AblationType[row.ablation], {})
        by_algo = by_metric.setdefault(row.metric, {}).setdefault(row.task, {})
        by_algo.setdefault(row.algo, []).append((row.n_edges, row.value))
    return nested


def _test_counts(
    task: TaskLike, prune_scores: PruneScores, test_edge_counts: TestEdges | None
) -> list[int]:
    n_edges = task.model.n_edges
    if isinstance(test_edge_counts, list):
        return listed_edge_counts(n_edges, test_edge_counts)
    return edge_counts_util(
        range(n_edges),
        test_edge_counts,
        prune_scores,
        true_edge_count=task.true_edge_count,
    )


def _direction(patch_type: PatchType, reverse_clean_corrupt: bool) -> str:
    return patch_type.name + ("_REVERSED" if reverse_clean_corrupt else "")
