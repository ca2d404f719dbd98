"""Greater-than in GPT-2 small: "The war lasted from the year 1732 to the year 17".

Source: Hanna et al. 2023, "How does GPT-2 compute greater-than?" (arXiv 2305.00586), with
the connections of the ACDC paper (Conmy et al. 2023, arXiv 2304.14997).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from auto_circuit.checks import checked
from auto_circuit.metrics.official_circuits.circuits.circuit_tables import (
    GPT2_SMALL,
    NO_WORDS,
    circuit_graph,
    head_inputs,
    mlps,
    pairs,
)
from auto_circuit.types import Edge
from auto_circuit.utils.patchable_model import PatchableModel

YEAR_HEADS = ("A0.3", "A0.5")
FIRST_HEADS = ("A0.1",)
EARLY_MLPS = tuple(mlps(0, 4))
MIDDLE_HEADS = ("A5.5", "A6.1", "A6.9", "A7.10", "A8.11", "A9.1")
LATE_MLPS = tuple(mlps(8, 12))

CONNECTIONS: tuple[tuple[Sequence[str], Sequence[str]], ...] = (
    (("Resid Start",), head_inputs(YEAR_HEADS + FIRST_HEADS)),
    (("Resid Start",), EARLY_MLPS),
    (FIRST_HEADS, EARLY_MLPS),
    (YEAR_HEADS + FIRST_HEADS + EARLY_MLPS, head_inputs(MIDDLE_HEADS)),
    (MIDDLE_HEADS, LATE_MLPS),
    (MIDDLE_HEADS + LATE_MLPS, ("Resid End",)),
    (mlps(0, 12), head_inputs(MIDDLE_HEADS, "Q")),
)
"""(sources, destinations): all edges from the one to the other that the model has."""

MLP_CHAINS: tuple[Sequence[str], ...] = (mlps(0, 9), LATE_MLPS)
"""MLPs with all the edges between them."""


@checked
def greaterthan_true_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The edges of the circuit, 235 of them; at every position if there are positions.

    The circuit has no known positions: `token_positions` changes nothing.
    Raises ConfigError if the model's graph is not GPT-2 small's, factorized and with
    separate queries, keys and values.
    """
    graph = circuit_graph(
        *(model, GPT2_SMALL, token_positions, word_idxs, seq_start_idx),
        separate_qkv=True,
    )
    edges = {
        edge for srcs, dests in CONNECTIONS for edge in graph.product(srcs, dests, None)
    }
    return edges.union(*(graph.edges(pairs(chain), None) for chain in MLP_CHAINS))
