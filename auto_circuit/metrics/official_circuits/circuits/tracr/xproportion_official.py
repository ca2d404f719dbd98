"""A compiled transformer that outputs, at each token, the share of "x" so far.

Source: Lindner et al. 2023, "Tracr" (arXiv 2301.05062), and Conmy et al. 2023 (ACDC, arXiv
2304.14997). Positions are those of BOS and five tokens.
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

TRACR_XPROPORTION = ModelShape("tracr-xproportion", n_layers=2, n_heads=1)
PROMPT_LEN = 6
POSITIONS = (1, 2, 3, 4, 5)

RESAMPLE_EDGES = ("Resid Start->MLP 0", "MLP 0->A1.0.V", "A1.0->Resid End")
ZERO_EDGES = (
    "A1.0->Resid End",
    "Resid Start->A1.0.Q",
    "Resid Start->A1.0.K",
    "MLP 0->A1.0.V",
    "Resid Start->MLP 0",
)


@checked
def tracr_xproportion_official_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The circuit that carries the tokens: 3 edges, or 15 with their positions.

    These are the edges that matter when activations of another sequence of the same
    length are patched in. Raises ConfigError if the graph is not tracr-xproportion's,
    with separate queries, keys and values.
    """
    return _edges(RESAMPLE_EDGES, model, token_positions, word_idxs, seq_start_idx)


@checked
def tracr_xproportion_acdc_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The circuit with what the head attends by: 5 edges, or 25 with their positions.

    These are the edges that matter when zeros are patched in (the ACDC paper's). Errors:
    `tracr_xproportion_official_edges`.
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
        *(model, TRACR_XPROPORTION, token_positions, word_idxs, seq_start_idx),
        separate_qkv=True,
        prompt_len=PROMPT_LEN,
    )
    return graph.edges(names, POSITIONS)
