"""Grouped-query attention with a key and a value for every query head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.nn import Linear
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.metrics.circuit_pruning import connected_circuit
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.integrated_gradients import (
    input_integrated_gradients_prune_scores,
)
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    graph_edges,
    patch_mode,
    patchable_model,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.families import bridge_of
from tests.families import make as make_family
from tests.micro import micro_model
from tests.models import (
    D_MODEL,
    N_HEADS,
    N_LAYERS,
    SIZES,
    _bridge,
    gemma2,
    gpt2,
    llama,
    pythia,
    qwen2,
    state_snapshot,
    tokens,
)
from tests.path_patching import patch_each_edge
from tests.test_prune import token_loader

SEQ, N_KV = 5, 2
GROUP = N_HEADS // N_KV
CLEAN, CORRUPT = tokens(3, SEQ, seed=1), tokens(3, SEQ, seed=2)
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
SHARED: dict[str, Any] = {**SIZES, "num_key_value_heads": N_KV}


def qwen3() -> TransformerBridge:
    config = Qwen3Config(**SHARED, head_dim=D_MODEL // N_HEADS)
    return _bridge(Qwen3ForCausalLM(config))


def mistral() -> TransformerBridge:
    return _bridge(MistralForCausalLM(MistralConfig(**SHARED, sliding_window=3)))


def phi3() -> TransformerBridge:
    return _bridge(Phi3ForCausalLM(Phi3Config(**SHARED, pad_token_id=0)))


GROUPED: dict[str, Callable[[], TransformerBridge]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma2": gemma2,
    "phi3": phi3,
}
on_all = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "llama" else pytest.mark.slow)
        for name in GROUPED
    ],
)


def make(
    bridge: TransformerBridge,
    qkv: bool = True,
    seq_len: int | None = None,
    ungroup: bool = True,
) -> PatchableModel:
    return patchable_model(
        bridge, True, "last_seq", seq_len, separate_qkv=qkv, ungroup=ungroup
    )


def run(model: PatchableModel, inputs: Tensor, patch: Tensor, **kwargs: Any) -> Tensor:
    with t.no_grad(), patch_mode(model, patch):
        return model(inputs, **kwargs)


def run_with_grad(model: PatchableModel, inputs: Tensor, patch: Tensor) -> Tensor:
    with train_mask_mode(model), patch_mode(model, patch):
        return model(inputs).detach()


def random_masks(model: PatchableModel) -> None:
    generator = t.Generator().manual_seed(0)
    for mask in model.patch_masks.values():
        mask.data = t.rand(mask.shape, generator=generator, dtype=mask.dtype)


def tie(grouped: PatchableModel, ungrouped: PatchableModel) -> None:
    """Random masks of groups, and the same for each of their heads."""
    random_masks(grouped)
    for name, mask in ungrouped.patch_masks.items():
        of_groups = grouped.patch_masks[name].data
        if mask.shape != of_groups.shape:
            of_groups = of_groups.repeat_interleave(GROUP, -2)
        mask.data = of_groups.clone()


# ------------------------------------------------------------------------------ the graph


def benchmark_edges(n_layers: int, n_heads: int, parallel: bool = False) -> int:
    """How many edges the benchmark's `Graph.from_model` has, which counts them so."""
    n_edges, n_srcs = 0, 1
    for _ in range(n_layers):
        n_edges += 3 * n_heads * n_srcs
        n_edges += n_srcs if parallel else n_srcs + n_heads
        n_srcs += n_heads + 1
    return n_edges + n_srcs


def test_the_formula_gives_gpt2_smalls_edges() -> None:
    assert benchmark_edges(12, 12) == 32491


@on_all
def test_the_graph_is_the_benchmarks(name: str) -> None:
    model = make(GROUPED[name]())
    assert model.n_edges == benchmark_edges(N_LAYERS, N_HEADS)
    for letter in "QKV":
        names = [
            d.name for d in model.dests if d.name.startswith("A1") and letter in d.name
        ]
        assert names == [f"A1.{head}.{letter}" for head in range(N_HEADS)]


