"""Circuits without dead ends: only edges on a path from the inputs to the output.

An algorithm ranks edges one by one, so the best of them may hang in the air: an edge
from a head that reads nothing of the circuit, or into a head that nothing reads. Such
an edge is a *dead end*. With resampled activations it carries what would be patched in
anyway, or nobody listens, so that the circuit's output is the same without it. With other
ablations a dead end may act: a component that reads nothing of the circuit writes what it
makes of ablated inputs, which is not what the ablation puts in its place.

How activations get from a destination to a source:

- In the factorized graph a destination feeds the sources of its own component, head for
  head (`A0.1.Q` feeds `A0.1`; `MLP 0` all latents and the error of an autoencoder there).
  With grouped-query attention a key-value head feeds the query heads of its group; where
  heads are not told apart on one side (`A0`), all are connected. Nodes say themselves what
  they belong to (`Node.component`), see `utils.component_links`.
- In the unfactorized graph the residual stream feeds all sources of the next layer.
- A head lives if *any* of its inputs (query, key, value) does.
- With edges at each position, everything stays at its position, except for what
  attention reads as keys and values: that reaches the same and all later positions
  (all positions, if the model's attention is bidirectional). An edge into the output
  counts only at a position that the model's `out_slice` keeps.

A source that no destination feeds (the embeddings) is an input; a destination that
feeds no source (the final residual stream) is the output.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import Literal

import torch as t
from jaxtyping import Bool, Shaped
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.circuits import Circuit, CircuitMasks, as_circuit
from auto_circuit.metrics.edge_ranks import (
    Ranking,
    best_first,
    edge_ranks,
    ranks_in_order,
)
from auto_circuit.types import DestNode, PositionsRead, PruneScores
from auto_circuit.utils.component_links import Links, fed_links
from auto_circuit.utils.patchable_model import PatchableModel

Selection = Literal["best", "greedy"]
"""How a circuit of a size is made of scores: its best edges, or grown from the output."""


@checked
def connected_circuit(model: PatchableModel, circuit: CircuitMasks) -> Circuit:
    """The edges of a circuit that lie on a path from an input to the output.

    circuit: destination module -> boolean tensor `[seq?, head?, src]` like its mask,
        True for the circuit's edges. Returned in the same form, on the same device. The
        module says what a path is.

    Raises GraphError for a circuit of another graph, and for a graph whose nodes do not say
    enough about their components (`Node.component`).
    Source: the pruning of MIB (Mueller et al. 2025, arXiv 2504.13151).
    """
    circuit = as_circuit(model, circuit)
    links = fed_links(model)
    reached = _reached_srcs(model, circuit, links)
    needed = _needed_dests(model, circuit, links)
    connected = {name: edges.clone() for name, edges in circuit.items()}
    for dest in model.dests:
        rows = _rows(model, connected, dest)
        rows &= reached[:, _in_srcs(model, dest)] & needed[dest][:, None]
    return Circuit(model, connected)


@checked
def weighted_edge_count(model: PatchableModel, circuit: CircuitMasks) -> float:
    """The size of a circuit: its edges, each with the kept share of its source.

    The sum over edges (u, v) of |N_u in the circuit| / |N_u|, where N_u are the neurons
    of the source u. Our sources (the embeddings, a head, an MLP; in Gemma 2 the whole
    attention of a layer) are kept whole or not at all, so the share is 1 for an edge of
    `connected_circuit` and 0 for a dead end, and the number is that of the connected
    edges: from 0 to `model.n_edges`. (In graphs with positions, counted at each.)

    Raises GraphError for a circuit of another graph. Source: MIB (arXiv 2504.13151).
    """
    return float(connected_circuit(model, circuit).n_edges)


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
    rows = {dest: _rows(model, places, dest).tolist() for dest in model.dests}
    candidates: list[tuple[int, int, int]] = []
    in_circuit: set[tuple[object, int]] = set()

    def let_in(dest: DestNode, position: int) -> None:
        if (dest, position) not in in_circuit:
            in_circuit.add((dest, position))
            for src_idx, place in enumerate(rows[dest][position], dest.min_src_idx):
                heapq.heappush(candidates, (place, src_idx, position))

    outputs = _output_positions(model).nonzero().flatten().tolist()
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


# ----------------------------------------------------------------- reached and needed


def _reached_srcs(
    model: PatchableModel,
    circuit: Mapping[str, Tensor],
    links: Links,
) -> Bool[Tensor, "seq src"]:
    """Which sources the inputs reach."""
    device = next(iter(circuit.values())).device
    reached = t.ones(model.seq_len or 1, len(model.srcs), dtype=t.bool, device=device)
    for link in (link for of_dest in links.values() for link in of_dest):
        reached[:, link.src.src_idx] = False
    # In the order of the graph, so that what a destination reads is known.
    for dest in sorted(model.dests):
        edges = _rows(model, circuit, dest)
        lives = (edges & reached[:, _in_srcs(model, dest)]).any(-1)
        for link in links[dest]:
            reached[:, link.src.src_idx] |= _reaching(lives, link.positions)
    return reached


def _needed_dests(
    model: PatchableModel,
    circuit: Mapping[str, Tensor],
    links: Links,
) -> dict[DestNode, Bool[Tensor, "seq"]]:
    """Which destinations reach the output."""
    device = next(iter(circuit.values())).device
    needed_srcs = t.zeros(
        model.seq_len or 1, len(model.srcs), dtype=t.bool, device=device
    )
    needed: dict[DestNode, Tensor] = {}
    for dest in sorted(model.dests, reverse=True):
        if links[dest]:
            lives = t.zeros_like(needed_srcs[:, 0])
            for link in links[dest]:
                # Backwards in time: who reaches is whom the flipped positions reach.
                src_lives = needed_srcs[:, link.src.src_idx].flip(0)
                lives |= _reaching(src_lives, link.positions).flip(0)
        else:
            lives = _output_positions(model).to(device)
        needed[dest] = lives
        edges = _rows(model, circuit, dest)
        needed_srcs[:, _in_srcs(model, dest)] |= edges & lives[:, None]
    return needed


def _rows(
    model: PatchableModel, circuit: Mapping[str, Tensor], dest: DestNode
) -> Shaped[Tensor, "seq src"]:
    """A view of the edges into a destination."""
    edges = circuit[dest.module_name]
    edges = edges if model.seq_len is not None else edges.unsqueeze(0)
    return edges if dest.head_idx is None else edges[:, dest.head_idx]


def _in_srcs(model: PatchableModel, dest: DestNode) -> slice:
    in_srcs = model.wrapper(dest.module_name).in_srcs
    assert in_srcs is not None
    return in_srcs


# ------------------------------------------------------------------------------ positions


def _reaching(
    lives: Bool[Tensor, "seq"], positions: PositionsRead
) -> Bool[Tensor, "seq"]:
    """The positions that depend on one that lives."""
    if positions == "own":
        return lives
    if positions == "all":
        return lives.any().expand_as(lives)
    return lives.cumsum(0) > 0


def _output_positions(model: PatchableModel) -> Bool[Tensor, "seq"]:
    if model.seq_len is None:
        return t.ones(1, dtype=t.bool)
    kept = t.zeros(1, model.seq_len, dtype=t.bool)
    kept[model.out_slice] = True
    return kept[0]
