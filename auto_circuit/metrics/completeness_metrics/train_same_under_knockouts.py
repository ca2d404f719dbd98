"""Train the knockout under which a circuit differs most from the model.

A mask over the circuit's edges says what is knocked out, in the circuit and in the model
alike. It is trained by gradient descent to make the two differ, while a penalty keeps it
to about a fifth of the circuit. The circuit passes the test (`same_under_knockouts`) if
even this knockout leaves the two alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch as t
from torch import Tensor

from auto_circuit.checks import (
    check_choice,
    check_count,
    check_number,
    check_seed,
    checked,
    seeded_generator,
)
from auto_circuit.circuits import Circuit, circuit_of_scores
from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ConfigError, TrainingError, near_matches
from auto_circuit.gates import hard_concrete_expected_l0
from auto_circuit.metrics.completeness_metrics.same_under_knockouts import (
    find_task_like,
    known_circuit_size,
)
from auto_circuit.metrics.protocols import PrunableTask
from auto_circuit.precision import at_least_float32
from auto_circuit.prune_algos.algo_config import AlgoConfig, takes_options
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import (
    AblationType,
    AlgoKey,
    MaskFn,
    PruneScores,
    TaskPruneScores,
)
from auto_circuit.utils.ablation_activations import batch_src_ablations
from auto_circuit.utils.graph_utils import mask_fn_mode, patch_mode, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.tensor_ops import batch_avg_answer_diff, multibatch_kl_div
from auto_circuit.utils.torch_state import own_state

KnockoutTarget = Literal["kl_div", "logit_diff"]

INIT_LOGIT = -math.log(5)
"""Where mask logits start: mostly not knocked out, as in auto-circuit."""
SURE_LOGIT = 99.0
"""A logit so large that the mask is 1 exactly (or 0, if negative) and has no gradient."""
TARGET_SHARE = 5
"""The penalty starts when more than one in this many edges of the circuit is out."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class KnockoutTrainingConfig(AlgoConfig):
    """How a knockout is trained.

    learning_rate: of the masks (Adam). epochs: how often all training prompts are seen.
    regularize_lambda: the weight of the penalty: (expected knockouts - target) / target, if
        that is positive, where the target is a fifth of the circuit and at least one edge.
    mask_fn: what makes a mask (1: the edge is knocked out) of a logit.
    faithfulness_target: what is made large: "kl_div": KL(model without K || circuit
        without K); "logit_diff": the model's logit difference minus the circuit's.
    seed: of the masks' randomness; the global generator is left alone.
    """

    learning_rate: int | float
    epochs: int
    regularize_lambda: int | float
    mask_fn: MaskFn = "hard_concrete"
    faithfulness_target: KnockoutTarget = "kl_div"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("regularize_lambda", self.regularize_lambda, low=0)
        # Without a function, masks would not stay between 0 and 1.
        check_choice("mask_fn", self.mask_fn, Literal["hard_concrete", "sigmoid"])
        check_seed(self.seed)


@checked
def train_same_under_knockouts(
    task_prune_scores: TaskPruneScores,
    algo_keys: Sequence[AlgoKey],
    learning_rate: int | float,
    epochs: int,
    regularize_lambda: int | float,
    faithfulness_target: KnockoutTarget = "kl_div",
    *,
    circuit_size: int | None = None,
    seed: int = 0,
    tasks: Sequence[PrunableTask] | None = None,
) -> TaskPruneScores:
    """Trained knockout scores for the circuits of some algorithms on each task.

    algo_keys: the algorithms, which must have scores on every task.
    circuit_size: the number of edges of every circuit; that of the task's true edges
        if None. tasks: where the keys are looked up; the predefined tasks if None.
    The other parameters: `KnockoutTrainingConfig`. The result is the
    `knockout_ps` of `measure_same_under_knockouts`.

    Raises ConfigError, before anything is trained, without `algo_keys`, for a key without a
    task or without scores, and for a size that is not known.
    """
    config = KnockoutTrainingConfig(
        learning_rate=learning_rate,
        epochs=epochs,
        regularize_lambda=regularize_lambda,
        faithfulness_target=faithfulness_target,
        seed=seed,
    )
    if not len(algo_keys):
        raise ConfigError(
            "`algo_keys` is empty, so there is nothing to train; name the algorithms, such "
            "as `list(task_prune_scores[task_key])`."
        )
    for task_key, algo_scores in task_prune_scores.items():
        known_circuit_size(find_task_like(task_key, tasks), circuit_size)
        for algo in algo_keys:
            if algo not in algo_scores:
                raise ConfigError(
                    f"The algorithm {algo!r} has no scores on the task {task_key!r}."
                    + near_matches(algo, algo_scores)
                )
    trained: TaskPruneScores = {}
    for task_key, algo_scores in task_prune_scores.items():
        task = find_task_like(task_key, tasks)
        trained[task_key] = {
            algo: train_same_under_knockout_prune_scores(
                task, algo_scores[algo], known_circuit_size(task, circuit_size), config
            )
            for algo in algo_keys
        }
    return trained


