"""Docstring completion in a four-layer attention-only model: the third argument's name.

Source: Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer
attention-only transformer".

Places: A_def, B_def, C_def (the arguments in the definition), ",_B" (the comma after B_def),
A_doc, B_doc (the arguments in the docstring), param_3 (the last token, ":param").
"""

from __future__ import annotations

from collections.abc import Mapping

from auto_circuit.checks import checked
from auto_circuit.metrics.official_circuits.circuits.circuit_tables import (
    NO_WORDS,
    ModelShape,
    Place,
    Span,
    circuit_graph,
)
from auto_circuit.types import Edge
from auto_circuit.utils.patchable_model import PatchableModel

ATTN_ONLY_4L = ModelShape(
    "attn-only-4l (Attn_Only_4L512W_C4_Code)", n_layers=4, n_heads=8, has_mlps=False
)
EDGE_WORDS = ("A_def", "B_def", ",_B", "C_def", "A_doc", "B_doc", "param_3")
HEAD_WORDS = ("B_def", ",_B", "C_def", "A_doc", "B_doc", "param_3")

EDGES: Mapping[str, tuple[Place, ...]] = {
    "A0.5->A1.4.V": ("B_def", "B_doc"),
    "Resid Start->A0.5.V": ("B_def", "C_def", "B_doc"),
    "Resid Start->A2.0.Q": ("C_def",),
    "A0.5->A2.0.Q": ("C_def",),
    "Resid Start->A2.0.K": (),
    "A0.5->A2.0.K": ("B_def",),
    "A1.4->A2.0.V": (",_B",),
    "Resid Start->A1.4.V": ("B_def", "B_doc"),
    "Resid Start->A1.2.K": ("A_def", "B_def", "A_doc", "B_doc"),
    "Resid Start->A1.2.Q": ("A_doc", "B_doc"),
    "A0.5->A1.2.Q": ("B_doc",),
    "A0.5->A1.2.K": ("B_def", "B_doc"),
    "A3.0->Resid End": ("param_3",),
    "A3.6->Resid End": ("param_3",),
    "A1.4->A3.0.Q": ("param_3",),
    "A1.4->A3.6.Q": ("param_3",),
    "Resid Start->A3.0.V": ("C_def",),
    "Resid Start->A3.6.V": ("C_def",),
    "A0.5->A3.0.V": ("C_def",),
    "A0.5->A3.6.V": ("C_def",),
    "A2.0->A3.0.K": ("C_def",),
    "A2.0->A3.6.K": ("C_def",),
    "A1.2->A3.0.K": ("A_doc", "B_doc"),
    "A1.2->A3.6.K": ("A_doc", "B_doc"),
}
"""Edge -> where it counts. No place: the edge counts only without positions."""

EVERY_WORD = (Span("B_def", "param_3"),)

HEADS: Mapping[str, tuple[Place, ...]] = {
    "A0.1": EVERY_WORD,
    "A0.2": ("B_doc",),
    "A0.4": ("param_3",),
    "A0.5": ("B_def", "C_def", "B_doc"),
    "A1.0": EVERY_WORD,
    "A1.2": ("A_doc", "B_doc"),
    "A1.4": (",_B",),
    "A2.0": ("C_def",),
    "A2.3": EVERY_WORD,
    "A3.0": ("param_3",),
    "A3.6": ("param_3",),
}
"""Head -> where its output counts."""


@checked
def docstring_true_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """The edges of the circuit: 24, or 34 with their positions.

    token_positions: only at the places of the table; `word_idxs` must have them.
        seq_start_idx: the length of the prefix that the graph leaves out.
    Raises ConfigError if the model's graph is not attn-only-4l's, factorized and with
    separate queries, keys and values.
    """
    graph = circuit_graph(
        *(model, ATTN_ONLY_4L, token_positions, word_idxs, seq_start_idx),
        words=EDGE_WORDS,
        separate_qkv=True,
    )
    return {
        edge for name, places in EDGES.items() for edge in graph.edges([name], places)
    }


@checked
def docstring_node_based_official_edges(
    model: PatchableModel,
    token_positions: bool = False,
    word_idxs: Mapping[str, int] = NO_WORDS,
    seq_start_idx: int = 0,
) -> set[Edge]:
    """All edges but those from heads that are not in the circuit: the circuit of nodes.

    token_positions: a head's edges are kept only at the places of the table. Factorized
    or not. Raises ConfigError if the graph is not attn-only-4l's.
    """
    graph = circuit_graph(
        *(model, ATTN_ONLY_4L, token_positions, word_idxs, seq_start_idx),
        words=HEAD_WORDS,
        factorized=None,
    )
    return graph.node_circuit(HEADS)
