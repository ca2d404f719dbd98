"""The algorithms that patch edges one by one: ACDC and exact edge patching."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.prune_algos.ACDC import (
    acdc_prune_scores,
    removed_edges,
    take_edges_out,
)
from auto_circuit.prune_algos.acdc_after_eap import acdc_after_eap_prune_scores
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.exact_edge_patching import (
    edge_effects,
    exact_edge_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_training import training_batches
from auto_circuit.ranking import circuit_mask
from auto_circuit.tasks import POCKET_IOI_TASK
from auto_circuit.types import AblationType, Edge
from auto_circuit.utils.ablation_activations import record_src_outs, src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, starting_at
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import attn_only, gpt2, llama, pythia, tokens
from tests.test_prune import token_loader

CLEAN = tokens(3, 5, seed=1)
EARLY_NAME = "Resid Start->A0.1.Q"


def plain_acdc(
    model: PatchableModel, loader: Any, threshold: float, step: int = 1
) -> list[Edge]:
    """The published loop, every step with a context and a circuit of its own."""
    batch = next(iter(loader))
    corrupt, corrupt_kwargs = batch.model_input("corrupt")
    patch = record_src_outs(model, corrupt, corrupt_kwargs)
    tokens, kwargs = batch.model_input("clean")
    with t.no_grad():
        clean = model(tokens, **kwargs)[model.out_slice].log_softmax(-1)

    def distance(edges: list[Edge]) -> float:
        with t.no_grad(), patch_mode(model, patch, edges):
            logprobs = model(tokens, **kwargs)[model.out_slice].log_softmax(-1)
        return float((clean.exp() * (clean - logprobs)).sum(-1).mean())

    removed: list[Edge] = []
    last = 0.0
    for layer in sorted({edge.dest.layer for edge in model.edges}, reverse=True):
        for edge in (
            edge for edge in list(model.edges)[::step] if edge.dest.layer == layer
        ):
            now = distance([*removed, edge])
            if now - last < threshold:
                removed, last = [*removed, edge], now
    return removed


def test_acdc_compares_with_the_last_circuit() -> None:
    """With the whole model, it would take out half as many edges here."""
    bridge = gpt2(1, 2).to(t.float64)
    model = patchable_model(bridge, True, "last_seq", separate_qkv=True)
    loader = token_loader(3, 3)
    for threshold, n_removed in ((3e-6, 2), (1e-5, 4)):
        removed = removed_edges(model, loader, threshold)
        assert removed == plain_acdc(model, loader, threshold)
        assert len(removed) == n_removed


def test_acdc_asks_how_well_the_circuit_predicts_the_model() -> None:
    """KL(model || circuit), not the other way round: each edge by itself."""
    model, loader = micro_model(), micro_loader([0.1])
    (batch,) = loader
    patch = src_ablations(model, batch.corrupt)

    def probs(edges: list[Edge]) -> t.Tensor:
        with t.no_grad(), patch_mode(model, patch, edges):
            return model(batch.clean)[model.out_slice].double().softmax(-1)

    clean, n_apart = probs([]), 0
    for edge in model.edges:
        circuit = probs([edge])
        kl, reverse = (
            float((p * (p / q).log()).sum(-1).mean())
            for p, q in ((clean, circuit), (circuit, clean))
        )
        if max(kl, reverse) > 1e-4 + 1.1 * min(kl, reverse):
            n_apart += 1
            removed = removed_edges(model, loader, (kl * reverse) ** 0.5, edges=[edge])
            assert removed == ([edge] if kl < reverse else [])
    assert n_apart > 3


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, llama])
def test_acdc_is_the_plain_loop(make: Any) -> None:
    # In float64: near a threshold, rounding would decide.
    model = patchable_model(make().to(t.float64), True, "last_seq", separate_qkv=True)
    loader = token_loader(3, 3)
    thresholds = (3e-7, 3e-6, 3e-5)
    removed = [removed_edges(model, loader, threshold) for threshold in thresholds]
    assert removed == [plain_acdc(model, loader, threshold) for threshold in thresholds]
    assert 0 < len(removed[0]) < len(removed[2]) < model.n_edges
    scores = acdc_prune_scores(model, loader, None, (-7, -6, -5), (3,))
    for edge in model.edges:
        lowest = [
            x for x, edges in zip(thresholds, removed, strict=True) if edge in edges
        ]
        score = float(edge.prune_score(scores))
        assert score == pytest.approx(min(lowest, default=math.inf), rel=1e-5)


@pytest.mark.slow
def test_acdc_is_the_plain_loop_on_the_pocket_model() -> None:
    """Every eighth edge. Prints how many edges each loop tests per second."""
    task = replace(POCKET_IOI_TASK, batch_size=(3, 1), batch_count=(1, 1))
    edges = list(task.model.edges)[::8]
    for threshold in (1e-4, 1e-2):
        start = time.perf_counter()
        removed = removed_edges(task.model, task.train_loader, threshold, edges=edges)
        middle = time.perf_counter()
        plain = plain_acdc(task.model, task.train_loader, threshold, step=8)
        end = time.perf_counter()
        assert removed == plain
        assert 0 < len(removed) < len(edges)
        rates = [len(edges) / seconds for seconds in (middle - start, end - middle)]
        print(f"{threshold}: {rates[0]:.0f} edges per second, plain {rates[1]:.0f}")
    task.free()


def test_several_edges_at_once_are_as_one_by_one() -> None:
    """Each circuit is tried on all prompts."""
    model, loader = micro_model(), micro_loader([0.1, 0.2, -0.4], 3)
    edges = list(model.edges)
    options: Any = {"grad_function": "logit", "answer_function": "avg_val"}
    effects = edge_effects(model, loader, edges, **options)
    assert len({round(effect, 4) for effect in effects.values()}) > 3
    removed = removed_edges(model, loader, 1e-2)
    assert 0 < len(removed) < len(edges)
    for n_edges in (2, 5):
        found = edge_effects(model, loader, edges, edges_at_once=n_edges, **options)
        assert found == pytest.approx(effects, abs=1e-5)
        assert removed_edges(model, loader, 1e-2, edges_at_once=n_edges) == removed


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, llama])
def test_guessing_that_edges_go_changes_nothing(make: Any) -> None:
    model = patchable_model(make().to(t.float64), True, "last_seq", separate_qkv=True)
    loader = token_loader(3, 3)
    one_by_one = removed_edges(model, loader, 3e-6)
    assert 0 < len(one_by_one) < model.n_edges
    for n_edges in (2, 5, 500):
        assert removed_edges(model, loader, 3e-6, edges_at_once=n_edges) == one_by_one


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, edges_at_once, seq_len",
    [
        (gpt2, 1, None),
        (gpt2, 7, 5),
        (llama, 7, None),
        (pythia, 1, 5),
        (attn_only, 7, None),
    ],
)
def test_exact_effects_are_those_of_whole_passes(
    make: Any, edges_at_once: int, seq_len: int | None
) -> None:
    bridge = make().to(t.float64)
    model = patchable_model(bridge, True, "last_seq", seq_len, separate_qkv=True)
    loader = token_loader(3, 3)
    exact = exact_edge_patching_prune_scores(
        model, loader, None, edges_at_once=edges_at_once
    )
    (batch,) = loader
    patch = src_ablations(model, batch.corrupt)
    edges = list(model.edges)[:: model.n_edges // 60 + 1]
    n_different = 0
    with t.no_grad():
        before = model(batch.clean)[:, -1]
        for edge in edges:
            with patch_mode(model, patch, [edge]):
                after = model(batch.clean)[:, -1]
            change = (before[:, 1] - before[:, 2]) - (after[:, 1] - after[:, 2])
            score = float(edge.prune_score(exact))
            assert score == pytest.approx(float(change.mean()), abs=1e-12)
            n_different += abs(score) > 1e-9
    assert n_different > len(edges) / 3


def test_layers_before_the_first_changed_edge_do_not_run() -> None:
    model = patchable_model(gpt2(), True, "last_seq", separate_qkv=True)
    runs = [0, 0]

    def count(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            runs[layer] += 1

        return hook

    patch = src_ablations(model, CLEAN.flip(0))
    handles = [
        block.mlp.register_forward_hook(count(layer))
        for layer, block in enumerate(model.plan.blocks)
    ]
    last, first = (model.find_edges(name)[0] for name in ("MLP 0->A1.2.K", EARLY_NAME))
    with t.no_grad(), patch_mode(model, patch, keeps_layers=True):
        with pytest.raises(GraphError, match="a whole pass before"):
            with starting_at(model, last.dest):
                pass
        clean = model(CLEAN)
        assert runs == [1, 1]
        with starting_at(model, last.dest):
            t.testing.assert_close(model(CLEAN), clean)
        assert runs == [1, 2]
        with starting_at(model, first.dest):
            model(CLEAN)  # a whole pass
        assert runs == [2, 3]
        with starting_at(model, last.dest):
            t.testing.assert_close(model(CLEAN), clean)
        session = model.patch_session
        assert session is not None
        with pytest.raises(GraphError, match="from late blocks to early ones"):
            with session.starting_at(2):
                model(CLEAN)
    with pytest.raises(GraphError, match="outside of `patch_mode`"):
        with starting_at(model, last.dest):
            pass
    for handle in handles:
        handle.remove()


def test_with_all_edges_as_candidates_it_is_acdc() -> None:
    model, loader = micro_model(), micro_loader([0.1, 0.2], 2)
    batch, *_ = training_batches(model, loader, AblationType.RESAMPLE, "clean")
    for threshold in (1e-4, 1e-2):
        expected = removed_edges(model, loader, threshold)
        assert 0 < len(expected) < model.n_edges
        found = take_edges_out(
            model, batch, threshold, edges=list(model.edges), only_edges=True
        )
        assert found == expected


def test_candidates_are_the_best_edges() -> None:
    model, loader = micro_model(), micro_loader([0.1, 0.2], 2)
    eap = edge_attribution_patching_prune_scores(model, loader, None)
    scores = acdc_after_eap_prune_scores(model, loader, None, 4, (1e-6,))
    in_circuit, size = circuit_mask(eap, 4)
    assert size == 4
    for name, values in scores.items():
        assert ((values > 0) == in_circuit[name]).all()
    with pytest.raises(ConfigError, match="`n_candidates` is 0"):
        acdc_after_eap_prune_scores(model, loader, None, 0)
    with pytest.raises(ConfigError, match="`threshold` is 0.0; expected a finite number"):
        acdc_after_eap_prune_scores(model, loader, None, thresholds=(0.0,))


def test_edges_that_are_no_candidates_are_patched_from_the_beginning() -> None:
    """The plain loop over the candidates, with all others patched already."""
    model, loader = micro_model(), micro_loader([0.1])
    (batch,) = loader
    patch = src_ablations(model, batch.corrupt)
    eap = edge_attribution_patching_prune_scores(model, loader, None)
    in_circuit, _ = circuit_mask(eap, 5)
    kept, others = (
        [
            e
            for e in model.edges
            if bool(in_circuit[e.dest.module_name][e.patch_idx]) == is_in
        ]
        for is_in in (True, False)
    )
    assert len(kept) == 5

    def logprobs(edges: list[Edge]) -> t.Tensor:
        with t.no_grad(), patch_mode(model, patch, edges):
            return model(batch.clean)[model.out_slice].double().log_softmax(-1)

    def plain_loop(already: list[Edge], threshold: float) -> list[Edge]:
        clean, removed = logprobs([]), []

        def kl(edges: list[Edge]) -> float:
            circuit = logprobs([*already, *edges])
            return float((clean.exp() * (clean - circuit)).sum(-1).mean())

        last = kl([])
        for edge in sorted(kept, key=lambda edge: (-edge.dest.layer, edge)):
            if (now := kl([*removed, edge])) - last < threshold:
                removed, last = [*removed, edge], now
        return removed

    n_apart = 0
    for threshold in (1e-3, 1e-2, 0.1, 0.3, 1.0):
        expected = plain_loop(others, threshold)
        n_apart += expected != plain_loop([], threshold)
        scores = acdc_after_eap_prune_scores(model, loader, None, 5, (threshold,))
        removed = [
            e for e in kept if float(e.prune_score(scores)) == pytest.approx(threshold)
        ]
        assert removed == sorted(expected)
    assert n_apart > 0


def test_the_quick_variant_is_acdc_on_small_graphs() -> None:
    model, loader = micro_model(), micro_loader([0.1, 0.2], 2)
    exps = {"tao_exps": (-3, -2), "tao_bases": (1,)}
    expected = acdc_prune_scores(model, loader, None, **exps)
    whole = acdc_after_eap_prune_scores(
        model, loader, None, 4, all_edges_up_to=13, edges_at_once=3
    )
    assert len({float(score) for v in whole.values() for score in v.flatten()}) > 1
    for name, scores in whole.items():
        t.testing.assert_close(scores, expected[name])
    candidates = acdc_after_eap_prune_scores(model, loader, None, 4, all_edges_up_to=12)
    assert sum(int((values > 0).sum()) for values in candidates.values()) == 4


@pytest.mark.slow
def test_several_edges_at_once_of_prompts_of_different_lengths() -> None:
    task = replace(POCKET_IOI_TASK, batch_size=4, batch_count=1)
    batch = next(iter(task.train_loader))
    assert batch.clean_attention_mask is not None
    edges = list(task.model.edges)[::40]
    one, many = (
        edge_effects(task.model, task.train_loader, edges, edges_at_once=n)
        for n in (1, 7)
    )
    assert max(abs(effect) for effect in one.values()) > 0.03
    assert many == pytest.approx(one, abs=1e-4)
    task.free()


def test_acdc_options() -> None:
    model, loader = micro_model(), micro_loader()
    with pytest.raises(ConfigError, match="There are no thresholds"):
        acdc_prune_scores(model, loader, None, tao_bases=())


def test_exact_is_the_estimate_on_a_linear_model() -> None:
    model, loader = micro_model(), micro_loader([1.0, 2.0, 5.0], batch_size=2)
    exact = exact_edge_patching_prune_scores(model, loader, None)
    estimate = edge_attribution_patching_prune_scores(model, loader, None)
    for name, scores in exact.items():
        t.testing.assert_close(scores, estimate[name], atol=1e-4, rtol=1e-4)


def test_exact_effects_of_single_edges() -> None:
    model = patchable_model(gpt2(), True, "last_seq", separate_qkv=True)
    loader = token_loader(3, 2)
    exact = exact_edge_patching_prune_scores(model, loader, None)
    for name in ("A0.1->MLP 1", "Resid Start->A1.2.V", "MLP 0->Resid End"):
        total = 0.0
        for batch in loader:
            patch = src_ablations(model, batch.corrupt)
            with t.no_grad():
                before = model(batch.clean)[:, -1]
                with patch_mode(model, patch, [name]):
                    after = model(batch.clean)[:, -1]
            change = (before[:, 1] - before[:, 2]) - (after[:, 1] - after[:, 2])
            total += float(change.sum())
        (edge,) = model.find_edges(name)
        assert abs(total) > 1e-6
        assert float(edge.prune_score(exact)) == pytest.approx(total / 3, abs=1e-6)


def test_edges_that_are_not_in_the_graph() -> None:
    model = micro_model()
    foreign, *_ = patchable_model(gpt2(), True, separate_qkv=True).edges
    with pytest.raises(GraphError, match="The graph has no edge"):
        edge_effects(model, micro_loader(), [foreign])
    with pytest.raises(GraphError, match="The graph has no edge"):
        removed_edges(model, micro_loader(), 1e-3, edges=[foreign])


@pytest.mark.parametrize("threshold", [0.0, -1e-3, float("nan")])
def test_thresholds_that_take_nothing_out(threshold: float) -> None:
    with pytest.raises(ConfigError, match="`threshold` is .*; expected a finite number"):
        removed_edges(micro_model(), micro_loader(), threshold)
