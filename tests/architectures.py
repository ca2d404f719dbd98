"""The families of Hugging Face models of which the site has a table, as tiny random models.

A newcomer is a `Family`: its class, its configuration's numbers, and the `Plan` by which
`plain_patching` finds its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch as t
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import PreTrainedModel

from tests.models import randomize
from tests.plain_patching import (
    PlainModel,
    Plan,
    group_by_group,
    head_by_head,
    in_four_parts,
    thirds,
)

VOCAB, D_MODEL, HEADS = 40, 16, 4
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
GPT2_SIZES = {
    "n_layer": 2,
    "n_head": HEADS,
    "n_embd": D_MODEL,
    "n_positions": 32,
    "vocab_size": VOCAB,
}


@dataclass(frozen=True)
class Family:
    """title: as readers know it. model: the class's name without "Config"'s ending.

    config: arguments of its configuration. plan: None if it is refused.
    """

    title: str
    config_class: str
    model_class: str
    config: Mapping[str, Any]
    plan: Plan | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def hugging_face(self, dtype: t.dtype = t.float32) -> PreTrainedModel:
        """The model, the same in every call."""
        config = getattr(transformers, self.config_class)(**self.config)
        # The default ones know no float64, or no hooks.
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        for name, value in self.attributes.items():
            setattr(config, name, value)
        model = getattr(transformers, self.model_class)(config)
        randomize(model)
        for parameter in model.parameters():
            parameter.data *= 2.5  # so that attention is far from uniform
        return model.to(dtype).eval().requires_grad_(False)

    def bridge(self, dtype: t.dtype = t.float32) -> TransformerBridge:
        """TransformerLens's model with the same weights."""
        model = self.hugging_face(dtype)
        bridge = build_bridge_from_module(
            model, type(model).__name__, hf_config=model.config
        )
        return bridge.eval().requires_grad_(False)

    def plain(self, dtype: t.dtype = t.float32) -> PlainModel:
        assert self.plan is not None, f"{self.title} has no plan"
        return PlainModel(self.hugging_face(dtype), self.plan)


def family(
    title: str, name: str, config: Mapping[str, Any], plan: Plan | None, **attributes: Any
) -> Family:
    return Family(title, f"{name}Config", f"{name}ForCausalLM", config, plan, attributes)


