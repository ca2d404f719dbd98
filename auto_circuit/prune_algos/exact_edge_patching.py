"""The effect of patching each single edge: what the gradient methods estimate.

Cost: per batch, about a third of a forward pass (F) for each edge, and 3 F.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from auto_circuit.checks import check_count, checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.prune_algos.algo_config import bound, takes_options
from auto_circuit.prune_algos.mask_training import TrainingBatch
from auto_circuit.prune_algos.objectives import (
    AnswerConfig,
    check_objective,
)
from auto_circuit.prune_algos.one_by_one import chunks, edges_from_the_end, trial
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.ablation_activations import (
    Side,
    SrcOuts,
    ablation_side,
)
from auto_circuit.utils.custom_tqdm import tqdm
from auto_circuit.utils.limited_passes import Passes, each_batch
from auto_circuit.utils.patchable_model import PatchableModel, unpatched
from auto_circuit.utils.torch_state import in_own_state


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class ExactEdgePatchingConfig(AnswerConfig):
    """The options of exact edge patching.

    ablation_type, clean_corrupt: what is patched in.
    edges_at_once: how many edges are patched in one pass, each for examples of its own
        (pays on GPUs, and for few short prompts).
    """

    ablation_type: AblationType = AblationType.RESAMPLE
    clean_corrupt: Side | None = "corrupt"
    edges_at_once: int = 1

    def __post_init__(self) -> None:
        check_count("edges_at_once", self.edges_at_once)


@takes_options(ExactEdgePatchingConfig)
@checked
@in_own_state(grad=False)
def exact_edge_patching_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: ExactEdgePatchingConfig,
) -> PruneScores:
    """How much worse the answers get when the edge alone is patched: mean over prompts.

    The input is clean. Positive: patching the edge makes the answer worse. The unit is that
    of the answer function. config: see `ExactEdgePatchingConfig`; its options may be given
    one by one too.
    """
    scores = model.new_prune_scores()
    effects = single_edge_effects(model, dataloader, model.edges, config)
    for edge, effect in effects.items():
        edge.set_prune_score(scores, effect)
    return scores


@takes_options(ExactEdgePatchingConfig)
@checked
@in_own_state(grad=False)
def single_edge_effects(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    edges: Collection[Edge],
    config: ExactEdgePatchingConfig,
) -> dict[Edge, float]:
    """The same for some edges, for example to check another method's best ones."""
    side = ablation_side(config.ablation_type, config.clean_corrupt)
    model.check_edges(edges)
    check_objective(dataloader, config.answer_function)
    effects = dict.fromkeys(edges_from_the_end(edges), 0.0)

    def batch_effects(
        edges: list[Edge], batch: PromptPairBatch, outs: SrcOuts
    ) -> Iterator[tuple[Edge, float]]:
        tokens, kwargs = batch.model_input("clean")
        with unpatched(model, grad=False):
            clean_outputs = model.sliced(tokens, **kwargs)
        ready = TrainingBatch(batch, tokens, kwargs, outs, clean_outputs)
        before = float(config.loss(clean_outputs, batch))
        with trial(model, ready, config.edges_at_once) as circuits:
            groups = list(chunks(edges, config.edges_at_once))
            for tried in tqdm(groups, leave=False):
                for circuit, edge in enumerate(tried):
                    circuits.patch(edge, slice(circuit, circuit + 1), 1.0)
                outputs = circuits.outputs(first=tried[-1])
                for edge, of_circuit in zip(tried, outputs, strict=False):
                    circuits.patch(edge, slice(None), 0.0)
                    yield edge, float(config.loss(of_circuit, batch)) - before

    def add_effects(batch: PromptPairBatch, outs: SrcOuts) -> None:
        weight = len(batch.clean) / dataloader.n_prompts
        for edge, effect in batch_effects(list(effects), batch, outs):
            effects[edge] += effect * weight

    def try_out(batch: PromptPairBatch, outs: SrcOuts) -> None:
        # The last ones: the first block runs, and all after it.
        list(batch_effects(list(effects)[-config.edges_at_once :], batch, outs))

    patched_in = config.ablation_type, side
    passes = Passes(add_effects, try_out)
    each_batch(model, dataloader, patched_in, passes, config.memory_limit)
    return effects


edge_effects = single_edge_effects
"""An earlier name of it; `metrics.minimality.edge_effects` are those inside a circuit."""

EXACT_EDGE_PATCHING_PRUNE_ALGO = PruneAlgo(
    key="Exact Edge Patching",
    name="Exact Edge Patching",
    _short_name="Exact",
    func=bound(exact_edge_patching_prune_scores, ExactEdgePatchingConfig()),
    needs_wrong_answers=True,
    notes=AlgoNotes(
        idea="What patching the edge alone does to the answers: no estimate",
        paper="Conmy et al. 2023, arXiv 2304.14997; Goldowsky-Dill et al. 2023, arXiv 2304.05969",
        cost="3 F, and about F / 3 for each edge",
        use="To judge the gradient methods; small graphs. Says nothing of edges together.",
    ),
)
