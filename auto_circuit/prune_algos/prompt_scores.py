"""Gradient scores of every single prompt, at the price of their mean.

Every prompt of a batch gets masks of its own, so that one backward pass gives all of
their gradients. What can be learned from them: `score_ensembles.bootstrap_prompt_scores`.

Cost per batch: two forward passes and one backward pass (2 F + 1 Bk).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch as t

from auto_circuit.checks import check_number, checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.prune_algos.algo_config import takes_options
from auto_circuit.prune_algos.objectives import (
    AnswerConfig,
    check_objective,
)
from auto_circuit.types import AblationType, PruneScores
from auto_circuit.utils.ablation_activations import (
    Side,
    SrcOuts,
    ablation_side,
)
from auto_circuit.utils.graph_utils import (
    patch_mode,
    set_all_masks,
    set_mask_batch_size,
    train_mask_mode,
)
from auto_circuit.utils.limited_passes import Passes, each_batch, kept_at
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class PromptScoresConfig(AnswerConfig):
    """The options of gradient scores of single prompts.

    mask_val: the mask's value where the gradient is taken; 0 is edge attribution
        patching. ablation_type, clean_corrupt: what is patched in; under the BATCH_*
        types it depends on the prompts that share a batch.
    """

    mask_val: int | float = 0.0
    ablation_type: AblationType = AblationType.RESAMPLE
    clean_corrupt: Side | None = "corrupt"

    def __post_init__(self) -> None:
        check_number("mask_val", self.mask_val)


@takes_options(PromptScoresConfig)
@checked
@in_own_state(grad=True)
def mask_gradient_prompt_scores(
    model: PatchableModel, dataloader: PromptDataLoader, config: PromptScoresConfig
) -> PruneScores:
    """d loss / d mask for every prompt and edge. The input is clean.

    Returns {destination module: [prompt, seq?, head?, src]}, prompts in the loader's
    order. Sign and unit are those of `mask_gradient_prune_scores`, whose scores are the
    means over prompts of these. They take memory of prompts times edges.

    config: see `PromptScoresConfig`; its options may be given one by one too.

    Raises ConfigError for unknown functions, DataError for a loader without prompts.
    """
    side = ablation_side(config.ablation_type, config.clean_corrupt)
    check_objective(dataloader, config.answer_function)
    found = _Found(dataloader.n_prompts)

    def take_gradients(batch: PromptPairBatch, patch_src_outs: SrcOuts) -> PruneScores:
        return _batch_scores(model, batch, patch_src_outs, config)

    passes = Passes(
        work=lambda batch, outs: found.add(take_gradients(batch, outs)),
        try_out=take_gradients,
        kept=kept_at(model, [float(config.mask_val)]),
    )
    with train_mask_mode(model, notes=False):
        set_all_masks(model, float(config.mask_val))
        patched_in = config.ablation_type, side
        each_batch(model, dataloader, patched_in, passes, config.memory_limit)
    return {name: t.cat([part[name] for part in found.parts]) for name in found.parts[0]}


class _Found:
    """The scores of all prompts, in parts; once more for each chunk of sources, added up."""

    def __init__(self, n_prompts: int) -> None:
        self.parts: list[PruneScores] = []
        self._n_missing = n_prompts
        self._n_added = 0

    def add(self, part: PruneScores) -> None:
        if self._n_missing > 0:
            self.parts.append(part)
            self._n_missing -= len(next(iter(part.values())))
            return
        for name, scores in self.parts[self._n_added % len(self.parts)].items():
            if name in part:  # else it reads none of these sources
                scores += part[name]
        self._n_added += 1


def _batch_scores(
    model: PatchableModel,
    batch: PromptPairBatch,
    patch_src_outs: SrcOuts,
    config: AnswerConfig,
) -> PruneScores:
    with (
        set_mask_batch_size(model, len(batch.clean)),
        patch_mode(model, patch_src_outs, overwrite_patch=True),
    ):
        config.clean_loss_sum(model, batch).backward()
        return {
            module_name: mask.grad.detach()
            for module_name, mask in model.patch_masks.items()
            if mask.grad is not None
        }
