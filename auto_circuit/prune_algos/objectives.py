"""What a circuit is trained or scored for: one number to lower, from a batch's outputs."""

from __future__ import annotations

from typing import Literal, get_args

import torch as t
from torch import Tensor
from torch.nn.functional import mse_loss

from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ConfigError
from auto_circuit.utils.tensor_ops import batch_avg_answer_diff, batch_avg_answer_val

GradFunction = Literal["logit", "prob", "logprob", "logit_exp"]
AnswerFunction = Literal["avg_diff", "avg_val", "mse"]


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ConfigError unless `value` is one of a Literal's values."""
    if value not in get_args(choices):
        known = ", ".join(repr(choice) for choice in get_args(choices))
        raise ConfigError(f"`{name}` is {value!r}; expected one of {known}.")


def answer_values(outputs: Tensor, grad_function: GradFunction) -> Tensor:
    """What the answers are compared in, from logits [batch *position vocab].

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


def answer_loss(
    outputs: Tensor,
    batch: PromptPairBatch,
    grad_function: GradFunction = "logit",
    answer_function: AnswerFunction = "avg_diff",
) -> Tensor:
    """The mean over a batch's prompts of a loss that is low when answers are right.

    avg_diff: -(answer - wrong answer). avg_val: -answer. mse: the squared error to
    `batch.answers` (for models whose outputs are the answers).
    """
    values = answer_values(outputs, grad_function)
    if answer_function == "avg_diff":
        return -batch_avg_answer_diff(values, batch)
    if answer_function == "avg_val":
        return -batch_avg_answer_val(values, batch)
    if not isinstance(batch.answers, Tensor):
        raise ConfigError(
            "The mean squared error needs the same number of answers for every prompt; "
            "this data set has different numbers. Use answer_function='avg_diff'."
        )
    targets = batch.answers.to(values.dtype)
    return mse_loss(values, targets.expand_as(values))
