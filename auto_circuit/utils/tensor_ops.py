"""What the model answered: values of answers, differences, divergences.

Answers are token ids, `batch.answers` and `batch.wrong_answers`: a tensor
`[batch *pos n]`, or a list of `[*pos n]` when prompts have different numbers of them.
`*pos` is empty when only the last position counts; with answers at every position it is
that position dimension, and a prompt's value is the mean over its positions.

A mean over prompts gives every prompt the same weight, however many answers it has.
Half-precision values are averaged in float32.
"""

from __future__ import annotations

from warnings import warn

import torch as t
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from auto_circuit import devices
from auto_circuit.checks import checked
from auto_circuit.data import NEED_NO_WRONG_ANSWERS, PromptPairBatch
from auto_circuit.errors import DataError
from auto_circuit.gates import hard_concrete_expected_l0 as hard_concrete_expected_l0
from auto_circuit.gates import hard_concrete_value as hard_concrete_value
from auto_circuit.gates import sample_hard_concrete as sample_hard_concrete
from auto_circuit.precision import at_least_float32
from auto_circuit.ranking import circuit_mask as circuit_mask
from auto_circuit.ranking import desc_prune_scores as desc_prune_scores
from auto_circuit.ranking import flat_prune_scores as flat_prune_scores
from auto_circuit.ranking import prune_scores_threshold as prune_scores_threshold
from auto_circuit.types import PruneScores as PruneScores

Answers = Tensor | list[Tensor]


class UndefinedPercentWarning(UserWarning):
    """A percentage of a number that is zero, but for rounding."""


@checked
def indices_vals(
    vals: Shaped[Tensor, "*lead vocab"], indices: Int[Tensor, "*lead n"]
) -> Shaped[Tensor, "*lead n"]:
    """The values at some indices of the last dimension.

    Raises DataError for an index that the last dimension does not have.
    """
    vocab = vals.shape[-1]
    low, high = devices.low_and_high(indices)
    if low < 0 or high >= vocab:
        raise DataError(
            f"Answer tokens run from {low} to {high}, but the output has the entries 0 "
            f"to {vocab - 1}. Are the prompts tokenized for another model?"
        )
    return vals.gather(-1, indices.to(vals.device, t.int64))


@checked
def vocab_avg_val(
    vals: Float[Tensor, "*lead vocab"], indices: Int[Tensor, "*lead n"]
) -> Float[Tensor, ""]:
    """The mean of the values at some indices of the last dimension, over all of them."""
    return at_least_float32(indices_vals(vals, indices)).mean()


@checked
def batch_answer_vals(
    vals: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    wrong_answer: bool = False,
) -> Float[Tensor, "batch"]:
    """The mean value of each prompt's correct (or wrong) answers."""
    tokens, is_answer = _answer_tokens(vals, batch, wrong_answer)
    answer_vals = at_least_float32(indices_vals(vals, tokens))
    if is_answer is None:
        return _per_prompt(answer_vals.mean(-1))
    sums = answer_vals.masked_fill(~is_answer, 0.0).sum(-1)
    return _per_prompt(sums / is_answer.sum(-1))


@checked
def batch_avg_answer_val(
    vals: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    wrong_answer: bool = False,
) -> Float[Tensor, ""]:
    """The mean over prompts of the mean value of a prompt's answers.

    vals: logits, probabilities or log-probabilities. wrong_answer: of the wrong answers
    instead. Raises DataError if the answers do not fit the values.
    """
    return batch_answer_vals(vals, batch, wrong_answer).mean()


@checked
def batch_answer_diffs(
    vals: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, "batch"]:
    """For each prompt: mean value of the correct answers minus that of the wrong ones.

    Positive: the model prefers the correct answers. With answers at several positions, their
    mean.
    """
    return batch_answer_vals(vals, batch) - batch_answer_vals(vals, batch, True)


@checked
def batch_avg_answer_diff(
    vals: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, ""]:
    """The mean over prompts of `batch_answer_diffs`."""
    return batch_answer_diffs(vals, batch).mean()


@checked
def batch_answer_diff_percents(
    pred_vals: Float[Tensor, "batch *pos vocab"],
    target_vals: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
) -> Float[Tensor, "batch"]:
    """For each prompt: the answer difference of `pred_vals` in % of `target_vals`'.

    100: the same difference; 0: no preference; negative: the opposite preference. It
    has no bounds: where the target's difference is small, the percentage is large.

    Where the target's difference is 0 within rounding, it is NaN, with an
    UndefinedPercentWarning.
    """
    check_same_shape(pred_vals, target_vals)
    target_diffs = batch_answer_diffs(target_vals, batch)
    target_diffs = nan_where_zero(
        target_diffs, answer_diff_rounding_errors(target_vals, batch)
    )
    return 100 * batch_answer_diffs(pred_vals, batch) / target_diffs


