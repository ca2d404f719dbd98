"""Helpers for notebooks and experiments."""

from __future__ import annotations

from pathlib import Path

import torch as t
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.model_utils.load_model import load_transformer


def load_tl_model(name: str | Path, device: t.device | str = "cpu") -> TransformerBridge:
    """A TransformerLens model, ready for `patchable_model`.

    name: a Hugging Face hub name ("gpt2", "EleutherAI/pythia-70m-deduped"), or a local
        folder in Hugging Face format.
    Float32, eval mode, weights processed (layer norm folded, writing weights and
    unembedding centred) and without gradients. Raises ModelError if it cannot be had.
    """
    return load_transformer(name, device)
