"""The figure of circuits and the model under knockouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from auto_circuit.checks import checked
from auto_circuit.types import COLOR_PALETTE, AlgoKey, TaskKey

Scores = Sequence[tuple[int, int, float, float]]
BARS = (("KL(Model || Circuit)", 2), ("KL(Model - K || Circuit - K)", 3))
"""The bars of each circuit: (their name, the place of their height in its score)."""


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
    fig = make_subplots(
        rows=1,
        cols=max(1, len(task_completeness_scores)),
        subplot_titles=list(task_completeness_scores),
    )
    for col, by_algo in enumerate(task_completeness_scores.values(), start=1):
        circuits = [
            (_label((algo_names or {}).get(algo, algo), score), score)
            for algo, scores in by_algo.items()
            for score in scores
        ]
        for bar_idx, (name, place) in enumerate(BARS):
            fig.add_bar(
                x=[label for label, _ in circuits],
                y=[score[place] for _, score in circuits],
                name=name,
                legendgroup=name,
                showlegend=col == 1,
                marker={"color": COLOR_PALETTE[bar_idx]},
                hovertemplate="%{x}: %{y:.4g}",
                row=1,
                col=col,
            )
    fig.update_layout(
        title="Same under Knockouts",
        barmode="group",
        template="plotly_white",
        yaxis_title="KL Divergence (Nats)",
    )
    return fig


def _label(algo_name: str, score: tuple[int, int, float, float]) -> str:
    return f"{algo_name}<br>{score[0]} edges, {score[1]} knocked out"
