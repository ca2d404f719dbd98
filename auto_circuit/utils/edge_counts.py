"""Which circuit sizes to test."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from numbers import Integral, Real

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.ranking import desc_prune_scores
from auto_circuit.types import EdgeCounts, PruneScores, TestEdges

LOGARITHMIC_FROM = 200
COARSE_DIGITS = (1, 2, 4, 7)
MAX_GROUPS = 100


@checked
def edge_counts_util(
    edges: Sized,
    test_counts: TestEdges | None = None,
    prune_scores: PruneScores | None = None,
    zero_edges: bool | None = None,
    all_edges: bool | None = None,
    true_edge_count: int | None = None,
) -> list[int]:
    """Circuit sizes to test, ascending and each once.

    edges: all edges of the graph; only their number counts (`range(n)` will do).
    test_counts: EdgeCounts.ALL: every size. LOGARITHMIC: 1..9, 10, 20, .. 90, 100,
        200, .. below the number of edges. COARSE: of these, 1, 2, 4, 7, 10, 20, ..,
        which are about evenly apart on a logarithmic axis. GROUPS: the sizes at which a
        group of equal |score| is complete, best first. A list: numbers of edges (int)
        and shares of all edges in [0, 1] (float; 1 is one edge, 1.0 all of them),
        rounded down.
        None: GROUPS if there are few different scores (fewer than 100, and than half
        the edges), else LOGARITHMIC above 200 edges, else ALL.
    zero_edges, all_edges: are 0 and the number of all edges tested? True puts it in, False
        takes it out. None: True if there are more than two sizes, and False if there are
        at most two groups: such scores are one circuit, so its size is all there is to
        test (`[5]` for 5 edges that score 1; nothing if all scores are equal). A list of
        at most two sizes stays as it is.
    true_edge_count: a size to put in: the number of true edges.

    Raises ConfigError for GROUPS without scores and for numbers that make no sense,
    GraphError for sizes above the number of edges and scores of another graph.

    A share that is a whole number of edges but for rounding is that number (0.29 of 100 edges
    is 29, not 28), and all sizes that a list names are tested.
    """
    n_edges = len(edges)
    if test_counts is None:
        test_counts = _default_rule(n_edges, prune_scores)
    counts = set(_rule_counts(n_edges, test_counts, prune_scores))
    is_one_circuit = test_counts == EdgeCounts.GROUPS and len(counts) <= 2
    by_default = True if len(counts) > 2 else False if is_one_circuit else None
    for end, wanted in ((0, zero_edges), (n_edges, all_edges)):
        wanted = by_default if wanted is None else wanted
        if wanted:
            counts.add(end)
        elif wanted is False:
            counts.discard(end)
    if true_edge_count is not None:
        counts.add(_checked_count(true_edge_count, n_edges, "`true_edge_count`"))
    return sorted(counts)


def _default_rule(n_edges: int, prune_scores: PruneScores | None) -> EdgeCounts:
    if prune_scores is not None:
        n_groups = desc_prune_scores(prune_scores).unique_consecutive().numel()
        if n_groups < min(n_edges / 2, MAX_GROUPS):
            return EdgeCounts.GROUPS
    return EdgeCounts.LOGARITHMIC if n_edges > LOGARITHMIC_FROM else EdgeCounts.ALL


@checked
def listed_edge_counts(
    n_edges: int, counts: Sequence[int | float], name: str = "test_counts"
) -> list[int]:
    """Exactly the sizes of a list of numbers of edges and shares, ascending.

    Raises as `edge_counts_util` does, which may also put in 0 and all edges; `name` is what
    errors call the list.
    """
    return sorted({_listed_count(count, n_edges, f"`{name}`") for count in counts})


def _rule_counts(
    n_edges: int, test_counts: TestEdges, prune_scores: PruneScores | None
) -> Sequence[int]:
    """The sizes that the rule or list means, before the ends are looked at."""
    if isinstance(test_counts, (list, tuple)):
        return listed_edge_counts(n_edges, test_counts)
    if test_counts == EdgeCounts.ALL:
        return range(n_edges + 1)
    if test_counts == EdgeCounts.LOGARITHMIC:
        return _logarithmic_counts(n_edges, range(1, 10))
    if test_counts == EdgeCounts.COARSE:
        return _logarithmic_counts(n_edges, COARSE_DIGITS)
    return _group_counts(n_edges, prune_scores)


def coarse_edge_counts(n_edges: int) -> list[int]:
    """0, the sizes of `EdgeCounts.COARSE`, and all edges."""
    return edge_counts_util(range(n_edges), EdgeCounts.COARSE, None, True, True)


def _logarithmic_counts(n_edges: int, digits: Sequence[int]) -> list[int]:
    """All numbers below n_edges that are one of these digits and zeros."""
    n_decades = len(str(n_edges))
    counts = [digit * 10**d for d in range(n_decades) for digit in digits]
    return [count for count in counts if count < n_edges]


def _group_counts(n_edges: int, prune_scores: PruneScores | None) -> list[int]:
    if prune_scores is None:
        raise ConfigError("EdgeCounts.GROUPS groups edges by score: give `prune_scores`.")
    desc_scores = desc_prune_scores(prune_scores)
    if desc_scores.numel() != n_edges:
        raise GraphError(
            f"There are {desc_scores.numel()} prune scores but {n_edges} edges: the "
            "scores are of another graph."
        )
    _, group_sizes = desc_scores.unique_consecutive(return_counts=True)
    return group_sizes.cumsum(0).tolist()


def _listed_count(count: int | float, n_edges: int, where: str) -> int:
    if isinstance(count, bool) or not isinstance(count, Real):
        raise ConfigError(f"{where} has {count!r}, which is not a number.")
    if isinstance(count, Integral):
        return _checked_count(int(count), n_edges, where)
    if not 0.0 <= count <= 1.0:
        raise ConfigError(
            f"{where} has {count!r}; a float is a share of all edges, from 0.0 "
            "to 1.0. Give a number of edges as an int."
        )
    # The tolerance undoes rounding in the product: 0.29 * 100 is 28.999...
    return math.floor(float(count) * n_edges + 1e-6)


def _checked_count(count: int, n_edges: int, where: str) -> int:
    if count < 0:
        raise ConfigError(f"{where} has {count}; a number of edges is 0 or more.")
    if count > n_edges:
        raise GraphError(f"{where} has {count}, but the graph has only {n_edges} edges.")
    return count
