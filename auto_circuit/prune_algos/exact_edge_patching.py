"""The effect of patching each single edge: what the gradient methods estimate.

Cost: per batch, one forward pass for each edge, and two more.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch as t

from auto_circuit.data import PromptDataLoader
from auto_circuit.prune_algos.objectives import (
    AnswerFunction,
    GradFunction,
    check_choice,
    clean_loss_sum,
)
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.ablation_activations import (
    PER_BATCH_ABLATIONS,
    Side,
    iter_src_ablations,
)
from auto_circuit.utils.custom_tqdm import tqdm
from auto_circuit.utils.graph_utils import patch_mode, preserved_masks, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel


def exact_edge_patching_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    grad_function: GradFunction = "logit",
    answer_function: AnswerFunction = "avg_diff",
    ablation_type: AblationType = AblationType.RESAMPLE,
    clean_corrupt: Side | None = "corrupt",
) -> PruneScores:
    """How much worse the answers get when the edge alone is patched: mean over prompts.

    The input is clean. Positive: patching the edge makes the answer worse. The unit is that
    of the answer function. The arguments: see `mask_gradient_prune_scores`.
    """
    check_choice("grad_function", grad_function, GradFunction)
    check_choice("answer_function", answer_function, AnswerFunction)
    side = clean_corrupt if ablation_type in PER_BATCH_ABLATIONS else None
    scores = model.new_prune_scores()
    loss = partial(
        clean_loss_sum,
        model,
        grad_function=grad_function,
        answer_function=answer_function,
    )
    batches = iter_src_ablations(model, dataloader, ablation_type, side)
    with t.no_grad(), preserved_masks(model):
        set_all_masks(model, 0.0)
        for batch, patch_src_outs in batches:
            with patch_mode(model, patch_src_outs):
                unpatched = float(loss(batch=batch))
                for edge in tqdm(model.edges, leave=False):
                    entry = edge.patch_mask(model).data[edge.patch_idx]
                    entry.fill_(1.0)
                    patched = float(loss(batch=batch))
                    entry.fill_(0.0)
                    effect = (patched - unpatched) / dataloader.n_prompts
                    scores[edge.dest.module_name][edge.patch_idx] += effect
    return scores


EXACT_EDGE_PATCHING_PRUNE_ALGO = PruneAlgo(
    key="Exact Edge Patching",
    name="Exact Edge Patching",
    _short_name="Exact",
    func=exact_edge_patching_prune_scores,
)
