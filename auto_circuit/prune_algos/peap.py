"""Position-aware edge attribution patching (PEAP; Haklay et al. 2025, arXiv 2502.04577).

EAP adds up the effects of an edge at all tokens, of which some may cancel. Here they are kept
apart: by token, or by spans of tokens that mean the same in prompts of different lengths. And
edges that lead through attention, from one position to another, have scores too.

Cost per batch: two forward passes, one of them to record, and one backward pass (2 F + 1 Bk), on
graphs with crossing edges also a third of a forward pass.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch as t
from jaxtyping import Float, Int
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.engine.token_masks import TokenMasks
from auto_circuit.prune_algos.algo_config import bound, takes_options
from auto_circuit.prune_algos.objectives import AnswerConfig, check_objective
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import AblationType, Crossing, Edge, PruneScores
from auto_circuit.utils.ablation_activations import (
    Side,
    SrcOuts,
    ablation_side,
)
from auto_circuit.utils.graph_utils import (
    patch_mode,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.limited_passes import Passes, each_batch
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state

Aggregation = Literal["sum", "avg", "sum_abs_pos", "sum_abs_exp", "max_abs"]
KeyEffect = Literal["recomputed", "gradient"]
Effects = Float[Tensor, "_batch *_use _row _col"]
"""The effect of an edge at each token of each prompt (or at each pair of tokens)."""
Groups = Int[Tensor, "_batch _use"]
"""The position of each token (or pair of tokens) of each prompt; the last one is none."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class PeapConfig(AnswerConfig):
    """The options of PEAP.

    aggregation: how the effects at the tokens of a span (of a crossing edge: at the pairs of
        tokens of two spans) become one: their "sum"; the mean over them ("avg"); the sum of
        their absolute values ("sum_abs_pos"); the absolute value of their sum
        ("sum_abs_exp"); the largest absolute value ("max_abs"). Of each prompt; the score is
        the mean over prompts.
    key_effect: that of a key on what its head writes: with the softmax computed again
        ("recomputed", as published), or to first order ("gradient").
    ablation_type, clean_corrupt: what is patched in.
    """

    aggregation: Aggregation = "sum"
    key_effect: KeyEffect = "recomputed"
    ablation_type: AblationType = AblationType.RESAMPLE
    clean_corrupt: Side | None = "corrupt"


@takes_options(PeapConfig)
@checked
@in_own_state(grad=True)
def peap_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: PeapConfig,
) -> PruneScores:
    """The estimated loss of answers from patching each edge: the mean over prompts.

    At each position or span, if the graph tells them apart, and also through attention, if it
    has crossing edges. Clean input. Unit: that of the answer function. Positive: patching the
    edge makes the answer worse; with aggregations of absolute values all scores are at least
    0. Without positions the whole prompt is one span; "sum" then gives the scores of EAP.

    An edge of sources has at a token the effect gradient times difference, as in EAP. A
    crossing edge from i to j has `<d loss / d z_j, the change of z_j>`, where z_j is what the
    head reads: exact for values, `p_ij (v*_i - v_i)`; for keys the change when the softmax is
    computed again with the one key patched.

    config: see `PeapConfig`; its options may be given one by one too. Source: Haklay et al.
    2025, arXiv 2502.04577, whose "avg" of a crossing edge is also over the pairs of tokens (in
    one span: those that attention can connect). Differs from its code: "sum_abs_exp" and
    "max_abs" of crossing edges are those of their pairs (there the sum of absolute values, and
    0); queries have no crossing edges, as in its paper.
    """
    check_objective(dataloader, config.answer_function)
    side = ablation_side(config.ablation_type, config.clean_corrupt)
    scores = {
        name: zeros.to(t.promote_types(zeros.dtype, t.float32))
        for name, zeros in model.new_prune_scores().items()
    }

    def add(batch: PromptPairBatch, patch_src_outs: SrcOuts) -> None:
        for name, of_batch in _batch_sums(model, batch, patch_src_outs, config):
            scores[name] += of_batch

    def try_out(batch: PromptPairBatch, patch_src_outs: SrcOuts) -> None:
        _batch_sums(model, batch, patch_src_outs, config)

    passes = Passes(add, try_out)
    with train_mask_mode(model, notes=False):
        set_all_masks(model, 0.0)
        patched_in = config.ablation_type, side
        each_batch(model, dataloader, patched_in, passes, config.memory_limit)
    return {name: total / dataloader.n_prompts for name, total in scores.items()}


def _batch_sums(
    model: PatchableModel,
    batch: PromptPairBatch,
    patch_src_outs: SrcOuts,
    config: PeapConfig,
) -> list[tuple[str, Tensor]]:
    """Each destination module's scores, summed over a batch's prompts."""
    effects = token_effects(model, batch, patch_src_outs, config)
    positions, n_positions = _positions(model, batch), model.seq_len or 1
    crossings = {dest.module_name: dest.crossing for dest in model.crossings}
    sums = []
    for wrapper in model.dest_wrappers:
        name = wrapper.module_name
        crossing = crossings.get(name)
        if crossing is not None:
            # [batch head to from] -> [batch pair head], the pairs of tokens in one dimension.
            uses = effects[name].flatten(2).transpose(1, 2)
            groups, n_groups = _pairs(positions, crossing), crossing.n_pairs
        else:
            uses, groups, n_groups = effects[name], positions, n_positions
        found = _aggregated(uses, groups, n_groups, config.aggregation).sum(0)
        if crossing is not None:
            found = found.transpose(0, 1)
        sums.append((name, found.reshape(wrapper.mask.shape)))
    return sums


