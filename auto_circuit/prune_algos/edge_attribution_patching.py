"""Edge attribution patching (Syed et al. 2023, arXiv 2310.10348).

The first-order estimate of what patching each edge does: gradient at the destination times
the difference of the source's activations, which is the mask gradient at mask 0.

Cost per batch: two forward passes, one of them to record, and one backward pass (2 F + 1 Bk).
"""

from __future__ import annotations

from collections.abc import Collection

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import Edge, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel


@checked
def edge_attribution_patching_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    answer_diff: bool = True,
) -> PruneScores:
    """The estimated loss of logit difference from patching each edge: mean over prompts.

    Clean input, corrupt activations patched in. Unit: logits. Positive: patching the edge
    lowers the difference between right and wrong answers.

    answer_diff: False: the loss of the answers' logits alone.

    The mean over prompts; on token graphs every position has its own score.
    """
    return mask_gradient_prune_scores(
        model,
        dataloader,
        official_edges,
        grad_function="logit",
        answer_function="avg_diff" if answer_diff else "avg_val",
        mask_val=0.0,
    )


# The same scores as LOGIT_DIFF_GRAD_PRUNE_ALGO, which has the short name "EAP".
EDGE_ATTR_PATCH_PRUNE_ALGO = PruneAlgo(
    key="Edge Attribution Patching",
    name="Edge Attribution Patching",
    _short_name="EAP (alias)",
    func=edge_attribution_patching_prune_scores,
    needs_wrong_answers=True,
)
