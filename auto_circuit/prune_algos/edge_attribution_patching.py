"""Edge attribution patching (Syed et al. 2023, arXiv 2310.10348).

The first-order estimate of what patching each edge does: gradient at the destination times
the difference of the source's activations, which is the mask gradient at mask 0.

Cost per batch: two forward passes, one of them to record, and one backward pass (2 F + 1 Bk).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader
from auto_circuit.fingerprints import FOR_READERS
from auto_circuit.memory import Limit
from auto_circuit.prune_algos.algo_config import AlgoConfig, bound, takes_options
from auto_circuit.prune_algos.mask_gradient import (
    EAP_NOTES,
    MaskGradientConfig,
    mask_gradients,
)
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import Edge, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeAttributionPatchingConfig(AlgoConfig):
    """answer_diff: of right and wrong answers' logits; False: the answers' logits alone.

    memory_limit: see `AnswerConfig`.
    """

    answer_diff: bool = True
    memory_limit: Limit = field(default=None, metadata=FOR_READERS)

    @property
    def gradient(self) -> MaskGradientConfig:
        """Which mask gradient it is."""
        answer_function = "avg_diff" if self.answer_diff else "avg_val"
        return MaskGradientConfig(
            answer_function=answer_function,
            mask_val=0.0,
            memory_limit=self.memory_limit,
        )


@takes_options(EdgeAttributionPatchingConfig)
@checked
def edge_attribution_patching_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: EdgeAttributionPatchingConfig,
) -> PruneScores:
    """The estimated loss of logit difference from patching each edge: mean over prompts.

    Clean input, corrupt activations patched in. Unit: logits. Positive: patching the edge
    lowers the difference between right and wrong answers.

    config: see `EdgeAttributionPatchingConfig`; its options may be given one by one too.

    The mean over prompts; on token graphs every position has its own score.
    """
    return mask_gradients(model, dataloader, official_edges, config.gradient)


# The same scores as LOGIT_DIFF_GRAD_PRUNE_ALGO, which has the short name "EAP".
EDGE_ATTR_PATCH_PRUNE_ALGO = PruneAlgo(
    key="Edge Attribution Patching",
    name="Edge Attribution Patching",
    _short_name="EAP (alias)",
    func=bound(edge_attribution_patching_prune_scores, EdgeAttributionPatchingConfig()),
    needs_wrong_answers=True,
    notes=replace(EAP_NOTES, use="Another name of EAP."),
)
