"""The figure of how much the circuits of different algorithms overlap."""

from __future__ import annotations

from collections.abc import Mapping

from plotly.graph_objects import Figure, Heatmap
from plotly.subplots import make_subplots

from auto_circuit.checks import checked
from auto_circuit.types import AlgoKey, TaskKey

__all__ = ["Figure", "similarity_fig"]

PANEL_SIZE = 320
"""The width and height of a panel, in pixels."""

Matrix = list[list[float | None]]


@checked
def similarity_fig(
    task_similarities: Mapping[TaskKey, Mapping[int, Mapping[str, Mapping[str, float]]]],
    algo_names: Mapping[AlgoKey, str] | None = None,
) -> Figure:
    """Heat maps of similarities: a column for each task, a row for each circuit size.

    task_similarities: of `task_prune_scores_similarities`. Each pair of algorithms is
    one cell, in the colour of its similarity: 0 no common edge, 1 the same circuit.
    algo_names: labels (else the keys).
    """
    n_rows = max((len(by_count) for by_count in task_similarities.values()), default=1)
    n_cols = max(1, len(task_similarities))
    fig = make_subplots(
        rows=n_rows, cols=n_cols, subplot_titles=_titles(task_similarities, n_rows)
    )
    for col, by_count in enumerate(task_similarities.values(), start=1):
        for row, by_algo in enumerate(by_count.values(), start=1):
            labels = [(algo_names or {}).get(algo, algo) for algo in by_algo]
            heatmap = Heatmap(
                x=labels,
                y=labels,
                z=_matrix(by_algo),
                coloraxis="coloraxis",
                texttemplate="%{z:.2f}",
                hovertemplate="%{y}, %{x}: %{z:.4f}<extra></extra>",
            )
            fig.add_trace(heatmap, row=row, col=col)
    fig.update_yaxes(autorange="reversed")
    fig.update_layout(
        template="plotly_white",
        coloraxis={"cmin": 0, "cmax": 1, "colorscale": "Blues"},
        width=150 + PANEL_SIZE * n_cols,
        height=150 + PANEL_SIZE * n_rows,
    )
    return fig


def _titles(
    task_similarities: Mapping[TaskKey, Mapping[int, Mapping[str, Mapping[str, float]]]],
    n_rows: int,
) -> list[str]:
    """Row after row; empty for a task that has fewer sizes."""
    columns = [
        [f"{task}<br>{edge_count} edges" for edge_count in by_count]
        for task, by_count in task_similarities.items()
    ]
    return [
        column[row] if row < len(column) else ""
        for row in range(n_rows)
        for column in columns
    ]


def _matrix(by_algo: Mapping[str, Mapping[str, float]]) -> Matrix:
    """[first algorithm, second algorithm]; None where the pair stands the other way."""
    return [[by_algo[first].get(second) for second in by_algo] for first in by_algo]
