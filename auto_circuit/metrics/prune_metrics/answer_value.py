"""How high the circuit's output is at the answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptPairBatch
from auto_circuit.metrics.protocols import SlicedModel
from auto_circuit.metrics.prune_metrics.full_model_outs import (
    FullModelOuts,
    ProbFunc,
    apply_prob_func,
)
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_means
from auto_circuit.metrics.prune_metrics.prune_metric import PruneMetric
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import CircuitOutputs, Measurements
from auto_circuit.utils.tensor_ops import batch_answer_vals


@checked
def measure_answer_val(
    model: SlicedModel,
    test_loader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    prob_func: ProbFunc = "logits",
    wrong_answer: bool = False,
    *,
    full_model_outs: FullModelOuts | None = None,
) -> Measurements:
    """The circuit's mean output at the correct answers: mean over prompts.

    prob_func: "logits"; "softmax": probabilities, 0 to 1; "log_softmax": their natural
        logarithms, 0 or less.
    wrong_answer: at the wrong answers instead.
    circuit_outs: `run_circuits` on the same loader. full_model_outs: not needed here.

    Raises DataError for answers that do not fit the output and for outputs of another
    loader.
    """
    prompt_func = partial(
        prompt_answer_vals, prob_func=prob_func, wrong_answer=wrong_answer
    )
    return prompt_means(model, test_loader, circuit_outs, prompt_func, full_model_outs)


@checked
def prompt_answer_vals(
    out: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    full: FullModelOuts,
    prob_func: ProbFunc = "logits",
    wrong_answer: bool = False,
) -> Float[Tensor, "batch"]:
    """The mean value of each prompt's answers."""
    return batch_answer_vals(apply_prob_func(out, prob_func), batch, wrong_answer)


ANSWER_LOGIT_METRIC = PruneMetric(
    key="Answer Logit",
    question="How high is the right answer's logit? It moves also when all logits do.",
    name="Answer Logit",
    log_x=True,
    prompt_func=partial(prompt_answer_vals, prob_func="logits"),
)

WRONG_ANSWER_LOGIT_METRIC = PruneMetric(
    key="Wrong Answer Logit",
    question="How high is the wrong answer's logit?",
    needs_wrong_answers=True,
    name="Wrong Answer Logit",
    log_x=True,
    lower_better=True,
    prompt_func=partial(prompt_answer_vals, prob_func="logits", wrong_answer=True),
)

ANSWER_PROB_METRIC = PruneMetric(
    key="Answer Prob",
    question="How probable does the circuit find the right answer?",
    name="Answer Probability",
    log_x=True,
    prompt_func=partial(prompt_answer_vals, prob_func="softmax"),
    bounds=(0.0, 1.0),
)

# Log-probabilities are negative and logarithmic already: their y axis is linear, where
# auto-circuit's was logarithmic and showed every point at 1e-6.
ANSWER_LOGPROB_METRIC = PruneMetric(
    key="Answer Logprob",
    question="The same as a logarithm, which tells small probabilities apart.",
    name="Answer Log-Probability",
    log_x=True,
    prompt_func=partial(prompt_answer_vals, prob_func="log_softmax"),
    bounds=(-math.inf, 0.0),
)
