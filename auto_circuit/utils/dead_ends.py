"""Dead ends of a circuit: edges that are on no path from the inputs to the output.

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
  (all positions, if the model's attention is bidirectional); in a graph with crossing edges,
  the positions that those of the circuit lead to. An edge into the output
  counts only at a position that the model's `out_slice` keeps.

A source that no destination feeds (the embeddings) is an input; a destination that
feeds no source (the final residual stream) is the output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch as t
from jaxtyping import Bool, Shaped
from torch import Tensor

from auto_circuit.types import DestNode, PositionsRead, SrcNode
from auto_circuit.utils.component_links import Link, Links, fed_links
from auto_circuit.utils.patchable_model import PatchableModel

_Crossed = Mapping[tuple[DestNode, SrcNode], Bool[Tensor, "to come_from"]]
"""For a head's key or value input, and what the head writes: which positions are connected."""


def without_dead_ends(
    model: PatchableModel, circuit: Mapping[str, Bool[Tensor, "*mask"]]
) -> dict[str, Bool[Tensor, "*mask"]]:
    """The masks of a circuit's edges that lie on a path from an input to the output.

    Raises GraphError for a graph whose nodes do not say enough about their components
    (`Node.component`).
    """
    links = fed_links(model)
    crossed = _crossed(model, circuit, links)
    reached = _reached_srcs(model, circuit, links, crossed)
    needed = _needed_dests(model, circuit, links, crossed)
    connected = {name: edges.clone() for name, edges in circuit.items()}
    for dest in model.dests:
        rows = edge_rows(model, connected, dest)
        rows &= reached[:, _in_srcs(model, dest)] & needed[dest][:, None]
    _cut_crossings(model, connected, links)
    return connected


def _reached_srcs(
    model: PatchableModel,
    circuit: Mapping[str, Tensor],
    links: Links,
    crossed: _Crossed,
) -> Bool[Tensor, "seq src"]:
    """Which sources the inputs reach."""
    device = next(iter(circuit.values())).device
    reached = t.ones(model.seq_len or 1, len(model.srcs), dtype=t.bool, device=device)
    for link in (link for of_dest in links.values() for link in of_dest):
        reached[:, link.src.src_idx] = False
    # In the order of the graph, so that what a destination reads is known.
    for dest in sorted(model.dests):
        edges = edge_rows(model, circuit, dest)
        lives = (edges & reached[:, _in_srcs(model, dest)]).any(-1)
        for link in links[dest]:
            across = crossed.get((dest, link.src))
            reached[:, link.src.src_idx] |= (
                _reaching(lives, link.positions)
                if across is None
                else (across & lives).any(1)
            )
    return reached


def _needed_dests(
    model: PatchableModel,
    circuit: Mapping[str, Tensor],
    links: Links,
    crossed: _Crossed,
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
                src_lives = needed_srcs[:, link.src.src_idx]
                across = crossed.get((dest, link.src))
                if across is not None:
                    lives |= (across & src_lives[:, None]).any(0)
                    continue
                # Backwards in time: who reaches is whom the flipped positions reach.
                lives |= _reaching(src_lives.flip(0), link.positions).flip(0)
        else:
            lives = output_positions(model).to(device)
        needed[dest] = lives
        edges = edge_rows(model, circuit, dest)
        needed_srcs[:, _in_srcs(model, dest)] |= edges & lives[:, None]
    return needed


def edge_rows(
    model: PatchableModel,
    circuit: Mapping[str, Shaped[Tensor, "*_ _"]],
    dest: DestNode,
) -> Shaped[Tensor, "seq src"]:
    """A view of the edges into a destination."""
    edges = circuit[dest.module_name]
    edges = edges if model.seq_len is not None else edges.unsqueeze(0)
    return edges if dest.head_idx is None else edges[:, dest.head_idx]


def _in_srcs(model: PatchableModel, dest: DestNode) -> slice:
    in_srcs = model.wrapper(dest.module_name).in_srcs
    assert in_srcs is not None
    return in_srcs


# ------------------------------------------------------------------------------ crossings


def _crossed(
    model: PatchableModel, circuit: Mapping[str, Tensor], links: Links
) -> _Crossed:
    """Where the circuit's crossing edges connect positions, input by input."""
    found: dict[tuple[DestNode, SrcNode], Tensor] = {}
    for end in model.crossings:
        pairs = _pair_matrix(circuit, end)
        for dest, link in _links_of(end, links):
            key = (dest, link.src)
            found[key] = found[key] | pairs if key in found else pairs
    return found


def _links_of(end: DestNode, links: Links) -> list[tuple[DestNode, Link]]:
    """The inputs that the end of crossing edges reads from, and what its head writes."""
    assert end.crossing is not None
    read = end.crossing.srcs[0]
    return [
        (dest, link)
        for dest, of_dest in links.items()
        if (dest.component, dest.head_input) == (end.component, end.head_input)
        and (dest.reaches_all_heads or dest.head_idx == read.head_idx)
        for link in of_dest
        if link.src.heads is None or end.head_idx in link.src.heads
    ]


def _pair_matrix(
    circuit: Mapping[str, Tensor], end: DestNode
) -> Bool[Tensor, "to come_from"]:
    assert end.crossing is not None
    of_head = circuit[end.module_name][end.head_idx]
    n_positions = end.crossing.n_positions
    matrix = of_head.new_zeros(n_positions, n_positions)
    to, come_from = t.tensor(end.crossing.pairs(), device=of_head.device).T
    matrix[to, come_from] = of_head
    return matrix


def _cut_crossings(
    model: PatchableModel,
    connected: Mapping[str, Tensor],
    links: Links,
) -> None:
    """Take out the crossing edges that connect nothing.

    Of the edges from sources those are left that connect something: a crossing edge does if
    one of them leads to where it comes from, and one away from where it leads to.
    """
    for end in model.crossings:
        assert end.crossing is not None
        of_end = _links_of(end, links)
        rows = [edge_rows(model, connected, dest).any(-1) for dest, _ in of_end]
        lives = t.stack(rows).any(0)
        wanted = t.stack([_is_read(model, connected, link.src) for _, link in of_end])
        to, come_from = t.tensor(end.crossing.pairs(), device=lives.device).T
        of_head = connected[end.module_name][end.head_idx]
        of_head &= wanted.any(0)[to] & lives[come_from]


def _is_read(
    model: PatchableModel, connected: Mapping[str, Tensor], src: SrcNode
) -> Bool[Tensor, "seq"]:
    """Where an edge leads away from a source."""
    edges = [
        edge_rows(model, connected, dest)[:, src.src_idx - srcs.start]
        for dest, srcs in ((dest, _in_srcs(model, dest)) for dest in model.dests)
        if srcs.start <= src.src_idx < srcs.stop
    ]
    return t.stack(edges).any(0)


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


def output_positions(model: PatchableModel) -> Bool[Tensor, "seq"]:
    """Which positions the output keeps; one, True, if positions are not told apart."""
    if model.seq_len is None:
        return t.ones(1, dtype=t.bool)
    kept = t.zeros(1, model.seq_len, dtype=t.bool)
    kept[model.out_slice] = True
    return kept[0]
