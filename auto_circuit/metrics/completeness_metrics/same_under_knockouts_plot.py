"""The figure of circuits and the model under knockouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from auto_circuit.checks import checked
from auto_circuit.metrics.panels import panels, shortened
from auto_circuit.types import COLOR_PALETTE, AlgoKey, TaskKey

Scores = Sequence[tuple[int, int, float, float]]
BARS = (("KL(Model || Circuit)", 2), ("KL(Model - K || Circuit - K)", 3))
"""The bars of each circuit: (their name, the place of their height in its score)."""

MANY, LEVEL_WIDTH, LABEL_HEIGHT = 14, 190, 250
"""With more circuits, panels stand one above the other; the pixels that a level label takes,
and that an upright one does."""


@checked
def same_under_knockouts_fig(
    task_completeness_scores: Mapping[TaskKey, Mapping[AlgoKey, Scores]],
    *,
    algo_names: Mapping[AlgoKey, str] | None = None,
) -> go.Figure:
    """For each circuit its distance to the model, whole and with K knocked out.

    A panel per task and two bars per circuit, in nats. For a complete circuit the second
    is no higher than the first. algo_names: labels (else the keys).
    """
    n_circuits = max(
        (sum(map(len, of.values())) for of in task_completeness_scores.values()),
        default=1,
    )
    drawn = panels(
        list(task_completeness_scores),
        gap=75 + LABEL_HEIGHT,
        max_columns=1 if n_circuits > MANY else 2,
    )
    fig, is_level = drawn.fig, drawn.width / max(1, n_circuits) > LEVEL_WIDTH
    for idx, by_algo in enumerate(task_completeness_scores.values()):
        circuits = [
            ((algo_names or {}).get(algo, algo), score)
            for algo, scores in by_algo.items()
            for score in scores
        ]
        labels = [_label(name, score) for name, score in circuits]
        for bar_idx, (name, place) in enumerate(BARS):
            fig.add_bar(
                x=labels,
                y=[score[place] for _, score in circuits],
                name=name,
                legendgroup=name,
                showlegend=idx == 0,
                marker={"color": COLOR_PALETTE[bar_idx]},
                hovertemplate="%{x}: %{y:.4g}",
                **drawn.place(idx),
            )
        shown = labels if is_level else [_short_label(*circuit) for circuit in circuits]
        axis = {"tickmode": "array", "tickvals": labels, "ticktext": shown}
        fig.update_xaxes(axis, tickangle=0 if is_level else -90, **drawn.place(idx))
    fig.update_yaxes(title_text="KL Divergence (Nats)", col=1)
    fig.update_layout(barmode="group")
    below = 45 if is_level else LABEL_HEIGHT
    return drawn.finish("Same under Knockouts", below=below)


def _short_label(algo_name: str, score: tuple[int, int, float, float]) -> str:
    return f"{shortened(algo_name, 20)}, {score[0]} edges, {score[1]} out"


def _label(algo_name: str, score: tuple[int, int, float, float]) -> str:
    return f"{algo_name}<br>{score[0]} edges, {score[1]} knocked out"
