"""Integrated gradients against plain hooks, exact effects and completeness."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.errors import ConfigError
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.integrated_gradients import (
    ACTIVATION_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    CLEAN_CORRUPT_PRUNE_ALGO,
    INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    SOURCE_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    activation_integrated_gradients_prune_scores,
    clean_corrupt_prune_scores,
    input_integrated_gradients_prune_scores,
)
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.types import AblationType, PruneScores, SrcNode
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import ARCHITECTURES, gemma2, gpt2, state_snapshot
from tests.prune_algos.test_mask_gradient import answer_diff, make, switches
from tests.test_prune import token_loader

ALGOS = (
    INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    ACTIVATION_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    SOURCE_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    CLEAN_CORRUPT_PRUNE_ALGO,
)
inputs, activations = (
    input_integrated_gradients_prune_scores,
    activation_integrated_gradients_prune_scores,
)


def brief(algo: PruneAlgo) -> Callable[..., PruneScores]:
    """The algorithm with few points on the path: enough for what holds of any number."""
    has_points = "integrated_grad_samples" in inspect.signature(algo.func).parameters
    return partial(algo.func, integrated_grad_samples=2) if has_points else algo.func


def flat(model: PatchableModel, scores: PruneScores) -> Tensor:
    return t.stack([edge.prune_score(scores) for edge in model.edges])


def record(bridge: Any, tokens: Tensor, names: list[str], embed: Any = None) -> Any:
    """{name: activation} with gradients back to them, and the answers' difference.

    All by TransformerLens's own hooks; `embed` replaces the residual stream's start.
    """
    stored: dict[str, Tensor] = {}

    def store(name: str) -> Any:
        # By closure: some hook points have several names.
        def hook(value: Tensor, hook: Any) -> Tensor:
            value = embed if embed is not None and name == names[0] else value
            # A clone: what is read here, apart from the residual stream that goes on.
            stored[name] = value.clone().requires_grad_()
            return stored[name]

        return hook

    with switches(bridge):
        hooks = [(name, store(name)) for name in names]
        out = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    return stored, answer_diff(out)


def reference_inputs(model: PatchableModel, points: list[float]) -> Tensor:
    """EAP-IG on the inputs, for `token_loader(4, 4)`: a score for each edge."""
    bridge: Any = model.wrapped_model
    (batch,) = token_loader(4, 4)
    srcs = list(dict.fromkeys(node.module_name for node in model.srcs))
    dests = list(dict.fromkeys(node.module_name for node in model.dests))
    clean, _ = record(bridge, batch.clean, srcs)
    corrupt, _ = record(bridge, batch.corrupt, srcs)
    start = srcs[0]
    total: dict[str, Tensor] = {}
    for point in points:
        embed = (point * clean[start] + (1 - point) * corrupt[start]).detach()
        for dest in dests:  # one at a time: the gradient through the model above it
            reads, diff = record(bridge, batch.clean, [start, dest], embed)
            (grad,) = t.autograd.grad(-diff, reads[dest])
            total[dest] = total.get(dest, t.zeros(())) + grad / len(points)
    scores = []
    for edge in model.edges:
        src, dest = edge.src, edge.dest
        change = corrupt[src.module_name] - clean[src.module_name]
        grad = total[dest.module_name]
        change = change if src.head_idx is None else change[:, :, src.head_idx]
        grad = grad if dest.head_idx is None else grad[:, :, dest.head_idx]
        scores.append((change * grad).sum())
    return t.stack(scores).detach()


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_inputs_against_hooks(name: str) -> None:
    model, loader = make(name), token_loader(4, 4)
    expected = reference_inputs(model, [0.25, 0.75])
    scores = inputs(model, loader, None, integrated_grad_samples=2)
    assert (expected.abs() > 1e-6).float().mean() > 0.9
    t.testing.assert_close(flat(model, scores), expected, atol=1e-6, rtol=1e-3)
    eap = edge_attribution_patching_prune_scores(model, loader, None)
    assert not t.allclose(flat(model, eap), expected, rtol=0.05)


@pytest.mark.parametrize(
    "path_points,points",
    [("midpoints", [1 / 6, 0.5, 5 / 6]), ("clean_end", [1 / 3, 2 / 3, 1.0])]
    + [("corrupt_end", [0.0, 1 / 3, 2 / 3]), ("both_ends", [0.0, 1 / 3, 2 / 3, 1.0])],
)
def test_path_points(path_points: Any, points: list[float]) -> None:
    model = make()
    scores = inputs(
        model,
        token_loader(4, 4),
        None,
        integrated_grad_samples=3,
        path_points=path_points,
    )
    expected = reference_inputs(model, points)
    t.testing.assert_close(flat(model, scores), expected, atol=1e-6, rtol=1e-3)


def test_one_clean_point_is_edge_attribution_patching() -> None:
    model, loader = make("llama"), token_loader()
    eap = edge_attribution_patching_prune_scores(model, loader, None)
    for algo in (inputs, activations):
        scores = algo(
            model, loader, None, integrated_grad_samples=1, path_points="clean_end"
        )
        t.testing.assert_close(flat(model, scores), flat(model, eap))


@pytest.mark.parametrize("name", ["gpt2", "pythia"])
def test_clean_corrupt_is_the_mean_of_the_two_ends(name: str) -> None:
    model, loader = make(name), token_loader(4, 4)
    scores = clean_corrupt_prune_scores(model, loader, None)
    (batch,) = loader
    dests = {node.module_name: node.head_idx is None for node in model.dests}
    clean = src_ablations(model, batch.clean)
    difference = src_ablations(model, batch.corrupt) - clean
    bridge: Any = model.wrapped_model
    ends = []
    for side in (batch.clean, batch.corrupt):  # the corrupt prompts themselves
        grads = {}
        for dest in dests:
            start = model.srcs[0].module_name
            reads, diff = record(bridge, side, [start, dest])
            (grads[dest],) = t.autograd.grad(-diff, reads[dest])
        ends.append(grads)
    expected = []
    for edge in model.edges:
        grad = (ends[0][edge.dest.module_name] + ends[1][edge.dest.module_name]) / 2
        grad = grad if edge.dest.head_idx is None else grad[:, :, edge.dest.head_idx]
        expected.append((difference[edge.src.src_idx] * grad).sum())
    t.testing.assert_close(
        flat(model, scores), t.stack(expected).detach(), atol=1e-6, rtol=1e-3
    )


# ------------------------------------------------------------------------- activations


def source_patched(model: PatchableModel, srcs: list[SrcNode]) -> float:
    """The answer difference when these sources write what they write on corrupt prompts.

    By replacing the activations themselves, with plain hooks.
    """
    (batch,) = token_loader(4, 4)
    bridge: Any = model.wrapped_model
    names = list(dict.fromkeys(src.module_name for src in srcs))
    corrupt, _ = record(bridge, batch.corrupt, names or [model.srcs[0].module_name])

    def replace(name: str) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            for src in srcs:
                where = ... if src.head_idx is None else (..., src.head_idx, slice(None))
                value[where] = corrupt[name][where].detach()
            return value

        return hook

    with t.no_grad(), switches(bridge):
        hooks = [(name, replace(name)) for name in names]
        out = bridge.run_with_hooks(batch.clean, fwd_hooks=hooks)
    return float(answer_diff(out))


@pytest.mark.parametrize("share_passes", [True, False])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", pytest.param("pythia", marks=pytest.mark.slow)]
)
def test_activation_scores_add_up_to_each_sources_effect(
    name: str, share_passes: bool
) -> None:
    """Completeness: of each source, or, with shared passes, of each sublayer."""
    bridge = ARCHITECTURES[name]().double()
    model = patchable_model(bridge, True, "last_seq", separate_qkv=True)
    scores = activations(
        model,
        token_loader(4, 4),
        None,
        integrated_grad_samples=8,
        share_passes=share_passes,
    )
    by_group: dict[str, list[SrcNode]] = {}
    for src in model.srcs:
        by_group.setdefault(src.module_name if share_passes else src.name, []).append(src)
    clean = source_patched(model, [])
    for srcs in by_group.values():
        effect = clean - source_patched(model, srcs)
        total = sum(float(e.prune_score(scores)) for e in model.edges if e.src in srcs)
        assert abs(effect) > 1e-5
        assert total == pytest.approx(effect, rel=5e-3, abs=1e-5)


def test_sharing_passes_changes_only_heads() -> None:
    model, loader = make(), token_loader(4, 2)
    few = partial(activations, model, loader, None, integrated_grad_samples=3)
    shared, alone = flat(model, few()), flat(model, few(share_passes=False))
    is_head = t.tensor([edge.src.head_idx is not None for edge in model.edges])
    t.testing.assert_close(shared[~is_head], alone[~is_head])
    assert not t.allclose(shared[is_head], alone[is_head], rtol=1e-3)
    t.testing.assert_close(shared[is_head], alone[is_head], rtol=0.5, atol=0.01)


# -------------------------------------------------------------------------- every one


@pytest.mark.parametrize("algo", ALGOS, ids=lambda algo: algo.short_name)
def test_on_a_linear_model_scores_are_the_exact_effects(algo: Any) -> None:
    model, loader = micro_model(), micro_loader([1.0, 2.0, 5.0], batch_size=2)
    scores = algo.func(model, loader, None)
    effects = []
    for edge in model.edges:
        changes = []
        for batch in loader:
            clean = model(batch.clean)[model.out_slice]
            with patch_mode(model, src_ablations(model, batch.corrupt), [edge]):
                patched = model(batch.clean)[model.out_slice]
            change = clean - patched
            changes.append(change[:, 1] - change[:, 0])
        effects.append(t.cat(changes).mean())
    expected = t.stack(effects).detach()
    assert (expected != 0).sum() == 12  # the direct path favours neither answer
    t.testing.assert_close(flat(model, scores), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("algo", ALGOS, ids=lambda algo: algo.short_name)
@pytest.mark.parametrize("seq_len", [None, 5], ids=["all", "positions"])
def test_batches_positions_and_state(algo: Any, seq_len: int | None) -> None:
    model, func = make(seq_len=seq_len), brief(algo)
    before = state_snapshot(model)
    small, large = (func(model, token_loader(3, size), None) for size in (2, 3))
    assert state_snapshot(model) == before
    assert model.patch_session is None
    for name, scores in small.items():
        assert scores.shape == model.patch_masks[name].shape
        t.testing.assert_close(scores, large[name], rtol=1e-4, atol=1e-6)
    if seq_len is not None:
        summed = func(make(), token_loader(3, 3), None)
        for name, scores in summed.items():
            t.testing.assert_close(large[name].sum(0), scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algo", ALGOS, ids=lambda algo: algo.short_name)
def test_other_graphs_and_ablations(algo: Any) -> None:
    loader, func = token_loader(3, 3), brief(algo)
    models = [
        patchable_model(gpt2(), False, "last_seq", separate_qkv=True),
        patchable_model(gemma2(), True, "last_seq", separate_qkv=False),
    ]
    for model in models:
        resample = flat(model, func(model, loader, None))
        for ablation in (AblationType.ZERO, AblationType.TOKENWISE_MEAN_CORRUPT):
            scores = flat(model, func(model, loader, None, ablation_type=ablation))
            assert scores.isfinite().all() and (scores != 0).any()
            assert not t.allclose(scores, resample)


def test_bad_options() -> None:
    for algo in (inputs, activations):
        with pytest.raises(ConfigError, match="is 0; expected at least 1"):
            algo(make(), token_loader(), None, integrated_grad_samples=0)


# ----------------------------------------------------------------- fixed differences


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fixed_differences_with_and_without_gradients(
    factorized: bool, share: float
) -> None:
    """A patched edge adds the given difference, on every path through the engine."""
    model = patchable_model(gpt2(), factorized, "last_seq", separate_qkv=True)
    (batch,) = token_loader(4, 4)
    differences = src_ablations(model, batch.corrupt)
    edge = next(e for e in model.edges if e.dest.name == "Resid End")
    with patch_mode(model, differences, differences=True):
        set_all_masks(model, share)
        with t.no_grad():
            without = model(batch.clean)
        edge.patch_mask(model).requires_grad_()
        with_gradients = model(batch.clean)
        edge.patch_mask(model).requires_grad_(False)
        set_all_masks(model, 0.0)
    t.testing.assert_close(without, with_gradients, rtol=1e-4, atol=1e-5)


def test_fixed_differences_by_hand() -> None:
    model = micro_model()
    (batch,) = micro_loader([1.0])
    differences = t.zeros(5, 1, 3, 2)
    differences[0], differences[3] = 1.0, 10.0  # Resid Start, B1.0
    names = ["Resid Start->B0.1", "B1.0->Resid End"]
    with t.no_grad(), patch_mode(model, differences, names, differences=True):
        out = model(batch.clean)
    # Head 0.1 reads 1 more and writes [3, 4] more; layer 1 multiplies that by [5, 7].
    expected = batch.clean * t.tensor([25.0, 49.0]) + t.tensor([25.0, 38.0])
    t.testing.assert_close(out, expected)
