"""Tiny random models that most tests run on. No download.

`tests/families.py` has all architectures that are known, `FAMILIES`, as plain Hugging Face
models (`make`) and as what TransformerLens makes of them (`bridge_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from auto_circuit.model_utils.transformer_lens_utils import native_bridge
from tests.families import (
    D_MODEL,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    VOCAB,
    bridge_of,
    randomize,
)

SIZES: dict[str, Any] = {
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": N_CTX,
}


def _bridge(model: PreTrainedModel) -> TransformerBridge:
    randomize(model)
    return bridge_of(model)


def gpt2(
    n_layers: int = N_LAYERS, n_heads: int = N_HEADS, dropout: float = 0.1
) -> TransformerBridge:
    config = GPT2Config(
        n_layer=n_layers,
        n_head=n_heads,
        n_embd=D_MODEL,
        vocab_size=VOCAB,
        n_positions=N_CTX,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
    )
    return _bridge(GPT2LMHeadModel(config))


def attn_only() -> TransformerBridge:
    config = TransformerBridgeConfig(
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
        d_model=D_MODEL,
        d_head=D_MODEL // N_HEADS,
        n_ctx=N_CTX,
        d_vocab=VOCAB,
        attn_only=True,
        act_fn="relu",
        architecture="TransformerLensNative",
    )
    bridge = native_bridge(config)
    randomize(bridge)
    return bridge.requires_grad_(False)


def pythia() -> TransformerBridge:
    return _bridge(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)))


def llama() -> TransformerBridge:
    return _bridge(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)))


def qwen2() -> TransformerBridge:
    return _bridge(Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)))


def gemma2() -> TransformerBridge:
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=D_MODEL // N_HEADS)
    return _bridge(Gemma2ForCausalLM(config))


def olmo() -> TransformerBridge:
    """Its norm is layer norm without weights, in a class of its own."""
    return _bridge(OlmoForCausalLM(OlmoConfig(**SIZES, num_key_value_heads=2)))


def mixtral() -> TransformerBridge:
    config = MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=2, sliding_window=None
    )
    config._experts_implementation = "eager"  # the default one knows no float64
    return _bridge(MixtralForCausalLM(config))


def folded(bridge: TransformerBridge) -> TransformerBridge:
    """The norms' weights in the next weights, and more, as `load_tl_model` does it."""
    bridge.enable_compatibility_mode()
    return bridge.eval().requires_grad_(False)


def gpt2_folded() -> TransformerBridge:
    """Its layer norms only centre and scale: they are folded into the next weights."""
    bridge = gpt2()
    for name, parameter in bridge.named_parameters():
        if ".ln" in name:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    return bridge


ARCHITECTURES: dict[str, Callable[[], TransformerBridge]] = {
    "gpt2": gpt2,
    "attn_only": attn_only,
    "pythia": pythia,
    "llama": llama,
    "qwen2": qwen2,
}
MORE_ARCHITECTURES = {
    **ARCHITECTURES,
    "gemma2": gemma2,
    "gpt2_folded": gpt2_folded,
}


# Every test of an architecture runs on two of them; --runslow runs it on all.
FAST = ("gpt2", "llama")


def architectures(*more: str) -> list[Any]:
    """The names of all architectures, as parameters of a test."""
    names = [*ARCHITECTURES, *more]
    return [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in names
    ]


def tokens(batch: int, seq: int, seed: int = 0) -> Tensor:
    generator = t.Generator().manual_seed(seed)
    return t.randint(0, VOCAB, (batch, seq), generator=generator)


def _all_named_modules(model: t.nn.Module) -> Iterator[tuple[str, t.nn.Module]]:
    """Also those of the Hugging Face model, which a bridge keeps apart."""
    yield from model.named_modules()
    inner = getattr(model, "wrapped_model", model)
    original = vars(inner).get("original_model")
    if original is not None:
        yield from original.named_modules(prefix="original")


def state_snapshot(model: t.nn.Module) -> dict[str, object]:
    """Everything about a model, and about torch, that we must leave as it was."""
    snapshot: dict[str, object] = {"rng": t.get_rng_state().tolist()}
    snapshot["torch"] = (
        t.is_grad_enabled(),
        t.is_inference_mode_enabled(),
        t.is_autocast_enabled("cpu"),
        t.get_default_dtype(),
        t.get_default_device(),
    )
    for name, module in _all_named_modules(model):
        snapshot[f"{name} ours"] = [key for key in vars(module) if "auto_circuit" in key]
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        snapshot[f"{name} hooks"] = [len(h) for h in (*hooks, module._backward_hooks)]
        snapshot[f"{name} training"] = module.training
        for switch in ("mask_fn", "dropout_p", "generator", "mask_batch_size"):
            if hasattr(module, switch):
                snapshot[f"{name} {switch}"] = getattr(module, switch)
        config = module.__dict__.get("cfg")
        for switch in ("attn_result", "attn_in", "split_qkv_input", "hook_mlp_in"):
            if config is not None:
                snapshot[f"{name} {switch}"] = getattr(config, f"use_{switch}", None)
    for name, param in model.named_parameters():
        grad = None if param.grad is None else param.grad.tolist()
        snapshot[f"{name} param"] = (param.tolist(), param.requires_grad, grad)
    return snapshot
