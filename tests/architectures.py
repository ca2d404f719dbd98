"""The families of Hugging Face models of which the site has a table, and how to hook them.

`tests/families.py` makes the models. A newcomer is a line there and one here: its name for
readers, and the `Plan` by which `plain_patching` finds its parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch as t
from transformers import PreTrainedModel

from tests.families import make
from tests.plain_patching import (
    PlainModel,
    Plan,
    default_dtype,
    group_by_group,
    head_by_head,
    in_four_parts,
    thirds,
)

FLOAT32 = t.float32
"""Also where `in_float64` puts another type in its place."""
LOUDER = 2.5
"""Weights are multiplied by this: attention is then far from uniform, and effects large."""


@dataclass(frozen=True)
class Family:
    """title: as readers know it. plan: None for a family without a graph."""

    title: str
    plan: Plan | None = None


def hugging_face(name: str, dtype: t.dtype = FLOAT32) -> PreTrainedModel:
    """A family's model, the same in every call."""
    with t.random.fork_rng(devices=[]), default_dtype(FLOAT32):
        model = make(name, FLOAT32)
    for parameter in model.parameters():
        parameter.data *= LOUDER
    return model.to(dtype)  # type: ignore[no-any-return]


def plain_model(name: str, dtype: t.dtype = FLOAT32) -> PlainModel:
    """The Hugging Face model alone."""
    plan = FAMILIES[name].plan
    assert plan is not None, f"{name} has no plan"
    return PlainModel(hugging_face(name, dtype), plan)


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


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT-2", GPT2),
    "gpt_bigcode": Family("GPT-BigCode (SantaCoder)", GPT2),
    "gpt_neo": Family(
        "GPT-Neo, TinyStories",
        replace(
            GPT2,
            qkv=tuple(f"attn.attention.{x}_proj" for x in "qkv"),
            stripe=LLAMA.stripe,
            output="attn.attention.out_proj",
        ),
    ),
    "gptj": Family("GPT-J", GPT_J),
    "codegen": Family(
        "CodeGen", replace(GPT_J, qkv=("attn.qkv_proj",), stripe=in_four_parts)
    ),
    "pythia": Family("Pythia (GPT-NeoX)", NEOX),
    "pythia_sequential": Family("GPT-NeoX, not parallel", NEOX),
    "opt": Family("OPT", OPT),
    "xglm": Family("XGLM", replace(OPT, blocks="model.layers", end="model.layer_norm")),
    "bloom": Family(
        "BLOOM",
        replace(
            FALCON,
            stripe=head_by_head,
            mlp_norm="post_attention_layernorm",
            mlp_in="mlp.dense_h_to_4h",
            mlp_out="mlp.dense_4h_to_h",
            activation="mlp.gelu_impl",
        ),
    ),
    "mpt": Family(
        "MPT",
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
    "falcon": Family("Falcon 7B", FALCON),
    "falcon_two_norms": Family(
        "Falcon 40B", replace(FALCON, attn_norm="ln_attn", mlp_norm="ln_mlp")
    ),
    "falcon_alibi": Family(
        "Falcon RW",
        replace(FALCON, mlp_norm="post_attention_layernorm", stripe=head_by_head),
    ),
    "phi": Family(
        "Phi 1, 1.5 and 2",
        replace(
            PARALLEL,
            end="model.final_layernorm",
            output="self_attn.dense",
            activation="mlp.activation_fn",
            gated=(),
            down="mlp.fc2",
        ),
    ),
    "phi3": Family(
        "Phi-3 and 4",
        replace(FUSED_GATE, qkv=("self_attn.qkv_proj",), stripe=thirds),
    ),
    "stablelm": Family("StableLM", LLAMA),
    "stablelm_parallel": Family("StableLM, parallel", PARALLEL),
    "cohere": Family("Cohere (Command R)", PARALLEL),
    "cohere2": Family("Cohere 2 (Command R7B)", PARALLEL),
    "granite": Family("Granite", replace(LLAMA, scale="residual_multiplier")),
    "granite_moe": Family(
        "Granite MoE",
        replace(
            MOE,
            scale="residual_multiplier",
            mlp_in="block_sparse_moe",
            mlp_out="block_sparse_moe",
        ),
    ),
    "llama": Family("Llama 2 and 3", LLAMA),
    "llama3": Family("Llama 3.1 to 3.3", LLAMA),
    "llama4": Family(
        "Llama 4", replace(MOE, mlp_in="feed_forward", mlp_out="feed_forward")
    ),
    "mistral_nemo": Family("Mistral NeMo", LLAMA),
    "ministral3": Family("Ministral 3", LLAMA),
    "mistral": Family("Mistral", LLAMA),
    "mixtral": Family("Mixtral", MOE),
    "qwen2": Family("Qwen 2 and 2.5", LLAMA),
    "qwen2_moe": Family("Qwen 2 MoE", MOE),
    "qwen3": Family("Qwen 3", LLAMA),
    "qwen3_moe": Family("Qwen 3 MoE", MOE),
    "gemma": Family("Gemma 1", LLAMA),
    "gemma2": Family("Gemma 2", BOTH_NORMS),
    "vaultgemma": Family(
        "VaultGemma", replace(LLAMA, mlp_norm="pre_feedforward_layernorm")
    ),
    "gemma3": Family("Gemma 3", BOTH_NORMS),
    "gemma3_images": Family(
        "Gemma 3 with images: its text model",
        replace(
            BOTH_NORMS,
            blocks="model.language_model.layers",
            end="model.language_model.norm",
        ),
    ),
    "olmo": Family("OLMo 1", LLAMA),
    "olmo2": Family("OLMo 2", POST_NORMS),
    "olmo3": Family("OLMo 3", POST_NORMS),
    "olmoe": Family("OLMoE", MOE),
    "flex_olmo": Family("FlexOlmo", replace(POST_NORMS, activation=None, gated=())),
    "starcoder2": Family(
        "StarCoder 2", replace(UNGATED, activation="mlp.act", down="mlp.c_proj")
    ),
    "smollm3": Family("SmolLM 3", LLAMA),
    "glm": Family("GLM", FUSED_GATE),
    "glm4": Family(
        "GLM-4",
        replace(
            FUSED_GATE,
            attn_post_norm="post_self_attn_layernorm",
            mlp_post_norm="post_mlp_layernorm",
        ),
    ),
    "glm4_moe": Family("GLM-4.5 (MoE)", MOE),
    "minimax_m2": Family("MiniMax M2", MOE),
    "jais2": Family("Jais 2", UNGATED),
    "modernbert_decoder": Family(
        "ModernBERT decoder",
        Plan(
            end="model.final_norm",
            attn_norm="attn_norm",
            qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            output="attn.Wo",
            mlp_norm="mlp_norm",
            activation="mlp.act",
            gated=(),
            down="mlp.Wo",
        ),
    ),
    "ernie4_5": Family("Ernie 4.5", LLAMA),
    "apertus": Family(
        "Apertus",
        replace(
            UNGATED, attn_norm="attention_layernorm", mlp_norm="feedforward_layernorm"
        ),
    ),
    "nemotron": Family("Nemotron", UNGATED),
    "arcee": Family("Arcee", UNGATED),
    "seed_oss": Family("Seed-OSS", LLAMA),
    "exaone4": Family("EXAONE 4", POST_NORMS),
    "hunyuan": Family("HunYuan", LLAMA),
    "gpt_oss": Family("gpt-oss", MOE),
    "t5": Family("T5"),
    "mt5": Family("mT5"),
    "bart": Family("BART"),
    "marian": Family("Marian"),
    "mamba": Family("Mamba"),
    "mamba2": Family("Mamba 2"),
    "rwkv": Family("RWKV"),
    "jamba": Family("Jamba"),
    "falcon_h1": Family("Falcon H1"),
    "recurrent_gemma": Family("RecurrentGemma"),
    "lfm2": Family("LFM 2"),
    "bert": Family("BERT"),
    "gpt1": Family("GPT 1"),
    "opt_norm_after": Family("OPT 350M"),
    "deepseek_v3": Family("DeepSeek V3"),
}
