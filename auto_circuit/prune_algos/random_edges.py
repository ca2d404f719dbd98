"""Random scores: the baseline that every algorithm must beat. Costs nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch as t

from auto_circuit.checks import check_seed, checked, seeded_generator
from auto_circuit.data import PromptDataLoader
from auto_circuit.prune_algos.algo_config import AlgoConfig, bound, makes_config
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import Edge, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class RandomConfig(AlgoConfig):
    """seed: see `random_prune_scores`."""

    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_seed(self.seed)


@makes_config(RandomConfig)
@checked
@in_own_state(grad=False)
def random_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader | None,
    official_edges: Collection[Edge] | None,
    seed: int | t.Generator | None = None,
) -> PruneScores:
    """Uniform in [0, 1).

    seed: a number: the same scores for the same one, in every call and process, on every
        device. A generator: the next numbers that it gives. None: new scores in
        every call, from torch's global generator, which `torch.manual_seed` sets.

    The algorithm `RANDOM_PRUNE_ALGO` has the seed 0; `with_seed` gives it another one.
    """
    if seed is None or isinstance(seed, t.Generator):
        generator = seed
    else:
        generator = seeded_generator(seed)
    device = "cpu" if generator is None else generator.device
    return {
        module_name: t.rand(scores.shape, generator=generator, device=device).to(scores)
        for module_name, scores in model.new_prune_scores().items()
    }


# An algorithm leaves the global generator alone: a sweep's numbers come from its seed.
RANDOM_PRUNE_ALGO = PruneAlgo(
    key="Random",
    name="Random",
    func=bound(random_prune_scores, RandomConfig(seed=0)),
    notes=AlgoNotes(
        idea="A random number for each edge, which follows from the seed",
        paper="none: a baseline",
        cost="none",
        use="Always: what no better than it can say nothing.",
    ),
)
