"""Which sources a destination feeds: those of the component that it is an input of.

A head's query, key and value feed what that head writes; the input of an MLP feeds what the
MLP writes, or each latent and the error of its autoencoder. What nodes say about themselves
decides (`Node.component`, `Node.heads`), never their names; only where they say nothing, a
destination and a source of the same name belong together.

At positions, what is read at one reaches the sources at the same one, and of attention, unless
as a query, at the later ones (all, if attention is bidirectional).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

from auto_circuit.checks import check_choice
from auto_circuit.errors import GraphError
from auto_circuit.types import DestNode, HeadInput, Node, PositionsRead, SrcNode
from auto_circuit.utils.patchable_model import PatchableModel


class Link(NamedTuple):
    """A source that a destination feeds.

    positions: which positions of the destination the source at a position depends on.
    """

    src: SrcNode
    positions: PositionsRead


Links = dict[DestNode, tuple[Link, ...]]

SAY_IT = (
    "In the adapter's `graph_nodes`, give every node a `component=Component(kind, block, "
    "positions)` of `auto_circuit.types`, and nodes of heads their `heads`."
)


def component_srcs(model: PatchableModel) -> dict[DestNode, tuple[SrcNode, ...]]:
    """The sources of every destination's component, and of its heads, by their indices."""
    of_component: dict[Hashable, list[SrcNode]] = defaultdict(list)
    for src in model.srcs:
        of_component[_component(src)].append(src)
    return {
        dest: tuple(src for src in of_component[_component(dest)] if _share(src, dest))
        for dest in model.dests
    }


def component_links(model: PatchableModel) -> Links:
    """`component_srcs`, and how positions mix on the way.

    Raises GraphError where nodes say nothing and their names do not help, and for what
    cannot be: a component that writes before it reads, or is known on one side only.
    """
    found = component_srcs(model)
    if model.is_factorized:
        _check(model, found)
    return _links(model, found)


def fed_links(model: PatchableModel) -> Links:
    """What every destination feeds: `component_links`, or without a factorized graph all
    sources of the next layer, which read the residual stream that the destination is.

    Raises GraphError as `component_links` does.
    """
    if model.is_factorized:
        return component_links(model)
    by_layer: dict[int, list[SrcNode]] = defaultdict(list)
    for src in model.srcs:
        by_layer[src.layer].append(src)
    fed = {dest: tuple(by_layer[dest.layer + 1]) for dest in model.dests}
    return _links(model, fed)


def _links(model: PatchableModel, fed: Mapping[DestNode, tuple[SrcNode, ...]]) -> Links:
    positions = _positions if model.seq_len is not None else lambda src, dest: "own"
    return {
        dest: tuple(Link(src, positions(src, dest)) for src in of_dest)
        for dest, of_dest in fed.items()
    }


def _component(node: Node) -> Hashable:
    return node.name if node.component is None else node.component


def _share(src: SrcNode, dest: DestNode) -> bool:
    """Do they belong to the same head?"""
    if src.heads is None or dest.heads is None or dest.reaches_all_heads:
        return True
    return not set(src.heads).isdisjoint(dest.heads)


def _positions(src: SrcNode, dest: DestNode) -> PositionsRead:
    if dest.head_input == "query":
        return "own"
    positions = None if src.component is None else src.component.positions
    if positions is None:
        raise GraphError(
            f"The graph tells positions apart, and does not say whether {src.name!r} depends "
            f"on what is read at its own position only, or also at others. {SAY_IT} "
            '`positions` is "own" of an MLP, "earlier" of causal attention.'
        )
    return positions


# ------------------------------------------------------------------------------- checks


def check_words(nodes: Iterable[Node]) -> None:
    """Raise ConfigError for words of an adapter's nodes that mean nothing."""
    for node in nodes:
        if node.component is not None:
            check_choice(
                f"{node.name}.component.positions",
                node.component.positions,
                PositionsRead | None,
            )
        if isinstance(node, DestNode):
            check_choice(f"{node.name}.head_input", node.head_input, HeadInput | None)


def _check(model: PatchableModel, fed: Mapping[DestNode, tuple[SrcNode, ...]]) -> None:
    """Raise GraphError for nodes in the middle of the graph that nothing belongs to."""
    is_fed = {src for of_dest in fed.values() for src in of_dest}
    first_dest = min(dest.layer for dest in fed)
    last_src = max(src.layer for src in model.srcs)
    for src in model.srcs:
        if src not in is_fed and src.kind != "embed" and src.layer >= first_dest:
            raise _alone(src, "destination feeds it")
    for dest, of_dest in fed.items():
        if not of_dest and dest.kind != "unembed" and dest.layer <= last_src:
            raise _alone(dest, "source is fed by it")
        for src in of_dest:
            _check_pair(src, dest)


def _check_pair(src: SrcNode, dest: DestNode) -> None:
    pair = f"The destination {dest.name!r} and the source {src.name!r}"
    if src.layer < dest.layer:
        raise GraphError(
            f"{pair} have the same component, but the source is in layer {src.layer}, before "
            f"the destination in layer {dest.layer}. {SAY_IT} Those of two blocks are two "
            "components."
        )
    says_little = dest.component is not None and None in (src.heads, dest.heads)
    if says_little and None not in (src.head_idx, dest.head_idx):
        raise GraphError(
            f"{pair} have the same component and a `head_idx`, but not both say which "
            f"`heads` they belong to. {SAY_IT}"
        )


def _alone(node: Node, problem: str) -> GraphError:
    said = "says no component" if node.component is None else f"is of {node.component}"
    role = "source" if isinstance(node, SrcNode) else "destination"
    return GraphError(
        f"The {role} {node.name!r} is in the middle of the graph, but no {problem}: it "
        f"{said}. {SAY_IT} Of a node that really is an input or an output of the graph, the "
        'kind is "embed" or "unembed".'
    )
