"""The effect of patching each single edge: what the gradient methods estimate.

Cost: per batch, about a third of a forward pass (F) for each edge, and 3 F.
"""

from __future__ import annotations

from collections.abc import Collection

from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import check_count, checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.prune_algos.mask_training import TrainingBatch
from auto_circuit.prune_algos.objectives import (
    AnswerFunction,
    GradFunction,
    answer_loss,
    check_objective,
)
from auto_circuit.prune_algos.one_by_one import chunks, edges_from_the_end, trial
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.ablation_activations import (
    PER_BATCH_ABLATIONS,
    Side,
    iter_src_ablations,
)
from auto_circuit.utils.custom_tqdm import tqdm
from auto_circuit.utils.patchable_model import PatchableModel, unpatched
from auto_circuit.utils.torch_state import in_own_state


@checked
@in_own_state(grad=False)
def exact_edge_patching_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    grad_function: GradFunction = "logit",
    answer_function: AnswerFunction = "avg_diff",
    ablation_type: AblationType = AblationType.RESAMPLE,
    clean_corrupt: Side | None = "corrupt",
    edges_at_once: int = 1,
) -> PruneScores:
    """How much worse the answers get when the edge alone is patched: mean over prompts.

    The input is clean. Positive: patching the edge makes the answer worse. The unit is that
    of the answer function. The arguments: see `mask_gradient_prune_scores`; edges_at_once:
    how many edges are patched in one pass, each for examples of its own (pays on GPUs, and
    for few short prompts).
    """
    effects = edge_effects(
        model,
        dataloader,
        model.edges,
        grad_function,
        answer_function,
        ablation_type,
        clean_corrupt,
        edges_at_once,
    )
    scores = model.new_prune_scores()
    for edge, effect in effects.items():
        scores[edge.dest.module_name][edge.patch_idx] = effect
    return scores


@checked
@in_own_state(grad=False)
def edge_effects(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    edges: Collection[Edge],
    grad_function: GradFunction = "logit",
    answer_function: AnswerFunction = "avg_diff",
    ablation_type: AblationType = AblationType.RESAMPLE,
    clean_corrupt: Side | None = "corrupt",
    edges_at_once: int = 1,
) -> dict[Edge, float]:
    """The same for some edges, for example to check another method's best ones."""
    check_count("edges_at_once", edges_at_once)
    side = clean_corrupt if ablation_type in PER_BATCH_ABLATIONS else None
    model.check_edges(edges)
    check_objective(dataloader, answer_function)
    effects = dict.fromkeys(edges_from_the_end(edges), 0.0)
    for batch, outs in iter_src_ablations(model, dataloader, ablation_type, side):
        tokens, kwargs = batch.model_input("clean")
        with unpatched(model, grad=False):
            clean_outputs = model.sliced(tokens, **kwargs)
        ready = TrainingBatch(batch, tokens, kwargs, outs, clean_outputs)

        def loss(
            outputs: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch = batch
        ) -> float:
            return float(answer_loss(outputs, batch, grad_function, answer_function))

        before = loss(clean_outputs)
        weight = len(tokens) / dataloader.n_prompts
        with trial(model, ready, edges_at_once) as circuits:
            for tried in tqdm(list(chunks(list(effects), edges_at_once)), leave=False):
                for circuit, edge in enumerate(tried):
                    circuits.patch(edge, slice(circuit, circuit + 1), 1.0)
                outputs = circuits.outputs(first=tried[-1])
                for edge, of_circuit in zip(tried, outputs, strict=False):
                    circuits.patch(edge, slice(None), 0.0)
                    effects[edge] += (loss(of_circuit) - before) * weight
    return effects


EXACT_EDGE_PATCHING_PRUNE_ALGO = PruneAlgo(
    key="Exact Edge Patching",
    name="Exact Edge Patching",
    _short_name="Exact",
    func=exact_edge_patching_prune_scores,
    needs_wrong_answers=True,
)
