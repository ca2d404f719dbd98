"""Blocks that do something in another way than GPT-2's, and those that are refused.

`test_architectures.py` compares every family with plain Hugging Face hooks.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch as t
from torch import Tensor
from torch.nn import Linear
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
)

from auto_circuit.errors import ModelError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.model_utils.block_facts import mlp_shares_norm, whole_mlp
from auto_circuit.model_utils.transformer_lens_utils import WHOLE_ATTENTION_ADAPTER
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.families import D_MODEL, FAMILIES, N_HEADS, REFUSED, bridge_of, make
from tests.models import SIZES, folded, tokens

CLEAN, CORRUPT = tokens(2, 5, seed=1), tokens(2, 5, seed=2)


def bridge(name: str, **options: Any) -> TransformerBridge:
    return bridge_of(make(name, **options))


def at_mask(model: PatchableModel, value: float) -> Tensor:
    """The output on the clean prompts with every mask at a value."""
    patch = src_ablations(model, CORRUPT)
    with t.no_grad(), patch_mode(model, patch):
        set_all_masks(model, value)
        return model(CLEAN)


TWO_STREAMS, STATES = "an encoder and a decoder", "state space, recurrent or convolution"
MISSING = {
    **dict.fromkeys(("t5", "mt5", "bart", "marian"), TWO_STREAMS),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "jamba", "falcon_h1"), STATES),
    **dict.fromkeys(("recurrent_gemma", "lfm2"), STATES),
    **dict.fromkeys(("bert", "gpt1", "opt_norm_after"), "norms the sums"),
    "deepseek_v3": "queries, keys and values alone",
}
FAST = ("mamba", "bert", "opt_norm_after")  # T5 takes seconds to import


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in REFUSED],
)
def test_what_is_not_supported_says_what_was_not_found(name: str) -> None:
    """Before TransformerLens says what follows from it."""
    for ungroup in (False, True):
        with pytest.raises(ModelError, match=MISSING[name]) as caught:
            model = load_tl_model(make(name))
            patchable_model(model, True, separate_qkv=True, ungroup=ungroup)
        assert "Use a decoder-only transformer" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [pytest.param("t5", marks=pytest.mark.slow), "mamba"])
def test_a_bridge_of_such_a_model_is_refused_too(name: str) -> None:
    with pytest.raises(ModelError, match=MISSING[name]):
        patchable_model(bridge(name), True, separate_qkv=True)


def test_norms_of_the_sums_that_a_configuration_asks_for() -> None:
    inner = bridge("bloom", apply_residual_connection_post_layernorm=True)
    with pytest.raises(ModelError, match="norms the sums.*not supported"):
        patchable_model(inner, True, separate_qkv=True)


def test_a_gate_of_attention_reads_the_residual_stream_too() -> None:
    """Nothing could be patched into it, so that it would read clean prompts always."""
    sizes: Any = SIZES | {"num_key_value_heads": 2, "head_dim": D_MODEL // N_HEADS}
    config = AfmoeConfig(**sizes, num_experts=4, moe_intermediate_size=8)
    inner = bridge_of(AfmoeForCausalLM(config))
    with pytest.raises(ModelError, match="there is `gate_proj` too.*not supported"):
        patchable_model(inner, True, separate_qkv=True)


def test_heads_shares_of_a_normed_sum_are_what_the_layer_adds() -> None:
    """Hugging Face's own norm says what the layer adds."""
    plain: Any = make("gemma2")
    added: list[Tensor] = []
    for layer in plain.model.layers:
        layer.post_attention_layernorm.register_forward_hook(
            lambda module, args, out: added.append(out)
        )
    plain(CLEAN)
    model = patchable_model(bridge("gemma2"), True, separate_qkv=True)
    written = src_ablations(model, CLEAN)
    assert len(added) == 2
    for layer, expected in enumerate(added):
        srcs = [src for src in model.srcs if src.name.startswith(f"A{layer}.")]
        assert len(srcs) == N_HEADS
        shares = written[[src.src_idx for src in srcs]]
        assert (shares.abs().mean((1, 2, 3)) > 0.05).all()
        t.testing.assert_close(shares.sum(0), expected)


