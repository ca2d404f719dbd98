"""PEAP: scores at positions, of spans, and of edges through attention."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.ACDC import acdc_prune_scores, removed_edges
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.exact_edge_patching import single_edge_effects
from auto_circuit.prune_algos.integrated_gradients import (
    activation_integrated_gradients_prune_scores,
)
from auto_circuit.prune_algos.peap import peap_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import train_subnetwork
from auto_circuit.spans import Spans, spans_of_labels
from auto_circuit.types import Edge, PruneScores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.engine.test_crossings import Plain, Seen, hugging_face, patchable
from tests.models import D_MODEL, N_HEADS, gpt2, llama, state_snapshot, tokens

N_PROMPTS, SEQ, ANSWER, WRONG = 3, 5, 1, 2
D_HEAD = D_MODEL // N_HEADS
CLEAN, CORRUPT = tokens(N_PROMPTS, SEQ, seed=1), tokens(N_PROMPTS, SEQ, seed=2)
AGGREGATIONS = ("sum", "avg", "sum_abs_pos", "sum_abs_exp", "max_abs")


def loader(
    clean: Tensor = CLEAN, corrupt: Tensor = CORRUPT, mask: Tensor | None = None
) -> PromptDataLoader:
    answers, wrong = ([t.tensor([word])] * len(clean) for word in (ANSWER, WRONG))
    dataset = PromptDataset(clean, corrupt, answers, wrong, mask, mask)
    return PromptDataLoader(dataset, None, 0, batch_size=2)


def graph(seq_len: int | None = None, **options: Any) -> PatchableModel:
    bridge = gpt2(1, 2).double()
    return patchable_model(bridge, True, "last_seq", seq_len, True, **options)


def assert_same(found: PruneScores, expected: PruneScores) -> None:
    assert set(found) == set(expected)
    for name, scores in expected.items():
        assert (scores != 0).any()
        t.testing.assert_close(found[name], scores, atol=1e-9, rtol=1e-6)


# ------------------------------------------------------------- against plain hooks


def read_gradients(plain: Plain) -> list[Tensor]:
    """The gradients of minus the answers' difference by what heads read, of each prompt."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any) -> Any:
        found.append(args[0].detach().requires_grad_())
        return (found[-1], *args[1:])

    handles = [output.register_forward_pre_hook(keep) for output in plain.outputs]
    logits = plain.model(CLEAN).logits[:, -1]
    for handle in handles:
        handle.remove()
    loss = (logits[:, WRONG] - logits[:, ANSWER]).sum()
    # Each block's input is cut off from the one before: gradients are those of one block.
    return [
        grad.unflatten(-1, (N_HEADS, -1)).transpose(1, 2)
        for grad in t.autograd.grad(loss, found, allow_unused=True)
        if grad is not None
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_values_add_up_to_the_exact_linear_effect(name: str) -> None:
    """Of the last block: gradient by what the head reads, times its change."""
    hf_model = hugging_face(name)
    model, plain = patchable(hf_model), Plain(hf_model)
    scores = peap_prune_scores(model, loader(), None)
    with t.no_grad():
        clean, corrupt = plain.see(CLEAN)[-1], plain.see(CORRUPT)[-1]
        pattern = plain.scores(clean.queries, clean.keys).softmax(-1)
    gradient = read_gradients(plain)[-1]
    effect = (gradient * (pattern @ corrupt.values - pattern @ clean.values)).sum(
        (-1, -2)
    )
    found = scores["blocks.1.attn.hook_value_crossing"].sum(1)
    assert (found.abs() > 1e-3).all()
    t.testing.assert_close(found, effect.mean(0), atol=1e-6, rtol=1e-5)

    # A key at a time: `softmax` computed again.
    for edge in [edge for edge in model.edges if edge.name.startswith("A1")][::7]:
        if edge.is_crossing:
            change = plain_change(plain, edge, clean, corrupt)
            expected = (gradient * change).sum((1, 2, 3)).mean()
            found = edge.prune_score(scores)
            t.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def plain_change(plain: Plain, edge: Edge, clean: Seen, corrupt: Seen) -> Tensor:
    with t.no_grad():
        return plain.change(edge, clean, corrupt)


# ----------------------------------------------------------------------------- spans


def test_one_span_for_each_token_is_a_graph_with_positions() -> None:
    labels = [f"word {i}" for i in range(SEQ)]
    by_span = graph(spans=spans_of_labels(labels), crossing=True)
    by_token = graph(SEQ, crossing=True)
    for aggregation in AGGREGATIONS:
        found, expected = (
            peap_prune_scores(model, loader(), None, aggregation=aggregation)
            for model in (by_span, by_token)
        )
        assert_same(found, expected)
    edges = list(by_token.edges)[5::40]
    effects = single_edge_effects(by_token, loader(), edges)
    assert single_edge_effects(by_span, loader(), edges) == pytest.approx(effects)


def test_spans_of_equal_prompts_add_up_their_tokens() -> None:
    """With and without crossing edges, whose other scores are the same."""
    spans = spans_of_labels(["start", "start", "middle", "end", "end"])
    crossing, by_span, by_token = (
        graph(spans=spans, crossing=True),
        graph(spans=spans),
        graph(SEQ, crossing=True),
    )
    found, without, expected = (
        peap_prune_scores(model, loader(), None)
        for model in (crossing, by_span, by_token)
    )
    assert_same({name: found[name] for name in without}, without)
    eap = edge_attribution_patching_prune_scores(by_span, loader(), None)
    assert_same(without, eap)
    parts = (slice(0, 2), slice(2, 3), slice(3, 5))
    for name in without:
        tied = t.stack([expected[name][part].sum(0) for part in parts])
        t.testing.assert_close(found[name], tied)
    for edge in crossing.edges:
        if edge.is_crossing:
            total = t.zeros((), dtype=t.float64)
            for to in range(SEQ)[parts[edge.seq_idx or 0]]:
                for come_from in range(SEQ)[parts[edge.src.src_idx]]:
                    name = f"{edge.src.name[:-3]}[{come_from}]->{edge.dest.name} @ {to}"
                    if come_from <= to:
                        (one,) = by_token.find_edges(name)
                        total = total + one.prune_score(expected)
            t.testing.assert_close(edge.prune_score(found), total)


def test_one_span_is_a_graph_without_positions() -> None:
    one = graph(spans=spans_of_labels(["all"] * SEQ))
    found = peap_prune_scores(one, loader(), None)
    eap = edge_attribution_patching_prune_scores(graph(), loader(), None)
    assert_same({name: scores[0] for name, scores in found.items()}, eap)
    assert_same(peap_prune_scores(graph(), loader(), None), eap)


def test_prompts_of_different_lengths_are_padded_without_a_trace() -> None:
    """Their spans are where they are, and the scores are those of each prompt alone."""

    def find(prompt: tuple[int, ...]) -> dict[str, tuple[int, int]]:
        end = len(prompt) - 2
        return {"name": (0, 1), "words": (1, end), "end": (end, end + 2)}

    model = graph(spans=Spans(("name", "words", "end"), find), crossing=True)
    long, short = (x.clone() for x in (CLEAN[:1], CLEAN[1:2, 1:]))
    long_corrupt, short_corrupt = CORRUPT[:1], CORRUPT[1:2, 1:]
    pad = t.zeros(1, 1, dtype=t.long)
    mask = t.tensor([[1] * SEQ, [0, *[1] * (SEQ - 1)]])
    padded = loader(
        t.cat([long, t.cat([pad, short], 1)]),
        t.cat([long_corrupt, t.cat([pad, short_corrupt], 1)]),
        mask,
    )
    for aggregation in AGGREGATIONS:
        found = peap_prune_scores(model, padded, None, aggregation=aggregation)
        alone = [
            peap_prune_scores(model, one, None, aggregation=aggregation)
            for one in (loader(long, long_corrupt), loader(short, short_corrupt))
        ]
        expected = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
        assert_same(found, expected)
    edges = [edge for edge in model.edges if edge.is_crossing][::6]
    effects = single_edge_effects(model, padded, edges)
    each = [
        single_edge_effects(model, one, edges)
        for one in (loader(long, long_corrupt), loader(short, short_corrupt))
    ]
    for edge in edges:
        assert effects[edge] == pytest.approx((each[0][edge] + each[1][edge]) / 2)


def test_aggregations_by_hand() -> None:
    """From the scores of single tokens, of one prompt."""
    by_token = graph(SEQ, crossing=True)
    by_span = graph(spans=spans_of_labels(["a", "a", "a", "b", "b"]), crossing=True)
    one = loader(CLEAN[:1], CORRUPT[:1])
    tokens_scores = peap_prune_scores(by_token, one, None)
    ways = {
        "sum": lambda x: x.sum(),
        "avg": lambda x: x.mean(),
        "sum_abs_pos": lambda x: x.abs().sum(),
        "sum_abs_exp": lambda x: x.sum().abs(),
        "max_abs": lambda x: x.abs().max(),
    }
    value, mlp = "blocks.0.attn.hook_value_crossing", "blocks.0.hook_mlp_in"
    # Of head 1: the pairs within the first span, and from it to the second one.
    numbers = tokens_scores[value][1]
    within, across = numbers[:6], t.cat([numbers[6:9], numbers[10:13]])
    for aggregation, way in ways.items():
        found = peap_prune_scores(by_span, one, None, aggregation=aggregation)
        t.testing.assert_close(found[value][1, 0], way(within))
        t.testing.assert_close(found[value][1, 1], way(across))
        t.testing.assert_close(found[mlp][0, 1], way(tokens_scores[mlp][:3, 1]))


def test_sums_of_gradients_are_those_of_masks() -> None:
    """On grouped queries with rotary positions, of keys too, in both blocks.

    EAP lets the engine overwrite what is patched in, and PEAP does not.
    """
    bridge = llama().double()
    model = patchable_model(bridge, True, "last_seq", SEQ, True, crossing=True)
    eap = edge_attribution_patching_prune_scores(model, loader(), None)
    assert_same(peap_prune_scores(model, loader(), None, key_effect="gradient"), eap)
    # A key that is computed again is another one, but where its span is read alone.
    key = "blocks.1.attn.hook_key_crossing"
    recomputed = peap_prune_scores(model, loader(), None)[key]
    assert not t.allclose(recomputed[:, 1:], eap[key][:, 1:], rtol=1e-3)


def test_it_leaves_the_model_as_it_was() -> None:
    model = graph(SEQ, crossing=True)
    before = state_snapshot(model)
    peap_prune_scores(model, loader(), None)
    assert state_snapshot(model) == before


# ------------------------------------------------------------------- other algorithms


@pytest.mark.slow
def test_acdc_compares_each_trial_with_whole_passes() -> None:
    model, short = graph(3, crossing=True), loader(CLEAN[:2, :3], CORRUPT[:2, :3])
    scores = acdc_prune_scores(
        model, short, None, tao_exps=[-4], tao_bases=[1], test_mode=True
    )
    crossing = scores["blocks.0.attn.hook_value_crossing"]
    assert crossing.isinf().any() and not crossing.isinf().all()


def test_acdc_knows_crossing_edges() -> None:
    """One by one and several at once, each with masks of its own."""
    model, short = graph(2, crossing=True), loader(CLEAN[:2, :2], CORRUPT[:2, :2])
    alone = removed_edges(model, short, 1e-4)
    together = removed_edges(model, short, 1e-4, edges_at_once=4)
    assert alone == together and any(edge.is_crossing for edge in alone)
    assert len(alone) < model.n_edges


@pytest.mark.parametrize("by_span", [False, True])
def test_masks_of_crossing_edges_are_trained(by_span: bool) -> None:
    spans = spans_of_labels(["start", "start", "end"]) if by_span else None
    model = graph(None if by_span else 3, spans=spans, crossing=True)
    short = loader(CLEAN[:2, :3], CORRUPT[:2, :3])
    training = train_subnetwork(model, short, epochs=3, circuit_size=10)
    scores = training.prune_scores["blocks.0.attn.hook_value_crossing"]
    assert len(scores.unique()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("share_passes", [True, False])
def test_paths_of_keys_and_values_are_complete(share_passes: bool) -> None:
    """Scores of what moves together add up to what patching all of it does."""
    model, short = graph(2, crossing=True), loader(CLEAN[:2, :2], CORRUPT[:2, :2])
    scores = activation_integrated_gradients_prune_scores(
        model, short, None, integrated_grad_samples=16, share_passes=share_passes
    )
    (batch,) = short
    patch = src_ablations(model, batch.corrupt)
    for kind in ("key", "value"):
        name = f"blocks.0.attn.hook_{kind}_crossing"
        # Of each head the edges 0->0, 0->1 from the first position, and 1->1.
        one_by_one = product((0, 1), ([0, 1], [2]))
        parts: list[Any] = [...] if share_passes else list(one_by_one)
        for part in parts:
            losses = []
            for share in (0.0, 1.0):
                with t.no_grad(), patch_mode(model, patch):
                    set_all_masks(model, 0.0)
                    model.patch_masks[name].data[part] = share
                    logits = model.sliced(batch.clean)
                losses.append((logits[:, WRONG] - logits[:, ANSWER]).mean())
            found = scores[name][part].sum()
            t.testing.assert_close(found, losses[1] - losses[0], atol=1e-6, rtol=5e-3)
        set_all_masks(model, 0.0)
        assert scores[name].abs().max() > 1e-4
