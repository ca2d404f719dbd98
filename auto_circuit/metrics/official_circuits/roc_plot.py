"""Figures of ROCs: how well scores tell the true edges from all others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from auto_circuit.checks import checked
from auto_circuit.metrics.bands import BAND_NOTE, band_traces
from auto_circuit.metrics.mean_interval import MeanInterval, mean_interval
from auto_circuit.metrics.panels import LineOfMany, in_legend, line_of_many, panels
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import (
    AlgoKey,
    AlgoMeasurements,
    Measurements,
    TaskMeasurements,
)

BASE_WIDTH, WIDTH_STEP = 2, 2
"""The width in pixels of the last line, and by how much each before it is wider."""


@checked
def task_roc_plot(
    algo_measurements: AlgoMeasurements,
    title: str | None = None,
    variable_width: bool = False,
    algo_names: Mapping[AlgoKey, str] | None = None,
) -> go.Figure:
    """The ROCs of one task: a line for each algorithm, true against false positives.

    The other arguments are those of `roc_plot`.
    """
    return roc_plot({title or "": algo_measurements}, variable_width, algo_names)


@checked
def roc_plot(
    taskname_measurements: TaskMeasurements,
    variable_width: bool = False,
    algo_names: Mapping[AlgoKey, str] | None = None,
    areas: Mapping[tuple[str, AlgoKey], float | MeanInterval] | None = None,
    of_seeds: Sequence[TaskMeasurements] = (),
) -> go.Figure:
    """ROCs: a panel for each task, a line for each algorithm; dotted is chance.

    taskname_measurements: task name -> algorithm -> [(false, true positive rate)] of `measure_roc`.
    variable_width: earlier algorithms have wider lines, so that equal curves all show.
    algo_names: legend labels (else the keys).
    areas: (task name, algorithm) -> its AUROC, or the mean of several seeds' with its interval;
        shown when the mouse is on the line, and in the legend if there is one task.
    of_seeds: each seed's ROCs. Where there are several of an algorithm, its line is their mean
        (`mean_roc`), and a band the 95 % interval of the mean.

    Points are joined by straight lines, whose area is `roc_auc`. An algorithm has the
    same colour and dash in every panel. Of more than 12, all after the 11th are thin and
    grey; hovering shows their names.
    """
    algos = list(
        dict.fromkeys(a for by_algo in taskname_measurements.values() for a in by_algo)
    )
    drawn = panels(list(taskname_measurements), shared_yaxes=True)
    fig = drawn.fig
    seen: set[str] = set()
    has_bands = False
    for idx, (task, by_algo) in enumerate(taskname_measurements.items()):
        fig.add_trace(_chance_line(), **drawn.place(idx))
        for algo, points in by_algo.items():
            line = line_of_many(algos.index(algo), len(algos))
            curves = [m[task][algo] for m in of_seeds if algo in m.get(task, {})]
            band: list[go.Scatter] = []
            if len(curves) > 1:
                means = mean_roc(curves)
                points = [(x, y) for x, y, _ in means]
                around = [(x, y - h, y + h) for x, y, h in means]
                band = [] if line.is_other else band_traces(around, line.color, algo)
            has_bands |= bool(band)
            name = (algo_names or {}).get(algo, algo)
            area = (areas or {}).get((task, algo))
            if area is not None and len(taskname_measurements) == 1:
                name = f"{name} ({_shown_area(area)})"
            trace = _trace(points, name, area, line)
            if variable_width and not line.is_other:
                n_wider = len(algos) - 1 - algos.index(algo)
                trace.update(line={"width": BASE_WIDTH + WIDTH_STEP * n_wider})
            in_legend(trace, line, algo, len(algos), seen)
            for one in (*band, trace):
                fig.add_trace(one, **drawn.place(idx))
    fig.update_xaxes(title_text="False Positive Rate", range=[-0.02, 1.02])
    fig.update_yaxes(range=[-0.02, 1.02])
    fig.update_yaxes(title_text="True Positive Rate", col=1)
    fig.update_layout(hovermode="closest")
    return drawn.finish(f"<sub>{BAND_NOTE}</sub>" if has_bands else None)


def mean_roc(curves: Sequence[Measurements]) -> list[tuple[float, float, float]]:
    """The mean of several ROCs: [(false rate, mean true rate, half of its 95 % interval)].

    Averaged over true rates, at each false rate that one of them has; where a ROC jumps, below
    and above the jump. Its area (`roc_auc`) is the mean of their areas.
    """
    means = []
    for x in sorted({x for points in curves for x, _ in points}):
        for is_above in (False, True):
            mean = mean_interval([_true_rate(points, x, is_above) for points in curves])
            means.append((float(x), *mean))
    return list(dict.fromkeys(means))


def _true_rate(points: Measurements, x: int | float, is_above: bool) -> float:
    """A ROC's height at a false rate: below a jump, or above it."""
    at_x = [true_rate for false_rate, true_rate in points if false_rate == x]
    if at_x:
        return float(max(at_x) if is_above else min(at_x))
    (x0, y0), (x1, y1) = max(p for p in points if p[0] < x), min(
        p for p in points if p[0] > x
    )
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _shown_area(area: float | MeanInterval) -> str:
    if not isinstance(area, MeanInterval):
        return f"{area:.3f}"
    if math.isnan(area.plus_minus):
        return f"{area.mean:.3f}"
    return f"{area.mean:.3f} ± {area.plus_minus:.3f}"


def _chance_line() -> go.Scatter:
    return go.Scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": "rgb(160, 160, 160)", "dash": "dot", "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )


def _trace(
    points: Measurements, name: str, area: float | MeanInterval | None, line: LineOfMany
) -> go.Scatter:
    shown_area = "" if area is None else f"<br>AUROC {_shown_area(area)}"
    return go.Scatter(
        x=[false_rate for false_rate, _ in points],
        y=[true_rate for _, true_rate in points],
        name=name,
        mode="lines",
        line={"color": line.color, "dash": line.dash, "width": line.width},
        hovertemplate="false %{x:.4f}, true %{y:.4f}" + shown_area,
    )
