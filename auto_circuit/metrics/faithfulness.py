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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import check_number, checked
from auto_circuit.circuits import Circuit, circuit_of_scores
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.metrics.circuit_outs import iter_circuit_outs
from auto_circuit.metrics.circuit_pruning import (
    Selection,
    selection_ranks,
)
from auto_circuit.metrics.edge_ranks import Ranking
from auto_circuit.metrics.edge_ranks import edge_ranks as edge_ranks
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import (
    PromptVals,
    batch_vals,
    warn_of_nan,
)
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
    LOGIT_DIFF_METRIC,
    PruneMetric,
)
from auto_circuit.precision import ROUNDING
from auto_circuit.types import (
    AblationType,
    BatchOutputs,
    Measurements,
    PruneScores,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state

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
    accuracy: the share of prompts, in %, whose correct answer is above all wrong ones; None
        if that was not measured.
    """

    share: float
    n_edges: int
    value: float
    faithfulness: float
    weighted_edge_count: float | None = None
    accuracy: float | None = None


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
    curves = faithfulness_curves(
        model,
        dataloader,
        prune_scores,
        (ranking,),
        metric,
        ablation_type,
        budgets,
        selection,
    )
    return curves[ranking]


@checked
@in_own_state(grad=False)
def faithfulness_curves(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    prune_scores: PruneScores,
    rankings: Sequence[Ranking] = ("signed", "absolute"),
    metric: PruneMetric = LOGIT_DIFF_METRIC,
    ablation_type: AblationType = AblationType.RESAMPLE,
    budgets: Sequence[float] = MIB_BUDGETS,
    selection: Selection = "best",
    accuracy: bool = False,
) -> dict[Ranking, list[FaithfulnessPoint]]:
    """Ranking -> `faithfulness_curve`, for less than one at a time costs.

    accuracy: measure the circuits' accuracy too, on the same outputs.

    The outputs of one batch are in memory at a time (those of all batches for a metric
    without a `prompt_func`). Raises as `faithfulness_curve` does, and DataError for prompts
    without wrong answers, which accuracy compares with.
    """
    _check_budgets(budgets)
    extra = CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC if accuracy else None
    for one in (metric, extra):
        if one is not None:
            one.check_prompts(dataloader)
    prune_scores = model.check_scores(prune_scores)
    n_edges = model.n_edges
    shares = {share: int(share * n_edges) for share in sorted(budgets)}
    circuits: dict[_Place, Circuit] = {}
    for ranking in rankings:
        ranks = selection_ranks(model, prune_scores, selection, ranking)
        for size in (0, *shares.values(), n_edges):
            place = _place(ranking, size, n_edges)
            if place not in circuits:
                circuits[place] = circuit_of_scores(model, ranks, size).connected()
    measured = _measure(
        model,
        dataloader,
        circuits,
        [one for one in (metric, extra) if one],
        ablation_type,
    )
    return {
        ranking: [
            _point(share, _place(ranking, size, n_edges), circuits, measured)
            for share, size in shares.items()
        ]
        for ranking in rankings
    }


_Place = tuple[str, int]
"""(ranking, number of edges); no ranking for the circuits of no edges and of all."""


def _place(ranking: Ranking, size: int, n_edges: int) -> _Place:
    return ("" if size in (0, n_edges) else ranking, size)


@dataclass(frozen=True)
class _Measured:
    """values: for each metric, circuit -> value. n_edges: of the graph. rounding: by how
    much values may be off."""

    values: Sequence[Mapping[_Place, float]]
    n_edges: int
    rounding: float


def _measure(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuits: Mapping[_Place, Circuit],
    metrics: Sequence[PruneMetric],
    ablation_type: AblationType,
) -> _Measured:
    """Run each circuit once, and look at its outputs while they are there."""
    places = list(circuits)
    full = FullModelOuts(model, dataloader)
    vals: list[dict[_Place, list[float]]] = [{p: [] for p in places} for _ in metrics]
    held: dict[_Place, BatchOutputs] = {place: {} for place in places}
    with_nan: dict[_Place, None] = {}
    rounding = 0.0
    all_outs = iter_circuit_outs(model, dataloader, [*circuits.values()], ablation_type)
    for batch, idx, out in all_outs:
        place = places[idx]
        if place[1] == model.n_edges and not rounding:
            rounding = _rounding_error(out)
        for metric, of_metric in zip(metrics, vals, strict=True):
            if metric.prompt_func is None:
                held[place][batch.key] = out
                continue
            of_batch = batch_vals(metric.prompt_func, out, batch, full).tolist()
            of_metric[place] += of_batch
            if any(map(math.isnan, of_batch)) and bool(out.isnan().any()):
                with_nan[place] = None
    warn_of_nan([size for _, size in with_nan], len(places))
    return _Measured(
        [
            (
                _values_of_held(metric, model, dataloader, held)
                if metric.prompt_func is None
                else {p: PromptVals(p[1], of_metric[p]).mean for p in places}
            )
            for metric, of_metric in zip(metrics, vals, strict=True)
        ],
        model.n_edges,
        rounding,
    )


def _values_of_held(
    metric: PruneMetric,
    model: PatchableModel,
    dataloader: PromptDataLoader,
    held: Mapping[_Place, BatchOutputs],
) -> dict[_Place, float]:
    """A metric that is no mean over prompts: it takes the circuits of one ranking."""
    values: dict[_Place, float] = {}
    for ranking in {ranking for ranking, _ in held}:
        outs = {size: out for (of, size), out in held.items() if of in ("", ranking)}
        found = dict(metric.measure(model, dataloader, outs))
        values |= {
            place: float(found[place[1]])
            for place in held
            if place[0] in ("", ranking) and place not in values
        }
    return values


def _point(
    share: float,
    place: _Place,
    circuits: Mapping[_Place, Circuit],
    measured: _Measured,
) -> FaithfulnessPoint:
    values, *others = measured.values
    ends = values["", 0], values["", measured.n_edges]
    return FaithfulnessPoint(
        share=share,
        n_edges=place[1],
        value=values[place],
        faithfulness=faithfulness(values[place], *ends, measured.rounding),
        # Without dead ends each edge weighs 1.
        weighted_edge_count=float(circuits[place].n_edges),
        accuracy=others[0][place] if others else None,
    )


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


def _rounding_error(out: Float[Tensor, "batch *pos vocab"]) -> float:
    """By how much a metric of these outputs may be off because they are rounded."""
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
