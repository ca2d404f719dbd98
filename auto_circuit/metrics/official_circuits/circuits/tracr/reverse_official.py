"""A compiled transformer that reverses a sequence of five tokens.

Source: Lindner et al. 2023, "Tracr" (arXiv 2301.05062), and Conmy et al. 2023 (ACDC, arXiv
2304.14997). Positions are those of BOS and five tokens. The published circuit leaves out
the middle one, which stays where it is: where clean and corrupt prompt differ there, that
output is the corrupt one's.
"""

from __future__ import annotations

from collections.abc import Mapping

from auto_circuit.checks import checked
from auto_circuit.metrics.official_circuits.circuits.circuit_tables import (
    NO_WORDS,
    ModelShape,
    circuit_graph,
)
from auto_circuit.types import Edge
from auto_circuit.utils.patchable_model import PatchableModel

TRACR_REVERSE = ModelShape("tracr-reverse", n_layers=4, n_heads=1)
PROMPT_LEN = 6
POSITIONS = (1, 2, 4, 5)

RESAMPLE_EDGES = ("Resid Start->A3.0.V", "A3.0->Resid End")
ZERO_EDGES = (
    "A3.0->Resid End",
    "MLP 2->A3.0.Q",
    "Resid Start->A3.0.K",
    "Resid Start->A3.0.V",
    "MLP 1->MLP 2",
    "MLP 0->MLP 1",
    "Resid Start->MLP 1",
    "A0.0->MLP 0",
    "Resid Start->MLP 0",
    "Resid Start->A0.0.V",
)


@checked
def tracr_reverse_true_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The circuit that carries the tokens: 2 edges, or 8 with their positions.

    These are the edges that matter when activations of another sequence of the same
    length are patched in. Raises ConfigError if the graph is not tracr-reverse's, with
    separate queries, keys and values.
    """
    return _edges(RESAMPLE_EDGES, model, token_positions, word_idxs, seq_start_idx)


@checked
def tracr_reverse_acdc_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The circuit with what computes the positions: 10 edges, or 40 with positions.

    These are the edges that matter when zeros are patched in (the ACDC paper's). Errors:
    `tracr_reverse_true_edges`.
    """
    return _edges(ZERO_EDGES, model, token_positions, word_idxs, seq_start_idx)


def _edges(
    names: tuple[str, ...],
    model: PatchableModel,
    token_positions: bool,
    word_idxs: Mapping[str, int],
    seq_start_idx: int,
) -> set[Edge]:
    graph = circuit_graph(
        *(model, TRACR_REVERSE, token_positions, word_idxs, seq_start_idx),
        separate_qkv=True,
        prompt_len=PROMPT_LEN,
    )
    return graph.edges(names, POSITIONS)
