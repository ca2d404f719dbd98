"""Modified backward passes: values unchanged, gradients as the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.modules import replaced_forward
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.integrated_gradients import (
    input_integrated_gradients_prune_scores,
)
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.backward_modifiers import gim_backward, relp_backward
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.families import bridge_of
from tests.families import make as make_family
from tests.micro import micro_model
from tests.models import ARCHITECTURES, SIZES, gemma2, gpt2, llama, state_snapshot
from tests.plain_patching import SofterBackward
from tests.prune_algos.test_mask_gradient import make
from tests.test_prune import token_loader

Modifier = Callable[[PatchableModel], AbstractContextManager[None]]
MODIFIERS: list[Any] = [
    pytest.param(gim_backward, id="gim"),
    pytest.param(relp_backward, id="relp"),
    pytest.param(partial(relp_backward, freeze_attention_patterns=True), id="relp-AH"),
]
MODELS = {**ARCHITECTURES, "gemma2": gemma2}


@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("name", list(MODELS))
def test_values_stay_and_gradients_change(name: str, modifier: Modifier) -> None:
    model = patchable_model(MODELS[name](), True, "last_seq", separate_qkv=True)
    (batch,) = token_loader(4, 4)
    patch = src_ablations(model, batch.corrupt)
    before = state_snapshot(model)

    def run() -> tuple[Tensor, Tensor]:
        bare = model(batch.clean)
        with patch_mode(
            model, patch, ["Resid Start->MLP 1"] if name != "attn_only" else None
        ):
            return bare, model(batch.clean)

    with t.enable_grad():
        expected = run()
        plain = edge_attribution_patching_prune_scores(model, token_loader(4, 4), None)
        with modifier(model):
            found = run()
            scores = edge_attribution_patching_prune_scores(
                model, token_loader(4, 4), None
            )
    assert state_snapshot(model) == before
    for one, other in zip(found, expected, strict=True):
        t.testing.assert_close(one, other, rtol=0.0, atol=1e-5)
    for module_name, score in scores.items():
        assert score.isfinite().all()
        if score.any():
            assert not t.allclose(score, plain[module_name], rtol=1e-2, atol=0.0)
    assert any(score.any() for score in scores.values())
    again = edge_attribution_patching_prune_scores(model, token_loader(4, 4), None)
    assert all(t.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_hooks_are_removed_after_an_error(modifier: Modifier) -> None:
    model = make("llama")
    before = state_snapshot(model)
    with pytest.raises(KeyboardInterrupt), modifier(model):
        raise KeyboardInterrupt
    assert state_snapshot(model) == before


# ------------------------------------------------- the same rules in a model of our own


def layer_norm(x: Tensor, ln: Any, frozen: bool) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + ln.eps).sqrt()
    return centred / (scale.detach() if frozen else scale) * ln.weight + ln.bias


def rms_norm(x: Tensor, norm: Any, frozen: bool) -> Tensor:
    scale = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return x / (scale.detach() if frozen else scale) * norm.weight


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor + (x * (1 - factor)).detach()


def attention(q: Tensor, k: Tensor, v: Tensor, rules: str) -> Tensor:
    """[batch seq head d_head] of queries, keys and values -> the same of outputs."""
    if rules == "gim":
        q, k, v = scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5)
    scores = t.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    seq = q.shape[1]
    scores = scores.masked_fill(t.ones(seq, seq).triu(1).bool(), -1e9)
    pattern = SofterBackward.apply(scores) if rules == "gim" else scores.softmax(-1)
    if rules == "relp-AH":
        pattern = pattern.detach()
    return t.einsum("bhqk,bkhd->bqhd", pattern, v)


def by_rule(activation: Callable[[Tensor], Tensor], x: Tensor, rules: str) -> Tensor:
    if rules.startswith("relp"):
        return x * (activation(x) / x).detach()
    return activation(x)


def gpt2_by_hand(hf: Any, embed: Tensor, rules: str) -> Tensor:
    """The logits at the last position from GPT-2's residual stream at its start."""
    frozen, x = rules != "", embed
    for block in hf.transformer.h:
        q, k, v = (
            part.unflatten(-1, (4, -1))
            for part in block.attn.c_attn(layer_norm(x, block.ln_1, frozen)).chunk(3, -1)
        )
        x = x + block.attn.c_proj(attention(q, k, v, rules).flatten(2))
        pre = block.mlp.c_fc(layer_norm(x, block.ln_2, frozen))
        x = x + block.mlp.c_proj(by_rule(block.mlp.act, pre, rules))
    return hf.lm_head(layer_norm(x, hf.transformer.ln_f, frozen))[:, -1]


