"""Faithfulness against circuit size, and its areas CPR and CMD, as MIB defines them.

The faithfulness of a circuit C is the share of the model's behaviour that it keeps:

    f(C) = (m(C) - m(nothing)) / (m(N) - m(nothing))

where m is a metric, N the full model and `nothing` the circuit without edges. It is
measured at *budgets*, shares k of all edges: the circuit has int(k * n_edges) edges.

- CPR, the circuit performance ratio, is the area under f. Edges are ranked by signed
  score, so that those that raise the metric come first. Higher is better.
- CMD, the circuit-model distance, is the area under |1 - f|. Edges are ranked by
  |score|, since what lowers the metric is part of the mechanism too. 0 is best.

Both areas are sums of trapezoids from the smallest budget to the largest.

The benchmark counts keys and values for every query head. With grouped-query attention the
numbers are therefore its own only on a graph made with `patchable_model(..., ungroup=True)`;
else the graph has fewer edges, and each budget is another circuit.

Source: Mueller et al. 2025, MIB (arXiv 2504.13151).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch as t

from auto_circuit.checks import check_number, checked
from auto_circuit.circuits import circuit_of_scores
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.metrics.circuit_outs import iter_circuit_outs
from auto_circuit.metrics.circuit_pruning import (
    Selection,
    selection_ranks,
)
from auto_circuit.metrics.edge_ranks import Ranking
from auto_circuit.metrics.edge_ranks import edge_ranks as edge_ranks
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_METRIC,
    PruneMetric,
)
from auto_circuit.precision import ROUNDING
from auto_circuit.types import (
    AblationType,
    BatchOutputs,
    CircuitOutputs,
    Measurements,
    PruneScores,
)
from auto_circuit.utils.patchable_model import PatchableModel

MIB_BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of all edges at which MIB measures."""


@dataclass(frozen=True)
class FaithfulnessPoint:
    """How faithful the circuit of one budget is.

    share: the budget, as a share of all edges: (0, 1]. n_edges: the circuit's edges.
    value: the metric m(C). faithfulness: f(C), 0 for nothing, 1 for the full model; it
        has no bounds.
    weighted_edge_count: the edges that are no dead ends, at most n_edges; None if they
        were not counted.
    """

    share: float
    n_edges: int
    value: float
    faithfulness: float
    weighted_edge_count: float | None = None


FaithfulnessCurve = Sequence[FaithfulnessPoint]


# -------------------------------------------------------------------------- the curve


@checked
def faithfulness_curve(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    prune_scores: PruneScores,
    ranking: Ranking = "signed",
    metric: PruneMetric = LOGIT_DIFF_METRIC,
    ablation_type: AblationType = AblationType.RESAMPLE,
    budgets: Sequence[float] = MIB_BUDGETS,
    selection: Selection = "best",
) -> list[FaithfulnessPoint]:
    """The faithfulness of the circuits that scores make, at each budget, ascending.

    ranking: "signed" (largest score first, for CPR) or "absolute" (largest |score|
        first, for CMD). Among equal scores the earlier edge of the graph is first, so
        that a circuit has exactly int(share * n_edges) edges.
    selection: "best" takes the best edges, wherever they are; "greedy" grows a connected
        circuit from the output (see `circuit_pruning.greedy_ranks`).
    metric: higher for what the model does. ablation_type: what is patched in along all
        edges outside the circuit, the input being clean.
    Edges that are dead ends are taken out before a circuit is measured: without resampled
    activations they would change what it does (see `circuit_pruning`).

    Raises ConfigError for a share outside of (0, 1] and for an unknown ranking,
    GraphError for scores of another graph or NaN, DataError if the metric is the same,
    within rounding, for the full model and for nothing. Cost: a forward pass per budget.
    """
    _check_budgets(budgets)
    metric.check_prompts(dataloader)
    prune_scores = model.check_scores(prune_scores)
    ranks = selection_ranks(model, prune_scores, selection, ranking)
    n_edges = model.n_edges
    sizes = {share: int(share * n_edges) for share in sorted(budgets)}
    circuits = {
        size: circuit_of_scores(model, ranks, size).connected()
        for size in (0, *sizes.values(), n_edges)
    }
    outs: CircuitOutputs = {size: {} for size in circuits}
    by_idx = list(outs.values())
    all_outs = iter_circuit_outs(model, dataloader, [*circuits.values()], ablation_type)
    for batch, idx, out in all_outs:
        by_idx[idx][batch.key] = out
    values = dict(metric.measure(model, dataloader, outs))
    rounding = _rounding_error(outs[n_edges])
    return [
        FaithfulnessPoint(
            share=share,
            n_edges=size,
            value=float(values[size]),
            faithfulness=faithfulness(values[size], values[0], values[n_edges], rounding),
            # Without dead ends each edge weighs 1.
            weighted_edge_count=float(circuits[size].n_edges),
        )
        for share, size in sizes.items()
    ]


