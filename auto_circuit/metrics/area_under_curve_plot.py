"""The figure of areas under curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from warnings import warn

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from auto_circuit.checks import checked
from auto_circuit.metrics.area_under_curve import task_areas
from auto_circuit.types import COLOR_PALETTE, AlgoKey, TaskMeasurements

PANELS = {
    "kept": "How much of the task do small circuits do?<br>(area; higher is better)",
    "off": "How far are circuits from the model?<br>(area of |1 - share|; 0 is best)",
}
"""Which of `Areas` -> the question that it answers."""


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
) -> go.Figure:
    """The mean over tasks of each algorithm's areas (`task_areas`): bars, tasks stacked.

    On the left what is `kept` (higher is better; overshoot counts in favour), on the right how
    far circuits are `off` the model, on both sides (0 is best). All algorithms of a task are
    compared over the same sizes. The title names the algorithms that have no area in some
    task (no measurement of 0 edges, or undefined values); they have no bar there.

    inverse: auto-circuit's, which turned the bars of falling metrics around. Shares of the
        way to the full model rise for them too, so it does nothing, with a warning.
    """
    if inverse is not None:
        warn(
            "`inverse` does nothing: bars are shares of the way from no edges to all edges, "
            "which rise for a metric that falls too. Leave it out.",
            stacklevel=3,
        )
    areas = {
        task: task_areas(by_algo, log_x, log_y, y_min)
        for task, by_algo in task_measurements.items()
    }
    names = {
        algo: (algo_names or {}).get(algo, algo)
        for by_algo in areas.values()
        for algo in by_algo
    }
    left_out = {
        algo: None
        for by_algo in areas.values()
        for algo, of_algo in by_algo.items()
        if math.isnan(of_algo.kept)
    }
    fig = make_subplots(rows=1, cols=len(PANELS), subplot_titles=[*PANELS.values()])
    for col, which in enumerate(PANELS, start=1):
        for task_idx, (task, by_algo) in enumerate(areas.items()):
            drawn = {
                names[algo]: getattr(of_algo, which)
                for algo, of_algo in by_algo.items()
                if not math.isnan(of_algo.kept)
            }
            fig.add_bar(
                x=list(drawn),
                y=[area / len(areas) for area in drawn.values()],
                customdata=list(drawn.values()),
                hovertemplate="%{x}: %{customdata:.4f}",
                name=task,
                legendgroup=task,
                showlegend=col == 1,
                marker={"color": COLOR_PALETTE[task_idx % len(COLOR_PALETTE)]},
                row=1,
                col=col,
            )
    if left_out:
        missing = ", ".join(names[algo] for algo in left_out)
        title = f"{title or ''}<br><sub>No area for: {missing}</sub>"
    fig.update_xaxes(title_text="Algorithm")
    fig.update_yaxes(title_text="Mean over Tasks")
    fig.update_layout(title=title, barmode="relative", template="plotly_white")
    return fig
