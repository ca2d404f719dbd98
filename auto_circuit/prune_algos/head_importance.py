"""Scores of nodes, and edge scores made from them.

A node here is a source: the embeddings, an attention head, an MLP, or a latent or the error
of an MLP's autoencoder. Its score can be the
sum of the scores of its outgoing edges, or its importance for a task (HISP: head
importance score for pruning; Michel et al. 2019, arXiv 1905.10650, in the form that
Conmy et al. 2023, arXiv 2304.14997, compare circuit discovery with).

Cost of HISP per batch: one forward pass to record, one forward and one backward pass (2 F +
1 Bk).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.engine.kept_sources import kept_alone
from auto_circuit.errors import GraphError
from auto_circuit.prune_algos.algo_config import bound, takes_options
from auto_circuit.prune_algos.objectives import (
    AnswerConfig,
    check_objective,
)
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import AblationType, Edge, PositionsRead, PruneScores
from auto_circuit.utils.ablation_activations import (
    Side,
    ablation_side,
)
from auto_circuit.utils.component_links import Link, component_links
from auto_circuit.utils.graph_utils import (
    patch_mode,
    set_all_masks,
    set_mask_batch_size,
    train_mask_mode,
)
from auto_circuit.utils.limited_passes import Passes, each_batch
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state

KeptOuts = Float[Tensor, "kept batch seq d_model"]
"""What is patched in, of all sources or of those that a pass keeps."""
NodeScores = Float[Tensor, "*seq src"]
"""A number per source, and per position if the graph tells positions apart."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class HeadImportanceConfig(AnswerConfig):
    """The options of HISP.

    ablation_type, clean_corrupt: what the node's activations are compared with (ZERO is
        Michel et al.'s head mask; RESAMPLE the variant of Conmy et al.).
    normalize: divide by the L2 norm over the nodes of the same layer of the graph, as
        Michel et al. do: numbers from 0 to 1. A layer of a single node (the embeddings,
        an MLP after its attention) then scores 1.
    """

    ablation_type: AblationType = AblationType.RESAMPLE
    clean_corrupt: Side | None = "corrupt"
    normalize: bool = True


@takes_options(HeadImportanceConfig)
@checked
@in_own_state(grad=True)
def head_importance_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: HeadImportanceConfig,
) -> PruneScores:
    """HISP: how much each node matters, mapped to the edges between nodes that do.

    A node's importance is the mean over prompts of |difference of its activations times
    gradient|, the estimated effect of patching it whichever its sign: 0 or more, in the
    unit of the answer function. An edge has the score of the weaker of its two nodes.

    config: see `HeadImportanceConfig`; its options may be given one by one too.

    Raises ConfigError for an unknown choice.
    """
    side = ablation_side(config.ablation_type, config.clean_corrupt)
    model.check_no_crossings("The importance of nodes")
    check_objective(dataloader, config.answer_function)
    found: list[NodeScores] = []

    def importance(batch: PromptPairBatch, patch_src_outs: KeptOuts) -> NodeScores:
        return _batch_importance(model, batch, patch_src_outs, config)

    def add_importance(batch: PromptPairBatch, patch_src_outs: KeptOuts) -> None:
        of_batch = importance(batch, patch_src_outs)
        found[:] = [found[0] + of_batch] if found else [of_batch]

    passes = Passes(add_importance, importance, kept_alone)
    patched_in = config.ablation_type, side
    each_batch(model, dataloader, patched_in, passes, config.memory_limit)
    scores = found[0] / dataloader.n_prompts
    return edge_scores_of_nodes(
        model, _normalize_layers(model, scores) if config.normalize else scores
    )


def _batch_importance(
    model: PatchableModel,
    batch: PromptPairBatch,
    patch_src_outs: KeptOuts,
    config: AnswerConfig,
) -> NodeScores:
    """The sum over a batch's prompts of |difference * gradient| at every source."""
    tokens, kwargs = batch.model_input("clean")
    # A mask for each prompt: the sum over its edges comes before the absolute value.
    with (
        set_mask_batch_size(model, len(tokens)),
        train_mask_mode(model, notes=False) as masks,
    ):
        with patch_mode(model, patch_src_outs, overwrite_patch=True):
            set_all_masks(model, 0.0)
            loss = config.loss(model.sliced(tokens, **kwargs), batch) * len(tokens)
            loss.backward()
        edge_scores = {
            # A destination may read none of the sources that are kept.
            name: mask.new_zeros(mask.shape) if mask.grad is None else mask.grad
            for name, mask in masks.items()
        }
        return _sum_over_edges(model, edge_scores).abs().sum(0)


@checked
def node_prune_scores(model: PatchableModel, prune_scores: PruneScores) -> PruneScores:
    """Scores that make circuits of nodes, from any algorithm's scores of edges.

    A node's score is the sum over its outgoing edges; an edge's new score is that of the
    weaker of its two nodes (by absolute value, with its sign). Circuits of the result
    are graphs of nodes: the strongest nodes, and all edges between them.
    """
    return edge_scores_of_nodes(model, node_scores(model, prune_scores))


