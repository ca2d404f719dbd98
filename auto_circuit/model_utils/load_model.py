"""Load a language model by hub name or from a local folder."""

from __future__ import annotations

from pathlib import Path

import torch as t
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.errors import ModelError

MODEL_ALIASES = {
    "gpt2-small": "gpt2",
    "attn-only-4l": "NeelNanda/Attn_Only_4L512W_C4_Code",
}
"""TransformerLens's old short names -> hub names."""


def load_transformer(
    name: str | Path,
    device: t.device | str = "cpu",
    dtype: t.dtype = t.float32,
) -> TransformerBridge:
    """A model whose weights need no gradients, in eval mode.

    name: a Hugging Face hub name, or a local folder in Hugging Face format.
    In float32 the weights are processed as auto-circuit does (layer norm folded, writing
    weights and unembedding centred), which changes no probabilities. In other types they
    are as they were published.

    Raises ModelError, with the cause, if the model cannot be had.
    """
    source = MODEL_ALIASES.get(str(name), str(name))
    try:
        model = TransformerBridge.boot_transformers(
            source, device=str(device), dtype=dtype
        )
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise ModelError(
            f"Cannot load the model {source!r}: {_first_line(error)} A hub name needs a "
            "network connection once (later the model is in the Hugging Face cache; "
            "HF_HUB_OFFLINE must not be 1 the first time); a local folder needs "
            "config.json, the weights and the tokenizer."
        ) from error
    if dtype == t.float32:
        model.enable_compatibility_mode()
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return line if line.endswith(".") else line + "."
