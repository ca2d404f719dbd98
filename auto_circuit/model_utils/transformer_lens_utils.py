"""The computation graph of TransformerLens models (`TransformerBridge`).

Sources: the embeddings, every attention head, every MLP. Destinations: every head's
query, key and value input (or one input for the three), every MLP's input, the final
residual stream. All of them are read before layer norm. Names and module names are
auto-circuit's; the modules themselves are TransformerLens hook points.

With grouped-query attention several query heads share one key-value head: `A0.1.K` is
then the input of key-value head 1, and with `separate_qkv=False` the node `A0.g` is the
input of the whole group g: its query heads, its key and its value. With `ungroup=True`
every query head has a key and a value of its own instead, `A0.1.K` being those that query
head 1 reads, as in the graphs of EAP-IG and the MIB benchmark.

Where attention's output is normed before it is added (Gemma 2 and 3, OLMo 2 and 3, GLM-4), a
head writes its share: what it gives to the sum, with the norm's gain, divided by the scale of
the sum of all heads in the same run. `WHOLE_ATTENTION_ADAPTER` makes the layer one source.

In OLMo 2 and 3 a norm runs over the queries (and one over the keys) of all heads together. An
edge into one head's Q or K then changes what all heads of the block read, as a change at
TransformerLens's `hook_q_input` does: the norm is the model's, computed with the patched head
among the others.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch as t
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    LinearBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformer_lens.model_bridge.sources.native import NativeModel

from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.model_utils.block_facts import check_is_decoder, has_residual_scale
from auto_circuit.model_utils.crossing_attention import read_attention
from auto_circuit.model_utils.model_adapter import CrossingSite, GraphNodes, ModelAdapter
from auto_circuit.model_utils.transformer_lens_sites import (
    check_can_ungroup,
    check_shows_attention,
    has_mlps,
    has_norm_over_heads,
    has_post_norm,
    heads_add_up,
    heads_switched_on,
    n_kv_heads,
    open_sites,
    ports,
    src_site,
)
from auto_circuit.types import Component, DestNode, HeadInput, SrcNode

RESID_START = "blocks.0.hook_resid_pre"
HEAD_INPUT_HOOKS: dict[HeadInput, tuple[str, str]] = {
    "query": ("hook_q_input", "Q"),
    "key": ("hook_k_input", "K"),
    "value": ("hook_v_input", "V"),
}
"""A head's inputs: their hook points, and their letters."""
EMBED, UNEMBED = Component("embed", positions="own"), Component("unembed")


def has_parallel_attention(model: TransformerBridge) -> bool:
    """Do attention and MLP of a block read the same residual stream, as in Pythia?"""
    return bool(model.cfg.parallel_attn_mlp)


def _attention_layer(model: TransformerBridge, block: int) -> int:
    """The graph layer of a block's attention: blocks take one layer or two."""
    mlp_has_own_layer = has_mlps(model) and not has_parallel_attention(model)
    return 1 + block * (2 if mlp_has_own_layer else 1)


def _mlp_layer(model: TransformerBridge, block: int) -> int:
    layer = _attention_layer(model, block)
    return layer if has_parallel_attention(model) else layer + 1


def _end_layer(model: TransformerBridge) -> int:
    return _attention_layer(model, model.cfg.n_layers)


def _attention(model: TransformerBridge, block: int) -> Component:
    is_causal = getattr(model.cfg, "attention_dir", "causal") != "bidirectional"
    return Component("attention", block, "earlier" if is_causal else "all")


def _mlp(block: int) -> Component:
    return Component("mlp", block, "own")


def _attention_srcs(
    model: TransformerBridge, block: int, layer: int, first_idx: int, whole: bool
) -> list[SrcNode]:
    """The heads of a block; or its whole attention."""
    if whole:
        module_name = f"blocks.{block}.hook_attn_out"
        return [
            SrcNode(
                name=f"A{block}",
                module_name=module_name,
                layer=layer,
                src_idx=first_idx,
                component=_attention(model, block),
            )
        ]
    return [
        SrcNode(
            name=f"A{block}.{head}",
            module_name=f"blocks.{block}.attn.hook_result",
            layer=layer,
            head_idx=head,
            head_dim=2,
            src_idx=first_idx + head,
            weight=f"blocks.{block}.attn.W_O",
            weight_head_dim=0,
            component=_attention(model, block),
            heads=(head,),
        )
        for head in range(model.cfg.n_heads)
    ]


def _mlp_src(block: int, layer: int, src_idx: int) -> SrcNode:
    return SrcNode(
        name=f"MLP {block}",
        module_name=f"blocks.{block}.hook_mlp_out",
        layer=layer,
        src_idx=src_idx,
        weight=f"blocks.{block}.mlp.W_out",
        component=_mlp(block),
    )


