"""Edges through attention in other families than GPT-2 and Llama.

Their single edges are a column of the table of architectures too; here are masks of all sizes,
padding and cached prefixes, and a family whose attention is special in the fast tests: Gemma 2
(soft caps, sliding windows, grouped queries, norms after attention).
"""

from __future__ import annotations

import pytest
import torch as t

from auto_circuit.errors import ModelError
from auto_circuit.prefix_cache import make_prefix_cache
from auto_circuit.types import Edge
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from tests.architecture_table import (
    CLEAN,
    CORRUPT,
    EXACT,
    PREFIX,
    SEQ,
    Subject,
    crossing_edges,
    gradients,
    left_padding,
    masks,
    off,
    random_masks,
    subject,
)
from tests.plain_patching import in_float64

SPECIAL = ("gemma2", "olmo2", "gpt_oss")
"""Soft caps and windows; norms of all keys together; sinks."""


def test_single_edges_are_what_plain_hooks_say() -> None:
    with in_float64():
        assert crossing_edges(subject("gemma2")) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIAL)
def test_masks_padding_and_prefixes(name: str) -> None:
    with in_float64():
        of = subject(name).crossing
        assert masks(of) < EXACT
        assert gradients(of) < 1e-6
        assert left_padding(of) < EXACT
        assert crossing_with_prefix(of) < EXACT


def crossing_with_prefix(of: Subject) -> float:
    """The masks of a graph whose prompts' beginning is cached, in the graph of whole ones."""
    whole, inner = of.model, of.model.wrapped_model
    corrupt = t.cat([CLEAN[:, :PREFIX], CORRUPT[:, PREFIX:]], dim=1)
    cache = make_prefix_cache(inner, CLEAN[0, :PREFIX])
    n_tokens = SEQ - PREFIX
    cached = patchable_model(inner, True, None, n_tokens, True, (cache,), crossing=True)
    random_masks(cached)
    set_all_masks(whole, 0.0)
    for edge in cached.edges:
        (same,) = whole.find_edges(name_in_whole_prompts(edge))
        value = edge.patch_mask(cached).data[edge.patch_idx]
        same.patch_mask(whole).data[same.patch_idx] = value
    with t.no_grad(), patch_mode(whole, src_ablations(whole, corrupt)):
        expected = whole(CLEAN)[:, PREFIX:]
    with t.no_grad(), patch_mode(cached, src_ablations(cached, corrupt[:, PREFIX:])):
        return off(cached(CLEAN[:, PREFIX:]), expected)


def name_in_whole_prompts(edge: Edge) -> str:
    assert edge.seq_idx is not None
    src = edge.src.name
    if edge.is_crossing:
        src = f"{src.partition('[')[0]}[{edge.src.src_idx + PREFIX}]"
    return f"{src}->{edge.dest.name} @ {edge.seq_idx + PREFIX}"


@pytest.mark.slow
def test_attention_that_keeps_its_scores_to_itself_is_refused() -> None:
    """As Hugging Face's own code does, which TransformerLens calls for some families."""
    with in_float64():
        of = subject("gptj")
        with pytest.raises(ModelError, match="AttentionBridge, which keeps its scores"):
            _ = of.crossing
