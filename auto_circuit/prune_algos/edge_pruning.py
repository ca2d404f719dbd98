"""Edge Pruning (Bhaskar et al. 2024, arXiv 2406.16778).

Every edge has a hard concrete gate. The gates are trained to keep the model's outputs, under
the constraint that a given share of the edges is gone: a Lagrangian whose multipliers climb
while the gates descend, and whose target share rises during a warm-up.

Cost: a step is one forward and one backward pass (F + Bk); each batch costs two forward
passes (2 F) once.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Literal

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import check_number, checked, seeded_generator
from auto_circuit.data import PromptDataLoader
from auto_circuit.gates import HARD_CONCRETE_LEFT, HARD_CONCRETE_RIGHT, HARD_CONCRETE_TEMP
from auto_circuit.precision import at_least_float32
from auto_circuit.prune_algos.integrated_gradients import (
    INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
)
from auto_circuit.prune_algos.mask_training import (
    MaskTraining,
    TrainingStep,
    check_finite,
    check_training,
    circuit_outputs,
    mask_optimizer,
    rate_decay,
    scores_from_logits,
    training_batches,
    training_step,
    training_steps,
    warm_start_logits,
)
from auto_circuit.prune_algos.objectives import (
    FaithfulnessTarget,
    check_objective,
    faithfulness_loss,
)
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.graph_utils import mask_fn_mode, set_all_masks, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state

Warmup = Literal["linear", "geometric"]
INIT_LOGIT = 2.0
N_POINTS = 16


@checked
def edge_pruning_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    target_sparsity: float = 0.98,
    n_steps: int = 3000,
    learning_rate: int | float = 0.2,
    multiplier_learning_rate: int | float = 0.8,
    warmup_share: float = 0.8,
    warmup: Warmup = "linear",
    faithfulness_target: FaithfulnessTarget = "kl_div",
    ablation_type: AblationType = AblationType.RESAMPLE,
    seed: int = 0,
    warm_start: PruneAlgo | PruneScores | None = None,
) -> PruneScores:
    """Each edge's trained logit, shifted so that the lowest is 0. See `train_edge_pruning`."""
    return train_edge_pruning(
        model,
        dataloader,
        target_sparsity,
        n_steps,
        learning_rate,
        multiplier_learning_rate,
        warmup_share,
        warmup,
        faithfulness_target,
        ablation_type,
        seed,
        warm_start,
    ).prune_scores


@checked
@in_own_state(grad=True)
def train_edge_pruning(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    target_sparsity: float = 0.98,
    n_steps: int = 3000,
    learning_rate: int | float = 0.2,
    multiplier_learning_rate: int | float = 0.8,
    warmup_share: float = 0.8,
    warmup: Warmup = "linear",
    faithfulness_target: FaithfulnessTarget = "kl_div",
    ablation_type: AblationType = AblationType.RESAMPLE,
    seed: int = 0,
    warm_start: PruneAlgo | PruneScores | None = None,
) -> MaskTraining:
    """Train a circuit of a given sparsity; the scores and the record of the training.

    target_sparsity: the share of all edges that goes, from 0 to 1.
    n_steps: batches that are trained on; the loader starts anew when it ends.
    learning_rate, multiplier_learning_rate: of the gates and of the multipliers (Adam).
        The gates' rate falls linearly to a tenth.
    warmup_share: the share of the steps during which the target rises, from what the
        gates begin with: were it from 0, they would first open and then lag behind.
    warmup: how it rises. "linear", as published; "geometric": the number of edges falls
        by the same factor in each step, so that small circuits get their share of steps.
    warm_start: an algorithm (or its scores) whose ranking the gates begin with, instead
        of all open: see `warm_start_logits`.

    Sparsity is 1 minus the mean gate; here its expectation, without the noise of a sample.
    Raises ConfigError for shares outside of 0 and 1, TrainingError if the loss becomes NaN.

    Differs from the paper's code: Adam without weight decay or a warm-up of its own; one
    gate for each edge, none for nodes; gates start less open (a logit of 2, not 10), and so
    the learning rate is 0.2, not 0.8, with which they close before they are needed.
    """
    check_training(n_steps, learning_rate)
    check_number("multiplier_learning_rate", multiplier_learning_rate, above=0)
    check_number("target_sparsity", target_sparsity, above=0, below=1)
    check_number("warmup_share", warmup_share, above=0, high=1)
    check_objective(dataloader, faithfulness_target)
    batches = training_batches(model, dataloader, ablation_type, "clean")
    first_logits = (
        {}
        if warm_start is None
        else warm_start_logits(model, dataloader, warm_start, INIT_LOGIT)
    )
    device = next(model.wrapped_model.parameters()).device
    generator = seeded_generator(seed, device)
    multipliers = t.zeros(2, device=device, requires_grad=True)
    steps: list[TrainingStep] = []
    first_sparsity = 0.0
    with (
        train_mask_mode(model, notes=False) as masks,
        mask_fn_mode(model, "hard_concrete", 0.0, generator),
        training_steps(model, batches, n_steps) as all_steps,
    ):
        set_all_masks(model, -INIT_LOGIT)  # of a patched edge: the gates are open
        for name, logits in first_logits.items():
            masks[name].data.copy_(-logits)
        optimizer = mask_optimizer(masks, learning_rate)
        ascent = t.optim.Adam([multipliers], lr=multiplier_learning_rate, maximize=True)
        decay = rate_decay(optimizer, 0.1, n_steps)
        for step, batch in all_steps:
            outputs = circuit_outputs(model, batch)
            faithfulness = faithfulness_loss(
                faithfulness_target, outputs, batch.batch, batch.clean_outputs
            )
            n_edges = t.stack(
                [expected_gate(at_least_float32(-mask)).sum() for mask in masks.values()]
            ).sum()
            sparsity = 1 - n_edges / model.n_edges
            progress = min(1.0, (step + 1) / (warmup_share * n_steps))
            if step == 0:
                first_sparsity = sparsity.item()
            target = _target(first_sparsity, target_sparsity, progress, warmup)
            excess = sparsity - target
            penalty = multipliers[0] * excess + multipliers[1] * excess.square()
            loss = faithfulness + penalty
            check_finite(loss, step, learning_rate)
            optimizer.zero_grad()
            ascent.zero_grad()
            loss.backward()
            optimizer.step()
            ascent.step()
            decay.step()
            steps.append(training_step(step, loss, faithfulness, penalty, n_edges))
        scores = scores_from_logits(
            {name: -mask for name, mask in masks.items()}, learning_rate
        )
    return MaskTraining(scores, tuple(steps))


def _target(first: float, last: float, progress: float, warmup: Warmup) -> float:
    """The share of the edges that must be gone, at this share of the warm-up."""
    if warmup == "linear":
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


EDGE_PRUNING_PRUNE_ALGO = PruneAlgo(
    key="Edge Pruning",
    name="Edge Pruning",
    _short_name="EP",
    func=partial(edge_pruning_prune_scores, n_steps=3000),
)
QUICK_EDGE_PRUNING_PRUNE_ALGO = PruneAlgo(
    key="Edge Pruning (quick)",
    name="Edge Pruning (quick)",
    _short_name="EP quick",
    func=partial(
        edge_pruning_prune_scores,
        n_steps=128,
        learning_rate=0.3,
        multiplier_learning_rate=40,
        warmup_share=0.5,
        warmup="geometric",
        faithfulness_target="logit_diff",
        warm_start=INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    ),
    needs_wrong_answers=True,
)
"""For small models and first looks: few steps, from EAP-IG's ranking on, and trained for
what the metrics of logit differences measure."""
