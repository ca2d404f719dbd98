"""Figures of measurements against circuit size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from auto_circuit.checks import checked
from auto_circuit.metrics.area_under_curve import curve_interval
from auto_circuit.metrics.area_under_curve_plot import average_auc_plot
from auto_circuit.metrics.bands import BAND_NOTE, band_traces
from auto_circuit.metrics.panels import (
    LineOfMany,
    Panels,
    in_legend,
    line_of_many,
    panels,
    shortened,
    wrapped,
)
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    PRUNE_METRICS,
    PruneMetric,
    find_metric,
)
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import (
    AblationMeasurements,
    AlgoKey,
    Measurements,
    TaskKey,
    TaskMeasurements,
)

ZERO_EDGES_X = 0.5
"""Where 0 edges are drawn on a logarithmic axis."""
STEPS = "hv"
"""Between two sizes one has the smaller circuit: see `area_under_curve`."""


@checked
def measurement_figs(
    measurements: AblationMeasurements,
    auc_plots: bool = False,
    *,
    metrics: Sequence[PruneMetric] = PRUNE_METRICS,
    algo_names: Mapping[AlgoKey, str] | None = None,
    of_seeds: Sequence[AblationMeasurements] = (),
) -> tuple[go.Figure, ...]:
    """A figure per ablation and metric: value against circuit size, a panel per task.

    auc_plots: after each, the areas of its curves (`average_auc_plot`).
    metrics: where metric keys are looked up. algo_names: legend labels (else the keys).
    of_seeds: each seed's measurements, of which `measurements` are the mean: curves get a band
        and bars error bars, their 95 % intervals, where there are several.

    Raises ConfigError for a metric key that is not in `metrics`.
    """
    figs = []
    for ablation_type, by_metric in measurements.items():
        for metric_key, task_measurements in by_metric.items():
            metric = find_metric(metric_key, metrics)
            title = f"{metric.name}, {ablation_type} Ablation"
            seeds = [m.get(ablation_type, {}).get(metric_key, {}) for m in of_seeds]
            figs.append(
                edge_patching_plot(task_measurements, metric, title, algo_names, seeds)
            )
            if auc_plots:
                figs.append(
                    average_auc_plot(
                        task_measurements,
                        metric.log_x,
                        metric.log_y,
                        metric.y_min,
                        title=f"Area under Curve: {title}",
                        algo_names=algo_names,
                        of_seeds=seeds,
                    )
                )
    return tuple(figs)


@checked
def edge_patching_plot(
    task_measurements: TaskMeasurements,
    metric: PruneMetric,
    title: str | None = None,
    algo_names: Mapping[AlgoKey, str] | None = None,
    of_seeds: Sequence[TaskMeasurements] = (),
) -> go.Figure:
    """A metric against circuit size: a panel for each task, steps for each algorithm.

    An algorithm with a single point is a labelled cross. On a logarithmic axis 0 edges
    stand at 0.5, and values below the metric's `y_min` at `y_min`; hovering shows the
    true numbers. An algorithm has the same colour in every panel. Of more than 12, all after
    the 11th are thin and grey; hovering shows their names.

    of_seeds: each seed's curves, of which the steps are the mean (`mean_curve`). Where there are
        several, a band around the steps is the 95 % interval of the mean.
    """
    algos = list(
        dict.fromkeys(a for by_algo in task_measurements.values() for a in by_algo)
    )
    drawn = panels(list(task_measurements), shared_yaxes=metric.y_axes_match)
    seen: set[str] = set()
    has_bands = False
    for idx, (task, by_algo) in enumerate(task_measurements.items()):
        singles = [algo for algo, points in by_algo.items() if len(points) == 1]
        for algo, points in by_algo.items():
            line = line_of_many(algos.index(algo), len(algos))
            intervals = _intervals(points, task, algo, of_seeds)
            bands = [] if line.is_other else _band(intervals, metric, line.color, algo)
            has_bands |= bool(bands)
            name = (algo_names or {}).get(algo, algo)
            trace = _trace(intervals or sorted(points), metric, name, line)
            if algo in singles:
                trace.update(_cross(name, singles.index(algo)))
            in_legend(trace, line, algo, len(algos), seen)
            for one in (*bands, trace):
                drawn.fig.add_trace(one, **drawn.place(idx))
    _style_axes(drawn, task_measurements, metric)
    if has_bands:
        title = f"{title or ''}<br><sub>{BAND_NOTE}</sub>"
    drawn.fig.update_layout(hovermode="closest")
    return drawn.finish(title)


def _intervals(
    points: Measurements,
    task: TaskKey,
    algo: AlgoKey,
    of_seeds: Sequence[TaskMeasurements],
) -> list[tuple[int | float, int | float, float]]:
    """[(edges, mean, half the width of its interval)]; [] unless there are several seeds."""
    curves = [m[task][algo] for m in of_seeds if algo in m.get(task, {})]
    if len(curves) < 2:
        return []
    half_widths = dict(curve_interval(curves))
    return [(x, y, half_widths.get(x, math.nan)) for x, y in sorted(points)]


def _band(
    intervals: Sequence[tuple[int | float, int | float, float]],
    metric: PruneMetric,
    color: str,
    algo: AlgoKey,
) -> list[go.Scatter]:
    points = [
        (_shown_x(x, metric), _shown_y(y - half, metric), _shown_y(y + half, metric))
        for x, y, half in intervals
    ]
    return band_traces(points, color, algo, STEPS)


def _trace(
    points: Sequence[tuple[int | float, ...]],
    metric: PruneMetric,
    name: str,
    line: LineOfMany,
) -> go.Scatter:
    """points: (edges, value), or (edges, value, half the width of its interval)."""
    has_interval = bool(points) and len(points[0]) > 2
    return go.Scatter(
        x=[_shown_x(x, metric) for x, *_ in points],
        y=[_shown_y(y, metric) for _, y, *_ in points],
        customdata=points,
        hovertemplate="%{customdata[0]} edges: %{customdata[1]:.5g}"
        + " ± %{customdata[2]:.2g}" * has_interval,
        name=name,
        mode="lines" if line.is_other else "lines+markers",
        marker={"color": line.color, "symbol": "circle", "size": 6},
        line={
            "color": line.color,
            "dash": line.dash,
            "width": line.width,
            "shape": STEPS,
        },
    )


def _cross(name: str, idx: int) -> dict[str, Any]:
    """How a single point is drawn; of several in a panel two have labels, which fit."""
    is_labelled = idx < 2
    return {
        "mode": "markers+text" if is_labelled else "markers",
        "text": [shortened(name, 20)] if is_labelled else None,
        "textposition": ("top center", "bottom center")[idx % 2],
        "marker": {"symbol": "x"},
    }


def _shown_x(n_edges: int | float, metric: PruneMetric) -> int | float:
    return ZERO_EDGES_X if metric.log_x and n_edges == 0 else n_edges


def _shown_y(value: int | float, metric: PruneMetric) -> int | float:
    if not metric.log_y or metric.y_min is None:
        return value
    return max(value, metric.y_min)


def _style_axes(
    drawn: Panels, task_measurements: TaskMeasurements, metric: PruneMetric
) -> None:
    fig = drawn.fig
    fig.update_xaxes(title_text="Circuit Edges")
    fig.update_yaxes(title_text=wrapped(metric.name, drawn.height), col=1)
    if metric.log_y:
        fig.update_yaxes(type="log")
    if metric.log_x:
        counts = [
            n_edges
            for by_algo in task_measurements.values()
            for points in by_algo.values()
            for n_edges, _ in points
        ]
        powers = [10**i for i in range(len(str(int(max(counts, default=1)))) + 1)]
        fig.update_xaxes(
            type="log",
            tickvals=[ZERO_EDGES_X, *powers],
            ticktext=["0", *(f"{power:,}" for power in powers)],
        )
