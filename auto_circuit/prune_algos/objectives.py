"""What a circuit is trained or scored for: one number to lower, from a batch's outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from auto_circuit.checks import checked
from auto_circuit.data import PromptPairBatch, check_wrong_answers
from auto_circuit.errors import DataError
from auto_circuit.fingerprints import FOR_READERS
from auto_circuit.memory import Limit
from auto_circuit.precision import at_least_float32
from auto_circuit.prune_algos.algo_config import AlgoConfig
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.tensor_ops import (
    answer_diff_rounding_errors,
    answer_margins,
    answer_targets,
    batch_answer_diffs,
    batch_avg_answer_diff,
    batch_avg_answer_val,
    batch_best_answer_val,
    multibatch_kl_div,
)

GradFunction = Literal["logit", "prob", "logprob", "logit_exp"]
AnswerFunction = Literal["avg_diff", "avg_val", "max_diff", "mse"]
FaithfulnessTarget = Literal[
    "kl_div",
    "mse",
    "answer",
    "wrong_answer",
    "correct_percent",
    "logit_diff_percent",
    "logit_diff",
]


COMPARE_WITH_WRONG_ANSWERS = (
    *("avg_diff", "max_diff"),
    *("wrong_answer", "logit_diff", "logit_diff_percent"),
)
"""The answer functions and faithfulness targets that do so."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class AnswerConfig(AlgoConfig):
    """By what number an algorithm measures how good the answers are: see `answer_loss`.

    memory_limit: the most that the work may take beside the model: bytes, or a share of what
        is free; see `MemoryLimit`. It changes no score, but for rounding.
    """

    grad_function: GradFunction = "logit"
    answer_function: AnswerFunction = "avg_diff"
    memory_limit: Limit = field(default=None, metadata=FOR_READERS)

    def loss(
        self, outputs: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
    ) -> Float[Tensor, ""]:
        """The mean over a batch's prompts."""
        return answer_loss(outputs, batch, self.grad_function, self.answer_function)

    def clean_loss_sum(
        self, model: PatchableModel, batch: PromptPairBatch
    ) -> Float[Tensor, ""]:
        """The sum over a batch's clean prompts, which are run."""
        return clean_loss_sum(model, batch, self.grad_function, self.answer_function)


@checked
def check_objective(
    dataloader: Iterable[PromptPairBatch], objective: AnswerFunction | FaithfulnessTarget
) -> None:
    """Raise DataError if it compares with wrong answers that some prompt does not have."""
    if objective in COMPARE_WITH_WRONG_ANSWERS:
        check_wrong_answers(dataloader, f"the objective {objective!r}")


@checked
def answer_values(
    outputs: Float[Tensor, "batch *pos vocab"], grad_function: GradFunction
) -> Float[Tensor, "batch *pos vocab"]:
    """What the answers are compared in, from logits.

    "logit_exp": exp(logit) over the sum of exponentials, which gets no gradient.
    """
    if grad_function == "logit":
        return outputs
    if grad_function == "prob":
        return t.softmax(outputs, dim=-1)
    if grad_function == "logprob":
        return t.log_softmax(outputs, dim=-1)
    top = outputs.detach().amax(dim=-1, keepdim=True)
    exponentials = t.exp(outputs - top)
    return exponentials / exponentials.sum(dim=-1, keepdim=True).detach()


@checked
def answer_loss(
    outputs: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    grad_function: GradFunction = "logit",
    answer_function: AnswerFunction = "avg_diff",
) -> Float[Tensor, ""]:
    """The mean over a batch's prompts of a loss that is low when answers are right.

    avg_diff: -(answer - wrong answer), means where there are several. avg_val: -answer.
    max_diff: -(the best answer - the best wrong answer). mse: the squared error to the
    answers, for models whose outputs are the answers; of token ids, to 1 for the answer
    and 0 for other words (with grad_function="prob" the Brier score, over the words).

    Raises DataError for answers that do not fit the outputs or the function.
    """
    values = answer_values(at_least_float32(outputs), grad_function)
    if answer_function == "avg_diff":
        return -batch_avg_answer_diff(values, batch)
    if answer_function == "avg_val":
        return -batch_avg_answer_val(values, batch)
    if answer_function == "max_diff":
        best, best_wrong = (
            batch_best_answer_val(values, batch, is_wrong) for is_wrong in (False, True)
        )
        return -(best - best_wrong).mean()
    return mse_loss(values, answer_targets(values, batch))


@checked
def clean_loss_sum(
    model: PatchableModel,
    batch: PromptPairBatch,
    grad_function: GradFunction = "logit",
    answer_function: AnswerFunction = "avg_diff",
) -> Float[Tensor, ""]:
    """Run a batch's clean prompts; the sum of `answer_loss` over them.

    A sum, so that batches of different sizes weigh what they hold.
    """
    tokens, kwargs = batch.model_input("clean")
    outputs = model.sliced(tokens, **kwargs)
    return answer_loss(outputs, batch, grad_function, answer_function) * len(tokens)


@checked
def faithfulness_loss(
    target: FaithfulnessTarget,
    outputs: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    clean_outputs: Float[Tensor, "batch *pos vocab"],
) -> Float[Tensor, ""]:
    """How unlike the full model a circuit is: a mean over a batch's prompts, to lower.

    outputs, clean_outputs: logits of the circuit and of the full model.
    kl_div: KL(model || circuit), nats. mse: to the answers, as in `answer_loss`. answer,
    wrong_answer: minus that logit. correct_percent: minus the share of prompts whose answer
    is the likeliest word, smoothed to sigmoid(answer - best other), so that it has a gradient.
    logit_diff_percent: |100 - the circuit's answer difference in % of the model's|.
    logit_diff: minus the answer difference, logits: more than the model's is welcome.

    Raises DataError for answers that do not fit, and for logit_diff_percent if the model's
    own difference on a prompt is 0 within rounding.
    """
    outputs, clean_outputs = map(at_least_float32, (outputs, clean_outputs))
    if target == "kl_div":
        return multibatch_kl_div(outputs.log_softmax(-1), clean_outputs.log_softmax(-1))
    if target == "mse":
        return answer_loss(outputs, batch, "logit", "mse")
    if target == "answer":
        return -batch_avg_answer_val(outputs, batch)
    if target == "wrong_answer":
        return -batch_avg_answer_val(outputs, batch, wrong_answer=True)
    if target == "logit_diff":
        return -batch_avg_answer_diff(outputs, batch)
    if target == "correct_percent":
        return -t.sigmoid(answer_margins(outputs, batch)).mean()
    diffs = batch_answer_diffs(outputs, batch)
    return (100 - 100 * diffs / _full_answer_diffs(clean_outputs, batch)).abs().mean()


def _full_answer_diffs(
    clean_outputs: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, "batch"]:
    """What percentages are of. Raises DataError if one is 0 within rounding."""
    diffs = batch_answer_diffs(clean_outputs, batch)
    is_zero = diffs.abs() <= answer_diff_rounding_errors(clean_outputs, batch)
    if is_zero.any():
        raise DataError(
            f"For {int(is_zero.sum())} of {len(diffs)} prompts the full model's own "
            "difference between correct and wrong answers is 0 within rounding, so a "
            "percentage of it is undefined. Train for 'logit_diff' or 'kl_div', or leave "
            "such prompts out."
        )
    return diffs