def _start() -> SrcNode:
    return SrcNode("Resid Start", RESID_START, layer=0, src_idx=0, component=EMBED)


def factorized_src_nodes(
    model: TransformerBridge, whole_attention: bool = False
) -> list[SrcNode]:
    """Embeddings, heads and MLPs, in the order in which they run."""
    srcs, whole = [_start()], whole_attention or not heads_add_up(model)
    for block in range(model.cfg.n_layers):
        layer = _attention_layer(model, block)
        srcs += _attention_srcs(model, block, layer, len(srcs), whole)
        if has_mlps(model):
            srcs.append(_mlp_src(block, _mlp_layer(model, block), len(srcs)))
    return srcs


def _attention_dests(
    model: TransformerBridge, block: int, separate_qkv: bool, ungroup: bool
) -> list[DestNode]:
    n_keys = model.cfg.n_heads if ungroup else n_kv_heads(model)
    if not separate_qkv:
        return _head_dests(model, block, None, n_keys)
    return [
        dest
        for head_input in HEAD_INPUT_HOOKS
        for dest in _head_dests(
            model,
            block,
            head_input,
            model.cfg.n_heads if head_input == "query" else n_keys,
        )
    ]


def _head_dests(
    model: TransformerBridge, block: int, head_input: HeadInput | None, n_dests: int
) -> list[DestNode]:
    """An input of a block's heads, shared by as many of them as `n_dests` asks for."""
    hook, letter = HEAD_INPUT_HOOKS[head_input] if head_input else ("hook_attn_in", None)
    group = model.cfg.n_heads // n_dests
    reaches_all_heads = has_norm_over_heads(model.blocks[block].attn, head_input)
    return [
        DestNode(
            name=f"A{block}.{idx}" + (f".{letter}" if letter else ""),
            module_name=f"blocks.{block}.{hook}",
            layer=_attention_layer(model, block),
            head_idx=idx,
            head_dim=2,
            weight=f"blocks.{block}.attn.W_{letter or 'QKV'}",
            weight_head_dim=0,
            component=_attention(model, block),
            heads=tuple(range(idx * group, (idx + 1) * group)),
            head_input=head_input,
            reaches_all_heads=reaches_all_heads,
        )
        for idx in range(n_dests)
    ]


def factorized_dest_nodes(
    model: TransformerBridge, separate_qkv: bool, ungroup: bool = False
) -> list[DestNode]:
    """Inputs of heads and MLPs, and the end, in the order in which they run."""
    dests: list[DestNode] = []
    are_normed = has_post_norm(model) and heads_add_up(model)
    for block in range(model.cfg.n_layers):
        of_heads = _attention_dests(model, block, separate_qkv, ungroup)
        # A norm of the sum of all heads makes each of them write another share of it.
        dests += [
            replace(d, reaches_all_heads=True) if are_normed else d for d in of_heads
        ]
        if has_mlps(model):
            dests.append(
                DestNode(
                    name=f"MLP {block}",
                    module_name=f"blocks.{block}.hook_mlp_in",
                    layer=_mlp_layer(model, block),
                    weight=f"blocks.{block}.mlp.W_in",
                    component=_mlp(block),
                )
            )
    last_block = model.cfg.n_layers - 1
    return dests + [
        DestNode(
            name="Resid End",
            module_name=f"blocks.{last_block}.hook_resid_post",
            layer=_end_layer(model),
            component=UNEMBED,
        )
    ]


CROSSING_INPUTS: tuple[HeadInput, ...] = ("key", "value")
"""What attention takes from other positions."""


def crossing_sites(model: Module, ungroup: bool = False) -> tuple[CrossingSite, ...]:
    """Where heads read keys and values of other positions, block by block.

    Raises ModelError for models whose attention TransformerLens does not compute itself.
    """
    assert isinstance(model, TransformerBridge)
    check_shows_attention(model)
    return tuple(
        _crossing_site(model, block, head_input, ungroup)
        for block in range(model.cfg.n_layers)
        for head_input in CROSSING_INPUTS
    )


