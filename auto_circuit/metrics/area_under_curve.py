"""One number for a whole curve of measurements.

A curve has the value Y of a few circuit sizes x. Y is the measured value y, or
log10(max(y, y_min)) if `log_y`; X is the number of edges, or its log10 if `log_x`.

**To compare algorithms**, `task_areas` (and `area_share`, for one curve) look at all sizes from
1 edge to all edges of the graph, the same range for every algorithm of a task. At a size that
was not measured a curve has the value of the largest measured circuit that is not larger, since
that is a circuit which one has; before the first, the value at 0 edges. So a curve is a
staircase, and one with few sizes gets nothing for what lies between. Its height is stated as a
share f of the way from the value at 0 edges to that of all edges: 0 does what no circuit does,
1 what the whole model does, whether the metric rises or falls. Two areas answer two questions:

- `kept`, the mean of f over X: how much of the task do small circuits do? Higher is better.
  Overshoot (a circuit with 150 % of the logit difference) counts in favour, also above 1.
- `off`, the mean of |1 - f| over X: how far are circuits from doing what the model does?
  0 is best. What is missing and what is too much count alike.

**For one curve by itself**, `measurements_auc` is auto-circuit's area between the curve and its
value at 0 edges, and `mean_height` the same divided by its width:

    area = integral of (Y(x) - Y(0)) dX        mean height = area / (X(last) - X(first))

by trapezoids between neighbouring points, over the curve's own sizes (on a logarithmic axis
those above 0). A metric that rises with circuit size has a positive area and one that falls a
negative one (with log_y, in decades: a mean height of -2 is a mean fall to a hundredth). Areas
of curves with different sizes cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar
from warnings import warn

from auto_circuit.checks import check_number, checked
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.mean_interval import mean_interval
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    PRUNE_METRICS,
    PruneMetric,
    find_metric,
)
from auto_circuit.precision import ROUNDING
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import (
    AlgoKey,
    AlgoMeasurements,
    Measurements,
    PruneMetricKey,
    PruneMetricMeasurements,
    TaskKey,
    TaskMeasurements,
)

K = TypeVar("K", bound=Hashable)


@checked
def measurements_auc(
    points: Measurements,
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
    eps: int | float | None = None,
) -> float:
    """The area between a curve and its value at 0 edges; see the module.

    The unit is that of value times edges; with `log_x` a decade of edges, with `log_y` a
    decade of values. Negative for a metric that falls.

    points: [(number of edges, value)] in any order, with 0 edges among them.
    y_min: the value below which values count as `y_min`; needed if `log_y`.
    eps: an area below it becomes it, as in auto-circuit (whose default was 0.001; falling
        metrics all had that area). None: areas are what they are.

    NaN if a value is. Raises ConfigError without a point at 0 edges, with too few
    above it (at least 1, or 2 if `log_x`), with two values for one size, or without a
    `y_min` where one is needed.
    """
    area = _area(_heights(points, log_x, log_y, y_min))
    # NaN, which is below nothing, stays.
    return area if eps is None or not area < eps else float(eps)


@checked
def mean_height(
    points: Measurements,
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
) -> float:
    """The mean height of a curve above its value at 0 edges: its area, by its width.

    The unit is that of the values. Arguments and errors: `measurements_auc`.
    """
    heights = _heights(points, log_x, log_y, y_min)
    return _area(heights) / (heights[-1][0] - heights[0][0])


def _area(heights: Sequence[tuple[float, float]]) -> float:
    return sum((y0 + y1) / 2 * (x1 - x0) for (x0, y0), (x1, y1) in pairwise(heights))


@dataclass(frozen=True)
class Areas:
    """The two areas of a curve's steps; see the module. NaN: not known.

    kept: mean height, as a share of that of all edges; no bounds, higher is better.
    off: mean distance from the height of all edges, as a share of it; 0 is best.
    """

    kept: float
    off: float


UNKNOWN_AREAS = Areas(math.nan, math.nan)


def task_areas(
    curves: Mapping[K, Measurements],
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
) -> dict[K, Areas]:
    """The areas of all algorithms' curves on one task, over one range of sizes.

    curves: any key -> [(number of edges, value)]. The range goes from 1 edge to the largest
        size of all the curves, which should be all edges of the graph.

    NaN for a curve without a point at 0 edges, and, with a warning, where the value of all edges
    is that of 0 edges. Raises ConfigError as `area_share` does.
    """
    sizes = [x for points in curves.values() for x, _ in points]
    n_edges = max(sizes, default=0)
    full_values = [y for points in curves.values() for x, y in points if x == n_edges]
    return {
        key: (
            _areas(points, log_x, log_y, y_min, n_edges, full_values[0])
            if n_edges > 1 and any(x == 0 for x, _ in points)
            else UNKNOWN_AREAS
        )
        for key, points in curves.items()
    }


@checked
def area_share(
    points: Measurements,
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
) -> float:
    """The area `kept` of one curve, from 1 edge to its largest circuit; see the module.

    0: never more than no circuit, 1: always as much as the largest. To compare curves, whose
    sizes may differ, use `task_areas`.

    NaN, with a warning, if the largest circuit's value is that at 0 edges. Raises ConfigError
    without a point at 0 edges or above 1, with two values for one size, or without a `y_min`
    where one is needed.
    """
    n_edges, full_value = max(points, default=(0, 0.0))
    return _areas(points, log_x, log_y, y_min, n_edges, full_value).kept


def _areas(
    points: Measurements,
    log_x: bool,
    log_y: bool,
    y_min: int | float | None,
    n_edges: int | float,
    full_value: int | float,
) -> Areas:
    points = _checked(points, log_y, y_min)
    if n_edges <= 1:
        raise ConfigError(
            "An area from 1 edge to all needs a size above 1 edge; there are only "
            f"{_some([x for x, _ in points])}."
        )
    start, full = (_shown(y, log_y, y_min) for y in (points[0][1], full_value))
    largest = max(abs(start), abs(full), *(abs(y) for _, y in points))
    if full == start or not log_y and abs(full - start) <= ROUNDING * largest:
        warn(
            "The measurements of the largest circuit and of 0 edges are equal, so the "
            "share of the area is undefined (NaN).",
            stacklevel=3,
        )
        return UNKNOWN_AREAS
    shares = [(_shown(y, log_y, y_min) - start) / (full - start) for _, y in points]
    # Each step ends where the next one begins; what begins before 1 edge begins there.
    ends = [max(1, x) for x, _ in points] + [n_edges]
    xs = [math.log10(x) if log_x else float(x) for x in ends]
    widths = [(x1 - x0) / (xs[-1] - xs[0]) for x0, x1 in pairwise(xs)]
    return Areas(
        kept=sum(w * f for w, f in zip(widths, shares, strict=True)),
        off=sum(w * abs(1 - f) for w, f in zip(widths, shares, strict=True)),
    )


def mean_curve(curves: Sequence[Measurements]) -> Measurements:
    """The mean of several curves' staircases, at every size that one of them has.

    [(number of edges, value)], ascending. A size below the smallest of some curve, which says
    nothing there, is left out.
    """
    firsts = [min((x for x, _ in points), default=math.inf) for points in curves]
    sizes = {x for points in curves for x, _ in points if x >= max(firsts)}
    return [
        (size, sum(_step_value(points, size) for points in curves) / len(curves))
        for size in sorted(sizes)
    ]


def curve_interval(curves: Sequence[Measurements]) -> Measurements:
    """Half the width of the 95 % interval of `mean_curve`, at its sizes; NaN for one curve."""
    return [
        (size, mean_interval([_step_value(points, size) for points in curves]).plus_minus)
        for size, _ in mean_curve(curves)
    ]


def _step_value(points: Measurements, size: int | float) -> int | float:
    """The value of the largest measured circuit that is not larger."""
    return max(point for point in points if point[0] <= size)[1]


@checked
def has_area(points: Measurements, log_x: bool = False) -> bool:
    """Are there points enough for `measurements_auc`: 0 edges and one above (two if log_x)?"""
    sizes = {x for x, _ in points}
    return 0 in sizes and len(sizes) >= (3 if log_x else 2)


@checked
def algo_measurements_auc(
    algo_measurements: AlgoMeasurements,
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
) -> dict[AlgoKey, float]:
    """Algorithm -> area (`measurements_auc`); NaN for too few points (see `has_area`)."""
    return {
        algo: (
            measurements_auc(points, log_x, log_y, y_min)
            if has_area(points, log_x)
            else math.nan
        )
        for algo, points in algo_measurements.items()
    }


@checked
def task_measurements_auc(
    task_measurements: TaskMeasurements,
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
) -> dict[TaskKey, dict[AlgoKey, float]]:
    """Task -> algorithm -> area (`algo_measurements_auc`)."""
    return {
        task: algo_measurements_auc(algo_measurements, log_x, log_y, y_min)
        for task, algo_measurements in task_measurements.items()
    }


@checked
def metric_measurements_auc(
    points: PruneMetricMeasurements,
    log_x: bool | None = None,
    log_y: bool | None = None,
    y_min: int | float | None = None,
    *,
    metrics: Sequence[PruneMetric] = PRUNE_METRICS,
) -> dict[PruneMetricKey, dict[TaskKey, dict[AlgoKey, float]]]:
    """Metric -> task -> algorithm -> area (`algo_measurements_auc`).

    log_x, log_y, y_min: the axes; None: those that each metric is drawn on, of `metrics`.

    Raises ConfigError for a metric key that is not in `metrics`.
    """
    areas = {}
    for key, task_measurements in points.items():
        metric = find_metric(key, metrics)
        areas[key] = task_measurements_auc(
            task_measurements,
            metric.log_x if log_x is None else log_x,
            metric.log_y if log_y is None else log_y,
            metric.y_min if y_min is None else y_min,
        )
    return areas


@checked
def accuracy_area(points: Measurements) -> float:
    """The mean accuracy over logarithmic circuit sizes: of 0 to 100 %, higher is better.

    The integral of the accuracy over log10 of the number of edges, by trapezoids between
    neighbouring sizes, divided by the width: from the smallest circuit with an edge to the
    largest. Unlike `measurements_auc` it is measured from 0 %, so that no circuit without
    edges is needed; points at 0 edges are left out.

    points: [(number of edges, accuracy)] in any order, of the metric
        CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC: the share of prompts whose
        correct answer is above all incorrect ones, in %.

    NaN if a value is. Raises ConfigError for values outside of [0, 100], with fewer than
    two sizes above 0 edges, or with two values for one size.
    """
    sized = sorted((x, y) for x, y in points if x > 0)
    bad = [y for _, y in points if y < 0 or y > 100]
    if bad:
        raise ConfigError(
            f"An accuracy is {bad[0]:g}; expected 0 to 100 (%), as the metric 'Correct "
            "Answer Greater Than Incorrect Percent' measures it."
        )
    sizes = [x for x, _ in sized]
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"A circuit size has two values; the sizes are {_some(sizes)}.")
    if len(sizes) < 2:
        raise ConfigError(
            "An accuracy area needs at least two sizes above 0 edges; there are only "
            f"{_some(sizes)}."
        )
    logs = [(math.log10(x), float(y)) for x, y in sized]
    area = sum((y0 + y1) / 2 * (x1 - x0) for (x0, y0), (x1, y1) in pairwise(logs))
    return area / (logs[-1][0] - logs[0][0])


@checked
def edges_for_share(
    points: Measurements,
    share: int | float = 0.8,
    target: int | float | None = None,
    baseline: int | float = 0.0,
    stay: bool = False,
) -> int | float | None:
    """The smallest tested circuit whose value is a share of the way to a target.

    The value is `baseline + share * (target - baseline)` or beyond; if the target is
    below the baseline (a metric that falls), beyond is below. Without a `target` it is
    the value of the largest tested circuit. None: no tested circuit gets there. NaN if a
    value is NaN.

    stay: count a circuit only if all larger tested ones get there too.

    Raises ConfigError without points, or if the target is the baseline.
    Example: `edges_for_share(logit_diff_percents, 0.8, target=100)`.
    """
    if not points:
        raise ConfigError("There are no measurements to find a share in.")
    check_number("share", share)
    check_number("baseline", baseline)
    points = sorted(points)
    goal = points[-1][1] if target is None else check_number("target", target)
    if math.isnan(goal) or any(math.isnan(value) for _, value in points):
        return math.nan
    if abs(goal - baseline) <= ROUNDING * max(abs(goal), abs(baseline)):
        raise ConfigError(
            f"The target and the baseline are both {baseline}, so shares of the way "
            "from one to the other are undefined."
        )
    reached = [(x, (y - baseline) / (goal - baseline) >= share) for x, y in points]
    if stay:
        reached = [
            (x, all(r for _, r in reached[i:])) for i, (x, _) in enumerate(reached)
        ]
    return next((x for x, is_reached in reached if is_reached), None)


def _heights(
    points: Measurements, log_x: bool, log_y: bool, y_min: int | float | None
) -> list[tuple[float, float]]:
    """[(X, Y - Y at 0 edges)] of the points that the integral runs over."""
    points = _checked(points, log_y, y_min)
    if not has_area(points, log_x):
        least = "two sizes" if log_x else "one size"
        raise ConfigError(
            f"An area needs at least {least} above 0 edges; there are only "
            f"{_some([x for x, _ in points])}."
        )
    start = _shown(points[0][1], log_y, y_min)
    heights = [(float(x), _shown(y, log_y, y_min) - start) for x, y in points]
    return [(math.log10(x), h) for x, h in heights[1:]] if log_x else heights


def _checked(
    points: Measurements, log_y: bool, y_min: int | float | None
) -> Measurements:
    """The points, ascending, with 0 edges among them and each size once."""
    if log_y and (y_min is None or y_min <= 0):
        raise ConfigError(f"`log_y` needs a `y_min` above 0, not {y_min}.")
    points = sorted(points)
    sizes = [x for x, _ in points]
    if sizes[:1] != [0]:
        raise ConfigError(
            "The area is measured from the value at 0 edges, which is missing; the "
            f"sizes are {_some(sizes)}. Measure with `zero_edges=True`."
        )
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"A circuit size has two values; the sizes are {_some(sizes)}.")
    return points


def _shown(value: int | float, log_y: bool, y_min: int | float | None) -> float:
    """Where a value is on the figure's axis."""
    return math.log10(max(value, y_min)) if log_y and y_min else float(value)


def _some(sizes: Sequence[int | float]) -> str:
    shown = ", ".join(f"{size:g}" for size in sizes[:8])
    return f"[{shown}{', ...' if len(sizes) > 8 else ''}]"