@takes_options(KnockoutTrainingConfig)
@checked
def train_same_under_knockout_prune_scores(
    task: PrunableTask,
    algo_ps: PruneScores,
    circuit_size: int,
    config: KnockoutTrainingConfig,
) -> PruneScores:
    """Knockout scores: positive for the edges whose loss sets circuit and model apart.

    algo_ps, circuit_size: the circuit, as in `same_under_knockout`.
    config: see `KnockoutTrainingConfig`; its options may be given one by one too.

    Returns mask logits for the circuit's edges, 0 outside: above 0, the mask is above a
    half. Adam. Raises ConfigError for an empty circuit and arguments that make no sense,
    GraphError for scores of another graph, TrainingError if the loss diverges. Cost: two
    forward passes and a backward pass through both per batch and epoch.

    It trains on the task's training prompts, while the knockout is measured on the test
    prompts; circuit and model see the same random mask; edges outside the circuit score 0.
    """
    model: PatchableModel = task.model
    circuit = circuit_of_scores(model, algo_ps, circuit_size)
    if not circuit.n_edges:
        raise ConfigError(
            "The circuit has no edges, so none can be knocked out. Give a `circuit_size` "
            "of at least 1."
        )
    device = next(iter(model.patch_masks.values())).device
    generator = seeded_generator(config.seed, device)
    patches = batch_src_ablations(
        model, task.train_loader, AblationType.RESAMPLE, "corrupt"
    )
    with (
        own_state(model, grad=True),
        train_mask_mode(model, notes=False) as masks,
        mask_fn_mode(model, config.mask_fn, 0.0, generator),
    ):
        for mask in masks.values():
            mask.data.fill_(INIT_LOGIT)
        optimizer = t.optim.Adam(masks.values(), lr=config.learning_rate)
        batches = (batch for _ in range(config.epochs) for batch in task.train_loader)
        for batch in batches:
            optimizer.zero_grad()
            with patch_mode(model, patches[batch.key]):
                outs = _both_outs(model, batch, masks, circuit, generator)
                difference = _difference(*outs, batch, config.faithfulness_target)
                penalty = _size_penalty(masks, circuit, config.mask_fn)
                loss = -difference + config.regularize_lambda * penalty
                _check_finite(loss, config.learning_rate)
                loss.backward()
            optimizer.step()
        return {
            name: mask.detach().where(circuit[name], t.zeros_like(mask))
            for name, mask in masks.items()
        }


def _both_outs(
    model: PatchableModel,
    batch: PromptPairBatch,
    masks: Mapping[str, Tensor],
    circuit: Circuit,
    generator: t.Generator,
) -> tuple[Tensor, Tensor]:
    """The outputs of the model and of the circuit, with the same edges knocked out."""
    tokens, kwargs = batch.model_input("clean")
    state = generator.get_state()
    _set_outside(masks, circuit, -SURE_LOGIT)
    model_out = model.sliced(tokens, **kwargs)
    generator.set_state(state)
    _set_outside(masks, circuit, SURE_LOGIT)
    return model_out, model.sliced(tokens, **kwargs)


def _set_outside(masks: Mapping[str, Tensor], circuit: Circuit, logit: float) -> None:
    for name, mask in masks.items():
        mask.data.masked_fill_(~circuit[name], logit)


def _difference(
    model_out: Tensor,
    circuit_out: Tensor,
    batch: PromptPairBatch,
    faithfulness_target: KnockoutTarget,
) -> Tensor:
    if faithfulness_target == "logit_diff":
        model_diff = batch_avg_answer_diff(model_out, batch)
        return model_diff - batch_avg_answer_diff(circuit_out, batch)
    circuit_logprobs, model_logprobs = (
        at_least_float32(out).log_softmax(-1) for out in (circuit_out, model_out)
    )
    return multibatch_kl_div(circuit_logprobs, model_logprobs)


def _size_penalty(
    masks: Mapping[str, Tensor], circuit: Circuit, mask_fn: MaskFn
) -> Tensor:
    size = hard_concrete_expected_l0 if mask_fn == "hard_concrete" else t.sigmoid
    inside = t.cat([mask[circuit[name]] for name, mask in masks.items()])
    target = max(1, circuit.n_edges // TARGET_SHARE)
    return t.relu(size(inside).sum() - target) / target


def _check_finite(loss: Tensor, learning_rate: int | float) -> None:
    if not math.isfinite(loss.item()):
        raise TrainingError(
            f"The loss is {loss.item()}: the training diverged. Lower the learning rate "
            f"(it is {learning_rate})."
        )
