"""How large a source's output is, as the score of all of its edges.

Cost: one forward pass (1 F) per batch.
"""

from __future__ import annotations

from collections.abc import Collection

import torch as t

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.ablation_activations import iter_src_ablations
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@in_own_state(grad=False)
def activation_magnitude_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
) -> PruneScores:
    """The mean |activation| of an edge's source on the clean prompts (at least 0).

    The mean is over prompts, positions and dimensions; padding does not count.
    """
    model.check_no_crossings("The magnitude of activations")
    total = t.zeros(model.plan.n_srcs, dtype=t.float64)
    count = 0
    clean = iter_src_ablations(model, dataloader, AblationType.RESAMPLE, "clean")
    for batch, outs in clean:
        _, kwargs = batch.model_input("clean")
        wide = t.promote_types(outs.dtype, t.float32)
        magnitudes = outs.abs().mean(dim=-1, dtype=wide)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            magnitudes = magnitudes * mask[:, -outs.shape[2] :]
        total = total + magnitudes.sum(dim=(1, 2)).cpu().double()
        count += magnitudes[0].numel() if mask is None else int(mask.sum())
    means = total / count
    return {
        wrapper.module_name: scores + means[wrapper.in_srcs].to(scores)
        for wrapper, scores in zip(
            model.dest_wrappers, model.new_prune_scores().values(), strict=True
        )
    }


ACT_MAG_PRUNE_ALGO = PruneAlgo(
    key="Act Mag",
    name="Activation Magnitude",
    _short_name="Act Mag",
    func=activation_magnitude_prune_scores,
    notes=AlgoNotes(
        idea="The mean |activation| of the edge's source, whatever the task",
        paper="none: a baseline",
        cost="F",
        use="A baseline that looks at no answer: better algorithms must beat it.",
    ),
)