def gptj() -> TransformerBridge:
    return bridge_of(make_family("gptj"))


@pytest.mark.parametrize(
    "bridge",
    [gpt2, pythia, pytest.param(gptj, marks=pytest.mark.slow)],
    ids=["gpt2", "pythia", "gptj"],
)
def test_nothing_to_ungroup(bridge: Callable[[], TransformerBridge]) -> None:
    grouped, ungrouped = make(bridge(), ungroup=False), make(bridge())
    assert ungrouped.edges == grouped.edges
    assert ungrouped.n_edges == benchmark_edges(2, N_HEADS, parallel=bridge is not gpt2)
    patch = src_ablations(grouped, CORRUPT)
    for model in (grouped, ungrouped):
        random_masks(model)
    assert t.equal(run(ungrouped, CLEAN, patch), run(grouped, CLEAN, patch))


def test_graph_edges() -> None:
    edges = graph_edges(llama(), True, True, ungroup=True)[4]
    assert len(edges) == benchmark_edges(N_LAYERS, N_HEADS)


def test_a_heads_key_belongs_to_that_head_alone() -> None:
    model = make(llama())
    kept = ["Resid Start->A0.1.K", "A0.1->Resid End", "Resid Start->A0.0.K"]
    circuit = model.circuit_prune_scores(kept, bool=True)
    connected = connected_circuit(model, circuit)
    names = {edge.name for edge in model.edges if edge.prune_score(connected)}
    assert names == {"Resid Start->A0.1.K", "A0.1->Resid End"}


# ----------------------------------------------------------------------------- the laws


@on_all
@pytest.mark.parametrize("qkv,seq_len", [(True, None), (True, SEQ), (False, None)])
def test_no_mask_is_clean_and_all_masks_are_corrupt(
    name: str, qkv: bool, seq_len: int | None
) -> None:
    model = make(GROUPED[name](), qkv, seq_len)
    with t.no_grad():
        clean, corrupt = model.wrapped_model(CLEAN), model.wrapped_model(CORRUPT)
    assert (clean - corrupt).abs().max() > 0.01
    patch = src_ablations(model, CORRUPT)
    for forward in (run, run_with_grad):
        set_all_masks(model, 0.0)
        t.testing.assert_close(forward(model, CLEAN, patch), clean, **EXACT)
        set_all_masks(model, 1.0)
        t.testing.assert_close(forward(model, CLEAN, patch), corrupt, **EXACT)


@on_all
@pytest.mark.parametrize("qkv", [True, False], ids=["qkv", "head"])
def test_masks_tied_over_groups_are_the_grouped_masks(name: str, qkv: bool) -> None:
    bridge = GROUPED[name]()
    grouped, ungrouped = make(bridge, qkv, ungroup=False), make(bridge, qkv)
    patch = src_ablations(grouped, CORRUPT)
    tie(grouped, ungrouped)
    for forward in (run, run_with_grad):
        expected = forward(grouped, CLEAN, patch)
        t.testing.assert_close(forward(ungrouped, CLEAN, patch), expected, **EXACT)
    random_masks(ungrouped)
    assert not t.allclose(run(ungrouped, CLEAN, patch), expected, atol=1e-4)


@on_all
def test_scores_summed_over_a_group_are_the_grouped_scores(name: str) -> None:
    bridge, loader = GROUPED[name](), token_loader(4, 4)
    grouped, ungrouped = make(bridge, ungroup=False), make(bridge)
    for algo in (
        edge_attribution_patching_prune_scores,
        input_integrated_gradients_prune_scores,
    ):
        expected, found = algo(grouped, loader, None), algo(ungrouped, loader, None)
        for module, scores in expected.items():
            of_heads = found[module]
            if of_heads.shape != scores.shape:
                assert not t.allclose(of_heads[::GROUP], of_heads[1::GROUP], rtol=0.01)
                of_heads = of_heads.unflatten(0, (N_KV, GROUP)).sum(1)
            t.testing.assert_close(of_heads, scores, rtol=1e-3, atol=1e-6)


