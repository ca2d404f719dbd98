"""The size of circuits without dead ends, and circuits that are grown from the output.

An algorithm ranks edges one by one, so the best of them may hang in the air: see
`utils.dead_ends`, which says what a path is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import Literal

import torch as t
from jaxtyping import Bool
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.circuits import CircuitMasks, as_circuit
from auto_circuit.metrics.edge_ranks import (
    Ranking,
    best_first,
    edge_ranks,
    ranks_in_order,
)
from auto_circuit.types import DestNode, PositionsRead, PruneScores
from auto_circuit.utils.component_links import fed_links
from auto_circuit.utils.dead_ends import edge_rows, output_positions
from auto_circuit.utils.patchable_model import PatchableModel

Selection = Literal["best", "greedy"]
"""How a circuit of a size is made of scores: its best edges, or grown from the output."""


@checked
def connected_circuit(
    model: PatchableModel, circuit: CircuitMasks
) -> dict[str, Bool[Tensor, "*_seq_head _src"]]:
    """The masks of `Circuit.connected`: its edges on a path from an input to the output.

    `utils.dead_ends` says what a path is.

    Raises GraphError for a circuit of another graph, and for a graph whose nodes do not say
    enough about their components (`Node.component`).
    Source: the pruning of MIB (Mueller et al. 2025, arXiv 2504.13151).
    """
    return dict(as_circuit(model, circuit).connected())


@checked
def weighted_edge_count(model: PatchableModel, circuit: CircuitMasks) -> float:
    """The size of a circuit: its edges, each with the kept share of its source.

    The sum over edges (u, v) of |N_u in the circuit| / |N_u|, where N_u are the neurons
    of the source u. Our sources (the embeddings, a head, an MLP) are kept whole or not at
    all, so the share is 1 for an edge of `connected_circuit` and 0 for a dead end, and the
    number is that of the connected edges: from 0 to `model.n_edges`. (In graphs with
    positions, counted at each.)

    Raises GraphError for a circuit of another graph. Source: MIB (arXiv 2504.13151).
    """
    return float(as_circuit(model, circuit).connected().n_edges)


# --------------------------------------------------------------- grown from the output


@checked
def selection_ranks(
    model: PatchableModel,
    prune_scores: PruneScores,
    selection: Selection = "best",
    ranking: Ranking = "signed",
) -> PruneScores:
    """Scores that are all different, by which circuits of a selection are taken.

    Those of `edge_ranks` ("best") or of `greedy_ranks`. Raises ConfigError for an unknown
    selection or ranking, GraphError for scores of another graph or NaN.
    """
    prune_scores = model.check_scores(prune_scores)
    if selection == "greedy":
        return greedy_ranks(model, prune_scores, ranking)
    return edge_ranks(prune_scores, ranking)


@checked
def greedy_ranks(
    model: PatchableModel, prune_scores: PruneScores, ranking: Ranking = "absolute"
) -> PruneScores:
    """Scores that are all different, in the order in which a circuit grows from the output.

    The next edge is always the best-scored one into a node that is in the circuit already:
    at first the output, then also the component of each source that came in with an edge.
    `circuit_mask(greedy_ranks(model, scores), n)` is the circuit of exactly n edges. All
    its edges lead to the output; `connected_circuit` takes out what the inputs do not
    reach. The first edge has the score n_edges, the last one 1. Edges that lead nowhere
    (at positions that the output does not keep) come last, the best of them first.

    ranking: "absolute" (the largest |score| is the best) or "signed". Of equal scores the
    first in the order of the graph's modules is the best.

    Raises ConfigError for an unknown ranking, GraphError for scores of another graph or
    NaN. Source: `apply_greedy` of EAP-IG (Hanna et al. 2024, arXiv 2403.17806), which the
    AUROC of MIB (arXiv 2504.13151) uses; without prune, which is `connected_circuit`.
    """
    model.check_no_crossings("A circuit that grows from the output")
    prune_scores = model.check_scores(prune_scores)
    prune_scores = {name: prune_scores[name] for name in model.patch_masks}
    order = best_first(prune_scores, ranking)
    n_edges = len(order)
    places = t.empty_like(order)
    places[order] = t.arange(n_edges, device=order.device)
    # {module: each edge's place in the order}, the best at 0: no two are equal.
    split = places.cpu().split([scores.numel() for scores in prune_scores.values()])
    by_module = {
        name: of_module.view(prune_scores[name].shape)
        for name, of_module in zip(prune_scores, split, strict=True)
    }
    grown = list(_grow(model, by_module))
    rest = sorted(set(range(n_edges)) - set(grown))
    return ranks_in_order(prune_scores, order[t.tensor(grown + rest).to(order.device)])


def _grow(model: PatchableModel, places: Mapping[str, Tensor]) -> Iterator[int]:
    """The places of the edges, in the order in which the circuit takes them in."""
    links = fed_links(model)
    feeders: dict[int, list[tuple[DestNode, PositionsRead]]] = {}
    for dest, of_dest in links.items():
        for link in of_dest:
            feeders.setdefault(link.src.src_idx, []).append((dest, link.positions))
    n_positions = model.seq_len or 1
    rows = {dest: edge_rows(model, places, dest).tolist() for dest in model.dests}
    candidates: list[tuple[int, int, int]] = []
    in_circuit: set[tuple[object, int]] = set()

    def let_in(dest: DestNode, position: int) -> None:
        if (dest, position) not in in_circuit:
            in_circuit.add((dest, position))
            for src_idx, place in enumerate(rows[dest][position], dest.min_src_idx):
                heapq.heappush(candidates, (place, src_idx, position))

    outputs = output_positions(model).nonzero().flatten().tolist()
    for dest in (dest for dest, of_dest in links.items() if not of_dest):
        for position in outputs:
            let_in(dest, position)
    while candidates:
        place, src_idx, position = heapq.heappop(candidates)
        yield place
        if (src_idx, position) in in_circuit:
            continue
        in_circuit.add((src_idx, position))
        for dest, positions in feeders.get(src_idx, []):
            first = position if positions == "own" else 0
            stop = n_positions if positions == "all" else position + 1
            for at in range(first, stop):
                let_in(dest, at)