@checked
def node_scores(model: PatchableModel, prune_scores: PruneScores) -> NodeScores:
    """The sum of the scores of each source's outgoing edges: [position?, source].

    For gradient scores in a factorized graph that is the score of patching the node as a
    whole, to first order. Raises GraphError for scores that do not fit the model.
    """
    model.check_no_crossings("The score of a node")
    prune_scores = model.check_scores(prune_scores)
    return _sum_over_edges(model, prune_scores)


@checked
def edge_scores_of_nodes(model: PatchableModel, scores: NodeScores) -> PruneScores:
    """Give each edge the score of the weaker of its nodes, by absolute value.

    scores: [position?, source]. The node that an edge ends in is the source of the same
    component; where several share the destination (grouped keys and values, the latents of
    an MLP), the strongest of them; and of what attention reads as key or value at a position,
    the strongest from that position on. The end of the residual stream has no source: there
    the edge has the score of its source. Raises GraphError for scores of the wrong shape, and
    for a graph whose nodes do not say enough about their components (`Node.component`).
    """
    model.check_no_crossings("The score of a node")
    leading = () if model.seq_len is None else (model.seq_len,)
    if scores.shape != (*leading, model.plan.n_srcs):
        raise GraphError(
            f"The node scores have shape {tuple(scores.shape)}; the graph needs "
            f"{(*leading, model.plan.n_srcs)}, [position?, source]."
        )
    links = component_links(model)
    prune_scores = {}
    for wrapper in model.dest_wrappers:
        start = scores[..., wrapper.in_srcs]
        dests = [node for node in model.dests if node.module_name == wrapper.module_name]
        rows = [_weaker(start, _strongest(scores, links[dest])) for dest in dests]
        has_heads = dests[0].head_idx is not None
        prune_scores[wrapper.module_name] = t.stack(rows, -2) if has_heads else rows[0]
    return prune_scores


def _sum_over_edges(model: PatchableModel, edge_scores: PruneScores) -> Tensor:
    """[..., head?, source] for each destination -> [..., source], summed over edges."""
    total = None
    for wrapper in model.dest_wrappers:
        scores = edge_scores[wrapper.module_name]
        scores = scores if wrapper.head_dim is None else scores.sum(-2)
        if total is None:
            total = scores.new_zeros((*scores.shape[:-1], model.plan.n_srcs))
        total[..., wrapper.in_srcs] += scores
    assert total is not None
    return total


def _normalize_layers(model: PatchableModel, scores: Tensor) -> Tensor:
    layers = t.tensor([src.layer for src in model.srcs], device=scores.device)
    result = t.zeros_like(scores)
    for layer in layers.unique():
        is_here = layers == layer
        of_layer = scores[..., is_here]
        # On token graphs over all positions of the layer.
        norm = of_layer.norm()
        result[..., is_here] = of_layer / norm if norm > 0 else of_layer
    return result


def _strongest(scores: NodeScores, links: tuple[Link, ...]) -> Tensor | None:
    """The score with the largest absolute value, [position?, 1]; None if there is none."""
    if not links:
        return None
    idxs: dict[PositionsRead, list[int]] = defaultdict(list)
    for link in links:
        idxs[link.positions].append(link.src.src_idx)
    reached = [_strongest_reached(scores[..., of], how) for how, of in idxs.items()]
    candidates = t.cat(reached, -1)
    return candidates.gather(-1, candidates.abs().argmax(-1, keepdim=True))


def _strongest_reached(
    scores: Float[Tensor, "*seq src"], positions: PositionsRead
) -> Float[Tensor, "*seq src"]:
    """For each position, the strongest score at those that depend on it."""
    if positions == "own":
        return scores
    # From the end, so that the later positions come before.
    backwards = scores.flip(0)
    sizes = backwards.abs()
    best = sizes.cummax(0).indices
    if positions == "all":
        best = sizes.argmax(0, keepdim=True).expand_as(best)
    return backwards.gather(0, best).flip(0)


def _weaker(start: Tensor, end: Tensor | None) -> Tensor:
    if end is None:
        return start.clone()
    return t.where(start.abs() <= end.abs(), start, end)


HEAD_IMPORTANCE_PRUNE_ALGO = PruneAlgo(
    key="Head Importance Score for Pruning",
    name="Head Importance Score for Pruning",
    _short_name="HISP",
    func=bound(head_importance_prune_scores, HeadImportanceConfig()),
    needs_wrong_answers=True,
    scores_crossings=False,
    notes=AlgoNotes(
        idea="The weaker of the importances of the edge's two nodes",
        paper="Michel et al. 2019, arXiv 1905.10650",
        cost="2 F + B",
        use="Circuits of nodes: heads and MLPs, with all edges between them.",
    ),
)
