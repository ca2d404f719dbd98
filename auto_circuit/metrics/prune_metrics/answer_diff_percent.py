"""How much of the full model's preference for the correct answers a circuit has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch as t
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
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_vals
from auto_circuit.metrics.prune_metrics.prune_metric import PruneMetric
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import CircuitOutputs, Measurements
from auto_circuit.utils.tensor_ops import (
    batch_answer_diff_percents,
    batch_answer_diffs,
)


@checked
def measure_answer_diff_percent(
    model: SlicedModel,
    test_loader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    prob_func: ProbFunc = "logits",
    diff_of_means: bool = True,
    *,
    full_model_outs: FullModelOuts | None = None,
) -> Measurements:
    """The means of `answer_diff_percent`: [(number of edges, %)]."""
    means, _, _ = answer_diff_percent(
        model,
        test_loader,
        circuit_outs,
        prob_func,
        diff_of_means,
        full_model_outs=full_model_outs,
    )
    return means


@checked
def answer_diff_percent(
    model: SlicedModel,
    test_loader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    prob_func: ProbFunc = "logits",
    diff_of_means: bool = True,
    *,
    full_model_outs: FullModelOuts | None = None,
) -> tuple[Measurements, Measurements, list[tuple[int, Float[Tensor, "prompt"]]]]:
    """The circuit's answer difference in % of the full model's on the clean prompts.

    100: the full model's; 0: no preference for the correct answers; it has no bounds.
    Returns (means, standard deviations, points), each [(number of edges, %)]: in the points
    one tensor for each circuit, with the percentage of every prompt.

    diff_of_means: True: 100 * mean(circuit) / mean(model); the deviations are 0 and
        the points are empty. False: the percentage of each prompt; their mean, their
        unbiased standard deviation, and all of them. The two differ: a prompt where the
        model has hardly any preference has a very large percentage.
    prob_func: as in `measure_answer_diff`.
    circuit_outs: `run_circuits` on the same loader. full_model_outs: to be shared.

    Raises DataError as `measure_answer_diff` does. Where the model's difference is 0 within
    rounding, the percentage is NaN, with an UndefinedPercentWarning.
    """
    prompt_func = partial(
        prompt_answer_diff_percents, prob_func=prob_func, diff_of_means=diff_of_means
    )
    circuits = prompt_vals(model, test_loader, circuit_outs, prompt_func, full_model_outs)
    means: Measurements = [(circuit.n_edges, circuit.mean) for circuit in circuits]
    stds: Measurements = [
        (circuit.n_edges, 0.0 if diff_of_means else circuit.std) for circuit in circuits
    ]
    points = [
        (
            circuit.n_edges,
            t.tensor([] if diff_of_means else circuit.vals, dtype=t.float32),
        )
        for circuit in circuits
    ]
    return means, stds, points


@checked
def prompt_answer_diff_percents(
    out: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    full: FullModelOuts,
    prob_func: ProbFunc = "logits",
    diff_of_means: bool = True,
) -> Float[Tensor, "batch"]:
    """Each prompt's answer difference in % of the full model's.

    diff_of_means: in % of the full model's mean over all prompts, else of its
    difference on the same prompt.
    """
    vals = apply_prob_func(out, prob_func)
    if diff_of_means:
        diffs = batch_answer_diffs(vals, batch).double()
        return 100 * diffs / full.mean_answer_diff(prob_func)
    full_vals = full.vals(batch, "clean", prob_func)
    return batch_answer_diff_percents(vals, full_vals, batch)


LOGIT_DIFF_PERCENT_METRIC = PruneMetric(
    key="Logit Diff Percent",
    question="How much of the model's preference for the right answer has the circuit?",
    needs_wrong_answers=True,
    name="Logit Difference (% of Model)",
    log_x=True,
    prompt_func=partial(prompt_answer_diff_percents, prob_func="logits"),
)

PROB_DIFF_PERCENT_METRIC = PruneMetric(
    key="Prob Diff Percent",
    question="The same, of probabilities: prompts of which the model is sure count most.",
    needs_wrong_answers=True,
    name="Probability Difference (% of Model)",
    log_x=True,
    prompt_func=partial(prompt_answer_diff_percents, prob_func="softmax"),
)

LOGPROB_DIFF_PERCENT_METRIC = PruneMetric(
    key="LogProb Diff Percent",
    question="The same, of log-probabilities; of one answer each, the same as of logits.",
    needs_wrong_answers=True,
    name="Log-Probability Difference (% of Model)",
    log_x=True,
    prompt_func=partial(prompt_answer_diff_percents, prob_func="log_softmax"),
)

LOBPROB_DIFF_PERCENT_METRIC = LOGPROB_DIFF_PERCENT_METRIC
"""The name that auto-circuit gave to LOGPROB_DIFF_PERCENT_METRIC."""

PERCENT_METRICS: tuple[PruneMetric, ...] = (
    LOGIT_DIFF_PERCENT_METRIC,
    PROB_DIFF_PERCENT_METRIC,
    LOGPROB_DIFF_PERCENT_METRIC,
)
"""Those that are the ratio of a circuit's mean to the model's."""


@checked
def with_mean_of_ratios(metric: PruneMetric) -> PruneMetric:
    """A percentage as the mean over prompts of each one's; other metrics as they are.

    Source: Miller et al. 2024 (arXiv 2407.08734), figure 4: the two differ.
    """
    if metric not in PERCENT_METRICS:
        return metric
    prompt_func: Any = metric.prompt_func
    return replace(
        metric,
        name=f"{metric.name}, Mean over Prompts",
        prompt_func=partial(prompt_func, diff_of_means=False),
    )
