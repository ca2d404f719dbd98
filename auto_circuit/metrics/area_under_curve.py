"""One number for a whole curve of measurements.

The *area* of a curve is its mean height above its value at 0 edges:

    area = integral of (Y(x) - Y(0)) dX / (X(last) - X(first))

- Y is the measured value y, or log10(max(y, y_min)) if `log_y`.
- X is the number of edges, or its log10 if `log_x`. 0 edges have no logarithm: there,
  the integral starts at the smallest circuit with an edge, and 0 edges only give Y(0).
- The integral is the sum of trapezoids between neighbouring points.

So a metric that rises with circuit size has a positive area and one that falls a
negative one (with log_y, in decades: -2 is a mean fall to a hundredth). `area_share`
divides by the height of the largest circuit, which makes curves comparable: 0 is a
circuit that never does more than no circuit, 1 one that always does as much as the
largest, whether the metric rises or falls.

Differs from auto-circuit, where falling metrics had no area and logarithmic ones were
measured from the wrong height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from warnings import warn

from auto_circuit.checks import check_number, checked
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    PRUNE_METRICS,
    PruneMetric,
    find_metric,
)
from auto_circuit.types import (
    AlgoKey,
    AlgoMeasurements,
    Measurements,
    PruneMetricKey,
    PruneMetricMeasurements,
    TaskKey,
    TaskMeasurements,
)
from auto_circuit.utils.tensor_ops import ROUNDING


@checked
def measurements_auc(
    points: Measurements,
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
) -> float:
    """The mean height of a curve above its value at 0 edges; see the module.

    points: [(number of edges, value)] in any order, with 0 edges among them.
    y_min: the value below which values count as `y_min`; needed if `log_y`.

    NaN if a value is. Raises ConfigError without a point at 0 edges, with too few
    above it (at least 1, or 2 if `log_x`), with two values for one size, or without a
    `y_min` where one is needed.
    """
    heights = _heights(points, log_x, log_y, y_min)
    area = sum((y0 + y1) / 2 * (x1 - x0) for (x0, y0), (x1, y1) in pairwise(heights))
    return area / (heights[-1][0] - heights[0][0])


@checked
def area_share(
    points: Measurements,
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
) -> float:
    """The area divided by the height of the largest circuit; see the module.

    NaN, with a warning, if the largest circuit's value is that at 0 edges.
    Raises as `measurements_auc` does.
    """
    last_height = _heights(points, log_x, log_y, y_min)[-1][1]
    values = [abs(value) for _, value in points]
    if not log_y and abs(last_height) <= ROUNDING * max(values) or last_height == 0:
        warn(
            "The measurements of the largest circuit and of 0 edges are equal, so the "
            "share of the area is undefined (NaN).",
            stacklevel=2,
        )
        return math.nan
    return measurements_auc(points, log_x, log_y, y_min) / last_height


@checked
def has_area(points: Measurements, log_x: bool = False) -> bool:
    """Are there points enough: 0 edges, and one size above it (two if log_x)?"""
    sizes = {x for x, _ in points}
    return 0 in sizes and len(sizes) >= (3 if log_x else 2)


@checked
def algo_measurements_auc(
    algo_measurements: AlgoMeasurements,
    log_x: bool = False,
    log_y: bool = False,
    y_min: int | float | None = None,
) -> dict[AlgoKey, float]:
    """Algorithm -> area; NaN for those with too few points (see `has_area`)."""
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
    metric_measurements: PruneMetricMeasurements,
    metrics: Sequence[PruneMetric] = PRUNE_METRICS,
) -> dict[PruneMetricKey, dict[TaskKey, dict[AlgoKey, float]]]:
    """Metric -> task -> algorithm -> area, on the axes that the metrics are drawn on.

    Raises ConfigError for a metric key that is not in `metrics`.
    """
    areas = {}
    for key, task_measurements in metric_measurements.items():
        metric = find_metric(key, metrics)
        areas[key] = task_measurements_auc(
            task_measurements, metric.log_x, metric.log_y, metric.y_min
        )
    return areas


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
    if log_y and (y_min is None or y_min <= 0):
        raise ConfigError(f"`log_y` needs a `y_min` above 0, not {y_min}.")
    points = sorted(points)
    sizes = [x for x, _ in points]
    if sizes[:1] != [0]:
        raise ConfigError(
            "The area is measured from the value at 0 edges, which is missing; the "
            f"sizes are {_some(sizes)}. Measure with `zero_edges=True`."
        )
    if not has_area(points, log_x):
        least = "two sizes" if log_x else "one size"
        raise ConfigError(
            f"An area needs at least {least} above 0 edges; there are only "
            f"{_some(sizes)}."
        )
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"A circuit size has two values; the sizes are {_some(sizes)}.")
    ys = [math.log10(max(y, y_min)) if log_y and y_min else y for _, y in points]
    heights = [(float(x), float(y - ys[0])) for x, y in zip(sizes, ys, strict=True)]
    return [(math.log10(x), h) for x, h in heights[1:]] if log_x else heights


def _some(sizes: Sequence[int | float]) -> str:
    shown = ", ".join(f"{size:g}" for size in sizes[:8])
    return f"[{shown}{', ...' if len(sizes) > 8 else ''}]"
