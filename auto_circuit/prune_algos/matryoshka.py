"""Matryoshka attribution (arXiv 2609.25518): one training that ranks edges for every budget.

Each step draws a circuit size k and keeps a soft top-k of the scores: edge i with the share
sigmoid((s_i - tau) / T), where tau is such that the shares sum to k. The scores learn which
edges are worth keeping at all sizes together.

Cost: a step is one forward and one backward pass (F + Bk); each batch costs two forward
passes (2 F) once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import check_number, checked, seeded_generator
from auto_circuit.data import PromptDataLoader
from auto_circuit.prune_algos.algo_config import AlgoConfig, bound, takes_options
from auto_circuit.prune_algos.mask_training import (
    MaskTraining,
    TrainingBatch,
    TrainingStep,
    batch_faithfulness,
    check_finite,
    check_training,
    prompts_at_once,
    scores_from_logits,
    training_batches,
    training_steps,
)
from auto_circuit.prune_algos.objectives import (
    FaithfulnessTarget,
    check_objective,
)
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.graph_utils import set_all_masks, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state

SizeDistribution = Literal["uniform", "log_uniform"]
BISECTIONS = 50


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class MatryoshkaConfig(AlgoConfig):
    """The options of Matryoshka attribution.

    n_steps: batches that are trained on; the loader starts anew when it ends.
    learning_rate: of the scores (Adam).
    temperature: T; the lower, the nearer to a sharp top-k.
    sizes: how k is drawn from 1..number of edges; "log_uniform" gives small circuits as
        many steps as large ones. seed: of these draws.
    ablation_type: what is patched in.
    faithfulness_target: the loss, see `objectives.faithfulness_loss`; "logit_diff" is the
        paper's, minus the mean difference between right and wrong answers' logits.
    """

    n_steps: int = 5000
    learning_rate: int | float = 0.05
    temperature: int | float = 0.5
    sizes: SizeDistribution = "log_uniform"
    ablation_type: AblationType = AblationType.RESAMPLE
    seed: int = 0
    faithfulness_target: FaithfulnessTarget = "logit_diff"

    def __post_init__(self) -> None:
        check_training(self.n_steps, self.learning_rate, self.seed)
        check_number("temperature", self.temperature, above=0)


@takes_options(MatryoshkaConfig)
@checked
def matryoshka_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: MatryoshkaConfig,
) -> PruneScores:
    """Each edge's score, shifted so that the lowest is 0. See `train_matryoshka`."""
    return train_matryoshka(model, dataloader, config).prune_scores


@takes_options(MatryoshkaConfig)
@checked
@in_own_state(grad=True)
def train_matryoshka(
    model: PatchableModel, dataloader: PromptDataLoader, config: MatryoshkaConfig
) -> MaskTraining:
    """Learn scores whose soft top-k circuits do what the model does.

    The higher a score, the smaller the circuits that the edge is in.

    config: see `MatryoshkaConfig`; its options may be given one by one too.

    Raises ConfigError for options out of range, TrainingError if the loss becomes NaN.
    """
    check_objective(dataloader, config.faithfulness_target)

    def try_out(batch: TrainingBatch) -> None:
        with train_mask_mode(model, notes=False), batch.patches(model):
            set_all_masks(model, 0.5)
            loss = batch_faithfulness(model, batch, config.faithfulness_target)
            if loss.requires_grad:
                loss.backward()

    ablation = config.ablation_type
    n_at_once = prompts_at_once(model, [dataloader], ablation, "clean", try_out)
    batches = training_batches(model, dataloader, ablation, "clean", None, n_at_once)
    generator = seeded_generator(config.seed)
    steps = []
    with (
        train_mask_mode(model, notes=False) as masks,
        training_steps(model, batches, config.n_steps) as all_steps,
    ):
        lengths = [mask.numel() for mask in masks.values()]
        scores = _first_scores(masks)
        optimizer = t.optim.Adam([scores], lr=config.learning_rate)
        for step, batch in all_steps:
            size = _draw_size(len(scores), config.sizes, generator)
            kept = soft_top_k(scores.detach(), size, config.temperature)
            for mask, shares in zip(masks.values(), kept.split(lengths), strict=True):
                mask.data.copy_(1 - shares.view_as(mask))
                mask.grad = None
            loss = batch_faithfulness(model, batch, config.faithfulness_target)
            check_finite(loss, step, config.learning_rate)
            if loss.requires_grad:  # else it went backwards part by part
                loss.backward()
            grad = t.cat([-_gradient(mask).flatten() for mask in masks.values()])
            scores.grad = soft_top_k_gradient(kept, grad.to(scores), config.temperature)
            optimizer.step()
            steps.append(TrainingStep(step, loss.item(), loss.item(), 0.0, size))
        parts = zip(masks.items(), scores.detach().split(lengths), strict=True)
        found = {name: values.view_as(mask).clone() for (name, mask), values in parts}
        found = scores_from_logits(found, config.learning_rate)
    return MaskTraining(found, tuple(steps))