@on_all
def test_each_single_edge_is_an_independent_path_patch(name: str) -> None:
    model = make(GROUPED[name]())
    edges = [e for e in model.edges if e.dest.name.endswith((".K", ".V"))]
    if name == "gemma2":  # whose other sources, normalised, the plain hooks do not know
        edges = [edge for edge in edges if edge.src.src_idx == 0]
    edges = edges[::5]
    clean, corrupt = CLEAN[:1], CORRUPT[:1]
    patch = src_ablations(model, corrupt)
    ours = []
    for edge in edges:
        with t.no_grad(), patch_mode(model, patch, [edge]):
            ours.append(model(clean)[0])
    names = [(edge.src.name, edge.dest.name, None) for edge in edges]
    bridge: Any = model.wrapped_model
    with t.no_grad():
        unpatched = bridge(clean)
        expected = patch_each_edge(bridge, clean, corrupt, names, ungroup=True)
    t.testing.assert_close(t.stack(ours), expected, **EXACT)
    effects = (expected - unpatched).abs().amax((1, 2))
    assert (effects > 1e-6).float().mean() > 0.9


@pytest.mark.parametrize("letter", "KV")
def test_a_heads_key_or_value_changes_that_head_only(letter: str) -> None:
    model = make(llama())
    bridge: Any = model.wrapped_model
    patch = src_ablations(model, CORRUPT)
    seen: list[Tensor] = []

    def see(z: Tensor, hook: Any) -> None:
        seen.append(z.clone())

    bridge.add_hook("blocks.0.attn.hook_z", see)
    for edges in ([], [f"Resid Start->A0.2.{letter}"]):
        with t.no_grad(), patch_mode(model, patch, edges):
            model(CLEAN)
    bridge.reset_hooks()
    changes = (seen[1] - seen[0]).abs().amax((0, 1, 3))
    assert changes[2] > 1e-4
    assert changes[[0, 1, 3]].max() < 1e-6


@on_all
@pytest.mark.parametrize("qkv", [True, False], ids=["qkv", "head"])
@pytest.mark.parametrize("value", [0.0, 0.4])
def test_mask_gradients_are_finite_differences(
    name: str, qkv: bool, value: float
) -> None:
    model = make(GROUPED[name]().to(t.float64), qkv)
    patch = src_ablations(model, CORRUPT)

    def loss() -> Tensor:
        return model(CLEAN)[:, -1].square().sum()

    ends = (".K", ".V") if qkv else (".1", ".3")
    edges = [e for e in model.edges if e.dest.name.endswith(ends)][::13]
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        set_all_masks(model, value)
        loss().backward()
        grads = {name: mask.grad.clone() for name, mask in masks.items()}  # type: ignore[union-attr]
    found, expected = [], []
    for edge in edges:
        ends_of_step = []
        for step in (1e-2, -1e-2):
            set_all_masks(model, value)
            edge.patch_mask(model).data[edge.patch_idx] += step
            with t.no_grad(), patch_mode(model, patch):
                ends_of_step.append(float(loss()))
        expected.append((ends_of_step[0] - ends_of_step[1]) / 2e-2)
        found.append(float(edge.prune_score(grads)))
    # Softmax and norms compute in float32, whatever the model's type is.
    largest = max(abs(x) for x in expected)
    assert largest > 1e-3
    assert found == pytest.approx(expected, rel=5e-3, abs=5e-3 * largest)


