"""How often the circuit's prediction is a correct answer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptPairBatch
from auto_circuit.metrics.protocols import SlicedModel
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_means
from auto_circuit.metrics.prune_metrics.prune_metric import PruneMetric
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import CircuitOutputs, Measurements
from auto_circuit.utils.tensor_ops import batch_correct_answers, batch_greater_answers


@checked
def measure_correct_ans_percent(
    model: SlicedModel,
    dataloader: Iterable[PromptPairBatch],
    pruned_outs: CircuitOutputs,
    out_of_correct_and_incorrect_answers: bool = False,
    *,
    full_model_outs: FullModelOuts | None = None,
) -> Measurements:
    """The share of prompts that the circuit answers correctly, 0 to 100 %.

    out_of_correct_and_incorrect_answers: correct is a prompt if a correct answer is
        above all its wrong answers; else, if it is above all other tokens.
    pruned_outs: `run_circuits` on the same loader. full_model_outs: not needed here.

    Raises DataError for answers that do not fit the output and for outputs of another
    loader. A prompt may have several correct answers, and a tie is not correct.
    """
    prompt_func = partial(
        prompt_correct_percents,
        out_of_correct_and_incorrect_answers=out_of_correct_and_incorrect_answers,
    )
    return prompt_means(model, dataloader, pruned_outs, prompt_func, full_model_outs)


@checked
def prompt_correct_percents(
    out: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    full: FullModelOuts,
    out_of_correct_and_incorrect_answers: bool = False,
) -> Float[Tensor, "batch"]:
    """100 for each prompt that is answered correctly, else 0."""
    is_correct = (
        batch_greater_answers
        if out_of_correct_and_incorrect_answers
        else batch_correct_answers
    )
    return 100 * is_correct(out, batch)


CORRECT_ANSWER_PERCENT_METRIC = PruneMetric(
    key="Correct Answer Percent",
    question="How often is a right answer the circuit's first choice, of all words?",
    name="Correct Answers (%)",
    log_x=True,
    prompt_func=prompt_correct_percents,
    bounds=(0.0, 100.0),
)

CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC = PruneMetric(
    key="Correct Answer Greater Than Incorrect Percent",
    question="How often is the right answer above the wrong one?",
    needs_wrong_answers=True,
    name="Correct Answer Above Incorrect (%)",
    log_x=True,
    prompt_func=partial(
        prompt_correct_percents, out_of_correct_and_incorrect_answers=True
    ),
    bounds=(0.0, 100.0),
)