@checked
def answer_diff_rounding_errors(
    vals: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, "batch"]:
    """How far each of `batch_answer_diffs` may be off because values are rounded."""
    sizes = batch_answer_vals(vals.abs(), batch)
    sizes = sizes + batch_answer_vals(vals.abs(), batch, wrong_answer=True)
    return sizes * (t.finfo(vals.dtype).eps / 2)


@checked
def nan_where_zero(
    wholes: Float[Tensor, "*n"], rounding_errors: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """What percentages are of: NaN, with a warning, where it is 0 within rounding."""
    is_zero = wholes.abs() <= rounding_errors
    if is_zero.any():
        warn(
            f"{int(is_zero.sum())} of {is_zero.numel()} percentages are undefined "
            "(NaN): the full model's own difference between correct and wrong answers "
            "is 0 within rounding. Measure the difference itself, or leave such "
            "prompts out.",
            UndefinedPercentWarning,
            stacklevel=2,
        )
    return wholes.masked_fill(is_zero, t.nan)


@checked
def batch_correct_answers(
    logits: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, "batch"]:
    """For each prompt: 1 if its top token is a correct answer, else 0.

    Correct: the best correct answer is strictly above every other token of the
    vocabulary; a tie is not correct. With answers at several positions, the share of
    them that are correct. NaN for a prompt that has a logit NaN.
    """
    margins = answer_margins(logits, batch)
    return _per_prompt(_is_above(margins, t.zeros_like(margins)))


@checked
def answer_margins(
    logits: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, "batch *pos"]:
    """By how much the best correct answer is above every other token of the vocabulary."""
    tokens, _ = _answer_tokens(logits, batch)
    others = logits.scatter(-1, tokens.to(logits.device), -t.inf).amax(-1)
    return indices_vals(logits, tokens).amax(-1) - others


@checked
def batch_best_answer_val(
    vals: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    wrong_answer: bool = False,
) -> Float[Tensor, "batch"]:
    """For each prompt: the largest value of its answers; the mean over positions."""
    tokens, _ = _answer_tokens(vals, batch, wrong_answer)
    return _per_prompt(indices_vals(vals, tokens).amax(-1))


@checked
def answer_targets(
    vals: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, "batch *pos vocab"]:
    """What the output would be if it were right.

    Answers that are numbers (floats) are the targets themselves. Of a token id, the target
    is 1 for the answer and 0 for all other words. Raises DataError for several answers to
    a prompt, and for answers that do not fit the values.
    """
    answers = batch.answers
    if isinstance(answers, Tensor) and answers.is_floating_point():
        if answers.shape == vals.shape:
            return answers.to(vals)
        raise DataError(
            f"The answers are numbers of shape {tuple(answers.shape)}, and the output has "
            f"the shape {tuple(vals.shape)}; a squared error needs a number for each."
        )
    tokens, is_answer = _answer_tokens(vals, batch)
    if is_answer is not None or tokens.shape[-1] != 1:
        raise DataError(
            "The mean squared error needs one answer for every prompt; this data set has "
            "several. Compare logits: the algorithm 'EAP' (answer_function='avg_diff'), or "
            "in a training faithfulness_target='kl_div'."
        )
    indices_vals(vals, tokens)  # raises for an answer that the output does not have
    return t.zeros_like(vals).scatter(-1, tokens.to(vals.device), 1.0)


@checked
def correct_answer_proportion(
    logits: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, ""]:
    """The share of prompts, in [0, 1], whose top token is a correct answer.

    A prompt may have several correct answers, and a tie is not correct.
    """
    return batch_correct_answers(logits, batch).mean()


@checked
def batch_greater_answers(
    logits: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, "batch"]:
    """For each prompt: 1 if a correct answer is strictly above all wrong ones, else 0.

    A wrong answer that is also a correct one does not count as wrong. With answers at
    several positions, the share of them where this is so. NaN for a prompt with an answer
    whose logit is NaN.
    """
    tokens, _ = _answer_tokens(logits, batch)
    wrong_tokens, _ = _answer_tokens(logits, batch, wrong_answer=True)
    also_correct = (wrong_tokens.unsqueeze(-1) == tokens.unsqueeze(-2)).any(-1)
    wrong_vals = indices_vals(logits, wrong_tokens)
    wrong_vals = wrong_vals.masked_fill(also_correct.to(logits.device), -t.inf)
    best_answer = indices_vals(logits, tokens).amax(-1)
    return _per_prompt(_is_above(best_answer, wrong_vals.amax(-1)))


def _is_above(
    vals: Float[Tensor, "*any"], others: Float[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """1 where a value is larger, else 0; NaN where one of the two is."""
    is_nan = vals.isnan() | others.isnan()
    return (vals > others).to(t.float32).masked_fill(is_nan, t.nan)


@checked
def correct_answer_greater_than_incorrect_proportion(
    logits: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch
) -> Float[Tensor, ""]:
    """The share of prompts, in [0, 1], with a correct answer above all wrong answers.

    A prompt may have several correct answers, and a tie is not correct.
    """
    return batch_greater_answers(logits, batch).mean()


def _answer_tokens(
    vals: Tensor, batch: PromptPairBatch, wrong_answer: bool = False
) -> tuple[Int[Tensor, "batch *pos n"], Bool[Tensor, "batch *pos n"] | None]:
    """Answer tokens as one tensor, and which of its entries count (None: all).

    The rows of a ragged list are filled up with their own first answer.
    """
    answers = batch.wrong_answers if wrong_answer else batch.answers
    name = "wrong_answers" if wrong_answer else "answers"
    _check_answers(vals, answers, name)
    if isinstance(answers, Tensor):
        return answers.long(), None
    longest = max(row.shape[-1] for row in answers)
    columns = t.arange(longest)
    tokens = [row[..., _first_again(columns, row).to(row.device)] for row in answers]
    counts = t.tensor([row.shape[-1] for row in answers])
    is_answer = columns < counts[:, None]
    lead = vals.shape[:-1]
    is_answer = is_answer.view(lead[0], *[1] * (len(lead) - 1), longest)
    stacked = t.stack(tokens).long()
    return stacked, is_answer.expand(stacked.shape).to(vals.device)


def _first_again(columns: Tensor, row: Tensor) -> Tensor:
    """The columns of the row, then column 0 again and again."""
    return t.where(columns < row.shape[-1], columns, 0)


def _check_answers(vals: Tensor, answers: Answers, name: str) -> None:
    lead = tuple(vals.shape[:-1])
    rows = answers if isinstance(answers, list) else [answers]
    for row in rows:
        if row.is_floating_point():
            raise DataError(
                f"`{name}` are numbers ({row.dtype}), not token ids, so the output has "
                "no entries for them. Compare with them by the mean squared error: the "
                "metric 'Clean MSE', the algorithms whose names end in '(MSE)', such as "
                "'EAP (MSE)', or answer_function='mse'."
            )
        if row.ndim == 0 or row.shape[-1] == 0:
            others = f" These need none: {NEED_NO_WRONG_ANSWERS}."
            raise DataError(
                f"A prompt has no `{name}`; at least one is needed."
                f"{others if name == 'wrong_answers' else ''}"
            )
    if isinstance(answers, Tensor):
        fits = tuple(answers.shape[:-1]) == lead
    else:
        fits = len(answers) == lead[0] and all(
            tuple(row.shape[:-1]) == lead[1:] for row in answers
        )
    if not fits:
        found = (
            tuple(answers.shape)
            if isinstance(answers, Tensor)
            else f"{len(answers)} x {tuple(answers[0].shape) if answers else ()}"
        )
        raise DataError(
            f"Output values of shape {tuple(vals.shape)} need `{name}` of shape "
            f"{(*lead, 'n')}, not {found}. If answers are for the last position only, "
            'make the model patchable with `slice_output="last_seq"`.'
        )


def _per_prompt(vals: Float[Tensor, "batch *pos"]) -> Float[Tensor, "batch"]:
    """The mean over positions, if there are any."""
    return vals if vals.ndim == 1 else vals.flatten(1).mean(1)


# ------------------------------------------------------------------------ divergences


def check_same_shape(
    output: Shaped[Tensor, "*output"], target: Shaped[Tensor, "*target"]
) -> None:
    """Raise DataError unless a circuit's output has the shape of what it is compared with."""
    if output.shape != target.shape:
        raise DataError(
            f"The circuit's output has the shape {tuple(output.shape)}, and what it is "
            f"compared with {tuple(target.shape)}; expected the same. Were they made with "
            "another model, another `slice_output`, or other prompts?"
        )


@checked
def kl_divs(
    input_logprobs: Float[Tensor, "*lead vocab"],
    target_logprobs: Float[Tensor, "*lead vocab"],
) -> Float[Tensor, "*lead"]:
    """KL(target || input) at every leading index, in nats.

    At least 0 but for rounding, 0 for equal distributions. A token that the target
    never takes (log-probability -inf) adds nothing. Raises DataError for outputs of
    different shapes, and for one of a single entry, whose divergence is 0 whatever it is.
    """
    check_same_shape(input_logprobs, target_logprobs)
    if target_logprobs.shape[-1] == 1:
        raise DataError(
            "The model's output is a single number, no distribution over words, so every "
            "KL divergence of it is 0. Compare the numbers: the metric 'Clean MSE', or "
            "faithfulness_target='mse'."
        )
    targets = at_least_float32(target_logprobs)
    terms = targets.exp() * (targets - at_least_float32(input_logprobs))
    return terms.masked_fill(targets == -t.inf, 0.0).sum(-1)


@checked
def multibatch_kl_div(
    input_logprobs: Float[Tensor, "*lead vocab"],
    target_logprobs: Float[Tensor, "*lead vocab"],
) -> Float[Tensor, ""]:
    """KL(target || input), in nats: the mean over all leading dimensions."""
    return kl_divs(input_logprobs, target_logprobs).mean()
