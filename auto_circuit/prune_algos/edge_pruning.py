"""Edge Pruning (Bhaskar et al. 2024, arXiv 2406.16778).

Every edge has a hard concrete gate. The gates are trained to keep the model's outputs, under
the constraint that a given share of the edges is gone: a Lagrangian whose multipliers climb
while the gates descend, and whose target share rises during a warm-up.

Cost: a step is one forward and one backward pass (F + Bk); each batch costs two forward
passes (2 F) once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from auto_circuit.checks import check_number, checked, seeded_generator
from auto_circuit.data import PromptDataLoader
from auto_circuit.gates import HARD_CONCRETE_LEFT, HARD_CONCRETE_RIGHT, HARD_CONCRETE_TEMP
from auto_circuit.prune_algos.algo_config import AlgoConfig, bound, takes_options
from auto_circuit.prune_algos.integrated_gradients import (
    INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
)
from auto_circuit.prune_algos.mask_training import (
    Losses,
    MaskTraining,
    TrainingBatch,
    TrainingStep,
    batch_faithfulness,
    check_training,
    circuit_logits,
    first_logits,
    mask_optimizer,
    prompts_at_once,
    rate_decay,
    scores_from_masks,
    set_circuit_logits,
    take_step,
    training_batches,
    training_steps,
)
from auto_circuit.prune_algos.objectives import (
    FaithfulnessTarget,
    check_objective,
)
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.graph_utils import mask_fn_mode, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state

Warmup = Literal["linear", "geometric"]
INIT_LOGIT = 2.0
"""The logit that all gates begin with, without a warm start: they are open."""
N_POINTS = 16


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class EdgePruningConfig(AlgoConfig):
    """The options of Edge Pruning.

    target_sparsity: the share of all edges that goes, between 0 and 1.
    n_steps: batches that are trained on; the loader starts anew when it ends.
    learning_rate, multiplier_learning_rate: of the gates and of the multipliers (Adam).
        The gates' rate falls linearly to a tenth.
    warmup_share: the share of the steps during which the target rises, from what the
        gates begin with: were it from 0, they would first open and then lag behind.
    warmup: how it rises. "linear", as published; "geometric": the number of edges falls
        by the same factor in each step, so that small circuits get their share of steps.
    faithfulness_target: see `objectives.faithfulness_loss`.
    ablation_type: what is patched in. seed: of the gates' noise.
    warm_start: an algorithm (or its scores) whose ranking the gates begin with, instead
        of all open: see `warm_start_logits`.
    """

    target_sparsity: int | float = 0.98
    n_steps: int = 3000
    learning_rate: int | float = 0.2
    multiplier_learning_rate: int | float = 0.8
    warmup_share: int | float = 0.8
    warmup: Warmup = "linear"
    faithfulness_target: FaithfulnessTarget = "kl_div"
    ablation_type: AblationType = AblationType.RESAMPLE
    seed: int = 0
    warm_start: PruneAlgo | PruneScores | None = None

    def __post_init__(self) -> None:
        check_training(self.n_steps, self.learning_rate, self.seed)
        check_number("multiplier_learning_rate", self.multiplier_learning_rate, above=0)
        check_number("target_sparsity", self.target_sparsity, above=0, below=1)
        check_number("warmup_share", self.warmup_share, above=0, high=1)


@takes_options(EdgePruningConfig)
@checked
def edge_pruning_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: EdgePruningConfig,
) -> PruneScores:
    """Each edge's trained logit, shifted so that the lowest is 0. See `train_edge_pruning`."""
    return train_edge_pruning(model, dataloader, config).prune_scores


