"""Which sport an athlete plays, in Pythia 2.8B: "... Tiger Woods plays the sport of".

Source: Nanda et al. 2023, "Fact Finding: Attempting to reverse-engineer factual recall",
in the form that Miller et al. 2024 tested (arXiv 2407.08734).

Places: first_name_tok and final_name_tok (first and last token of the name), end (the last
token of the prompt).
"""

from __future__ import annotations

from collections.abc import Mapping

from auto_circuit.checks import checked
from auto_circuit.metrics.official_circuits.circuits.circuit_tables import (
    NO_WORDS,
    CircuitGraph,
    ModelShape,
    Span,
    circuit_graph,
    mlps,
)
from auto_circuit.types import Edge
from auto_circuit.utils.patchable_model import PatchableModel

PYTHIA_2_8B = ModelShape("Pythia 2.8B", n_layers=32, n_heads=32)
WORDS = ("first_name_tok", "final_name_tok", "end")

FIRST_NAMES = (Span("first_name_tok", "final_name_tok", last_included=False),)
FINAL_NAME = ("final_name_tok",)
END = ("end",)

EARLY_HEADS = tuple(f"A{layer}.{head}" for layer in (0, 1) for head in range(32))
"""They put the tokens of the name together."""
N_LOOKUP_MLPS = 16
"""The first 16 MLPs look up the sport at the name's last token."""
PROBE_HEAD = "A16.20"
"""It reads the sport out."""
EXTRACTING_HEADS = ("A21.9", "A22.17", "A22.15", "A17.30", "A19.24")
"""They bring it to the end."""


@checked
def sports_players_true_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The whole circuit: 2276 edges without positions.

    token_positions: only at the places of the circuit; `word_idxs` must have
        first_name_tok, final_name_tok and end. seq_start_idx: the length of the prefix
        that the graph leaves out.
    Raises ConfigError if the model's graph is not Pythia 2.8B's, factorized and with one
    input for a head's query, key and value.
    """
    graph = _graph(model, token_positions, word_idxs, seq_start_idx)
    lookup = _lookup_nodes(N_LOOKUP_MLPS)
    return set().union(
        _name_edges(graph),
        _edges_within(graph, lookup, FINAL_NAME),
        graph.product(lookup, [PROBE_HEAD], FINAL_NAME),
        graph.product([PROBE_HEAD], EXTRACTING_HEADS, FINAL_NAME),
        graph.product([PROBE_HEAD, *EXTRACTING_HEADS], ["Resid End"], END),
    )


@checked
def sports_players_probe_true_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The half of the circuit that looks the sport up, with all MLPs: 3600 edges.

    It is tested by a probe at the name's last token. Arguments, errors:
    `sports_players_true_edges`.
    """
    graph = _graph(model, token_positions, word_idxs, seq_start_idx)
    lookup = _lookup_nodes(PYTHIA_2_8B.n_layers)
    return _name_edges(graph) | _edges_within(graph, lookup, FINAL_NAME)


def _graph(
    model: PatchableModel,
    token_positions: bool,
    word_idxs: Mapping[str, int],
    seq_start_idx: int,
) -> CircuitGraph:
    return circuit_graph(
        *(model, PYTHIA_2_8B, token_positions, word_idxs, seq_start_idx),
        words=WORDS,
        separate_qkv=False,
    )


def _name_edges(graph: CircuitGraph) -> set[Edge]:
    """Those at the tokens of the name before its last one."""
    return _edges_within(graph, ["Resid Start", *EARLY_HEADS, *mlps(0, 1)], FIRST_NAMES)


def _lookup_nodes(n_mlps: int) -> list[str]:
    return ["Resid Start", *EARLY_HEADS, *mlps(0, n_mlps)]


def _edges_within(
    graph: CircuitGraph, nodes: list[str], places: tuple[str | Span, ...]
) -> set[Edge]:
    """All edges between nodes of which the first is the embeddings."""
    return graph.product(nodes, nodes[1:], places)
