"""The order in which edges enter a circuit, as scores that are all different."""

from __future__ import annotations

from typing import Literal

import torch as t
from jaxtyping import Int
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.ranking import desc_prune_scores, flat_prune_scores, score_tensors
from auto_circuit.types import PruneScores

Ranking = Literal["signed", "absolute"]
"""Which edge is the best: that of the largest score, or of the largest |score|."""


@checked
def edge_ranks(prune_scores: PruneScores, ranking: Ranking = "signed") -> PruneScores:
    """Scores that are all different: n_edges for the best edge, down to 1.

    `run_circuits` and `circuit_mask`, which rank by |score|, then rank by `ranking`, and
    a circuit has exactly the edges that it is asked to have. Of equal scores the first
    is the best. Raises ConfigError for an unknown ranking, GraphError for NaN scores.
    """
    return ranks_in_order(prune_scores, best_first(prune_scores, ranking))


@checked
def best_first(prune_scores: PruneScores, ranking: Ranking) -> Int[Tensor, "edges"]:
    """The indices of `flat_prune_scores`, in order. Raises as `edge_ranks` does."""
    desc_prune_scores(prune_scores)  # Raises for NaN, which has no rank.
    scores = flat_prune_scores(prune_scores).double()
    keys = scores if ranking == "signed" else scores.abs()
    return keys.argsort(descending=True, stable=True)


def ranks_in_order(prune_scores: PruneScores, order: Int[Tensor, "edges"]) -> PruneScores:
    """n_edges for the first index of `order`, down to 1, in the shapes of the scores."""
    prune_scores = score_tensors(prune_scores)
    n_edges = len(order)
    ranks = t.empty(n_edges, dtype=t.float64, device=order.device)
    ranks[order] = t.arange(n_edges, 0, -1).to(ranks)
    sizes = [of_module.numel() for of_module in prune_scores.values()]
    return {
        name: of_module.view(prune_scores[name].shape)
        for name, of_module in zip(prune_scores, ranks.split(sizes), strict=True)
    }