@takes_options(EdgePruningConfig)
@checked
@in_own_state(grad=True)
def train_edge_pruning(
    model: PatchableModel, dataloader: PromptDataLoader, config: EdgePruningConfig
) -> MaskTraining:
    """Train a circuit of a given sparsity; the scores and the record of the training.

    config: see `EdgePruningConfig`; its options may be given one by one too.

    Sparsity is 1 minus the mean gate; here its expectation, without the noise of a sample.
    Raises ConfigError for options out of range, TrainingError if the loss becomes NaN.

    Differs from the paper's code: Adam without weight decay or a warm-up of its own; one
    gate for each edge, none for nodes; gates start less open (a logit of 2, not 10), and so
    the learning rate is 0.2, not 0.8, with which they close before they are needed.
    """
    check_objective(dataloader, config.faithfulness_target)
    device, ablation = next(model.wrapped_model.parameters()).device, config.ablation_type

    def try_out(batch: TrainingBatch) -> None:
        noise = seeded_generator(config.seed, device)
        with (
            train_mask_mode(model, notes=False) as masks,
            mask_fn_mode(model, "hard_concrete", 0.0, noise),
            batch.patches(model),
        ):
            loss = batch_faithfulness(model, batch, config.faithfulness_target)
            (loss + _expected_edges(masks)).backward()

    n_at_once = prompts_at_once(model, [dataloader], ablation, "clean", try_out)
    first = first_logits(model, dataloader, config.warm_start, INIT_LOGIT, INIT_LOGIT)
    batches = training_batches(model, dataloader, ablation, "clean", None, n_at_once)
    generator = seeded_generator(config.seed, device)
    multipliers = t.zeros(2, device=device, requires_grad=True)
    steps: list[TrainingStep] = []
    first_sparsity = 0.0
    with (
        train_mask_mode(model, notes=False) as masks,
        mask_fn_mode(model, "hard_concrete", 0.0, generator),
        training_steps(model, batches, config.n_steps) as all_steps,
    ):
        set_circuit_logits(masks, first, "others")
        optimizer = mask_optimizer(masks, config.learning_rate)
        optimizers = [optimizer, _ascent(multipliers, config.multiplier_learning_rate)]
        decay = rate_decay(optimizer, 0.1, config.n_steps)
        for step, batch in all_steps:
            faithfulness = batch_faithfulness(model, batch, config.faithfulness_target)
            n_edges = _expected_edges(masks)
            sparsity = 1 - n_edges / model.n_edges
            first_sparsity = sparsity.item() if step == 0 else first_sparsity
            progress = min(1.0, (step + 1) / (config.warmup_share * config.n_steps))
            excess = sparsity - _target(first_sparsity, progress, config)
            penalty = multipliers[0] * excess + multipliers[1] * excess.square()
            losses = Losses(faithfulness, penalty, n_edges)
            steps.append(take_step(step, losses, config.learning_rate, optimizers))
            decay.step()
        scores = scores_from_masks(masks, "others", config.learning_rate)
    return MaskTraining(scores, tuple(steps))


def _ascent(multipliers: Tensor, learning_rate: int | float) -> t.optim.Adam:
    """The multipliers climb while the gates descend."""
    return t.optim.Adam([multipliers], lr=learning_rate, maximize=True)


def _expected_edges(masks: Mapping[str, Parameter]) -> Tensor:
    gates = circuit_logits(masks, "others").values()
    return t.stack([expected_gate(logits).sum() for logits in gates]).sum()


def _target(first: float, progress: float, config: EdgePruningConfig) -> float:
    """The share of the edges that must be gone, at this share of the warm-up."""
    last = config.target_sparsity
    if config.warmup == "linear":
        return first + (last - first) * progress
    return 1 - (1 - first) * ((1 - last) / (1 - first)) ** progress


@checked
def expected_gate(logits: Float[Tensor, "*mask"]) -> Float[Tensor, "*mask"]:
    """The mean of a hard concrete gate, from 0 to 1: the share of the edge that is in.

    The mean of a number between 0 and 1 is the integral of its chance to be above x.
    """
    points = (t.arange(N_POINTS, device=logits.device) + 0.5) / N_POINTS
    offsets = HARD_CONCRETE_TEMP * t.log(
        (points - HARD_CONCRETE_LEFT) / (HARD_CONCRETE_RIGHT - points)
    )
    return t.sigmoid(logits.unsqueeze(-1) - offsets.to(logits)).mean(-1)


_NOTES = AlgoNotes(
    idea="Gates trained to keep the outputs while a given share of the edges has to go",
    paper="Bhaskar et al. 2024, arXiv 2406.16778",
    cost="steps x (F + B), and 2 F",
    use="A circuit of one chosen size, where there is time for a long training.",
)
EDGE_PRUNING_PRUNE_ALGO = PruneAlgo(
    key="Edge Pruning",
    name="Edge Pruning",
    _short_name="EP",
    func=bound(edge_pruning_prune_scores, EdgePruningConfig()),
    notes=_NOTES,
)
QUICK_EDGE_PRUNING_PRUNE_ALGO = PruneAlgo(
    key="Edge Pruning (quick)",
    name="Edge Pruning (quick)",
    _short_name="EP quick",
    func=bound(
        edge_pruning_prune_scores,
        EdgePruningConfig(
            n_steps=128,
            learning_rate=0.3,
            multiplier_learning_rate=40,
            warmup_share=0.5,
            warmup="geometric",
            faithfulness_target="logit_diff",
            warm_start=INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
        ),
    ),
    needs_wrong_answers=True,
    notes=replace(
        _NOTES,
        use="The same in 128 steps from EAP-IG's ranking on: small models, first looks.",
    ),
)
"""For small models and first looks: few steps, from EAP-IG's ranking on, and trained for
what the metrics of logit differences measure."""
