"""A circuit as a still picture (SVG), for browsers that run no JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from auto_circuit.explorer.data import AlgorithmView, GraphView, TaskView

GAP_X, GAP_Y, MARGIN = 64, 56, 60
MAX_EDGES = 300
"""The most that are drawn: of a larger circuit the strongest."""
COLORS = {True: ("#0b5cad", ""), False: ("#b84a00", ' stroke-dasharray="6 3"')}

Place = tuple[float, float]


def circuit_picture(view: TaskView, algorithm: AlgorithmView) -> str:
    """An SVG of the circuit that the explorer shows first; positions are drawn as one."""
    size = algorithm.sizes[algorithm.first_size]
    edges = algorithm.order[: min(size.n_drawn, MAX_EDGES)].tolist()
    places, width, height = _places(view.graph)
    strongest = _strongest(view.graph, algorithm, edges)
    largest = max((abs(score) for score in strongest.values()), default=0.0)
    lines = [
        _line((places[src], places[dest]), score, largest)
        for (src, dest), score in strongest.items()
    ]
    busy = {node for pair in strongest for node in pair}
    boxes = [
        _box(node.name, places[i], i in busy) for i, node in enumerate(view.graph.nodes)
    ]
    caption = (
        f"{view.name}, {algorithm.name}: {len(edges):,} of {size.n_drawn:,} edges of the "
        "circuit. Blue: positive score; orange and dashed: negative."
    )
    return (
        '<figure style="margin:0">'
        f'<svg viewBox="0 0 {width} {height}" role="img" style="max-width:100%;'
        f'height:auto;font:12px system-ui,sans-serif" width="{width}" '
        f'aria-label="{escape(caption)}">{"".join(lines)}{"".join(boxes)}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _places(graph: GraphView) -> tuple[dict[int, Place], int, int]:
    """Where each node is: one row for each layer, the first at the bottom."""
    rows: dict[int, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        rows.setdefault(node.layer, []).append(i)
    layers = sorted(rows)
    width = max(map(len, rows.values())) * GAP_X + MARGIN
    height = len(layers) * GAP_Y
    places = {
        node: (
            width / 2 + (i - (len(rows[layer]) - 1) / 2) * GAP_X,
            height - (y + 0.5) * GAP_Y,
        )
        for y, layer in enumerate(layers)
        for i, node in enumerate(rows[layer])
    }
    return places, width, height


def _strongest(
    graph: GraphView, algorithm: AlgorithmView, edges: list[int]
) -> dict[tuple[int, int], float]:
    """Of the edges between two drawn nodes (at any position) the score of the strongest."""
    found: dict[tuple[int, int], float] = {}
    for edge in edges:
        found.setdefault(graph.drawn_ends(edge), float(algorithm.scores[edge]))
    return found


def _line(ends: tuple[Place, Place], score: float, largest: float) -> str:
    (x1, y1), (x2, y2) = ends
    color, dashes = COLORS[score >= 0]
    share = abs(score) / largest if 0 < largest < np.inf else float(np.isinf(score))
    return (
        f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{color}"{dashes} '
        f'stroke-width="{1 + 4 * share**0.5:.1f}" opacity="0.7" fill="none"/>'
    )


def _box(name: str, place: Place, is_busy: bool) -> str:
    x, y = place
    width = max(44, 7.5 * len(name) + 10)
    opacity = 1 if is_busy else 0.45
    return (
        f'<g opacity="{opacity}"><rect x="{x - width / 2:g}" y="{y - 12:g}" rx="5" '
        f'width="{width:g}" height="24" fill="#f3f4f6" stroke="#9ca3af"/>'
        f'<text x="{x:g}" y="{y + 4:g}" text-anchor="middle" fill="#1f2430">'
        f"{escape(name)}</text></g>"
    )


def first_picture(views: Sequence[TaskView]) -> str:
    """The picture of the first task that has an algorithm; none: an empty text."""
    for view in views:
        for algorithm in view.algorithms:
            return circuit_picture(view, algorithm)
    return ""
