"""The figure of areas under curves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import plotly.graph_objects as go

from auto_circuit.checks import checked
from auto_circuit.metrics.area_under_curve import area_share, has_area
from auto_circuit.types import COLOR_PALETTE, AlgoKey, TaskMeasurements


@checked
def average_auc_plot(
    task_measurements: TaskMeasurements,
    log_x: bool,
    log_y: bool,
    y_min: int | float | None = None,
    title: str | None = None,
    algo_names: Mapping[AlgoKey, str] | None = None,
) -> go.Figure:
    """The mean over tasks of each algorithm's `area_share`: bars, tasks stacked.

    0: never more than no circuit, 1: always as much as the largest circuit; higher is
    better for rising and for falling metrics. The title names the algorithms that have
    no area in some task (too few points, or all tasks' values undefined); they have no
    bar there.

    Differs from auto-circuit, which divided by the area of random scores and so had no
    meaning where that was near 0.
    """
    fig = go.Figure()
    left_out: dict[AlgoKey, None] = {}
    for task_idx, (task, by_algo) in enumerate(task_measurements.items()):
        shares = {
            algo: (
                area_share(points, log_x, log_y, y_min)
                if has_area(points, log_x)
                else math.nan
            )
            for algo, points in by_algo.items()
        }
        left_out |= {algo: None for algo, share in shares.items() if math.isnan(share)}
        drawn = {algo: share for algo, share in shares.items() if not math.isnan(share)}
        fig.add_bar(
            x=[(algo_names or {}).get(algo, algo) for algo in drawn],
            y=[share / len(task_measurements) for share in drawn.values()],
            customdata=list(drawn.values()),
            hovertemplate="%{x}: %{customdata:.4f}",
            name=task,
            marker={"color": COLOR_PALETTE[task_idx % len(COLOR_PALETTE)]},
        )
    if left_out:
        names = ", ".join((algo_names or {}).get(algo, algo) for algo in left_out)
        title = f"{title or ''}<br><sub>No area for: {names}</sub>"
    fig.update_layout(
        title=title,
        barmode="relative",
        template="plotly_white",
        xaxis_title="Algorithm",
        yaxis_title="Mean Share of Largest Circuit's Value",
    )
    return fig
