"""Heads by their weights do what TransformerLens's own heads do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import Olmo2Config, Olmo2ForCausalLM

from auto_circuit.model_utils import transformer_lens_sites
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import (
    N_HEADS,
    SIZES,
    gpt2,
    gpt2_folded,
    llama,
    pythia,
    randomize,
    tokens,
)
from tests.path_patching import patch_each_edge

SEQ = 5
CLEAN, CORRUPT = tokens(3, SEQ, seed=1), tokens(3, SEQ, seed=2)


def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for architectures whose heads do not follow from the weights."""
    monkeypatch.setattr(transformer_lens_sites, "projects_heads", lambda attention: False)


def set_masks(model: PatchableModel, kind: str) -> None:
    generator = t.Generator().manual_seed(0)
    for mask in model.patch_masks.values():
        noise = t.rand(mask.shape, generator=generator, dtype=mask.dtype)
        values = {
            "none": noise * 0,
            "any": noise,
            "few": (noise < 0.2).to(noise),
            "most": (noise > 0.2).to(noise),
        }
        mask.data = values[kind]


def outputs_and_gradients(model: PatchableModel, kind: str) -> list[Tensor]:
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        set_masks(model, kind)
        outputs = model(CLEAN)
        outputs.log_softmax(-1)[..., 3].sum().backward()
        gradients = [
            mask.grad.clone() for mask in masks.values() if mask.grad is not None
        ]
    set_masks(model, kind)
    with t.no_grad(), patch_mode(model, patch):
        without_gradients = [model(CLEAN).clone(), model(CLEAN).clone()]
    return [patch, outputs.detach(), *without_gradients, *gradients]


@pytest.mark.parametrize("separate_qkv", [True, False], ids=["qkv", "head"])
@pytest.mark.parametrize("seq_len", [None, SEQ], ids=["all", "positions"])
@pytest.mark.parametrize(
    "make", [gpt2, gpt2_folded, llama, pytest.param(pythia, marks=pytest.mark.slow)]
)
def test_heads_by_weights_are_those_of_the_switches(
    make: Callable[[], Any],
    seq_len: int | None,
    separate_qkv: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = ("none", "any", "few", "most")
    bridge = make().to(t.float64)
    args = (bridge, True, None, seq_len, separate_qkv)
    model = patchable_model(*args)
    by_weights = [outputs_and_gradients(model, kind) for kind in kinds]
    without_weights(monkeypatch)
    model = patchable_model(*args)
    assert all(port.heads is None for port in model.plan.dest_ports)
    # Llama's norm computes in float32, whatever it is given.
    atol, rtol = (1e-6, 1e-5) if make is llama else (1e-12, 0.0)
    for kind, ours in zip(kinds, by_weights, strict=True):
        assert len(ours) == 4 + len(model.patch_masks)
        # Of circuits of few edges, most edges have no gradient at all.
        assert sum(bool(tensor.any()) for tensor in ours) > len(ours) / 2
        theirs = outputs_and_gradients(model, kind)
        t.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_what_these_architectures_use(make: Callable[[], Any]) -> None:
    model = patchable_model(make(), True, separate_qkv=True)
    n_heads = [port.heads.n_rows for port in model.plan.dest_ports if port.heads]
    assert n_heads == [12, 12] if make is gpt2 else [8, 8]


def test_one_block_without_weights_is_enough_for_switches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The switches are the whole model's: then no block's heads go by the weights."""
    bridge = gpt2().to(t.float64)
    by_weights = outputs_and_gradients(
        patchable_model(bridge, True, None, None, True), "any"
    )
    first = bridge.blocks[0].attn
    monkeypatch.setattr(
        transformer_lens_sites, "projects_heads", lambda attn: attn is first
    )
    mixed = outputs_and_gradients(patchable_model(bridge, True, None, None, True), "any")
    for ours, theirs in zip(by_weights, mixed, strict=True):
        t.testing.assert_close(ours, theirs, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("make", [gpt2, llama, pythia])
def test_a_second_backward_pass_gives_the_same_gradients(
    make: Callable[[], Any],
) -> None:
    """Inputs of heads are made anew in each; what that overwrites must come back."""
    model = patchable_model(make().to(t.float64), True, None, None, True)
    patch = src_ablations(model, CORRUPT)
    gradients = []
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        set_masks(model, "any")
        loss = model(CLEAN).log_softmax(-1)[..., 3].sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
            gradients.append(
                [mask.grad.clone() for mask in masks.values() if mask.grad is not None]
            )
            model.zero_grad()
    assert all(gradient.any() for gradient in gradients[0])
    t.testing.assert_close(gradients[0], gradients[1], atol=0.0, rtol=1e-12)


@pytest.mark.parametrize("trained", ["ln1.", "attn.q."])
@pytest.mark.parametrize("make", [gpt2, gpt2_folded])
def test_weights_that_are_trained_get_the_gradients_of_the_switches(
    make: Callable[[], Any], trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed forms are for constant weights; the last block's inputs need no gradient."""
    bridge = make().to(t.float64)
    last = bridge.blocks[1].get_submodule(trained.rstrip("."))
    last.requires_grad_(True)

    def gradients() -> list[Tensor]:
        model = patchable_model(bridge, True, None, None, True)
        patch = src_ablations(model, CORRUPT)
        set_masks(model, "any")
        with patch_mode(model, patch):
            loss = model(CLEAN).log_softmax(-1)[..., 3].sum()
        return list(t.autograd.grad(loss, list(last.parameters())))

    by_weights = gradients()
    without_weights(monkeypatch)
    by_switches = gradients()
    assert len(by_weights) == 2 and all(gradient.any() for gradient in by_weights)
    t.testing.assert_close(by_weights, by_switches, atol=1e-12, rtol=0.0)


def test_a_norm_over_all_heads_mixes_them() -> None:
    """OLMo 2: an edge into one head's query changes what all heads of the block read."""
    sizes = {**SIZES, "num_key_value_heads": N_HEADS}
    config = Olmo2Config(**sizes)
    inner = Olmo2ForCausalLM(config)
    randomize(inner)
    bridge = build_bridge_from_module(inner, "Olmo2ForCausalLM", hf_config=config)
    bridge.eval().requires_grad_(False)
    graph = patchable_model(bridge, True, None, None, True)
    clean, corrupt = tokens(1, 6), tokens(1, 6, seed=1)
    patch = src_ablations(graph, corrupt)
    dests = ["A0.1.Q", "A0.2.K", "A1.0.Q", "A1.3.K", "A1.1.V"]
    expected = patch_each_edge(
        bridge, clean, corrupt, [("Resid Start", dest, None) for dest in dests]
    )
    whole = bridge(clean)
    patterns = []
    handle = bridge.blocks[1].attn.hook_pattern.register_forward_hook(
        lambda _, __, out: patterns.append(out)
    )
    for dest, by_hooks in zip(dests, expected, strict=True):
        with patch_mode(graph, patch, edges=[f"Resid Start->{dest}"]):
            patched = graph(clean)[0]
        assert (patched - whole[0]).abs().max() > 1e-3
        t.testing.assert_close(patched, by_hooks, rtol=0, atol=1e-5)
    graph(clean)
    handle.remove()
    of_query, of_plain = patterns[dests.index("A1.0.Q")], patterns[-1]
    changes = (of_query - of_plain).abs().amax(dim=(0, 2, 3))
    assert (changes > 1e-6).all()
