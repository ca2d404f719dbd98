"""Random scores: the baseline that every algorithm must beat. Costs nothing."""

from __future__ import annotations

from collections.abc import Collection

import torch as t

from auto_circuit.checks import checked, seeded_generator
from auto_circuit.data import PromptDataLoader
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.types import Edge, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@in_own_state(grad=False)
def random_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader | None,
    official_edges: Collection[Edge] | None,
    seed: int = 0,
) -> PruneScores:
    """Uniform in [0, 1), the same for the same seed in every process, on every device.

    Differs from auto-circuit, whose order of edges came from sets.
    """
    generator = seeded_generator(seed)
    return {
        module_name: t.rand(scores.shape, generator=generator).to(scores)
        for module_name, scores in model.new_prune_scores().items()
    }


RANDOM_PRUNE_ALGO = PruneAlgo(key="Random", name="Random", func=random_prune_scores)