@on_all
def test_a_prefix_in_the_cache_is_as_if_there_was_none(name: str) -> None:
    model = make(GROUPED[name]())
    bridge: Any = model.wrapped_model
    # Shorter than Mistral's window: cached positions outside of it are not this test.
    prefix = tokens(1, 2, seed=3).expand(len(CLEAN), -1)
    clean, corrupt = t.cat([prefix, CLEAN], 1), t.cat([prefix, CORRUPT], 1)
    random_masks(model)
    expected = run(model, clean, src_ablations(model, corrupt))[:, 2:]
    with t.no_grad():
        _, cache = bridge(prefix, return_type="logits_and_cache", use_cache=True)

    patch = src_ablations(model, corrupt)[:, :, 2:]
    found = run(model, CLEAN, patch, past_key_values=cache)
    t.testing.assert_close(found, expected, **EXACT)


def test_hooks_at_keys_see_all_heads() -> None:
    model = make(llama())
    bridge: Any = model.wrapped_model
    shapes = []
    for name in ("blocks.0.attn.hook_k", "blocks.0.attn.hook_v"):
        bridge.add_hook(name, lambda value, hook: shapes.append(tuple(value.shape)))
    run(model, CLEAN, src_ablations(model, CORRUPT))
    bridge.reset_hooks()
    d_head = D_MODEL // N_HEADS
    # Two for the recording, with the model's own heads, and two for the patched pass.
    of_model, ungrouped = (3, SEQ, N_KV, d_head), (3, SEQ, N_HEADS, d_head)
    assert shapes == [of_model] * 2 + [ungrouped] * 2


def test_the_model_is_as_it_was_also_after_an_error() -> None:
    bridge = llama()
    with t.no_grad():
        bare = bridge(CLEAN)  # the first pass registers hooks of TransformerLens's own
    before = state_snapshot(bridge)
    attributes = [dict(b.attn.__dict__) for b in bridge.blocks]
    inner = [dict(b.attn.original_component.__dict__) for b in bridge.blocks]
    model = make(bridge)
    patch = src_ablations(model, CORRUPT)
    random_masks(model)
    with pytest.raises(KeyError), patch_mode(model, patch):
        model(CLEAN)
        raise KeyError
    assert state_snapshot(bridge) == before
    for block, was, inner_was in zip(bridge.blocks, attributes, inner, strict=True):
        for key in ("config", "_update_kv_cache"):
            assert block.attn.__dict__.get(key) is was.get(key)
        now = block.attn.original_component.__dict__
        assert now["num_key_value_groups"] == inner_was["num_key_value_groups"] == GROUP
    with t.no_grad():
        assert t.equal(bridge(CLEAN), bare)


# --------------------------------------------------------------------------- what cannot be


def test_a_norm_over_all_key_heads_together() -> None:
    bridge = _bridge(Olmo2ForCausalLM(Olmo2Config(**SHARED, pad_token_id=0)))
    with pytest.raises(ModelError, match="ungroup=True.*a norm over keys.*ungroup=False"):
        make(bridge)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        # The norm over all keys has as many weights as a head has dimensions.
        ("olmo2", {"num_key_value_heads": 1}),
        # A norm for each head, each with weights of its own.
        ("stablelm", {"qk_layernorm": True}),
    ],
)
def test_norms_that_look_as_if_they_were_the_same_for_all_heads(
    family: str, options: dict[str, Any]
) -> None:
    bridge = bridge_of(make_family(family, **options))
    with pytest.raises(ModelError, match="a norm over keys.*ungroup=False"):
        make(bridge)
    patchable_model(bridge, True, separate_qkv=True)


def test_heads_that_are_not_told_apart_by_weights() -> None:
    bridge = llama()
    bridge.blocks[1].attn.q.original_component.__class__ = type("Other", (Linear,), {})
    with pytest.raises(ModelError, match="cannot be told apart by their weights"):
        make(bridge)


def test_models_without_attention() -> None:
    with pytest.raises(ConfigError, match="the adapter 'MicroModel' cannot"):
        patchable_model(micro_model().wrapped_model, True, ungroup=True)
