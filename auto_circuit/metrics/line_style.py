"""How the lines of many algorithms are told apart in a figure."""

from __future__ import annotations

from typing import Any

from auto_circuit.types import COLOR_PALETTE

DASHES = ("solid", "dash", "dot", "dashdot")


def line_style(algo_idx: int) -> dict[str, Any]:
    """A colour, and another dash when the colours have run out."""
    n_colors = len(COLOR_PALETTE)
    return {
        "color": COLOR_PALETTE[algo_idx % n_colors],
        "dash": DASHES[algo_idx // n_colors % len(DASHES)],
    }
