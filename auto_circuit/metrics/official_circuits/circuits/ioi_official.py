"""Indirect object identification in GPT-2 small: "When Mary and John ..., John gave to".

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), in the form
that Miller et al. 2024 tested (arXiv 2407.08734): heads act on each other directly and
through the MLPs between them.

Places: IO (the indirect object), S1 and S2 (the subject, first and second), S1+1 (the token
after S1), end (the last token).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from auto_circuit.checks import checked
from auto_circuit.metrics.official_circuits.circuits.circuit_tables import (
    GPT2_SMALL,
    NO_WORDS,
    CircuitGraph,
    circuit_graph,
    head_inputs,
    mlps,
)
from auto_circuit.types import Edge
from auto_circuit.utils.patchable_model import PatchableModel

WORDS = ("IO", "S1", "S1+1", "S2", "end")
INPUT, OUTPUT = "Resid Start", "Resid End"

HEADS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "name mover": ((9, 9), (10, 0), (9, 6)),
    "backup name mover": (
        *((10, 10), (10, 6), (10, 2), (10, 1)),
        *((11, 2), (9, 7), (9, 0), (11, 9)),
    ),
    "negative name mover": ((10, 7), (11, 10)),
    "s2 inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
    "duplicate token": ((0, 1), (0, 10), (3, 0)),
    "previous token": ((2, 2), (4, 11)),
}
"""Group -> its heads, (layer, head)."""

MOVERS = ("name mover", "backup name mover", "negative name mover")

HEAD_PLACES: Mapping[str, str] = {
    **dict.fromkeys(MOVERS, "end"),
    "s2 inhibition": "end",
    "induction": "S2",
    "duplicate token": "S2",
    "previous token": "S1+1",
}
"""Group -> the place whose output its heads write for the task."""


@dataclass(frozen=True)
class Connection:
    """Groups of heads (or the input) that act on others (or the output).

    inputs: (input of the destination heads, place). The output has one input, "".
    """

    srcs: tuple[str, ...]
    dests: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...]


CONNECTIONS: tuple[Connection, ...] = (
    Connection((INPUT,), ("previous token",), (("Q", "S1+1"), ("K", "S1"), ("V", "S1"))),
    Connection((INPUT,), ("duplicate token",), (("Q", "S2"), ("K", "S1"), ("V", "S1"))),
    Connection((INPUT,), ("s2 inhibition",), (("Q", "end"),)),
    Connection((INPUT,), MOVERS, (("K", "IO"), ("V", "IO"))),
    Connection(("previous token",), ("induction",), (("K", "S1+1"), ("V", "S1+1"))),
    Connection(
        ("induction", "duplicate token"), ("s2 inhibition",), (("K", "S2"), ("V", "S2"))
    ),
    Connection(("s2 inhibition",), MOVERS, (("Q", "end"),)),
    Connection(MOVERS, (OUTPUT,), (("", "end"),)),
)


@checked
def ioi_true_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The edges between heads, and those through the MLPs between them.

    Between two groups of heads lie the MLPs from the first layer of the one up to the
    last layer of the other. 771 edges without positions.

    token_positions: only at the places of the paper; `word_idxs` must have IO, S1, S1+1,
        S2 and end. seq_start_idx: the length of the prefix that the graph leaves out.
    Raises ConfigError if the model's graph is not GPT-2 small's, factorized and with
    separate queries, keys and values.
    """
    graph = circuit_graph(
        *(model, GPT2_SMALL, token_positions, word_idxs, seq_start_idx),
        words=WORDS,
        separate_qkv=True,
    )
    return {edge for row in CONNECTIONS for edge in _connection_edges(graph, row)}


@checked
def ioi_true_edges_mlp_0_only(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The edges of `ioi_true_edges` without an MLP, or with the first one. 242 edges.

    The first MLP acts as a part of the embedding. Arguments, errors: `ioi_true_edges`.
    """
    edges = ioi_true_edges(model, token_positions, word_idxs, seq_start_idx)
    return {edge for edge in edges if _has_only_mlp_0(edge)}


@checked
def ioi_head_based_official_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """All edges but those from heads that are not in the circuit: the circuit of nodes.

    token_positions: a head's edges are kept only at the place whose output it writes.
    Factorized or not. Raises ConfigError if the graph is not GPT-2 small's.
    """
    graph = circuit_graph(
        *(model, GPT2_SMALL, token_positions, word_idxs, seq_start_idx),
        words=WORDS,
        factorized=None,
    )
    return graph.node_circuit(
        {head: (HEAD_PLACES[group],) for group in HEADS for head in _head_names(group)}
    )


def _connection_edges(graph: CircuitGraph, row: Connection) -> set[Edge]:
    mlps_between = mlps(*_layers_between(row))
    srcs = _names(row.srcs) + mlps_between
    edges: set[Edge] = set()
    for letter, place in row.inputs:
        dests = head_inputs(_names(row.dests), letter) if letter else list(row.dests)
        edges |= graph.product(srcs, dests, (place,))
    places = [place for _, place in row.inputs]
    return edges | graph.product(srcs, mlps_between, places)


def _layers_between(row: Connection) -> tuple[int, int]:
    """From the sources' first layer, up to but without the destinations' last."""
    first = min(_layers(row.srcs), default=0)
    return first, max(_layers(row.dests), default=GPT2_SMALL.n_layers)


def _layers(groups: tuple[str, ...]) -> list[int]:
    return [layer for group in groups for layer, _ in HEADS.get(group, ())]


def _names(groups: tuple[str, ...]) -> list[str]:
    return [name for group in groups for name in _head_names(group)]


def _head_names(group: str) -> list[str]:
    """The heads of a group; the input and the output are nodes themselves."""
    if group not in HEADS:
        return [group]
    return [f"A{layer}.{head}" for layer, head in HEADS[group]]


def _has_only_mlp_0(edge: Edge) -> bool:
    components = [edge.src.component, edge.dest.component]
    blocks = [part.block for part in components if part and part.kind == "mlp"]
    return not blocks or 0 in blocks
