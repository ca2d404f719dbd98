"""The figure of how much the circuits of different algorithms overlap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plotly.graph_objects import Figure, Heatmap
from plotly.subplots import make_subplots

from auto_circuit.checks import checked
from auto_circuit.metrics.panels import WIDTH, n_lines, shortened, wrapped
from auto_circuit.types import AlgoKey, TaskKey

__all__ = ["Figure", "similarity_fig"]

CELL_SIZE, MIN_SIZE, MAX_SIZE = 36, 150, 700
"""The pixels of a pair of algorithms, if there is room, and of a panel."""
MIN_CELL = 30
"""The pixels of a cell that has room for its number."""
LABELS = 125
"""The pixels of the algorithms' names."""
MAX_NAME = 17
"""The most letters of them; hovering shows the whole name."""

Matrix = list[list[float | None]]


@checked
def similarity_fig(
    task_similarities: Mapping[TaskKey, Mapping[int, Mapping[str, Mapping[str, float]]]],
    algo_names: Mapping[AlgoKey, str] | None = None,
) -> Figure:
    """Heat maps of similarities: a column for each task, a row for each circuit size.

    As many tasks stand side by side as can be read at 1000 pixels.

    task_similarities: of `task_prune_scores_similarities`. Each pair of algorithms is
    one cell, in the colour of its similarity: 0 no common edge, 1 the same circuit.
    algo_names: labels (else the keys).
    """
    n_sizes = max((len(by_count) for by_count in task_similarities.values()), default=1)
    n_algos = max(
        (len(of) for by_count in task_similarities.values() for of in by_count.values()),
        default=1,
    )
    size = min(max(MIN_SIZE, CELL_SIZE * n_algos), MAX_SIZE)
    n_cols = max(1, min((WIDTH - 100) // (size + LABELS), len(task_similarities)))
    titles = _titles(task_similarities, n_sizes, n_cols, size + LABELS)
    n_rows = len(titles) // n_cols
    gap = LABELS + 20 + 18 * max(map(n_lines, titles), default=0)
    width = n_cols * size + (n_cols - 1) * LABELS
    height = n_rows * size + (n_rows - 1) * gap
    fig = make_subplots(
        rows=n_rows,
        cols=n_cols,
        subplot_titles=titles,
        horizontal_spacing=LABELS / width if n_cols > 1 else 0.0,
        vertical_spacing=gap / height if n_rows > 1 else 0.0,
    )
    for task_idx, by_count in enumerate(task_similarities.values()):
        for size_idx, by_algo in enumerate(by_count.values()):
            place: dict[str, Any] = {
                "row": task_idx // n_cols * n_sizes + size_idx + 1,
                "col": task_idx % n_cols + 1,
            }
            labels = [(algo_names or {}).get(algo, algo) for algo in by_algo]
            has_numbers = size / max(1, len(labels)) >= MIN_CELL
            heatmap = Heatmap(
                x=labels,
                y=labels,
                z=_matrix(by_algo),
                coloraxis="coloraxis",
                texttemplate="%{z:.2f}" if has_numbers else None,
                hovertemplate="%{y}, %{x}: %{z:.4f}<extra></extra>",
            )
            fig.add_trace(heatmap, **place)
            short = [shortened(label, MAX_NAME) for label in labels]
            axis = {"tickmode": "array", "tickvals": labels, "ticktext": short}
            fig.update_xaxes(axis, tickangle=-90, **place)
            fig.update_yaxes(axis, **place)
    fig.update_yaxes(autorange="reversed")
    fig.update_annotations(font_size=13)
    top = gap - LABELS + 10
    fig.update_layout(
        template="plotly_white",
        coloraxis={"cmin": 0, "cmax": 1, "colorscale": "Blues"},
        coloraxis_colorbar={
            "title": "Jaccard",
            "lenmode": "pixels",
            "len": MIN_SIZE * 1.2,
        },
        coloraxis_colorbar_y=1,
        coloraxis_colorbar_yanchor="top",
        margin={"l": LABELS, "r": 90, "t": top, "b": LABELS},
        width=LABELS + width + 90,
        height=top + height + LABELS,
    )
    return fig


def _titles(
    task_similarities: Mapping[TaskKey, Mapping[int, Mapping[str, Mapping[str, float]]]],
    n_sizes: int,
    n_cols: int,
    pixels: int,
) -> list[str]:
    """Row after row; empty for a task that has fewer sizes."""
    columns = [
        [wrapped(f"{task}<br>{edge_count} edges", pixels) for edge_count in by_count]
        for task, by_count in task_similarities.items()
    ]
    columns += [[]] * (-len(columns) % n_cols)
    return [
        column[size] if size < len(column) else ""
        for start in range(0, len(columns), n_cols)
        for size in range(n_sizes)
        for column in columns[start : start + n_cols]
    ]


def _matrix(by_algo: Mapping[str, Mapping[str, float]]) -> Matrix:
    """[first algorithm, second algorithm]; None where the pair stands the other way."""
    return [[by_algo[first].get(second) for second in by_algo] for first in by_algo]
