"""Tiny random Hugging Face models of every architecture family that is known here.

Each is made without any code of the library: `make(name)` gives the Hugging Face model,
with random parameters, and `bridge_of` what TransformerLens makes of it.
"""

from __future__ import annotations

from typing import Any

import torch as t
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import PreTrainedModel

N_LAYERS, N_HEADS, N_KV_HEADS, D_MODEL, D_MLP = 2, 4, 2, 32, 48
VOCAB, N_CTX = 40, 16

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIZES: dict[str, Any] = _TOKENS | {
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "max_position_embeddings": N_CTX,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_key_value_heads": N_KV_HEADS}
_GEMMA: dict[str, Any] = _GROUPED | {"head_dim": D_MODEL // N_HEADS}
_EXPERTS: dict[str, Any] = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}
_GPT2: dict[str, Any] = _TOKENS | {
    "n_layer": N_LAYERS,
    "n_head": N_HEADS,
    "n_embd": D_MODEL,
    "n_positions": N_CTX,
}
_DECODER: dict[str, Any] = _TOKENS | {"ffn_dim": D_MLP, "max_position_embeddings": N_CTX}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt_bigcode": ("GPTBigCode", _GPT2),
    "gpt_neo": (
        "GPTNeo",
        _TOKENS
        | {
            "num_layers": N_LAYERS,
            "num_heads": N_HEADS,
            "hidden_size": D_MODEL,
            "max_position_embeddings": N_CTX,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 4}),
    "codegen": ("CodeGen", _GPT2 | {"rotary_dim": 4}),
    "pythia": ("GPTNeoX", _SIZES),
    "pythia_sequential": ("GPTNeoX", _SIZES | {"use_parallel_residual": False}),
    "opt": (
        "OPT",
        _DECODER
        | {
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "hidden_size": D_MODEL,
            "word_embed_proj_dim": D_MODEL,
        },
    ),
    "xglm": (
        "XGLM",
        _DECODER
        | {"num_layers": N_LAYERS, "attention_heads": N_HEADS, "d_model": D_MODEL},
    ),
    "bloom": (
        "Bloom",
        _TOKENS | {"n_layer": N_LAYERS, "n_head": N_HEADS, "hidden_size": D_MODEL},
    ),
    "mpt": (
        "Mpt",
        _TOKENS
        | {
            "n_layers": N_LAYERS,
            "n_heads": N_HEADS,
            "d_model": D_MODEL,
            "max_seq_len": N_CTX,
        },
    ),
    "falcon": ("Falcon", _SIZES | {"parallel_attn": True, "multi_query": True}),
    "falcon_two_norms": (
        "Falcon",
        _SIZES
        | {
            "new_decoder_architecture": True,
            "num_kv_heads": N_KV_HEADS,
            "multi_query": False,
        },
    ),
    "falcon_alibi": (
        "Falcon",
        _SIZES | {"alibi": True, "parallel_attn": False, "multi_query": False},
    ),
    "phi": ("Phi", _SIZES),
    "phi3": ("Phi3", _GROUPED),
    "stablelm": ("StableLm", _GROUPED | {"use_parallel_residual": False}),
    "stablelm_parallel": ("StableLm", _GROUPED | {"use_parallel_residual": True}),
    "cohere": ("Cohere", _GROUPED | {"logit_scale": 0.5}),
    "cohere2": ("Cohere2", _GROUPED | {"logit_scale": 0.5, "sliding_window": 4}),
    "granite": (
        "Granite",
        _GROUPED
        | {
            "residual_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "granite_moe": (
        "GraniteMoe",
        _GROUPED
        | {
            "residual_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "num_local_experts": 4,
        },
    ),
    "llama": ("Llama", _GROUPED),
    "llama3": (
        "Llama",
        _GROUPED
        | {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "mistral_nemo": ("Mistral", _GROUPED | {"head_dim": 12, "sliding_window": None}),
    "ministral3": ("Ministral3", _GEMMA),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": 4}),
    "mixtral": ("Mixtral", _GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen2_moe": (
        "Qwen2Moe",
        _EXPERTS
        | {"moe_intermediate_size": D_MLP, "shared_expert_intermediate_size": D_MLP},
    ),
    "qwen3": ("Qwen3", _GEMMA),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS | {"moe_intermediate_size": D_MLP, "head_dim": 8}),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", _GEMMA | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "vaultgemma": (
        "VaultGemma",
        _GEMMA | {"sliding_window": 4, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("Gemma3", _GEMMA | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3_images": (
        "Gemma3Images",
        {
            "text_config": _GEMMA | {"sliding_window": 4, "query_pre_attn_scalar": 8},
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
                **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "olmo": ("Olmo", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "olmo3": ("Olmo3", _GROUPED | {"sliding_window": 4}),
    "olmoe": ("Olmoe", _EXPERTS),
    "flex_olmo": ("FlexOlmo", _EXPERTS),
    "starcoder2": ("Starcoder2", _GROUPED),
    "smollm3": ("SmolLM3", _GROUPED | {"no_rope_layers": [1, 0]}),
    "glm": ("Glm", _GEMMA),
    "glm4": ("Glm4", _GEMMA),
    "ernie4_5": ("Ernie4_5", _GEMMA),
    "glm4_moe": (
        "Glm4Moe",
        _GEMMA
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        | {"moe_intermediate_size": D_MLP, "n_group": 1, "topk_group": 1},
    ),
    "minimax_m2": (
        "MiniMaxM2",
        _GEMMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4",
        _GEMMA
        | {"num_local_experts": 4, "intermediate_size_mlp": D_MLP}
        | {"attention_chunk_size": 8, "use_cache": False},
    ),
    "jais2": ("Jais2", _GROUPED),
    "modernbert_decoder": ("ModernBertDecoder", _SIZES | {"local_attention": 4}),
    "apertus": ("Apertus", _GROUPED),
    "nemotron": ("Nemotron", _GROUPED),
    "arcee": ("Arcee", _GROUPED),
    "seed_oss": ("SeedOss", _GEMMA),
    "exaone4": ("Exaone4", _GEMMA | {"sliding_window": 4, "sliding_window_pattern": 2}),
    "hunyuan": ("HunYuanDenseV1", _GEMMA),
    "gpt_oss": (
        "GptOss",
        _GEMMA
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
"""Per family, the Hugging Face class's name (without `ForCausalLM`) and the configuration."""

_T5: dict[str, Any] = _TOKENS | {
    "num_layers": N_LAYERS,
    "num_heads": N_HEADS,
    "d_model": D_MODEL,
    "d_kv": D_MODEL // N_HEADS,
    "d_ff": D_MLP,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = _TOKENS | {
    "d_model": D_MODEL,
    "max_position_embeddings": N_CTX,
    **{f"{side}_layers": N_LAYERS for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": N_HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": D_MLP for side in ("encoder", "decoder")},
}
_MAMBA: dict[str, Any] = _TOKENS | {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": D_MODEL,
    "state_size": 4,
}
_SOME_STATES: dict[str, Any] = _GROUPED | {"mamba_d_state": 4, "mamba_n_groups": 1}
_LATENT_ATTENTION: dict[str, Any] = _SIZES | {
    "num_key_value_heads": N_HEADS,
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 2},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _T5),
    "mt5": ("MT5", _T5),
    "bart": ("Bart", _BART),
    "marian": ("Marian", _BART),
    "mamba": ("Mamba", _MAMBA),
    "mamba2": ("Mamba2", _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "rwkv": (
        "Rwkv",
        _TOKENS
        | {
            "num_hidden_layers": N_LAYERS,
            "hidden_size": D_MODEL,
            "context_length": N_CTX,
        },
    ),
    "jamba": (
        "Jamba",
        _SOME_STATES
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "falcon_h1": (
        "FalconH1",
        _SOME_STATES | {"mamba_d_ssm": D_MODEL, "mamba_n_heads": 4, "mamba_d_head": 8},
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        _GROUPED | {"lru_width": D_MODEL, "block_types": ("recurrent", "attention")},
    ),
    "lfm2": ("Lfm2", _GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "bert": ("Bert", _SIZES),
    "gpt1": (
        "OpenAIGPT",
        _TOKENS
        | {
            "n_layer": N_LAYERS,
            "n_head": N_HEADS,
            "n_embd": D_MODEL,
            "n_positions": N_CTX,
        },
    ),
    "opt_norm_after": (
        "OPT",
        FAMILIES["opt"][1] | {"do_layer_norm_before": False},
    ),
    "deepseek_v3": ("DeepseekV3", _LATENT_ATTENTION),
}
"""Architectures that no graph of the library is right for."""

_CONFIGS = {
    "Gemma3": "Gemma3TextConfig",
    "Gemma3Images": "Gemma3Config",
    "Llama4": "Llama4TextConfig",
}
_CLASSES = {
    "Gemma3Images": "Gemma3ForConditionalGeneration",
    "GPT2": "GPT2LMHeadModel",
    "T5": "T5ForConditionalGeneration",
    "MT5": "MT5ForConditionalGeneration",
    "Bart": "BartForConditionalGeneration",
    "Marian": "MarianMTModel",
    "Bert": "BertForMaskedLM",
    "OpenAIGPT": "OpenAIGPTLMHeadModel",
}


def make(name: str, dtype: t.dtype = t.float32, **others: Any) -> PreTrainedModel:
    """A family's Hugging Face model, in eval mode; the same weights in every call.

    others: of its configuration, instead of or besides those of `FAMILIES`.
    """
    kind, options = (FAMILIES | REFUSED)[name]
    config = getattr(transformers, _CONFIGS.get(kind, f"{kind}Config"))(
        **(options | others)
    )
    config._experts_implementation = "eager"  # the default one knows no float64
    model_class = getattr(transformers, _CLASSES.get(kind, f"{kind}ForCausalLM"))
    model: Any = model_class._from_config(config, attn_implementation="eager")
    randomize(model)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval().requires_grad_(False)  # type: ignore[no-any-return]


def randomize(model: t.nn.Module, seed: int = 0) -> None:
    """Every parameter random, biases and norm weights included."""
    generator = t.Generator().manual_seed(seed)
    for param in model.parameters():
        param.data = 0.2 * t.randn(param.shape, generator=generator, dtype=param.dtype)


def bridge_of(model: PreTrainedModel) -> TransformerBridge:
    """TransformerLens's model, which has the same weights and takes the model over."""
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return bridge.eval().requires_grad_(False)