def _first_scores(masks: Mapping[str, Tensor]) -> Float[Tensor, "edges"]:
    """A score of 0 for every edge. In half precision a sum of shares would mean little."""
    first = next(iter(masks.values()))
    dtype = t.promote_types(first.dtype, t.float32)
    n_edges = sum(mask.numel() for mask in masks.values())
    return t.zeros(n_edges, dtype=dtype, device=first.device).requires_grad_()


@checked
def soft_top_k(
    scores: Float[Tensor, "edges"], size: int | float, temperature: float
) -> Float[Tensor, "edges"]:
    """Shares in (0, 1) that sum to `size`: sigmoid((score - tau) / temperature)."""
    # Beyond these bounds all shares are 0 or 1 to the last digit.
    reach = 40 * temperature
    low, high = scores.min() - reach, scores.max() + reach
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_too_low = t.sigmoid((scores - middle) / temperature).sum() > size
        low, high = t.where(is_too_low, middle, low), t.where(is_too_low, high, middle)
    return t.sigmoid((scores - (low + high) / 2) / temperature)


@checked
def soft_top_k_gradient(
    shares: Float[Tensor, "edges"], grad: Float[Tensor, "edges"], temperature: float
) -> Float[Tensor, "edges"]:
    """The gradient of the scores from that of the shares.

    tau depends on all scores, so that the shares go on summing to the same size: the mean
    gradient, weighted by the slopes, drops out.
    """
    slopes = shares * (1 - shares) / temperature
    total = slopes.sum().clamp(min=t.finfo(slopes.dtype).tiny)
    return slopes * (grad - (grad * slopes).sum() / total)


def _gradient(mask: Tensor) -> Tensor:
    assert mask.grad is not None
    return mask.grad


def _draw_size(n_edges: int, sizes: SizeDistribution, generator: t.Generator) -> int:
    draw = float(t.rand((), generator=generator))
    if sizes == "uniform":
        return 1 + min(int(draw * n_edges), n_edges - 1)
    return round(math.exp(draw * math.log(n_edges)))


_NOTES = AlgoNotes(
    idea="Scores trained so that the best k edges do the task, for many k at once",
    paper="arXiv 2609.25518",
    cost="steps x (F + B), and 2 F",
    use="One ranking for all circuit sizes, where there is time for a training.",
)
MATRYOSHKA_PRUNE_ALGO = PruneAlgo(
    key="Matryoshka Attribution",
    name="Matryoshka Attribution",
    _short_name="MAttr",
    func=bound(matryoshka_prune_scores, MatryoshkaConfig()),
    needs_wrong_answers=True,
    notes=_NOTES,
)
QUICK_MATRYOSHKA_PRUNE_ALGO = PruneAlgo(
    key="Matryoshka Attribution (quick)",
    name="Matryoshka Attribution (quick)",
    _short_name="MAttr quick",
    func=bound(
        matryoshka_prune_scores, MatryoshkaConfig(n_steps=144, learning_rate=0.13)
    ),
    needs_wrong_answers=True,
    notes=replace(_NOTES, use="The same in 144 steps: small models and first looks."),
)
"""Enough for a small model: few steps, more than twice the published learning rate."""
