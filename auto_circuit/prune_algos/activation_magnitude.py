"""How large a source's output is, as the score of all of its edges.

Cost: one forward pass (1 F) per batch.
"""

from __future__ import annotations

from collections.abc import Collection

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.engine.kept_sources import kept_alone
from auto_circuit.memory import Limit
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.ablation_activations import SrcOuts
from auto_circuit.utils.limited_passes import Passes, each_batch
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@in_own_state(grad=False)
def activation_magnitude_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    memory_limit: Limit = None,
) -> PruneScores:
    """The mean |activation| of an edge's source on the clean prompts (at least 0).

    The mean is over prompts, positions and dimensions; padding does not count.
    memory_limit: the most that the work may take beside the model; see `MemoryLimit`.
    """
    model.check_no_crossings("The magnitude of activations")
    total = t.zeros(model.plan.n_srcs, dtype=t.float64)
    counts = t.zeros_like(total)

    def add_magnitudes(batch: PromptPairBatch, outs: SrcOuts) -> None:
        kept = model.plan.kept
        own = slice(None) if kept is None else slice(kept.own.start, kept.own.stop)
        magnitudes, count = _magnitudes(batch, outs)
        total[own] += magnitudes
        counts[own] += count

    passes = Passes(add_magnitudes, _magnitudes, kept_alone)
    each_batch(model, dataloader, (AblationType.RESAMPLE, "clean"), passes, memory_limit)
    means = total / counts
    return {
        wrapper.module_name: scores + means[wrapper.in_srcs].to(scores)
        for wrapper, scores in zip(
            model.dest_wrappers, model.new_prune_scores().values(), strict=True
        )
    }


def _magnitudes(
    batch: PromptPairBatch, outs: SrcOuts
) -> tuple[Float[Tensor, "src"], int]:
    """(The sum of the mean |activation| of each source, of how many positions)"""
    _, kwargs = batch.model_input("clean")
    wide = t.promote_types(outs.dtype, t.float32)
    magnitudes = outs.abs().mean(dim=-1, dtype=wide)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        magnitudes = magnitudes * mask[:, -outs.shape[2] :]
    count = magnitudes[0].numel() if mask is None else int(mask.sum())
    return magnitudes.sum(dim=(1, 2)).cpu().double(), count


ACT_MAG_PRUNE_ALGO = PruneAlgo(
    key="Act Mag",
    name="Activation Magnitude",
    _short_name="Act Mag",
    func=activation_magnitude_prune_scores,
    scores_crossings=False,
    notes=AlgoNotes(
        idea="The mean |activation| of the edge's source, whatever the task",
        paper="none: a baseline",
        cost="F",
        use="A baseline that looks at no answer: better algorithms must beat it.",
    ),
)