@pytest.mark.parametrize("ungroup", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_whole_layer_is_an_option(ungroup: bool) -> None:
    inner, arguments = bridge("gemma2"), {"separate_qkv": True, "ungroup": ungroup}
    heads = patchable_model(inner, True, **arguments)  # type: ignore[arg-type]
    whole = patchable_model(
        inner,
        True,
        adapter=WHOLE_ATTENTION_ADAPTER,
        **arguments,  # type: ignore[arg-type]
    )
    assert [src.name for src in whole.srcs][1:3] == ["A0", "MLP 0"]
    assert [dest.name for dest in whole.dests] == [dest.name for dest in heads.dests]
    for value, inputs in ((0.0, CLEAN), (1.0, CORRUPT)):
        with t.no_grad():
            expected = inner(inputs)
        for model in (heads, whole):
            t.testing.assert_close(at_mask(model, value), expected, atol=1e-5, rtol=0.0)


def test_an_mlp_that_shares_the_heads_norm_where_weights_were_processed() -> None:
    """TransformerLens's gated MLP then calls none of its linear maps as a module."""
    inner = folded(bridge("stablelm_parallel"))
    assert mlp_shares_norm(inner.blocks[0])
    assert inner.blocks[0].mlp._use_processed_weights
    model = patchable_model(inner, True, separate_qkv=True)
    with t.no_grad():
        clean, corrupt = inner(CLEAN), inner(CORRUPT)
    t.testing.assert_close(at_mask(model, 0.0), clean, atol=1e-5, rtol=0.0)
    t.testing.assert_close(at_mask(model, 1.0), corrupt, atol=1e-5, rtol=0.0)
    assert inner.blocks[0].mlp._use_processed_weights
    patch = src_ablations(model, CORRUPT)
    with t.no_grad(), patch_mode(model, patch, ["Resid Start->MLP 1"]):
        assert (model(CLEAN) - clean).abs().max() > 1e-3


def test_what_computes_an_mlp_and_nothing_else() -> None:
    """What a module gives is remembered only if it depends on what its MLP reads alone."""
    assert whole_mlp(bridge("gpt2").blocks[0]) is not None
    for name in ("mpt", "opt"):
        assert whole_mlp(bridge(name).blocks[0]) is None, name


def test_the_unfactorized_graph_of_scaled_residuals() -> None:
    with pytest.raises(ModelError, match="scales what its parts add.*factorized=True"):
        patchable_model(bridge("granite"), False, separate_qkv=True)


def test_residuals_that_are_scaled_by_1() -> None:
    """Their blocks' hook points fire no more often than those of others' (Granite)."""
    inner = bridge("granite", residual_multiplier=1.0)
    model = patchable_model(inner, True, separate_qkv=True)
    with t.no_grad():
        clean, corrupt = inner(CLEAN), inner(CORRUPT)
    t.testing.assert_close(at_mask(model, 0.0), clean, atol=1e-5, rtol=0.0)
    t.testing.assert_close(at_mask(model, 1.0), corrupt, atol=1e-5, rtol=0.0)


def test_where_all_edges_are_patched_every_source_writes_what_it_writes_there() -> None:
    """Whatever reads the residual stream, and is no destination, would read clean prompts."""
    for name in ("gptj", "gemma2"):
        model = patchable_model(bridge(name), True, separate_qkv=True)
        set_all_masks(model, 1.0)
        patch = src_ablations(model, CORRUPT)
        written = t.zeros_like(patch)
        with t.no_grad(), patch_mode(model, patch, curr_src_outs=written):
            model(CLEAN)
        assert not t.allclose(written[0], patch[0])  # the embeddings read nothing
        t.testing.assert_close(written[1:], patch[1:], atol=1e-5, rtol=1e-4)


def test_a_norm_of_all_heads_values_lets_each_input_reach_all_heads() -> None:
    model = patchable_model(bridge("llama"), True, separate_qkv=True)
    assert not any(dest.reaches_all_heads for dest in model.dests)
    config = BitNetConfig(**SIZES, num_key_value_heads=2)
    model = patchable_model(bridge_of(BitNetForCausalLM(config)), True, separate_qkv=True)
    assert all(dest.reaches_all_heads for dest in model.dests if dest.heads)


def test_heads_that_transformer_lens_does_not_show() -> None:
    inner = bridge("gptj")
    inner.blocks[1].attn.q.original_component.__class__ = type("Other", (Linear,), {})
    with pytest.raises(ModelError, match="not expose its heads.*not supported") as caught:
        patchable_model(inner, True, separate_qkv=True)
    assert "native_bridge" not in str(caught.value)


def test_a_model_that_cannot_be_run_with_its_nodes_in_view() -> None:
    inner = bridge("gpt2")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Sizes do not match.\n(really)")

    with (
        mock.patch.object(type(inner), "forward", fail),
        pytest.raises(ModelError, match=r"RuntimeError: Sizes do not match\. \(really\)"),
    ):
        patchable_model(inner, True, separate_qkv=True)


def test_attention_that_reads_its_input_in_another_way() -> None:
    """A class that looks like any other, and calls a linear map with something else."""
    inner = bridge("llama")
    for block in inner.blocks:
        attention: Any = block.attn
        plain = type(attention)

        class Doubling(plain):  # type: ignore[misc, valid-type]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                kwargs["hidden_states"] = 2 * kwargs["hidden_states"]
                return super().forward(*args, **kwargs)

        attention.__class__ = Doubling
    with pytest.raises(ModelError, match="do not read what was expected"):
        patchable_model(inner, True, separate_qkv=True)


def test_the_families() -> None:
    assert len(FAMILIES) >= 40
