"""Writes circuit_sizes.json: what `edge_counts_util` of auto-circuit 1.0.1 gives.

Run with the Python of an environment that has it (and not this repository on its path).
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch as t

from auto_circuit.utils.graph_utils import edge_counts_util

N_EDGES = 13
GROUPS = ([13], [5, 8], [1, 12], [5, 3, 5], [1, 2, 3, 7], [2, 2, 2, 2, 2, 3])
LISTS: tuple[list[Any], ...] = ([5], [5, 0.25], [0, 5, 13], [1, 2, 3], [1, 2, 0.5])
FLAGS = (None, True, False)


def scores(groups: list[int]) -> dict[str, t.Tensor]:
    """Scores in groups of equal ones, of these sizes, the best first."""
    values = [
        len(groups) - place for place, size in enumerate(groups) for _ in range(size)
    ]
    return {"a": t.tensor(values[:4]).float(), "b": -t.tensor(values[4:]).float()}


def cases() -> list[tuple[list[int] | None, list[Any] | None, list[Any]]]:
    """(groups of scores, list of sizes, [zero_edges, all_edges, true_edge_count])"""
    ends = [list(flags) for flags in product(FLAGS, FLAGS, (None, 4))]
    rules: list[Any] = [(groups, None) for groups in GROUPS]
    rules += [(None, sizes) for sizes in LISTS]
    return [(*rule, flags) for rule in rules for flags in ends]


def found(groups: list[int] | None, sizes: list[Any] | None, flags: list[Any]) -> Any:
    """The sizes that are to be tested."""
    prune_scores = None if groups is None else scores(groups)
    return edge_counts_util(range(N_EDGES), sizes, prune_scores, *flags)  # type: ignore


if __name__ == "__main__":
    rows = [[*case, found(*case)] for case in cases()]
    path = Path(__file__).with_suffix(".json")
    path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]\n")
