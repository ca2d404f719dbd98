"""Node scores: head importance against plain hooks, and the way to edges and back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.errors import GraphError
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    sae_model,
)
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.head_importance import (
    HEAD_IMPORTANCE_PRUNE_ALGO,
    edge_scores_of_nodes,
    head_importance_prune_scores,
    node_prune_scores,
    node_scores,
)
from auto_circuit.types import AblationType
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import ARCHITECTURES, N_HEADS, gemma2, gpt2, state_snapshot
from tests.prune_algos.test_integrated_gradients import record
from tests.prune_algos.test_mask_gradient import make
from tests.test_prune import token_loader


def node_effects(model: PatchableModel, zero: bool = False) -> Tensor:
    """difference * gradient at each source, for each prompt: [prompt, position, source].

    By TransformerLens's hooks, one backward pass per prompt, for `token_loader(5, 5)`.
    """
    bridge: Any = model.wrapped_model
    (batch,) = token_loader(5, 5)
    names = list(dict.fromkeys(src.module_name for src in model.srcs))
    by_prompt = []
    for clean, corrupt in zip(batch.clean.split(1), batch.corrupt.split(1), strict=True):
        values, diff = record(bridge, clean, names)
        other, _ = record(bridge, corrupt, names)
        grads = dict(
            zip(names, t.autograd.grad(-diff, [values[n] for n in names]), strict=True)
        )
        effects = {
            name: (((0 if zero else other[name]) - values[name]) * grads[name]).sum(-1)
            for name in names
        }
        by_source = [
            (
                effects[src.module_name][..., src.head_idx]
                if src.head_idx is not None
                else effects[src.module_name]
            )
            for src in model.srcs
        ]
        by_prompt.append(t.stack(by_source, -1)[0].detach())
    return t.stack(by_prompt)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_edge_scores_add_up_to_node_scores(name: str) -> None:
    """The sum over a node's edges is gradient times difference at the node itself."""
    model = make(name)
    eap = edge_attribution_patching_prune_scores(model, token_loader(5, 2), None)
    expected = node_effects(model).sum(1).mean(0)
    assert (expected.abs() > 1e-5).all()
    t.testing.assert_close(node_scores(model, eap), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("ablation", [AblationType.RESAMPLE, AblationType.ZERO])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_head_importance_is_a_mean_of_absolute_values(
    ablation: AblationType, batch_size: int
) -> None:
    model, loader = make(), token_loader(5, batch_size)
    effects = node_effects(model, zero=ablation == AblationType.ZERO).sum(1)
    importance = effects.abs().mean(0)
    scores = head_importance_prune_scores(
        model, loader, None, ablation_type=ablation, normalize=False
    )
    # Into the end of the residual stream an edge has its source's score.
    end = scores["blocks.1.hook_resid_post"]
    t.testing.assert_close(end, importance, rtol=1e-3, atol=1e-6)
    assert not t.allclose(importance, effects.mean(0).abs(), rtol=0.05)
    normal = head_importance_prune_scores(model, loader, None, ablation_type=ablation)
    for layer in {src.layer for src in model.srcs}:
        here = [src.src_idx for src in model.srcs if src.layer == layer]
        found = normal["blocks.1.hook_resid_post"][here]
        t.testing.assert_close(found, importance[here] / importance[here].norm())


def test_head_importance_by_position() -> None:
    model = make(seq_len=5)
    scores = head_importance_prune_scores(
        model, token_loader(5, 5), None, normalize=False
    )
    t.testing.assert_close(
        scores["blocks.1.hook_resid_post"],
        node_effects(make()).abs().mean(0),
        rtol=1e-3,
        atol=1e-6,
    )


def test_micro_model_by_hand() -> None:
    """Head h of either layer multiplies by its weights; clean - corrupt is 2 * clean."""
    model, loader = micro_model(), micro_loader([1.0, -2.0])
    scores = head_importance_prune_scores(model, loader, None, normalize=False)
    # At the last position clean is [x, x]; patching a node changes it by -2 of itself.
    # B0.0 writes [1, 2] * x, which is multiplied by [5, 7]: loses 2 * (14 - 5) * x.
    # B1.1 writes [3, 4] * [5, 7] * x: loses 2 * (28 - 15) * x. Mean |x| is 1.5.
    end = scores["output"]
    expected = t.tensor([2 * (49 - 25), 2 * (14 - 5), 2 * (28 - 15), 18, 26.0]) * 1.5
    t.testing.assert_close(end, expected)
    # "B0.1->B1.0": the weaker of the two.
    edge = model.find_edges("B0.1->B1.0")[0]
    assert float(edge.prune_score(scores)) == pytest.approx(27.0)


@pytest.mark.parametrize(
    "name,qkv", [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)]
)
def test_an_edge_has_the_score_of_its_weaker_node(name: str, qkv: bool) -> None:
    model = make(name, qkv=qkv)
    scores = t.arange(1.0, model.plan.n_srcs + 1) * t.tensor([1.0, -1.0]).repeat(50)[:11]
    by_name = {src.name: float(scores[src.src_idx]) for src in model.srcs}
    edge_scores = edge_scores_of_nodes(model, scores)
    for edge in model.edges:
        # The scores grow with depth, so an edge's source is weaker than its end.
        assert float(edge.prune_score(edge_scores)) == by_name[edge.src.name]
    falling = edge_scores_of_nodes(model, scores.flip(0))
    by_name = {src.name: float(scores.flip(0)[src.src_idx]) for src in model.srcs}
    for edge in model.edges:
        component, _, head = edge.dest.name.removesuffix(".Q").partition(".")
        if component.startswith("A") and name == "llama":
            is_group = not edge.dest.name.endswith(".Q")
            # Key-value head k serves the query heads 2k and 2k + 1; the first is stronger.
            head = str(2 * int(head[0])) if is_group else head
        end = f"{component}.{head[0]}" if head else component
        expected = by_name.get(end, by_name[edge.src.name])
        assert float(edge.prune_score(falling)) == expected, edge.name


