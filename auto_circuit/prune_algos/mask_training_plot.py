"""The figure of a mask training: how its losses and its circuit's size developed."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError
from auto_circuit.prune_algos.mask_training import TrainingStep
from auto_circuit.types import COLOR_PALETTE

LOSS_COLORS = {
    "loss": COLOR_PALETTE[7],
    "faithfulness": COLOR_PALETTE[0],
    "penalty": COLOR_PALETTE[1],
}
EDGES_COLOR = COLOR_PALETTE[2]
VALIDATION_COLOR = COLOR_PALETTE[4]
MIN_EDGES_Y = 0.5
"""Where expected numbers of edges below it are drawn on the logarithmic axis."""


@checked
def mask_training_fig(
    steps: Sequence[TrainingStep], title: str | None = None
) -> go.Figure:
    """Losses (left axis) and expected edges (right, logarithmic) against the step.

    loss = faithfulness + penalty, in the unit of the faithfulness loss; markers are the
    faithfulness loss on validation prompts, where it was measured. Fewer than 0.5 edges
    are drawn at 0.5; hovering shows the true number.

    Raises ConfigError if there are no steps.
    """
    if not steps:
        raise ConfigError(
            "There are no training steps to draw; give the `steps` of a MaskTraining."
        )
    fig = make_subplots(specs=[[{"secondary_y": True}]])
    for field, color in LOSS_COLORS.items():
        fig.add_trace(_loss_trace(steps, field, color))
    if any(step.validation is not None for step in steps):
        fig.add_trace(_validation_trace(steps))
    fig.add_trace(_edges_trace(steps), secondary_y=True)
    _style(fig, title)
    return fig


def _loss_trace(steps: Sequence[TrainingStep], field: str, color: str) -> go.Scatter:
    return go.Scatter(
        x=[step.step for step in steps],
        y=[getattr(step, field) for step in steps],
        name=field.title(),
        mode=_mode(steps),
        line={"color": color, "dash": "dot" if field == "penalty" else "solid"},
    )


def _validation_trace(steps: Sequence[TrainingStep]) -> go.Scatter:
    measured = [step for step in steps if step.validation is not None]
    return go.Scatter(
        x=[step.step for step in measured],
        y=[step.validation for step in measured],
        name="Faithfulness (validation)",
        mode="markers",
        marker={"color": VALIDATION_COLOR, "symbol": "diamond", "size": 9},
    )


def _edges_trace(steps: Sequence[TrainingStep]) -> go.Scatter:
    return go.Scatter(
        x=[step.step for step in steps],
        y=[max(step.n_edges, MIN_EDGES_Y) for step in steps],
        customdata=[step.n_edges for step in steps],
        hovertemplate="%{customdata:.5g}",
        name="Expected edges",
        mode=_mode(steps),
        line={"color": EDGES_COLOR, "dash": "dash"},
    )


def _mode(steps: Sequence[TrainingStep]) -> str:
    # A line through one point cannot be seen.
    return "lines" if len(steps) > 1 else "markers"


def _style(fig: go.Figure, title: str | None) -> None:
    fig.update_layout(
        title=title,
        template="plotly_white",
        hovermode="x unified",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0.0},
    )
    fig.update_xaxes(title_text="Step")
    fig.update_yaxes(title_text="Loss", secondary_y=False)
    # plotly would put the ticks where the left axis has its own, at uneven numbers.
    fig.update_yaxes(
        title_text="Expected edges",
        type="log",
        tickmode="auto",
        color=EDGES_COLOR,
        showgrid=False,
        secondary_y=True,
    )