LLAMA = Plan()
UNGATED = replace(LLAMA, gated=())
MOE = replace(LLAMA, activation=None, gated=())
FUSED_GATE = replace(LLAMA, gated=("mlp.gate_up_proj",), activation="mlp.activation_fn")
PARALLEL = replace(LLAMA, mlp_norm="input_layernorm")
BOTH_NORMS = replace(
    LLAMA,
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
POST_NORMS = replace(BOTH_NORMS, attn_norm=None, mlp_norm=None)
GPT2 = Plan(
    blocks="transformer.h",
    end="transformer.ln_f",
    attn_norm="ln_1",
    qkv=("attn.c_attn",),
    stripe=thirds,
    output="attn.c_proj",
    mlp_norm="ln_2",
    activation="mlp.act",
    gated=(),
    down="mlp.c_proj",
)
GPT_J = replace(
    GPT2,
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    stripe=LLAMA.stripe,
    output="attn.out_proj",
    mlp_norm="ln_1",
    down="mlp.fc_out",
)
NEOX = Plan(
    blocks="gpt_neox.layers",
    end="gpt_neox.final_layer_norm",
    qkv=("attention.query_key_value",),
    stripe=head_by_head,
    output="attention.dense",
    activation="mlp.act",
    gated=(),
    down="mlp.dense_4h_to_h",
)
FALCON = Plan(
    blocks="transformer.h",
    end="transformer.ln_f",
    qkv=("self_attention.query_key_value",),
    stripe=group_by_group,
    output="self_attention.dense",
    mlp_norm="input_layernorm",
    activation="mlp.act",
    gated=(),
    down="mlp.dense_4h_to_h",
)
FALCON_SIZES = {**SIZES, "ffn_hidden_size": 24}
del FALCON_SIZES["intermediate_size"]
OPT = Plan(
    blocks="model.decoder.layers",
    end="model.decoder.final_layer_norm",
    attn_norm="self_attn_layer_norm",
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    mlp_in="fc1",
    mlp_out="fc2",
    activation="activation_fn",
    gated=(),
    down="fc2",
)

STABLE_LM = {**GROUPED, "partial_rotary_factor": 0.5}

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT-2", "GPT2Config", "GPT2LMHeadModel", GPT2_SIZES, GPT2),
    "gpt_bigcode": family("GPT-BigCode (SantaCoder)", "GPTBigCode", GPT2_SIZES, GPT2),
    "gpt_neo": family(
        "GPT-Neo, TinyStories",
        "GPTNeo",
        {
            "num_layers": 2,
            "num_heads": HEADS,
            "hidden_size": D_MODEL,
            "intermediate_size": 24,
            "vocab_size": VOCAB,
            "max_position_embeddings": 32,
            "window_size": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        replace(
            GPT2,
            qkv=tuple(f"attn.attention.{x}_proj" for x in "qkv"),
            stripe=LLAMA.stripe,
            output="attn.attention.out_proj",
        ),
    ),
    "gptj": family("GPT-J", "GPTJ", {**GPT2_SIZES, "rotary_dim": 4}, GPT_J),
    "codegen": family(
        "CodeGen",
        "CodeGen",
        {**GPT2_SIZES, "rotary_dim": 4},
        replace(GPT_J, qkv=("attn.qkv_proj",), stripe=in_four_parts),
    ),
    "opt": family(
        "OPT",
        "OPT",
        {
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "hidden_size": D_MODEL,
            "word_embed_proj_dim": D_MODEL,
            "ffn_dim": 24,
            "vocab_size": VOCAB,
            "max_position_embeddings": 32,
        },
        OPT,
    ),
    "bloom": family(
        "BLOOM",
        "Bloom",
        {"n_layer": 2, "n_head": HEADS, "hidden_size": D_MODEL, "vocab_size": VOCAB},
        Plan(
            blocks="transformer.h",
            end="transformer.ln_f",
            qkv=("self_attention.query_key_value",),
            stripe=head_by_head,
            output="self_attention.dense",
            mlp_in="mlp.dense_h_to_4h",
            mlp_out="mlp.dense_4h_to_h",
            activation="mlp.gelu_impl",
            gated=(),
            down="mlp.dense_4h_to_h",
        ),
    ),
    "mpt": family(
        "MPT",
        "Mpt",
        {
            "n_layers": 2,
            "n_heads": HEADS,
            "d_model": D_MODEL,
            "vocab_size": VOCAB,
            "max_seq_len": 32,
        },
        Plan(
            blocks="transformer.blocks",
            end="transformer.norm_f",
            attn_norm="norm_1",
            qkv=("attn.Wqkv",),
            stripe=thirds,
            output="attn.out_proj",
            mlp_norm="norm_2",
            mlp_in="ffn.up_proj",
            mlp_out="ffn.down_proj",
            activation="ffn.act",
            gated=(),
            down="ffn.down_proj",
        ),
    ),
    "falcon": family("Falcon 7B", "Falcon", FALCON_SIZES, FALCON),
    "falcon_new": family(
        "Falcon 40B",
        "Falcon",
        {**FALCON_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
        replace(FALCON, attn_norm="ln_attn", mlp_norm="ln_mlp"),
    ),
    "falcon_rw": family(
        "Falcon RW",
        "Falcon",
        {
            **FALCON_SIZES,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
        replace(FALCON, mlp_norm="post_attention_layernorm", stripe=head_by_head),
    ),
    "pythia": family("Pythia (GPT-NeoX)", "GPTNeoX", SIZES, NEOX),
    "neox_sequential": family(
        "GPT-NeoX, not parallel",
        "GPTNeoX",
        {**SIZES, "use_parallel_residual": False},
        NEOX,
    ),
    "phi": family(
        "Phi 1, 1.5 and 2",
        "Phi",
        SIZES,
        replace(
            PARALLEL,
            end="model.final_layernorm",
            output="self_attn.dense",
            activation="mlp.activation_fn",
            gated=(),
            down="mlp.fc2",
        ),
    ),
    "phi3": family(
        "Phi-3 and 4",
        "Phi3",
        {**GROUPED, "pad_token_id": 0},
        replace(FUSED_GATE, qkv=("self_attn.qkv_proj",), stripe=thirds),
    ),
    "llama": family("Llama 2 and 3", "Llama", GROUPED, LLAMA),
    "mistral": family("Mistral", "Mistral", {**GROUPED, "sliding_window": 4}, LLAMA),
    "mixtral": family(
        "Mixtral",
        "Mixtral",
        {**GROUPED, "num_local_experts": 3, "sliding_window": None},
        MOE,
    ),
    "qwen2": family("Qwen 2 and 2.5", "Qwen2", GROUPED, LLAMA),
    "qwen2_moe": family(
        "Qwen 2 MoE",
        "Qwen2Moe",
        {
            **GROUPED,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        MOE,
    ),
    "qwen3": family("Qwen 3", "Qwen3", WIDE, LLAMA),
    "qwen3_moe": family(
        "Qwen 3 MoE",
        "Qwen3Moe",
        {
            **WIDE,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        MOE,
    ),
    "gemma": family("Gemma 1", "Gemma", WIDE, LLAMA),
    "gemma2": family("Gemma 2", "Gemma2", {**WIDE, "sliding_window": 4}, BOTH_NORMS),
    "gemma3": Family(
        "Gemma 3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**WIDE, "sliding_window": 4},
        BOTH_NORMS,
    ),
    "olmo": family("OLMo 1", "Olmo", GROUPED, LLAMA),
    "olmo2": family("OLMo 2", "Olmo2", GROUPED, POST_NORMS),
    "olmo3": family("OLMo 3", "Olmo3", {**GROUPED, "sliding_window": 4}, POST_NORMS),
    "olmoe": family(
        "OLMoE",
        "Olmoe",
        {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2},
        MOE,
    ),
    "stablelm": family("StableLM", "StableLm", STABLE_LM, LLAMA),
    "stablelm_parallel": family(
        "StableLM, parallel",
        "StableLm",
        {**STABLE_LM, "use_parallel_residual": True},
        PARALLEL,
    ),
    "starcoder2": family(
        "StarCoder 2",
        "Starcoder2",
        GROUPED,
        replace(UNGATED, activation="mlp.act", down="mlp.c_proj"),
    ),
    "smollm3": family("SmolLM 3", "SmolLM3", {**GROUPED, "pad_token_id": 0}, LLAMA),
    "glm": family("GLM", "Glm", {**WIDE, "pad_token_id": 0}, FUSED_GATE),
    "glm4": family(
        "GLM-4",
        "Glm4",
        {**WIDE, "pad_token_id": 0},
        replace(
            FUSED_GATE,
            attn_post_norm="post_self_attn_layernorm",
            mlp_post_norm="post_mlp_layernorm",
        ),
    ),
    "cohere": family("Cohere (Command R)", "Cohere", GROUPED, PARALLEL),
    "cohere2": family("Cohere 2 (Command R7B)", "Cohere2", GROUPED, PARALLEL),
    "granite": family(
        "Granite",
        "Granite",
        {
            **GROUPED,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.4,
        },
        replace(LLAMA, scale="residual_multiplier"),
    ),
    "granite_moe": family(
        "Granite MoE",
        "GraniteMoe",
        {
            **GROUPED,
            "residual_multiplier": 0.22,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
        replace(
            MOE,
            scale="residual_multiplier",
            mlp_in="block_sparse_moe",
            mlp_out="block_sparse_moe",
        ),
    ),
    "nemotron": family(
        "Nemotron",
        "Nemotron",
        {**WIDE, "partial_rotary_factor": 0.5},
        UNGATED,
    ),
    "apertus": family(
        "Apertus",
        "Apertus",
        GROUPED,
        replace(
            UNGATED, attn_norm="attention_layernorm", mlp_norm="feedforward_layernorm"
        ),
    ),
    "arcee": family("Arcee", "Arcee", GROUPED, UNGATED),
    "ernie4_5": family("Ernie 4.5", "Ernie4_5", WIDE, LLAMA),
    "exaone4": family(
        "EXAONE 4", "Exaone4", {**GROUPED, "sliding_window": 4}, POST_NORMS
    ),
    "seed_oss": family("Seed-OSS", "SeedOss", WIDE, LLAMA),
    "hunyuan": family("HunYuan", "HunYuanDenseV1", WIDE, LLAMA),
    "gpt_oss": family(
        "gpt-oss",
        "GptOss",
        {
            **WIDE,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        MOE,
    ),
    "xglm": family(
        "XGLM",
        "XGLM",
        {
            "num_layers": 2,
            "attention_heads": HEADS,
            "d_model": D_MODEL,
            "ffn_dim": 24,
            "vocab_size": VOCAB,
            "max_position_embeddings": 32,
        },
        replace(OPT, blocks="model.layers", end="model.layer_norm"),
    ),
    "openai_gpt": Family(
        "GPT (2018)",
        "OpenAIGPTConfig",
        "OpenAIGPTLMHeadModel",
        GPT2_SIZES,
    ),
    "opt_350m": family(
        "OPT 350M",
        "OPT",
        {
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "hidden_size": D_MODEL,
            "word_embed_proj_dim": D_MODEL,
            "ffn_dim": 24,
            "vocab_size": VOCAB,
            "max_position_embeddings": 32,
            "do_layer_norm_before": False,
        },
        None,
    ),
}
