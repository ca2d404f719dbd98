"""The figure of areas under curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from warnings import warn

import plotly.graph_objects as go

from auto_circuit.checks import checked
from auto_circuit.metrics.area_under_curve import Areas, task_areas
from auto_circuit.metrics.mean_interval import MeanInterval, mean_interval
from auto_circuit.metrics.panels import listed, panels, shortened
from auto_circuit.types import COLOR_PALETTE, AlgoKey, TaskKey, TaskMeasurements

PANELS = {
    "kept": "How much of the task do small circuits do?<br>(area; higher is better)",
    "off": "How far are circuits from the model?<br>(area of |1 - share|; 0 is best)",
}
"""Which of `Areas` -> the question that it answers."""


SIDE_BY_SIDE, MAX_LEVEL = 16, 2
"""The most algorithms with which both panels stand in a row, and with level names."""
MAX_LABEL = 28
"""The most letters of an algorithm's name under a bar."""


@checked
def average_auc_plot(
    task_measurements: TaskMeasurements,
    log_x: bool,
    log_y: bool,
    y_min: int | float | None = None,
    inverse: bool | None = None,
    *,
    title: str | None = None,
    algo_names: Mapping[AlgoKey, str] | None = None,
    of_seeds: Sequence[TaskMeasurements] = (),
) -> go.Figure:
    """The mean over tasks of each algorithm's areas (`task_areas`): bars, tasks stacked.

    On the left what is `kept` (higher is better; overshoot counts in favour), on the right how
    far circuits are `off` the model, on both sides (0 is best). All algorithms of a task are
    compared over the same sizes. The title names the algorithms that have no area in some
    task (no measurement of 0 edges, or undefined values); they have no bar there.

    inverse: auto-circuit's, which turned the bars of falling metrics around. Shares of the
        way to the full model rise for them too, so it does nothing, with a warning.
    of_seeds: each seed's curves, of which those of `task_measurements` are the mean. Bars are then
        the mean of the seeds' areas, with the 95 % interval of the mean over tasks where an
        algorithm has several seeds.
    """
    if inverse is not None:
        warn(
            "`inverse` does nothing: bars are shares of the way from no edges to all edges, "
            "which rise for a metric that falls too. Leave it out.",
            stacklevel=3,
        )
    by_seed = [
        {
            task: task_areas(by_algo, log_x, log_y, y_min)
            for task, by_algo in measurements.items()
        }
        for measurements in of_seeds or [task_measurements]
    ]
    names = {
        algo: (algo_names or {}).get(algo, algo)
        for by_algo in task_measurements.values()
        for algo in by_algo
    }
    # Names of many algorithms need the whole width, and stand under the lower panel.
    n_columns = 2 if len(names) <= SIDE_BY_SIDE else 1
    drawn = panels(
        [*PANELS.values()], max_columns=n_columns, shared_xaxes=n_columns == 1, gap=30
    )
    fig = drawn.fig
    left_out: dict[str, None] = {}
    for col, which in enumerate(PANELS, start=1):
        areas = {
            task: _areas_of_seeds(task, by_algo, by_seed, which)
            for task, by_algo in task_measurements.items()
        }
        for task_idx, (task, by_algo) in enumerate(areas.items()):
            means = {
                names[algo]: fmean(of.values()) for algo, of in by_algo.items() if of
            }
            left_out |= {name: None for name, mean in means.items() if math.isnan(mean)}
            color = COLOR_PALETTE[task_idx % len(COLOR_PALETTE)]
            bar = _bar(means, len(areas), task, color)
            fig.add_trace(bar.update(showlegend=col == 1), **drawn.place(col - 1))
        intervals = _total_intervals(areas)
        if intervals:
            named = {names[algo]: mean for algo, mean in intervals.items()}
            fig.add_trace(_error_bars(named, showlegend=col == 1), **drawn.place(col - 1))
    if left_out:
        title = f"{title or ''}<br><sub>No area for: {listed(left_out)}</sub>"
    # Every algorithm has its name; of a long one the beginning.
    labels = {name: shortened(name, MAX_LABEL) for name in names.values()}
    fig.update_xaxes(
        tickmode="array",
        tickvals=list(labels),
        ticktext=list(labels.values()),
        tickangle=-90 if len(labels) > MAX_LEVEL else 0,
    )
    fig.update_xaxes(title_text="Algorithm", row=drawn.n_rows)
    fig.update_yaxes(title_text="Mean over Tasks")
    fig.update_layout(barmode="relative")
    longest = max(map(len, labels.values()), default=0) if len(labels) > MAX_LEVEL else 0
    return drawn.finish(title, below=75 + 6.5 * longest)


def _bar(means: Mapping[str, float], n_tasks: int, task: TaskKey, color: str) -> go.Bar:
    """A task's part of each algorithm's bar; none for those without an area."""
    drawn = {name: mean for name, mean in means.items() if not math.isnan(mean)}
    return go.Bar(
        x=list(drawn),
        y=[mean / n_tasks for mean in drawn.values()],
        customdata=list(drawn.values()),
        hovertemplate="%{x}: %{customdata:.4f}",
        name=task,
        legendgroup=task,
        marker={"color": color},
    )


def _areas_of_seeds(
    task: TaskKey,
    algos: Iterable[AlgoKey],
    by_seed: Sequence[Mapping[TaskKey, Mapping[AlgoKey, Areas]]],
    which: str,
) -> dict[AlgoKey, dict[int, float]]:
    """Algorithm -> number of the seed -> its area on a task."""
    return {
        algo: {
            seed: getattr(areas[task][algo], which)
            for seed, areas in enumerate(by_seed)
            if algo in areas.get(task, {})
        }
        for algo in algos
    }


def _total_intervals(
    areas: Mapping[TaskKey, Mapping[AlgoKey, Mapping[int, float]]],
) -> dict[AlgoKey, MeanInterval]:
    """The interval of each algorithm's whole bar, of seeds that it has on all of its tasks."""
    intervals = {}
    for algo in dict.fromkeys(algo for by_algo in areas.values() for algo in by_algo):
        of_tasks = [by_algo[algo] for by_algo in areas.values() if algo in by_algo]
        seeds = set(of_tasks[0]).intersection(*of_tasks)
        totals = [sum(of[seed] for of in of_tasks) / len(areas) for seed in sorted(seeds)]
        mean = mean_interval(totals)
        if not math.isnan(mean.plus_minus):
            intervals[algo] = mean
    return intervals


def _error_bars(intervals: Mapping[str, MeanInterval], showlegend: bool) -> go.Scatter:
    half_widths = [interval.plus_minus for interval in intervals.values()]
    return go.Scatter(
        x=list(intervals),
        y=[interval.mean for interval in intervals.values()],
        error_y={"type": "data", "array": half_widths, "thickness": 1.5},
        customdata=half_widths,
        hovertemplate="%{x}: %{y:.4f} ± %{customdata:.4f}",
        mode="markers",
        marker={"color": "black", "size": 4},
        name="mean over seeds, 95 % interval",
        legendgroup="interval",
        showlegend=showlegend,
    )
