"""The faithfulness metrics: what measures how much a circuit does what the model does.

To add one, write a function `(circuit output, batch, FullModelOuts) -> value of each
prompt`, make a PruneMetric of it, and add that to PRUNE_METRICS. A metric need not be
in the tuple to be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ConfigError, near_matches
from auto_circuit.metrics.prune_metrics.answer_diff import (
    measure_answer_diff,
    prompt_answer_diffs,
)
from auto_circuit.metrics.prune_metrics.answer_diff_percent import (
    measure_answer_diff_percent,
    prompt_answer_diff_percents,
)
from auto_circuit.metrics.prune_metrics.answer_value import (
    measure_answer_val,
    prompt_answer_vals,
)
from auto_circuit.metrics.prune_metrics.correct_answer_percent import (
    measure_correct_ans_percent,
    prompt_correct_percents,
)
from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div, prompt_kl_divs
from auto_circuit.metrics.prune_metrics.mean_squared_error import (
    measure_mean_squared_error,
    prompt_squared_errors,
)
from auto_circuit.metrics.prune_metrics.prompt_stats import PromptFunc
from auto_circuit.types import CircuitOutputs, Measurements, PruneMetricKey

MetricFunc = Callable[[Any, Iterable[PromptPairBatch], CircuitOutputs], Measurements]
"""(model, dataloader, circuit outputs) -> [(number of edges, value)]"""


@dataclass(frozen=True)
class PruneMetric:
    """One number for each circuit size, and how to draw it.

    key: the name under which results are filed. name: the label of figures' y axes.
    metric_func: (model, dataloader, circuit outputs) -> [(number of edges, value)].
    log_x, log_y: are the figures' axes logarithmic? A logarithmic y axis needs `y_min`.
    lower_better: is a lower value closer to the full model?
    y_axes_match: do a figure's tasks share one y axis?
    y_min: the lowest value that is drawn, and that enters an area, if log_y.
    prompt_func: the same metric for each prompt of a batch. With it, measurements have
        standard deviations, and share the full model's outputs with other metrics.

    Raises ConfigError for a logarithmic y axis without a positive `y_min`.
    """

    key: PruneMetricKey
    name: str
    metric_func: MetricFunc
    log_x: bool = False
    log_y: bool = False
    lower_better: bool = False
    y_axes_match: bool = False
    y_min: int | float | None = None
    prompt_func: PromptFunc | None = None

    def __post_init__(self) -> None:
        if self.log_y and (self.y_min is None or self.y_min <= 0):
            raise ConfigError(
                f"The metric {self.key!r} has `log_y` and y_min={self.y_min}; a "
                "logarithmic axis needs a `y_min` above 0."
            )

    def __str__(self) -> str:
        return self.key


CLEAN_KL_DIV_METRIC = PruneMetric(
    key="Clean KL Div",
    name="KL(Clean || Circuit)",
    metric_func=partial(measure_kl_div, compare_to_clean=True),
    log_x=True,
    log_y=True,
    lower_better=True,
    y_min=1e-2,
    prompt_func=partial(prompt_kl_divs, compare_to_clean=True),
)
CORRUPT_KL_DIV_METRIC = PruneMetric(
    key="Corrupt KL Div",
    name="KL(Corrupt || Circuit)",
    metric_func=partial(measure_kl_div, compare_to_clean=False),
    log_x=True,
    log_y=True,
    y_min=1e-6,
    prompt_func=partial(prompt_kl_divs, compare_to_clean=False),
)
CLEAN_MSE_METRIC = PruneMetric(
    key="Clean MSE",
    name="Squared Difference to Clean",
    metric_func=measure_mean_squared_error,
    log_x=True,
    log_y=True,
    lower_better=True,
    y_min=1e-6,
    prompt_func=prompt_squared_errors,
)
"""For models whose output is a number; auto-circuit has no such metric."""

ANSWER_LOGIT_METRIC = PruneMetric(
    key="Answer Logit",
    name="Answer Logit",
    metric_func=partial(measure_answer_val, prob_func="logits"),
    log_x=True,
    prompt_func=partial(prompt_answer_vals, prob_func="logits"),
)
WRONG_ANSWER_LOGIT_METRIC = PruneMetric(
    key="Wrong Answer Logit",
    name="Wrong Answer Logit",
    metric_func=partial(measure_answer_val, prob_func="logits", wrong_answer=True),
    log_x=True,
    prompt_func=partial(prompt_answer_vals, prob_func="logits", wrong_answer=True),
)
ANSWER_PROB_METRIC = PruneMetric(
    key="Answer Prob",
    name="Answer Probability",
    metric_func=partial(measure_answer_val, prob_func="softmax"),
    log_x=True,
    prompt_func=partial(prompt_answer_vals, prob_func="softmax"),
)
# Log-probabilities are negative and logarithmic already: their y axis is linear, where
# auto-circuit's was logarithmic and showed every point at 1e-6.
ANSWER_LOGPROB_METRIC = PruneMetric(
    key="Answer LogProb",
    name="Answer Log-Probability",
    metric_func=partial(measure_answer_val, prob_func="log_softmax"),
    log_x=True,
    prompt_func=partial(prompt_answer_vals, prob_func="log_softmax"),
)
LOGIT_DIFF_METRIC = PruneMetric(
    key="Logit Diff",
    name="Logit Difference",
    metric_func=partial(measure_answer_diff, prob_func="logits"),
    log_x=True,
    prompt_func=partial(prompt_answer_diffs, prob_func="logits"),
)
PROB_DIFF_METRIC = PruneMetric(
    key="Prob Diff",
    name="Probability Difference",
    metric_func=partial(measure_answer_diff, prob_func="softmax"),
    log_x=True,
    prompt_func=partial(prompt_answer_diffs, prob_func="softmax"),
)
LOGPROB_DIFF_METRIC = PruneMetric(
    key="LogProb Diff",
    name="Log-Probability Difference",
    metric_func=partial(measure_answer_diff, prob_func="log_softmax"),
    log_x=True,
    prompt_func=partial(prompt_answer_diffs, prob_func="log_softmax"),
)
LOGIT_DIFF_PERCENT_METRIC = PruneMetric(
    key="Logit Diff Percent",
    name="Logit Difference (% of Model)",
    metric_func=partial(measure_answer_diff_percent, prob_func="logits"),
    log_x=True,
    prompt_func=partial(prompt_answer_diff_percents, prob_func="logits"),
)
PROB_DIFF_PERCENT_METRIC = PruneMetric(
    key="Prob Diff Percent",
    name="Probability Difference (% of Model)",
    metric_func=partial(measure_answer_diff_percent, prob_func="softmax"),
    log_x=True,
    prompt_func=partial(prompt_answer_diff_percents, prob_func="softmax"),
)
LOGPROB_DIFF_PERCENT_METRIC = PruneMetric(
    key="LogProb Diff Percent",
    name="Log-Probability Difference (% of Model)",
    metric_func=partial(measure_answer_diff_percent, prob_func="log_softmax"),
    log_x=True,
    prompt_func=partial(prompt_answer_diff_percents, prob_func="log_softmax"),
)
LOBPROB_DIFF_PERCENT_METRIC = LOGPROB_DIFF_PERCENT_METRIC
"""The name that auto-circuit gave to LOGPROB_DIFF_PERCENT_METRIC."""

CORRECT_ANSWER_PERCENT_METRIC = PruneMetric(
    key="Correct Answer Percent",
    name="Correct Answers (%)",
    metric_func=measure_correct_ans_percent,
    log_x=True,
    prompt_func=prompt_correct_percents,
)
CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC = PruneMetric(
    key="Correct Answer Greater Than Incorrect Percent",
    name="Correct Answer Above Incorrect (%)",
    metric_func=partial(
        measure_correct_ans_percent, out_of_correct_and_incorrect_answers=True
    ),
    log_x=True,
    prompt_func=partial(
        prompt_correct_percents, out_of_correct_and_incorrect_answers=True
    ),
)

PERCENT_METRICS: tuple[PruneMetric, ...] = (
    LOGIT_DIFF_PERCENT_METRIC,
    PROB_DIFF_PERCENT_METRIC,
    LOGPROB_DIFF_PERCENT_METRIC,
)
"""Those that are the ratio of a circuit's mean to the model's."""


def with_mean_of_ratios(metric: PruneMetric) -> PruneMetric:
    """A percentage as the mean over prompts of each one's; other metrics as they are.

    Source: Miller et al. 2024 (arXiv 2407.08734), figure 4: the two differ.
    """
    if metric not in PERCENT_METRICS:
        return metric
    metric_func: Any = metric.metric_func
    prompt_func: Any = metric.prompt_func
    return replace(
        metric,
        name=f"{metric.name}, Mean over Prompts",
        metric_func=partial(metric_func, diff_of_means=False),
        prompt_func=partial(prompt_func, diff_of_means=False),
    )


PRUNE_METRICS: tuple[PruneMetric, ...] = (
    CLEAN_KL_DIV_METRIC,
    CORRUPT_KL_DIV_METRIC,
    CLEAN_MSE_METRIC,
    ANSWER_LOGIT_METRIC,
    WRONG_ANSWER_LOGIT_METRIC,
    ANSWER_PROB_METRIC,
    ANSWER_LOGPROB_METRIC,
    LOGIT_DIFF_METRIC,
    PROB_DIFF_METRIC,
    LOGPROB_DIFF_METRIC,
    LOGIT_DIFF_PERCENT_METRIC,
    PROB_DIFF_PERCENT_METRIC,
    LOGPROB_DIFF_PERCENT_METRIC,
    CORRECT_ANSWER_PERCENT_METRIC,
    CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
)
PRUNE_METRIC_DICT: dict[PruneMetricKey, PruneMetric] = {
    metric.key: metric for metric in PRUNE_METRICS
}


def find_metric(
    key: PruneMetricKey, metrics: Sequence[PruneMetric] = PRUNE_METRICS
) -> PruneMetric:
    """The metric with a key. Raises ConfigError if there is none."""
    known = {metric.key: metric for metric in metrics}
    if key not in known:
        raise ConfigError(
            f"There is no metric {key!r}.{near_matches(key, known)} Known: "
            f"{', '.join(known)}. Give your own with `metrics=`."
        )
    return known[key]
