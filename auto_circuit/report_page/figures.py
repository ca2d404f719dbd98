"""Figures of the report: what Plotly draws, and the numbers behind as a table.

Names go through `html.escape`: Plotly reads `<b>` in a text as bold.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from auto_circuit.errors import ConfigError
from auto_circuit.explorer.packing import zipped
from auto_circuit.metrics.area_under_curve import curve_interval
from auto_circuit.metrics.area_under_curve_plot import average_auc_plot
from auto_circuit.metrics.official_circuits.roc_plot import mean_roc, roc_plot
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC,
    PruneMetric,
    find_metric,
)
from auto_circuit.metrics.prune_metrics.prune_metrics_plot import edge_patching_plot
from auto_circuit.report_page.tables import Cell, Table, name_cell, number_cell
from auto_circuit.robustness import RobustnessRow
from auto_circuit.robustness_plot import robustness_fig
from auto_circuit.summary import (
    ExperimentResults,
    mean_aurocs,
    mean_measurements,
    seed_measurements,
)
from auto_circuit.types import (
    AblationMeasurements,
    AlgoKey,
    AlgoMeasurements,
    Measurements,
    TaskKey,
    TaskMeasurements,
)

HEIGHT = 440
"""Of a figure, in pixels."""

Names = Mapping[AlgoKey, str]


@dataclass(frozen=True)
class PlotFigure:
    """A figure: `data` is what Plotly draws, as JSON. title: its accessible name too."""

    name: str
    title: str
    caption: str
    data: str
    height: int
    table: Table | None = None


@cache
def zipped_plotly_js() -> str:
    """Plotly's library, zipped: 2 MB instead of 5."""
    from plotly.offline import get_plotlyjs

    return zipped(get_plotlyjs().encode())


def _figure(
    fig: Any, name: str, title: str, caption: str, table: Table | None = None
) -> PlotFigure:
    top = 72 if "<br>" in str(fig.layout.annotations) else 36
    fig.update_layout(
        title=None,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        margin={
            "l": fig.layout.margin.l or 64,
            "r": 16,
            "t": top,
            "b": fig.layout.margin.b or 56,
        },
        legend={
            "orientation": "h",
            "y": fig.layout.legend.y or -0.2,
            "yanchor": "top",
            "x": 0,
        },
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        width=None,
    )
    height = fig.layout.height or HEIGHT
    content = json.loads(fig.to_json())
    content["layout"].pop("template", None)
    # The frame draws it as wide as it is; no text of JSON may end the script that holds it.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return PlotFigure(name, title, caption, data, int(height), table)


def _escaped(names: Names) -> dict[str, str]:
    return {key: html.escape(name, quote=False) for key, name in names.items()}


def metric_of(key: str) -> PruneMetric:
    """The metric; one that is not known here is drawn as percentages are."""
    try:
        return find_metric(key)
    except ConfigError:
        return _unknown_metric(key)


def _unknown_metric(key: str) -> PruneMetric:
    return replace(LOGIT_DIFF_PERCENT_METRIC, key=key, name=html.escape(key))


# -------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curves:
    """The curves of a metric on a task: the mean of the seeds' and each seed's."""

    task: TaskKey
    metric: PruneMetric
    mean: AlgoMeasurements
    seeds: Sequence[AlgoMeasurements]


def all_curves(results: ExperimentResults) -> list[Curves]:
    """Metric by metric, and task by task."""
    means = _of_the_ablation(mean_measurements(results.rows))
    of_seeds = [_of_the_ablation(one) for one in seed_measurements(results.rows)]
    return [
        Curves(
            task,
            metric_of(metric),
            by_algo,
            [one.get(metric, {}).get(task, {}) for one in of_seeds],
        )
        for metric, by_task in means.items()
        for task, by_algo in by_task.items()
    ]


def _of_the_ablation(measured: AblationMeasurements) -> Mapping[str, TaskMeasurements]:
    """A sweep has one."""
    return next(iter(measured.values()), {})


def curve_figure(curves: Curves, names: Names, name: str) -> PlotFigure:
    """A metric against the size of circuits."""
    title = f"{curves.metric.name} on {curves.task}"
    shown = html.escape(curves.task, quote=False)
    fig = edge_patching_plot(
        {shown: curves.mean},
        curves.metric,
        algo_names=_escaped(names),
        of_seeds=[{shown: by_algo} for by_algo in curves.seeds],
    )
    n_seeds = max((_n_seeds(curves, algo) for algo in curves.mean), default=1)
    bands = " Bands are 95 % intervals of the mean over seeds." if n_seeds > 1 else ""
    caption = f"{title}, against the number of edges in the circuit.{bands}"
    return _figure(fig, name, title, caption, _curve_table(curves, names, title))


def _n_seeds(curves: Curves, algo: AlgoKey) -> int:
    return sum(algo in by_algo for by_algo in curves.seeds)


