"""The figure of how the verdict on a circuit depends on its test."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from auto_circuit.checks import checked
from auto_circuit.metrics.panels import panels, wrapped
from auto_circuit.robustness import RobustnessRow, values_by_choice
from auto_circuit.types import AlgoKey

ROW_HEIGHT = 22
"""The height of one value of a choice, in pixels."""
LINE_COLOR = "rgb(200, 200, 200)"
LEFT = 240
"""The pixels of a value's name."""


@checked
def robustness_fig(
    rows: Sequence[RobustnessRow], algo_names: Mapping[AlgoKey, str] | None = None
) -> go.Figure:
    """The verdict on each circuit for every value of every choice.

    A panel for each algorithm and task, a line for each value of
    a choice, a dot for each size of the circuit, darker for larger ones. Dotted lines are
    the verdicts of the experiment's own choices, whose dots are diamonds.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    algos = list(dict.fromkeys(row.algo for row in rows))
    labels = [_label(choice, value) for choice, value, _ in values_by_choice(rows)]
    drawn = panels(
        [
            f"{task}, {(algo_names or {}).get(algo, algo)}"
            for algo in algos
            for task in tasks
        ],
        shared_yaxes=True,
        height=ROW_HEIGHT * len(labels),
        gap=110,
        left=LEFT,
    )
    fig = drawn.fig
    for idx, (algo, task) in enumerate(itertools.product(algos, tasks)):
        points = [row for row in rows if (row.task, row.algo) == (task, algo)]
        place = drawn.place(idx)
        _draw_panel(fig, points, place, in_legend=idx == 0)
        for border in _borders(labels):
            fig.add_hline(y=border, line={"color": LINE_COLOR}, **place)
    title = wrapped("Verdict: % of the task that the circuit does", drawn.width)
    fig.update_xaxes(title_text=title)
    list_from_the_top(fig, labels)
    fig.update_yaxes(tickmode="array", tickvals=labels)
    fig.update_layout(hovermode="closest")
    return drawn.finish("How the same circuits fare in other tests", below=105)


def list_from_the_top(fig: go.Figure, labels: Sequence[str]) -> None:
    """Give the y axes a row for each label, the first one at the top."""
    fig.update_yaxes(
        categoryorder="array",
        categoryarray=labels,
        range=[len(labels) - 0.5, -0.5],
        gridcolor="rgb(240, 240, 240)",
    )


def _draw_panel(
    fig: go.Figure,
    rows: Sequence[RobustnessRow],
    place: Mapping[str, Any],
    in_legend: bool,
) -> None:
    shares = sorted({row.share for row in rows})
    for idx, share in enumerate(shares):
        color = sample_colorscale("Blues", [0.35 + 0.6 * idx / max(1, len(shares) - 1)])[
            0
        ]
        points = [row for row in rows if row.share == share]
        fig.add_trace(_dots(points, share, color, in_legend), **place)
        base = next(row.verdict for row in points if row.is_base)
        line = {"dash": "dot", "width": 1, "color": color}
        fig.add_vline(x=base, line=line, **place)


def _label(choice: str, value: str) -> str:
    return f"<b>{choice}</b>: {value}"


def _borders(labels: Sequence[str]) -> list[float]:
    """Where one choice's values end and the next one's begin."""
    choices = [label.partition(":")[0] for label in labels]
    return [i - 0.5 for i in range(1, len(choices)) if choices[i] != choices[i - 1]]


def _dots(
    rows: Sequence[RobustnessRow], share: float, color: Any, in_legend: bool
) -> go.Scatter:
    name = f"{100 * share:g} % of the edges"
    return go.Scatter(
        x=[row.verdict for row in rows],
        y=[_label(row.choice, row.value) for row in rows],
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=in_legend,
        marker={
            "color": color,
            "size": 10,
            "symbol": ["diamond" if row.is_base else "circle" for row in rows],
            "line": {"color": "white", "width": 1},
        },
        customdata=[(row.n_edges, row.percent) for row in rows],
        hovertemplate=(
            "%{y}<br>%{customdata[0]} edges, %{customdata[1]:.4g} % of the logit "
            "difference"
        ),
    )
