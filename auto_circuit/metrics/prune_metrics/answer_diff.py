"""How much the circuit prefers the correct answers."""

from __future__ import annotations

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
from auto_circuit.utils.tensor_ops import batch_answer_diffs


@checked
def measure_answer_diff(
    model: SlicedModel,
    test_loader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    prob_func: ProbFunc = "logits",
    *,
    full_model_outs: FullModelOuts | None = None,
) -> Measurements:
    """Value of the correct answers minus that of the wrong ones: mean over prompts.

    Positive: the circuit prefers the correct answers.

    prob_func: of "logits", probabilities ("softmax") or their logarithms
        ("log_softmax": the same as logits when each side has one answer).
    circuit_outs: `run_circuits` on the same loader. full_model_outs: not needed here.

    Raises DataError for answers that do not fit the output and for outputs of another
    loader.
    """
    prompt_func = partial(prompt_answer_diffs, prob_func=prob_func)
    return prompt_means(model, test_loader, circuit_outs, prompt_func, full_model_outs)


@checked
def prompt_answer_diffs(
    out: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    full: FullModelOuts,
    prob_func: ProbFunc = "logits",
) -> Float[Tensor, "batch"]:
    """Each prompt's correct answers minus its wrong ones."""
    return batch_answer_diffs(apply_prob_func(out, prob_func), batch)


LOGIT_DIFF_METRIC = PruneMetric(
    key="Logit Diff",
    question="By how much does the circuit prefer the right answer, in logits?",
    needs_wrong_answers=True,
    name="Logit Difference",
    log_x=True,
    prompt_func=partial(prompt_answer_diffs, prob_func="logits"),
)

PROB_DIFF_METRIC = PruneMetric(
    key="Prob Diff",
    question="By how much is the right answer more probable than the wrong one?",
    needs_wrong_answers=True,
    name="Probability Difference",
    log_x=True,
    prompt_func=partial(prompt_answer_diffs, prob_func="softmax"),
    bounds=(-1.0, 1.0),
)

LOGPROB_DIFF_METRIC = PruneMetric(
    key="Logprob Diff",
    question="How many times as probable is the right answer, as a logarithm?",
    needs_wrong_answers=True,
    name="Log-Probability Difference",
    log_x=True,
    prompt_func=partial(prompt_answer_diffs, prob_func="log_softmax"),
)
