"""What a circuit is, and what can be done with one.

A circuit is a set of edges of one graph. Where an algorithm gives every edge a score, the
circuit of a size has the edges with the largest |score|:

    circuit = circuit_of_scores(model, scores, 100)
    circuit.n_edges, circuit.names[:3], circuit.jaccard(another)

Everything that takes a circuit also takes a dictionary like `Circuit.masks`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType

import torch as t
from jaxtyping import Float, Shaped
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, GraphError, near_matches
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import Edge, PerEdge, PruneScores
from auto_circuit.utils.dead_ends import without_dead_ends
from auto_circuit.utils.patchable_model import PatchableModel

CircuitMasks = Mapping[str, PerEdge]
"""Destination module -> `[seq?, head?, src]`: True for the edges of the circuit."""
_Place = int | EllipsisType
"""A position; `...`: all, or that of a graph which tells none apart."""


@checked
@dataclass(frozen=True, eq=False)
class Circuit(Mapping[str, PerEdge]):
    """A set of edges of one graph; also the mapping of its masks.

    model: the graph. masks: destination module -> boolean tensor `[seq?, head?, src]` like
        the mask of that module: True for the edges of the circuit.

    Raises GraphError for masks of another graph.
    """

    model: PatchableModel
    masks: CircuitMasks

    def __post_init__(self) -> None:
        check_circuit(self.model, self.masks)

    # ------------------------------------------------------- what is in it

    @property
    def n_edges(self) -> int:
        """How many edges are in it, counted at each position if these are told apart."""
        return n_circuit_edges(self.masks)

    @property
    def edges(self) -> list[Edge]:
        """Its edges, in the order of the graph."""
        places = self.model.in_edge_order(self.masks).nonzero()[:, 0].tolist()
        return [self.model.edge_table.edge(place) for place in places]

    @property
    def names(self) -> list[str]:
        """The names of its edges, with positions if these are told apart."""
        return [repr(edge) for edge in self.edges]

    @property
    def scores(self) -> PruneScores:
        """1 for its edges and 0 for all others."""
        return {name: mask.float() for name, mask in self.masks.items()}

    # ------------------------------------------------------ other circuits

    def complement(self) -> Circuit:
        """All edges that are not in it."""
        return Circuit(self.model, {name: ~mask for name, mask in self.masks.items()})

    def union(self, other: CircuitMasks) -> Circuit:
        """The edges that are in one of the two."""
        other = as_circuit(self.model, other)
        return self._with({name: mask | other[name] for name, mask in self.masks.items()})

    def intersection(self, other: CircuitMasks) -> Circuit:
        """The edges that are in both."""
        other = as_circuit(self.model, other)
        return self._with({name: mask & other[name] for name, mask in self.masks.items()})

    def without(self, other: CircuitMasks) -> Circuit:
        """Its edges that are not in another."""
        return self.intersection(as_circuit(self.model, other).complement())

    def without_edges(self, edges: Collection[Edge | str]) -> Circuit:
        """Its edges that are not among these Edges or names."""
        masks = dict(self.masks)
        for edge in (edge for given in edges for edge in self.model.find_edges(given)):
            name = edge.dest.module_name
            # Destinations that keep all edges share their masks with this circuit.
            if masks[name] is self.masks[name]:
                masks[name] = masks[name].clone()
            edge.set_prune_score(masks, 0)
        return self._with(masks)

    def connected(self) -> Circuit:
        """Its edges on a path from an input to the output (see `utils.dead_ends`).

        Raises GraphError for a graph whose nodes do not say enough about their components.
        Source: the pruning of MIB (Mueller et al. 2025, arXiv 2504.13151).
        """
        return self._with(without_dead_ends(self.model, self.masks))

    def sample(self, n_edges: int, generator: t.Generator) -> Circuit:
        """`n_edges` of its edges, each set of them equally likely.

        generator: on the CPU, so that the sample is the same on every device. Raises
        ConfigError for more edges than it has.
        """
        flat = t.cat([mask.flatten().cpu() for mask in self.masks.values()])
        choices = flat.nonzero()[:, 0]
        if not 0 <= n_edges <= len(choices):
            raise ConfigError(
                f"{n_edges} edges were asked for at random, out of {len(choices)}."
            )
        sampled = t.zeros_like(flat)
        sampled[choices[t.randperm(len(choices), generator=generator)[:n_edges]]] = True
        parts = sampled.split([mask.numel() for mask in self.masks.values()])
        return self._with(
            {
                name: part.view(mask.shape).to(mask.device)
                for (name, mask), part in zip(self.masks.items(), parts, strict=True)
            }
        )

    def in_graph(self, other: PatchableModel) -> Circuit:
        """The same circuit in another graph of the same model.

        If one of them is a graph of nodes, an edge is in the circuit if its source is a
        source of the circuit; the residual stream between components, which only such a
        graph has as an edge, is always in it. If only one of them has positions, an edge
        is in the circuit at every position, or if it is in it at any.
        """
        if other is self.model:
            return self
        by_node = not (self.model.is_factorized and other.is_factorized)
        by_position = self.model.seq_len is not None and other.seq_len is not None

        components = {src.name for src in self.model.srcs}
        kept: set[tuple[str, _Place]] = {
            (src.name, ...) for src in other.srcs if src.name not in components
        }
        names: set[tuple[str, _Place]] = set()
        for edge in self.edges:
            place = edge.seq_idx if by_position and edge.seq_idx is not None else ...
            if by_node:
                kept.add((edge.src.name, place))
            else:
                names.add((edge.name, place))
        masks = all_edges(other).complement().masks
        for name, place in kept:
            _keep_all_from(other, masks, name, place)
        for name, place in names:
            _keep_named(other, masks, name, place)
        return Circuit(other, masks)

    def _with(self, masks: CircuitMasks) -> Circuit:
        return Circuit(self.model, masks)

    # ---------------------------------------------------------- comparison

    def jaccard(self, other: CircuitMasks) -> float:
        """See `circuit_jaccard`."""
        return circuit_jaccard(self, as_circuit(self.model, other))

    def __eq__(self, other: object) -> bool:
        """Have both the same edges of the same graph?"""
        return (
            isinstance(other, Circuit)
            and self.model is other.model
            and all(t.equal(mask, other.masks[name]) for name, mask in self.items())
        )

    # ---------------------------------------------------------- as a mapping

    def __getitem__(self, module_name: str) -> Shaped[Tensor, "*seq_head src"]:
        return self.masks[module_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        return f"Circuit({self.n_edges} of {self.model.n_edges} edges)"


# ------------------------------------------------------------------ where circuits come from


@checked
def circuit_of_scores(
    model: PatchableModel,
    prune_scores: PruneScores,
    n_edges: int,
    desc_scores: Float[Tensor, "edges"] | None = None,
) -> Circuit:
    """The edges with the largest |score|, and all that tie with the last of them.

    So the circuit may have more than `n_edges` edges; of 0 edges, it has none, whatever the
    scores are. desc_scores: `desc_prune_scores(prune_scores)`, to sort once for many sizes.

    Raises GraphError for scores of another graph or NaN, and for more edges than there are.
    """
    prune_scores = model.check_scores(prune_scores)
    return Circuit(model, circuit_mask(prune_scores, n_edges, desc_scores)[0])


@checked
def circuit_of_edges(model: PatchableModel, edges: Collection[Edge | str]) -> Circuit:
    """The circuit of some edges, given as Edges or names.

    Raises GraphError, with near matches, for an edge that the graph does not have.
    """
    return Circuit(model, model.circuit_prune_scores(edges, bool=True))


@checked
def all_edges(model: PatchableModel) -> Circuit:
    """The circuit that is the whole graph."""
    zeros = model.new_prune_scores()
    return Circuit(model, {name: score == 0 for name, score in zeros.items()})


def _keep_all_from(
    model: PatchableModel, masks: CircuitMasks, src_name: str, place: _Place
) -> None:
    """Put all edges of a source into a circuit's masks, if the graph has the source."""
    src = model.edge_table.srcs_by_name.get(src_name)
    if src is None or not _is_there(model, place):
        return
    for wrapper in model.dest_wrappers:
        srcs = wrapper.in_srcs
        if srcs is not None and srcs.start <= src.src_idx < srcs.stop:
            # At one position [head? src], at all [seq? head? src]: for all heads.
            masks[wrapper.module_name][place][..., src.src_idx - srcs.start] = True


