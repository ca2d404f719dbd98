"""The 95 % interval of a curve, in a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

BAND_NOTE = "Bands: 95 % intervals of the mean over seeds"
OPACITY = 0.15

BandPoint = tuple[int | float, int | float, int | float]
"""x, low, high."""


def band_traces(
    points: Sequence[BandPoint], color: str, group: str, shape: str = "linear"
) -> list[go.Scatter]:
    """A band from low to high along a curve; [] if it is nowhere known.

    color: the curve's, "rgb(...)". group: its legend group, with which the band is hidden.
    shape: how points are joined.
    """
    known = [point for point in points if not any(map(math.isnan, point))]
    if len(known) < 2:
        return []
    xs, lows, highs = zip(*known, strict=True)
    edges = [
        go.Scatter(
            x=xs,
            y=ys,
            mode="lines",
            line={"width": 0, "color": color, "shape": shape},
            legendgroup=group,
            showlegend=False,
            hoverinfo="skip",
        )
        for ys in (lows, highs)
    ]
    edges[1].update(
        fill="tonexty",
        fillcolor=color.replace("rgb(", "rgba(").replace(")", f", {OPACITY})"),
    )
    return edges