def llama_by_hand(hf: Any, embed: Tensor, rules: str) -> Tensor:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    frozen, x = rules != "", embed
    cos, sin = hf.model.rotary_emb(x, t.arange(x.shape[1])[None])
    for block in hf.model.layers:
        normed = rms_norm(x, block.input_layernorm, frozen)
        attn = block.self_attn
        q, k, v = (
            projection(normed).unflatten(-1, (-1, 8))
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        x = x + attn.o_proj(attention(q, k, v, rules).flatten(2))
        normed = rms_norm(x, block.post_attention_layernorm, frozen)
        mlp = block.mlp
        gated = by_rule(mlp.act_fn, mlp.gate_proj(normed), rules) * mlp.up_proj(normed)
        x = x + mlp.down_proj(scaled(gated, 0.5) if frozen else gated)
    return hf.lm_head(rms_norm(x, hf.model.norm, frozen))[:, -1]


@pytest.mark.parametrize("rules", ["", "gim", "relp", "relp-AH"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_of_a_model_written_by_hand(name: str, rules: str) -> None:
    """The gradient at the embeddings; in patch mode, as algorithms run."""
    modifiers: dict[str, Modifier] = {
        "gim": gim_backward,
        "relp": relp_backward,
        "relp-AH": partial(relp_backward, freeze_attention_patterns=True),
    }
    bridge: Any = {"gpt2": gpt2, "llama": llama}[name]().double()
    model = patchable_model(bridge, True, "last_seq", separate_qkv=True)
    (batch,) = token_loader(3, 3)
    stored: list[Tensor] = []

    def store(module: Any, args: Any, out: Tensor) -> Tensor:
        stored.append(out.detach().requires_grad_())
        return stored[-1]

    def gradient(in_patch_mode: bool) -> Tensor:
        handle = bridge.hook_dict["blocks.0.hook_resid_pre"].register_forward_hook(store)
        patch = src_ablations(model, batch.clean)
        stored.clear()
        if in_patch_mode:
            with patch_mode(model, patch, []):
                logits = model(batch.clean)[:, -1]
        else:
            logits = model(batch.clean)[:, -1]
        handle.remove()
        assert len(stored) == 1
        (grad,) = t.autograd.grad((logits[:, 1] - logits[:, 2]).sum(), stored[0])
        return grad

    hf = bridge.original_model
    by_hand = {"gpt2": gpt2_by_hand, "llama": llama_by_hand}[name]
    plain = gradient(True)
    embed = stored[0].detach().requires_grad_()
    if rules:
        with modifiers[rules](model):
            found = [gradient(True), gradient(False)]
        assert not t.allclose(found[0], plain, rtol=0.05)
    else:
        found = [plain]
    logits = by_hand(hf, embed, rules)
    t.testing.assert_close(logits, model(batch.clean)[:, -1], rtol=1e-5, atol=1e-5)
    (expected,) = t.autograd.grad((logits[:, 1] - logits[:, 2]).sum(), embed)
    for grad in found:
        t.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------- use


def test_frozen_patterns_leave_queries_and_keys_without_score() -> None:
    model = make()
    with relp_backward(model, freeze_attention_patterns=True):
        scores = edge_attribution_patching_prune_scores(model, token_loader(), None)
    for edge in model.edges:
        is_frozen = edge.dest.name.endswith((".Q", ".K"))
        assert (float(edge.prune_score(scores)) == 0) == is_frozen


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_around_integrated_gradients(modifier: Modifier) -> None:
    model, loader = make(), token_loader(4, 2)
    plain = input_integrated_gradients_prune_scores(model, loader, None)
    with modifier(model):
        scores = input_integrated_gradients_prune_scores(model, loader, None)
    name = "blocks.1.hook_mlp_in"
    assert scores[name].any()
    assert not t.allclose(scores[name], plain[name], rtol=0.05)


def test_temperature_1_changes_only_the_factors() -> None:
    """At temperature 1 the softmax is its own; at 2 it is not."""
    model, loader = make("attn_only"), token_loader(4, 4)
    name = "blocks.1.hook_q_input"
    scores = {}
    for temperature in (1.0, 2.0):
        with gim_backward(model, softmax_temperature=temperature):
            scores[temperature] = edge_attribution_patching_prune_scores(
                model, loader, None
            )
    with relp_backward(model):  # an attention-only model: frozen norms, nothing else
        frozen = edge_attribution_patching_prune_scores(model, loader, None)
    t.testing.assert_close(scores[1.0][name], frozen[name] / 4, rtol=1e-4, atol=1e-7)
    assert not t.allclose(scores[2.0][name], frozen[name] / 4, rtol=0.05)


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_other_models_are_refused(modifier: Modifier) -> None:
    with pytest.raises(ConfigError, match="this is a MicroModel"):
        with modifier(micro_model()):
            pass


def test_a_mixture_of_experts_is_refused() -> None:
    from tests.models import _bridge

    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    bridge = _bridge(MixtralForCausalLM(config))
    model = patchable_model(bridge, True, "last_seq", separate_qkv=True)
    before = state_snapshot(model)
    with pytest.raises(ModelError, match="cannot reach inside of MoEBridge"):
        with gim_backward(model):
            pass
    assert state_snapshot(model) == before


def gptj_model() -> PatchableModel:
    """Its attention runs in Hugging Face's own code; its MLP is as any."""
    return patchable_model(bridge_of(make_family("gptj")), True, None, separate_qkv=True)


@pytest.mark.parametrize(
    "modifier", [gim_backward, partial(relp_backward, freeze_attention_patterns=True)]
)
def test_attention_that_shows_no_softmax_is_refused(modifier: Modifier) -> None:
    model = gptj_model()
    before = state_snapshot(model)
    with pytest.raises(ModelError, match="AttentionBridge .attention in Hugging Face's"):
        with modifier(model):
            pass
    assert state_snapshot(model) == before


def test_a_norm_that_the_bridge_does_not_have_is_refused() -> None:
    """Of an OPT whose embeddings are projected, TransformerLens shows no norm at the end."""
    bridge = bridge_of(make_family("opt", word_embed_proj_dim=16))
    model = patchable_model(bridge, True, None, separate_qkv=True)
    with pytest.raises(ModelError, match="cannot reach inside of LayerNorm"):
        with relp_backward(model):
            pass


def test_a_norm_that_computes_something_else_is_refused() -> None:
    model = make("llama")
    norm: Any = model.wrapped_model.blocks[0].ln2.original_component  # type: ignore[union-attr, index]
    with replaced_forward(norm, lambda x: 2 * x), gim_backward(model):
        with pytest.raises(ModelError, match="LlamaRMSNorm of this model computes some"):
            edge_attribution_patching_prune_scores(model, token_loader(), None)


def test_masks_between_see_constant_scales_of_post_norms() -> None:
    """Where all edges are patched, nothing of the clean run has a gradient.

    What the residual stream hands on and what its heads take away cancel, by the same rule.
    """
    bridge: Any = gemma2().double()
    model = patchable_model(bridge, True, None, separate_qkv=True)
    (batch,) = token_loader(3, 3)
    patch, seen = src_ablations(model, batch.corrupt), []

    def follow(module: Any, args: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[-1]

    handle = bridge.blocks[0].attn.o.hook_in.register_forward_hook(follow)
    for modifier in (nullcontext, gim_backward, relp_backward):
        with modifier(model), train_mask_mode(model), patch_mode(model, patch):
            set_all_masks(model, 1.0)
            logits = model(batch.clean)
            (grad,) = t.autograd.grad(logits.square().sum(), seen[-1])
        assert grad.abs().max() < 1e-5 * logits.square().sum()
    handle.remove()


def test_a_temperature_of_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a number above 0"):
        with gim_backward(make(), softmax_temperature=0.0):
            pass


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_patched_values_are_what_they_are_without(share: float) -> None:
    model, (batch,) = make("llama"), token_loader(4, 4)
    patch = src_ablations(model, batch.corrupt)

    def logits() -> Tensor:
        with train_mask_mode(model), patch_mode(model, patch):
            set_all_masks(model, share)
            return model(batch.clean).detach()

    true = logits()
    for modifier in (gim_backward, relp_backward):
        with modifier(model):
            t.testing.assert_close(logits(), true, atol=1e-6, rtol=0.0)


# ------------------------------------------------------------- scores of edges, by hand


def per_head(x: Tensor) -> Tensor:
    """Inputs of heads' own: [batch seq head d_model]."""
    return x.unsqueeze(2).repeat(1, 1, 4, 1)


def in_heads(weight: Tensor, n_heads: int) -> Tensor:
    """[d_model width] -> [head d_model d_head]."""
    return weight.unflatten(1, (n_heads, -1)).movedim(1, 0)


def project(x: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    return t.einsum("bshd,hde->bshe", x, in_heads(weight, x.shape[2])) + bias


class ByHand:
    """Sources' outputs and destinations' inputs of one pass, written out once more."""

    def __init__(self) -> None:
        self.reads: dict[str, Tensor] = {}
        self.writes: dict[str, Tensor] = {}

    def read(self, name: str, x: Tensor) -> Tensor:
        """What a destination reads, apart from the residual stream that goes on."""
        self.reads[name] = x.clone()
        return self.reads[name]

    def write_heads(self, layer: int, z: Tensor, weight: Tensor) -> Tensor:
        out = t.einsum("bshe,hed->bshd", z, weight.unflatten(0, (4, -1)))
        self.writes.update({f"A{layer}.{h}": out[:, :, h] for h in range(4)})
        return out.sum(2)

    def write(self, name: str, x: Tensor) -> Tensor:
        self.writes[name] = x
        return x

    def gpt2(self, hf: Any, tokens: Tensor, rules: str) -> Tensor:
        frozen, model = rules != "", hf.transformer
        positions = model.wpe(t.arange(tokens.shape[1]))
        x = self.write("Resid Start", model.wte(tokens) + positions)
        for i, block in enumerate(model.h):
            weights = block.attn.c_attn.weight.chunk(3, -1)
            biases = block.attn.c_attn.bias.unflatten(0, (3, 4, -1))
            q, k, v = (
                project(
                    layer_norm(self.read(f"A{i} {n}", per_head(x)), block.ln_1, frozen),
                    weight,
                    bias,
                )
                for n, weight, bias in zip("QKV", weights, biases, strict=True)
            )
            z = attention(q, k, v, rules)
            x = x + self.write_heads(i, z, block.attn.c_proj.weight)
            x = x + block.attn.c_proj.bias
            read = layer_norm(self.read(f"MLP {i}", x), block.ln_2, frozen)
            hidden = by_rule(block.mlp.act, block.mlp.c_fc(read), rules)
            x = x + self.write(f"MLP {i}", block.mlp.c_proj(hidden))
        return hf.lm_head(layer_norm(self.read("Resid End", x), model.ln_f, frozen))

    def llama(self, hf: Any, tokens: Tensor, rules: str) -> Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        frozen, model = rules != "", hf.model
        x = self.write("Resid Start", model.embed_tokens(tokens))
        cos, sin = model.rotary_emb(x, t.arange(x.shape[1])[None])
        for i, block in enumerate(model.layers):
            attn = block.self_attn
            # Key-value head 1 serves the query heads 2 and 3.
            q, k, v = (
                project(
                    rms_norm(
                        self.read(f"A{i} {n}", per_head(x)[:, :, ::group]),
                        block.input_layernorm,
                        frozen,
                    ),
                    projection.weight.T,
                    0.0,
                )
                for n, projection, group in (
                    ("Q", attn.q_proj, 1),
                    ("K", attn.k_proj, 2),
                    ("V", attn.v_proj, 2),
                )
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
            k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
            z = attention(q, k, v, rules)
            x = x + self.write_heads(i, z, attn.o_proj.weight.T)
            read = self.read(f"MLP {i}", x)
            normed = rms_norm(read, block.post_attention_layernorm, frozen)
            mlp = block.mlp
            gate = by_rule(mlp.act_fn, mlp.gate_proj(normed), rules)
            gated = gate * mlp.up_proj(normed)
            gated = scaled(gated, 0.5) if frozen else gated
            x = x + self.write(f"MLP {i}", mlp.down_proj(gated))
        return hf.lm_head(rms_norm(self.read("Resid End", x), model.norm, frozen))


@pytest.mark.parametrize(
    "name,rules",
    [
        ("gpt2", "gim"),
        ("llama", "relp"),
        pytest.param("gpt2", "relp", marks=pytest.mark.slow),
        pytest.param("llama", "gim", marks=pytest.mark.slow),
    ],
)
def test_scores_of_edges_in_a_model_written_by_hand(name: str, rules: str) -> None:
    """(corrupt - clean) source times gradient at the destination, edge by edge."""
    bridge: Any = {"gpt2": gpt2, "llama": llama}[name]().double()
    model = patchable_model(bridge, True, "last_seq", separate_qkv=True)
    loader = token_loader(3, 3)
    (batch,) = loader
    with {"gim": gim_backward, "relp": relp_backward}[rules](model):
        scores = edge_attribution_patching_prune_scores(model, loader, None)
    clean, corrupt = ByHand(), ByHand()
    with t.no_grad():
        getattr(corrupt, name)(bridge.original_model, batch.corrupt, rules)
    bridge.requires_grad_(True)  # so that there is a graph
    logits = getattr(clean, name)(bridge.original_model, batch.clean, rules)[:, -1]
    loss = (logits[:, 2] - logits[:, 1]).mean()
    grads = t.autograd.grad(loss, list(clean.reads.values()))
    grad_of = dict(zip(clean.reads, grads, strict=True))
    expected = []
    for edge in model.edges:
        component, _, head_and_letter = edge.dest.name.partition(".")
        head, _, letter = head_and_letter.partition(".")
        grad = grad_of[f"{component} {letter}" if letter else component]
        grad = grad[:, :, int(head)] if head else grad
        change = corrupt.writes[edge.src.name] - clean.writes[edge.src.name]
        expected.append((change * grad).sum())
    by_hand = t.stack(expected).detach()
    ours = t.stack([edge.prune_score(scores) for edge in model.edges])
    assert (by_hand.abs() > 1e-6).float().mean() > 0.9
    t.testing.assert_close(ours.double(), by_hand, rtol=1e-4, atol=1e-8)
