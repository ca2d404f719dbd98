"""The figure of one circuit's tests in several graphs, with the spread of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from auto_circuit.checks import checked
from auto_circuit.metrics.panels import panels, wrapped
from auto_circuit.paper import GridRow, grid_values
from auto_circuit.robustness_plot import (
    LEFT,
    LINE_COLOR,
    ROW_HEIGHT,
    list_from_the_top,
)


@checked
def grid_fig(rows: Sequence[GridRow]) -> go.Figure:
    """How much of the task a circuit does, in % of the logit difference, in each test.

    A panel for each task, a line for each test: a dot is the ratio of means, a diamond the
    mean of ratios, and a bar goes from the first to the third quartile of the prompts' own
    percentages. The dotted line is what the model itself does.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    tests = [", ".join(value) for value in grid_values(rows)]
    titles = {row.task: f"{row.task}, {row.circuit}" for row in rows}
    drawn = panels(
        list(titles.values()),
        shared_yaxes=True,
        height=ROW_HEIGHT * len(tests),
        gap=90,
        left=LEFT,
    )
    fig = drawn.fig
    for idx, task in enumerate(tasks):
        of_task = [row for row in rows if row.task == task]
        place = drawn.place(idx)
        for trace in _traces(of_task, in_legend=idx == 0):
            fig.add_trace(trace, **place)
        fig.add_vline(x=100, line={"color": LINE_COLOR, "dash": "dot"}, **place)
    fig.update_xaxes(title_text=wrapped("% of the logit difference", drawn.width))
    list_from_the_top(fig, tests)
    fig.update_yaxes(tickmode="array", tickvals=tests)
    return drawn.finish("The same circuit in other graphs, and with other ablations")


def _traces(rows: Sequence[GridRow], in_legend: bool) -> list[go.Scatter]:
    common: dict[str, Any] = {
        "y": [f"{row.unit}, {row.positions}, {row.ablation}" for row in rows],
        "mode": "markers",
        "showlegend": in_legend,
    }
    return [
        go.Scatter(
            x=[row.median for row in rows],
            error_x={
                "type": "data",
                "array": [row.q3 - row.median for row in rows],
                "arrayminus": [row.median - row.q1 for row in rows],
            },
            name="median and quartiles of prompts",
            marker={"color": "rgb(150, 150, 150)", "symbol": "line-ns-open", "size": 10},
            **common,
        ),
        go.Scatter(
            x=[row.ratio_of_means for row in rows],
            name="ratio of means",
            marker={"color": "rgb(30, 90, 170)", "size": 9},
            **common,
        ),
        go.Scatter(
            x=[row.mean_of_ratios for row in rows],
            name="mean of ratios",
            marker={"color": "rgb(200, 80, 30)", "symbol": "diamond", "size": 9},
            **common,
        ),
    ]