def latents_model(seq_len: int | None = None) -> PatchableModel:
    saes = sae_model(gpt2(), "resid_delta_mlp", load_pretrained=False, n_latents=3)
    return patchable_model(saes, True, "last_seq", seq_len, separate_qkv=True)


def effects_at_sites(model: PatchableModel) -> Tensor:
    """difference * gradient at each source of the latents' graph: [prompt position source].

    By plain hooks at the sites. Heads by their parts of what attention projects.
    """
    (batch,) = token_loader(5, 5)
    names = list(dict.fromkeys(src.module_name for src in model.srcs))
    sites = [model.adapter.src_site(model.wrapped_model, name).module for name in names]

    def outputs(tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        outs: list[Tensor] = []

        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            outs.append(out.clone().requires_grad_())
            return outs[-1]

        with ExitStack() as stack:
            stack.enter_context(model.adapter.open_sites(model.wrapped_model, True))
            for site in sites:
                stack.callback(site.register_forward_hook(hook).remove)
            logits = model.wrapped_model(tokens)
        return outs, logits[:, -1, 1] - logits[:, -1, 2]

    clean, diff = outputs(batch.clean)
    corrupt, _ = outputs(batch.corrupt)
    grads = t.autograd.grad(diff.sum(), clean)
    effects = []
    for name, ours, other, grad in zip(names, clean, corrupt, grads, strict=True):
        product = ((other - ours) * grad).detach()
        if name.endswith("latents"):
            effects.append(product.sum(-1))
        elif name.endswith("hook_result"):
            effects.append(product.unflatten(-1, (N_HEADS, -1)).sum(-1))
        else:
            effects.append(product.sum(-1, keepdim=True))
    return t.cat(effects, -1)


def ends_of(dest: str) -> Callable[[str], bool]:
    """Is a source what the destination of the latents' graph leads to?"""
    if dest.startswith("MLP"):
        return lambda src: src.startswith(f"{dest} ")
    return lambda src: src == dest[: len("A0.0")]


@pytest.mark.parametrize("seq_len", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_importance_of_latents_and_what_it_makes_of_edges(seq_len: int | None) -> None:
    model = latents_model(seq_len)
    by_position = effects_at_sites(model).transpose(0, 1)
    if seq_len is None:
        by_position = by_position.sum(0, keepdim=True)
    importance = by_position.abs().mean(1)
    assert len(model.srcs) == 1 + 2 * (N_HEADS + 3 + 1) == importance.shape[-1]
    scores = head_importance_prune_scores(
        model, token_loader(5, 2), None, normalize=False
    )
    n_by_end = 0
    for edge in model.edges:
        at = edge.seq_idx or 0
        start = float(importance[at, edge.src.src_idx])
        is_end = ends_of(edge.dest.name)
        # What attention reads as keys and values acts at later positions too.
        stop = len(importance) if edge.dest.name[-1] in "KV" else at + 1
        ends = [
            float(importance[later, src.src_idx])
            for src in model.srcs
            for later in range(at, stop)
            if is_end(src.name)
        ]
        assert bool(ends) == (edge.dest.name != "Resid End")
        expected = min(start, max(ends, default=start))
        n_by_end += expected < start
        found = float(edge.prune_score(scores))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), repr(edge)
    assert n_by_end > 10


def test_the_strongest_keeps_its_sign() -> None:
    model = latents_model(2)
    scores = t.full((2, len(model.srcs)), 9.0)
    of = {src.name: src.src_idx for src in model.srcs}
    for latent, values in enumerate([(1.0, 5.0), (-3.0, 4.0), (2.0, -6.0)]):
        scores[:, of[f"MLP 0 Latent {latent}"]] = t.tensor(values)
    scores[:, of["MLP 0 Error"]] = 0.0
    scores[:, of["A0.1"]] = t.tensor([2.0, -4.0])
    edge_scores = edge_scores_of_nodes(model, scores)

    def score(name: str) -> float:
        return float(model.find_edges(name)[0].prune_score(edge_scores))

    assert [score(f"Resid Start->MLP 0 @ {at}") for at in (0, 1)] == [-3.0, -6.0]
    assert [score(f"Resid Start->A0.1.V @ {at}") for at in (0, 1)] == [-4.0, -4.0]
    assert [score(f"Resid Start->A0.1.Q @ {at}") for at in (0, 1)] == [2.0, -4.0]


def test_node_circuits() -> None:
    """The edges above a threshold are all the edges between the nodes above it."""
    model = make()
    eap = edge_attribution_patching_prune_scores(model, token_loader(), None)
    nodes, edges = node_scores(model, eap), node_prune_scores(model, eap)
    threshold = float(nodes.abs().median())
    kept = {src.name for src in model.srcs if abs(nodes[src.src_idx]) >= threshold}
    assert 1 < len(kept) < len(model.srcs)
    for edge in model.edges:
        end = edge.dest.name.rstrip("QKV").rstrip(".")
        is_in = edge.src.name in kept and (end in kept or end == "Resid End")
        assert (abs(float(edge.prune_score(edges))) >= threshold) == is_in


@pytest.mark.parametrize("factorized", [True, False])
def test_other_graphs_and_state(factorized: bool) -> None:
    model = patchable_model(gemma2(), factorized, "last_seq", separate_qkv=True)
    before = state_snapshot(model)
    scores = HEAD_IMPORTANCE_PRUNE_ALGO.func(model, token_loader(), None)
    assert state_snapshot(model) == before
    for name, mask in model.patch_masks.items():
        assert scores[name].shape == mask.shape
        assert ((scores[name] >= 0) & (scores[name] <= 1 + 1e-6)).all()


def test_wrong_shapes() -> None:
    model = micro_model()
    scores = model.new_prune_scores()
    with pytest.raises(
        GraphError, match="'output' have shape .4,.; the graph needs .5,."
    ):
        node_scores(model, scores | {"output": t.zeros(4)})
    with pytest.raises(GraphError, match=r"shape \(4,\); the graph needs \(5,\)"):
        edge_scores_of_nodes(model, t.zeros(4))