def _crossing_site(
    model: TransformerBridge, block: int, head_input: HeadInput, ungroup: bool
) -> CrossingSite:
    n_heads = model.cfg.n_heads
    n_keys = n_heads if ungroup else n_kv_heads(model)
    inputs = _head_dests(model, block, head_input, n_keys)
    component = _attention(model, block)
    dests = [
        DestNode(
            name=f"A{block}.{head} by {head_input}",
            module_name=f"blocks.{block}.attn.hook_{head_input}_crossing",
            layer=_attention_layer(model, block),
            head_idx=head,
            head_dim=2,
            component=component,
            heads=(head,),
            head_input=head_input,
        )
        for head in range(n_heads)
    ]
    return CrossingSite(
        attention=model.blocks[block].attn,
        head_input=head_input,
        # Four query heads share two keys: inputs 0, 0, 1, 1.
        inputs=tuple(inputs[head * n_keys // n_heads] for head in range(n_heads)),
        dests=tuple(dests),
        is_causal=component.positions == "earlier",
    )


def _unfactorized_stages(model: TransformerBridge, block: int) -> list[tuple[str, str]]:
    """[(the sources' kind, the residual stream that they feed)] of one block."""
    if has_mlps(model) and not has_parallel_attention(model):
        return [("attention", "mid"), ("mlp", "post")]
    return [("attention and mlp" if has_mlps(model) else "attention", "post")]


def simple_graph_nodes(
    model: TransformerBridge, whole_attention: bool = False
) -> GraphNodes:
    """The unfactorized graph: components feed the residual stream right after them.

    Its edges are the components: patching `A0.1->Resid Mid 0` patches head 0.1.
    """
    if any(map(has_residual_scale, model.blocks)):
        raise ModelError(
            f"The unfactorized graph of this {model.cfg.architecture} model is not "
            "supported: it scales what its parts add to the residual stream. Use "
            "`factorized=True`."
        )
    srcs, whole = [_start()], whole_attention or not heads_add_up(model)
    dests: list[DestNode] = []
    stages = [
        (block, kinds, stream)
        for block in range(model.cfg.n_layers)
        for kinds, stream in _unfactorized_stages(model, block)
    ]
    for stage, (block, kinds, stream) in enumerate(stages):
        layer, min_src_idx = 2 * stage, len(srcs) - 1
        if "attention" in kinds:
            srcs += _attention_srcs(model, block, layer, len(srcs), whole)
        if "mlp" in kinds:
            srcs.append(_mlp_src(block, layer, len(srcs)))
        is_last = stage == len(stages) - 1
        name = "Resid End" if is_last else f"Resid {stream.title()} {block}"
        module_name = f"blocks.{block}.hook_resid_{stream}"
        component = UNEMBED if is_last else Component(f"residual {stream}", block, "own")
        dests.append(
            DestNode(
                name, module_name, layer + 1, min_src_idx=min_src_idx, component=component
            )
        )
        if not is_last:
            srcs.append(
                SrcNode(
                    name, module_name, layer + 2, src_idx=len(srcs), component=component
                )
            )
    return srcs, dests


def _graph_nodes(
    model: Module,
    factorized: bool,
    separate_qkv: bool | None,
    ungroup: bool = False,
    whole_attention: bool = False,
) -> GraphNodes:
    assert isinstance(model, TransformerBridge)
    check_is_decoder(model)
    if separate_qkv is None:
        raise ConfigError(
            "`separate_qkv` must be True or False for a transformer: True gives every "
            "head three inputs (query, key, value), False one."
        )
    if not factorized:
        return simple_graph_nodes(model, whole_attention)
    dests = factorized_dest_nodes(model, separate_qkv, ungroup)
    return factorized_src_nodes(model, whole_attention), dests


def _probe_input(model: Module) -> Int[Tensor, "batch seq"]:
    assert isinstance(model, TransformerBridge)
    seq_len = min(8, getattr(model.cfg, "n_ctx", 8) or 8)
    tokens = t.arange(2 * seq_len).reshape(2, seq_len) % model.cfg.d_vocab
    return tokens.to(next(model.parameters()).device)


def _blocks(model: Module) -> list[Module]:
    assert isinstance(model, TransformerBridge)
    return list(model.blocks)


def embed_tokens(
    model: Module, tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq d_model"] | None:
    """The embeddings of tokens, where those of positions are added to them, else None."""
    if "pos_embed" not in model._modules:
        return None
    embed: Any = model.embed
    return embed(tokens)


def has_grouped_queries(model: TransformerBridge) -> bool:
    """Do several query heads share one key-value head?"""
    return n_kv_heads(model) != model.cfg.n_heads


def _ungrouped(model: Module, whole_attention: bool = False) -> ModelAdapter:
    assert isinstance(model, TransformerBridge)
    grouped = WHOLE_ATTENTION_ADAPTER if whole_attention else TRANSFORMER_BRIDGE_ADAPTER
    check_is_decoder(model)
    if not has_grouped_queries(model):
        return grouped
    check_can_ungroup(model)
    nodes = partial(_graph_nodes, ungroup=True, whole_attention=whole_attention)
    return replace(
        grouped,
        graph_nodes=nodes,
        ports=partial(ports, ungroup=True),
        crossings=partial(crossing_sites, ungroup=True),
    )


TRIED = (
    *(
        "GPT-2",
        "GPT-BigCode",
        "GPT-Neo",
        "GPT-J",
        "CodeGen",
        "OPT",
        "XGLM",
        "BLOOM",
        "MPT",
    ),
    *("Pythia (GPT-NeoX)", "Falcon", "Phi 1, 2 and 3", "StableLM", "Cohere 1 and 2"),
    *(
        "Llama (also 4)",
        "Mistral (also NeMo)",
        "Ministral 3",
        "Mixtral",
        "Qwen 2 and 3 (also MoE)",
        "Gemma 1, 2 and 3",
    ),
    *("VaultGemma", "FlexOlmo", "ModernBERT decoder", "Jais 2", "MiniMax M2"),
    *("OLMo 1, 2, 3 and OLMoE", "Granite (also MoE)", "Starcoder 2", "SmolLM 3"),
    *("GLM, GLM-4 and 4.5", "EXAONE 4", "Ernie 4.5", "Apertus", "Nemotron", "Arcee"),
    *("Seed-OSS", "GPT-OSS", "Hunyuan"),
)
"""Architectures that were tried, and whose graphs are right."""
REFUSED = (
    "T5, BART, mT5, Marian and others with an encoder and a decoder",
    "Mamba, RWKV, Jamba, LFM 2, RecurrentGemma, Falcon H1 and others with states",
    "BERT, GPT 1, OPT-350m and others that norm the residual stream itself",
    "DeepSeek V2 and V3, whose heads read the residual stream through a bottleneck",
    "Falcon 40B, of which TransformerLens computes another model",
)
"""Those of which `patchable_model`, or `load_tl_model`, says why they cannot be used."""

TRANSFORMER_BRIDGE_ADAPTER = ModelAdapter(
    name="TransformerBridge",
    about="Hugging Face models that TransformerLens 4 loads.",
    tried=TRIED,
    refused=REFUSED,
    handles=lambda model: isinstance(model, TransformerBridge),
    graph_nodes=_graph_nodes,
    src_site=src_site,
    ports=ports,
    open_sites=open_sites,
    probe_input=_probe_input,
    find_unembed=lambda model: getattr(model, "unembed", None),
    blocks=_blocks,
    is_transformer=True,
    ungrouped=_ungrouped,
    embed_tokens=embed_tokens,
    open_hooks=heads_switched_on,
    crossings=crossing_sites,
    read_attention=read_attention,
    example=lambda: small_bridge(),
)

WHOLE_ATTENTION_ADAPTER = replace(
    TRANSFORMER_BRIDGE_ADAPTER,
    name="TransformerBridge, whole attention",
    graph_nodes=partial(_graph_nodes, whole_attention=True),
    ungrouped=partial(_ungrouped, whole_attention=True),
)
"""For graphs in which each attention layer is one source, `A0`, and not its heads.

`patchable_model(model, ..., adapter=WHOLE_ATTENTION_ADAPTER)`. Heads still have their own
inputs.
"""


def native_bridge(config: TransformerBridgeConfig) -> TransformerBridge:
    """A TransformerLens model without Hugging Face, whose heads can be patched.

    `TransformerBridge.boot_native` builds the same model with an attention that does not
    expose its heads. This one has standard (not rotary) positions, any norm or none,
    causal or bidirectional attention, with or without MLPs. Its weights are random.
    Raises ConfigError for rotary positions, which this attention would leave out.
    """
    if config.positional_embedding_type != "standard":
        raise ConfigError(
            f"`positional_embedding_type` is {config.positional_embedding_type!r}; this "
            "attention has 'standard' positions only, and would compute another model."
        )
    model = NativeModel(config)
    for layer in model.layers:
        attention: Any = layer.attn
        attention.head_dim = config.d_head
        attention.scaling = 1 / attention.scale
        attention.num_key_value_groups = attention.kv_repeats
        attention.is_causal = attention.causal
    bridge = build_bridge_from_module(
        model,
        "TransformerLensNative",
        tl_config=config,
        post_adapter_hook=_use_attention_with_heads,
    )
    return bridge.eval()


def _use_attention_with_heads(adapter) -> None:  # noqa: ANN001 (TransformerLens's type)
    adapter.component_mapping["blocks"].submodules["attn"] = (
        PositionEmbeddingsAttentionBridge(
            name="attn",
            config=adapter.cfg,
            submodules={name: LinearBridge(name=name) for name in "qkvo"},
            is_causal=getattr(adapter.cfg, "attention_dir", "causal") == "causal",
        )
    )


def small_bridge() -> TransformerBridge:
    """An example of a TransformerBridge: random weights, the same in every call."""
    with t.random.fork_rng(devices=[]):
        t.manual_seed(0)
        config = TransformerBridgeConfig(
            n_layers=2,
            n_heads=2,
            d_model=8,
            d_head=4,
            d_mlp=12,
            n_ctx=8,
            d_vocab=20,
            act_fn="gelu",
            normalization_type="LN",
            architecture="TransformerLensNative",
        )
        return native_bridge(config)