def token_effects(
    model: PatchableModel,
    batch: PromptPairBatch,
    patch_src_outs: SrcOuts,
    config: PeapConfig,
) -> dict[str, Effects]:
    """Every edge's effect at each token of each prompt, masks as they are.

    [batch token row src] of edges from sources, [batch head token token] of crossing ones.
    """
    masks = TokenMasks()
    with patch_mode(model, patch_src_outs):
        assert model.patch_session is not None
        model.patch_session.token_masks = masks
        loss = config.clean_loss_sum(model, batch)
        grads = t.autograd.grad(loss, list(masks.uses.values()), allow_unused=True)
    effects = {
        name: t.zeros_like(use) if grad is None else grad
        for (name, use), grad in zip(masks.uses.items(), grads, strict=True)
    }
    if config.key_effect == "recomputed":
        for name, change in masks.score_changes.items():
            # In float64, whose exponentials do not overflow here.
            ratio = _softmax_ratio(change.double(), masks.patterns[name].double())
            effects[name] = (effects[name] * ratio).to(effects[name].dtype)
    return effects


def _softmax_ratio(
    change: Float[Tensor, "batch head token token"],
    pattern: Float[Tensor, "batch head token token"],
) -> Float[Tensor, "batch head token token"]:
    """What a change of one score does to a softmax, over what its gradient says.

    With the score of i larger by d, `p_i` grows to `p_i e^d / (1 + p_i (e^d - 1))` and all
    others shrink alike. The sum `z = sum_i p_i v_i` changes by `(v_i - z) p_i (e^d - 1) / (1 +
    p_i (e^d - 1))`, and to first order by `(v_i - z) p_i d`.
    """
    # (e^d - 1) / (1 + p (e^d - 1)), by powers that are at most 1.
    shrunk = t.exp(-change.abs())
    grown = change > 0
    numerator = t.where(grown, 1, -1) * -t.expm1(-change.abs())
    denominator = t.where(
        grown, shrunk + pattern * (1 - shrunk), 1 + pattern * (shrunk - 1)
    )
    ratio = numerator / (denominator * change)
    return t.where(change == 0, 1.0, ratio)


def _positions(model: PatchableModel, batch: PromptPairBatch) -> Groups:
    """The position (or span) of each token; the number of positions at padding."""
    tokens, kwargs = batch.model_input("clean")
    mask = kwargs.get("attention_mask")
    if model.spans is not None:
        found = model.spans.positions(tokens, mask)
    else:
        found = t.zeros(tokens.shape[:2], dtype=t.long, device=tokens.device)
        if model.seq_len is not None:
            found = found + t.arange(tokens.shape[1], device=tokens.device)
        if mask is not None:
            found = t.where(mask[:, -tokens.shape[1] :].bool(), found, -1)
    return t.where(found < 0, model.seq_len or 1, found)


def _pairs(positions: Groups, crossing: Crossing) -> Groups:
    """The number of each pair of tokens, in their order; `n_pairs` of those without edge."""
    n_positions, n_tokens = crossing.n_positions, positions.shape[1]
    numbers = t.full((n_positions + 1,) * 2, crossing.n_pairs, device=positions.device)
    readers, read = t.tensor(crossing.pairs(), device=positions.device).T
    numbers[readers, read] = t.arange(crossing.n_pairs, device=positions.device)
    pairs = numbers[positions[:, :, None], positions[:, None, :]]
    if crossing.is_causal:
        # In one span, a token reads none after itself.
        is_later = pairs.new_ones(n_tokens, n_tokens).triu(1).bool()
        pairs = pairs.masked_fill(is_later, crossing.n_pairs)
    return pairs.flatten(1)


def _aggregated(
    uses: Float[Tensor, "batch use *edge"],
    groups: Groups,
    n_groups: int,
    aggregation: Aggregation,
) -> Float[Tensor, "batch group *edge"]:
    """The uses of each group as one number, per prompt; 0 for a group without any."""
    uses = uses.to(t.promote_types(uses.dtype, t.float32))
    shape = (len(uses), n_groups + 1, *uses.shape[2:])
    index = groups.view(*groups.shape, *(1,) * (uses.ndim - 2)).expand_as(uses)
    if aggregation in ("sum_abs_pos", "max_abs"):
        uses = uses.abs()
    how = "amax" if aggregation == "max_abs" else "sum"
    found = uses.new_zeros(shape).scatter_reduce(1, index, uses, how)
    if aggregation == "sum_abs_exp":
        found = found.abs()
    if aggregation == "avg":
        counts = uses.new_zeros(shape[:2]).scatter_add(
            1, groups, t.ones_like(groups).to(uses)
        )
        found = found / counts.clamp(min=1).view(*counts.shape, *(1,) * (uses.ndim - 2))
    return found[:, :-1]


PEAP_PRUNE_ALGO = PruneAlgo(
    key="PEAP",
    name="Position-aware Edge Attribution Patching",
    _short_name="PEAP",
    func=bound(peap_prune_scores, PeapConfig()),
    needs_wrong_answers=True,
    notes=AlgoNotes(
        idea="EAP at each token or span, and of edges through attention",
        paper="Haklay et al. 2025, arXiv 2502.04577",
        cost="2 F + B",
        use="Graphs with positions, spans or crossing edges. Without, EAP is the same.",
    ),
)