@checked
def measured_faithfulness(points: Measurements) -> list[FaithfulnessPoint]:
    """The faithfulness curve of measurements that were made already, ascending.

    points: [(number of edges, value)], among them 0 edges and, as the largest, all
        edges. The point at 0 edges is left out: its faithfulness is 0.

    Shares are those of the real numbers of edges, so that areas start at the smallest
    circuit. Raises ConfigError without a point at 0 edges or above it.
    """
    values = dict(sorted(points))
    if 0 not in values or len(values) < 2:
        raise ConfigError(
            "Faithfulness compares with the circuits of 0 and of all edges; the "
            f"measured sizes are {list(values)}. Measure with `zero_edges=True` and "
            "`all_edges=True`."
        )
    n_edges = max(values)
    return [
        FaithfulnessPoint(
            share=size / n_edges,
            n_edges=int(size),
            value=float(value),
            faithfulness=faithfulness(value, values[0], values[n_edges]),
        )
        for size, value in values.items()
        if size > 0
    ]


@checked
def faithfulness(
    value: int | float,
    nothing: int | float,
    full_model: int | float,
    rounding_error: int | float = 0.0,
) -> float:
    """f = (m(C) - m(nothing)) / (m(N) - m(nothing)).

    0: as nothing does; 1: as the full model does; above 1: more; negative: the opposite.
    NaN if a value is. rounding_error: by how much values may be off, if more is known
    than that they come from numbers in single precision.

    Raises DataError if m(N) and m(nothing) are equal within rounding: the quotient would
    be noise.
    """
    rounding_error = max(rounding_error, ROUNDING * max(abs(full_model), abs(nothing)))
    if abs(full_model - nothing) <= rounding_error:
        raise DataError(
            f"The metric is {full_model:g} for the full model and {nothing:g} for the "
            f"circuit without edges: equal within rounding ({rounding_error:.1g}), so "
            "faithfulness is undefined. Are the clean prompts also the corrupt ones?"
        )
    return float((value - nothing) / (full_model - nothing))


def _rounding_error(full_outs: BatchOutputs) -> float:
    """By how much a metric of these outputs may be off because they are rounded."""
    out = next(iter(full_outs.values()))
    return 8 * t.finfo(out.dtype).eps * float(out.abs().nanmedian())


def _check_budgets(budgets: Sequence[float]) -> None:
    if not len(budgets):
        raise ConfigError(
            "`budgets` has no shares; expected some, above 0 and at most 1."
        )
    for share in budgets:
        check_number("budgets", share, above=0, high=1)


# -------------------------------------------------------------------------- the areas


@checked
def circuit_performance_ratio(curve: FaithfulnessCurve, log_scale: bool = False) -> float:
    """CPR: the area under f(k). Higher is better; it has no bounds.

    A model's own faithfulness, f = 1 everywhere, has 0.999 at MIB's budgets, and
    nothing has 0. Rank by signed score. log_scale: over ln(k) instead of k. With
    grouped-query attention it differs from the benchmark's unless the model was made
    patchable with `ungroup=True`.
    Raises ConfigError for fewer than two budgets.
    """
    return _area(curve, lambda point: point.faithfulness, log_scale)


@checked
def circuit_model_distance(curve: FaithfulnessCurve, log_scale: bool = False) -> float:
    """CMD: the area under |1 - f(k)|. 0 (all circuits do as the model) or more.

    Nothing has 0.999 at MIB's budgets. Rank by |score|. log_scale: over ln(k). With
    grouped-query attention it differs from the benchmark's unless the model was made
    patchable with `ungroup=True`.
    Raises ConfigError for fewer than two budgets.
    """
    return _area(curve, lambda point: abs(1 - point.faithfulness), log_scale)


@checked
def value_area(curve: FaithfulnessCurve, log_scale: bool = False) -> float:
    """The area under the metric's value itself, in the metric's unit.

    Measured with CORRECT_ANSWER_PERCENT_METRIC it is the area under accuracy: 0 to 99.9
    at MIB's budgets. Raises ConfigError for fewer than two budgets.
    """
    return _area(curve, lambda point: point.value, log_scale)


@checked
def mean_faithfulness(curve: FaithfulnessCurve) -> float:
    """The mean of f over the budgets, each with the same weight."""
    if not curve:
        raise ConfigError("The curve has no points, so there is nothing to mean.")
    return math.fsum(point.faithfulness for point in curve) / len(curve)


def _area(
    curve: FaithfulnessCurve,
    height: Callable[[FaithfulnessPoint], float],
    log_scale: bool,
) -> float:
    if len({point.share for point in curve}) < 2:
        raise ConfigError(
            f"An area needs at least two different budgets; the curve has {len(curve)} "
            "points."
        )
    points = sorted(curve, key=lambda point: point.share)
    xs = [math.log(point.share) if log_scale else point.share for point in points]
    heights = [height(point) for point in points]
    return math.fsum(
        (x1 - x0) * (h0 + h1) / 2
        for (x0, h0), (x1, h1) in pairwise(zip(xs, heights, strict=True))
    )
