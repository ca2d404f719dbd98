"""The models of `parity_models.py` as `load_tl_model` would give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)

from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.model_utils.transformer_lens_utils import native_bridge
from tests.models import folded
from tests.upstream import parity_models
from tests.upstream.parity_models import ATTN_ONLY_4L_GRAPH, GPT2_SMALL_GRAPH, SMALL, Size


@cache
def gpt2(size: Size = SMALL) -> TransformerBridge:
    model = parity_models.random_gpt2(size)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return folded(bridge)


@cache
def attention_only(size: Size = SMALL) -> TransformerBridge:
    config = TransformerBridgeConfig(
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        d_model=size.d_model,
        d_head=size.d_head,
        n_ctx=parity_models.N_CTX,
        d_vocab=parity_models.VOCAB,
        attn_only=True,
        act_fn="relu",
        architecture="TransformerLensNative",
    )
    bridge = native_bridge(config)
    parameters = {
        name.replace("_original_component.", ""): parameter
        for name, parameter in bridge.original_model.named_parameters()
    }
    for name, weight in parity_models.attention_only_weights(size).items():
        parameters[name].data = weight
    return bridge.requires_grad_(False)


@cache
def pocket_model() -> TransformerBridge:
    return load_tl_model(parity_models.POCKET_MODEL)


MODELS: dict[str, Callable[[], TransformerBridge]] = {
    "gpt2": gpt2,
    "attention only": attention_only,
}
KNOWN_CIRCUIT_MODELS: dict[str, Callable[[], TransformerBridge]] = {
    "gpt2_circuits": lambda: gpt2(GPT2_SMALL_GRAPH),
    "docstring_circuits": lambda: attention_only(ATTN_ONLY_4L_GRAPH),
}
