"""Where the path of integrated gradients, from corrupt to clean, is sampled."""

from __future__ import annotations

from typing import Literal

from auto_circuit.checks import check_count, checked

PathPoints = Literal["midpoints", "clean_end", "corrupt_end", "both_ends"]
"""Which points of a path of m steps from corrupt (0) to clean (1); all weigh the same.

midpoints: (k + 1/2) / m for k = 0 ... m-1. clean_end: k / m for k = 1 ... m, so that the
clean end is a point (a right Riemann sum). corrupt_end: k / m for k = 0 ... m-1 (a left
one; EAP-IG's published code). both_ends: k / m for k = 0 ... m, one point more
(auto-circuit's).
"""


@checked
def path_shares(n_steps: int, path_points: PathPoints) -> list[float]:
    """How far on the way from corrupt to clean each point is, in [0, 1], ascending.

    Raises ConfigError for fewer than one step and for an unknown rule.
    """
    n_steps = check_count("integrated_grad_samples", n_steps)
    first = {"midpoints": 0.5, "clean_end": 1.0}.get(path_points, 0.0)
    n_points = n_steps + 1 if path_points == "both_ends" else n_steps
    return [(first + step) / n_steps for step in range(n_points)]