def _curve_table(curves: Curves, names: Names, title: str) -> Table:
    sizes = sorted({x for points in curves.mean.values() for x, _ in points})
    columns = [_points(curves, algo) for algo in curves.mean]
    return Table(
        label=f"{title}: the numbers",
        columns=(
            ("Edges", True),
            *((names.get(algo, algo), True) for algo in curves.mean),
        ),
        rows=tuple(
            (number_cell(size, 0), *(_point_cell(points.get(size)) for points in columns))
            for size in sizes
        ),
    )


def _points(
    curves: Curves, algo: AlgoKey
) -> dict[int | float, tuple[int | float, int | float]]:
    """Size -> (mean, half of the interval)."""
    of_algo = [by_algo[algo] for by_algo in curves.seeds if algo in by_algo]
    half = dict(curve_interval(of_algo)) if len(of_algo) > 1 else {}
    return {x: (y, half.get(x, math.nan)) for x, y in curves.mean[algo]}


def _point_cell(point: tuple[int | float, int | float] | None) -> Cell:
    if point is None:
        return Cell("", None)
    value, plus_minus = point
    text = f"{value:.4g}"
    if not math.isnan(plus_minus):
        text += f" ± {plus_minus:.2g}"
    return Cell(text, value)


# ------------------------------------------------------------------------ areas and ROCs


def area_figure(
    curves: Sequence[Curves], names: Names, name: str, table: Table
) -> PlotFigure:
    """The mean over tasks of the areas of one metric's curves."""
    metric = curves[0].metric
    n_seeds = max(len(one.seeds) for one in curves)
    fig = average_auc_plot(
        {html.escape(one.task, quote=False): one.mean for one in curves},
        metric.log_x,
        metric.log_y,
        metric.y_min,
        algo_names=_escaped(names),
        of_seeds=[
            {
                html.escape(one.task, quote=False): one.seeds[seed]
                for one in curves
                if one.seeds[seed]
            }
            for seed in range(n_seeds)
        ],
    )
    title = f"Areas of {metric.name}"
    fig.update_xaxes(tickangle=-40, title_text=None)
    fig.update_layout(legend={"y": -0.42}, margin={"b": 150}, height=HEIGHT + 80)
    caption = f"{title}: the mean over tasks, each task's part in its own colour."
    return _figure(fig, name, title, caption, table)


def roc_figures(results: ExperimentResults, names: Names) -> list[PlotFigure]:
    """For each task whose circuit is known."""
    tasks = dict.fromkeys(run.task for run in results.runs if run.rocs)
    return [
        _roc_figure(task, results, names, f"roc-{place}")
        for place, task in enumerate(tasks)
    ]


def _roc_figure(
    task: TaskKey, results: ExperimentResults, names: Names, name: str
) -> PlotFigure:
    of_seeds = [run.rocs for run in results.runs if run.task == task]
    firsts: AlgoMeasurements = {}
    for rocs in of_seeds:
        for algo, points in rocs.items():
            firsts.setdefault(algo, points)
    areas = mean_aurocs([run for run in results.runs if run.task == task])
    shown = html.escape(task, quote=False)
    fig = roc_plot(
        {shown: firsts},
        algo_names=_escaped(names),
        areas={(shown, algo): area for (_, algo), area in areas.items()},
        of_seeds=[{shown: rocs} for rocs in of_seeds],
    )
    title = f"ROC on {task}"
    caption = (
        f"{title}: how well scores tell the true edges from all others. Dotted is "
        "chance."
    )
    curves = {algo: [rocs[algo] for rocs in of_seeds if algo in rocs] for algo in firsts}
    return _figure(fig, name, title, caption, _roc_table(curves, names, title))


def _roc_table(
    curves: Mapping[AlgoKey, Sequence[Measurements]], names: Names, title: str
) -> Table:
    rows = [
        (name_cell(names.get(algo, algo)), number_cell(x, 4), number_cell(y, 4, half))
        for algo, of_seeds in curves.items()
        for x, y, half in _thinned(mean_roc(of_seeds))
    ]
    columns = (
        ("Algorithm", False),
        ("False positive rate", True),
        ("True positive rate", True),
    )
    return Table(f"{title}: the numbers", columns, tuple(rows))


MAX_POINTS = 25


def _thinned(points: Sequence[Any]) -> Iterable[Any]:
    """Of many points, so many at even steps."""
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    return [*points[:-1:step], points[-1]] if points else []


# --------------------------------------------------------------------------- robustness


def robustness_figure(
    rows: Sequence[RobustnessRow], names: Names, name: str
) -> PlotFigure:
    """How the verdict on the same circuits changes with the way of testing."""
    escaped = [_with_escaped_task(row) for row in rows]
    fig = robustness_fig(escaped, _escaped(names))
    fig.update_layout(margin={"l": 250})
    title = "The same circuits in other tests"
    caption = (
        f"{title}: % of the task that they do. One choice is changed at a time; diamonds "
        "and dotted lines are the experiment's own choices."
    )
    return _figure(fig, name, title, caption)


def _with_escaped_task(row: RobustnessRow) -> RobustnessRow:
    return replace(row, task=html.escape(row.task, quote=False))