def _keep_named(
    model: PatchableModel, masks: CircuitMasks, name: str, place: _Place
) -> None:
    """Put the edge of a name into a circuit's masks, if the graph has it."""
    table = model.edge_table
    if place is not ...:
        at_place = table.named(name, place)
        if at_place is not None:
            at_place.set_prune_score(dict(masks), True)
        return
    edge = table.named(name, table.positions[0])
    if edge is not None and _is_there(model, place):
        at_no_position = Edge(edge.src, edge.dest).patch_idx
        masks[edge.dest.module_name][(place, *at_no_position)] = True


def _is_there(model: PatchableModel, place: _Place) -> bool:
    return place is ... or model.edge_table.has_position(place)


@checked
def as_circuit(model: PatchableModel, circuit: CircuitMasks) -> Circuit:
    """The circuit of a graph that is given as one, or as its masks.

    Raises GraphError for a circuit of another graph.
    """
    if isinstance(circuit, Circuit) and circuit.model is model:
        return circuit
    return Circuit(model, dict(circuit))


# --------------------------------------------------------------------- masks without a graph


@checked
def check_circuit(model: PatchableModel, circuit: CircuitMasks) -> None:
    """Raise GraphError unless the circuit is a boolean tensor for every mask."""
    # Without the dimension of single examples that masks have in `set_mask_batch_size`.
    expected = {
        wrapper.module_name: tuple(
            wrapper.mask.shape[wrapper.mask_batch_size is not None :]
        )
        for wrapper in model.dest_wrappers
    }
    for name in (*circuit, *expected):
        if name not in expected:
            raise GraphError(
                f"The circuit names {name!r}, which is no destination of this graph."
                + near_matches(name, expected)
            )
        if name not in circuit:
            raise GraphError(
                f"The circuit lacks the destination {name!r}. Start from "
                "`circuit_of_edges(model, edges)`."
            )
        mask = circuit[name]
        if mask.dtype != t.bool or tuple(mask.shape) != expected[name]:
            raise GraphError(
                f"The circuit at {name!r} is {mask.dtype} of shape "
                f"{tuple(mask.shape)}; expected torch.bool of shape {expected[name]}. "
                "`circuit_of_scores(model, prune_scores, n_edges)` makes circuits of scores."
            )


@checked
def n_circuit_edges(circuit: CircuitMasks) -> int:
    """The number of edges in a circuit."""
    return sum(int(mask.sum()) for mask in circuit.values())


@checked
def circuit_jaccard(circuit: CircuitMasks, other: CircuitMasks) -> float:
    """The edges in both circuits, over those in either: from 0 to 1.

    1 for two circuits without edges. Raises GraphError for circuits of different graphs.
    """
    shapes = [
        {name: tuple(mask.shape) for name, mask in c.items()} for c in (circuit, other)
    ]
    if shapes[0] != shapes[1]:
        raise GraphError(
            f"The circuits are of different graphs: {shapes[0]} and {shapes[1]}."
        )
    both = sum(int((mask & other[name]).sum()) for name, mask in circuit.items())
    either = sum(int((mask | other[name]).sum()) for name, mask in circuit.items())
    return both / either if either else 1.0
