"""The faithfulness metrics: what measures how much a circuit does what the model does.

To add one, write a file of its own with a function `(circuit output, batch,
FullModelOuts) -> value of each prompt` and a PruneMetric of it (see `kl_div.py`), and add
that to PRUNE_METRICS. A metric need not be in the tuple to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, near_matches
from auto_circuit.metrics.prune_metrics.answer_diff import (
    LOGIT_DIFF_METRIC,
    LOGPROB_DIFF_METRIC,
    PROB_DIFF_METRIC,
)
from auto_circuit.metrics.prune_metrics.answer_diff_percent import (
    LOBPROB_DIFF_PERCENT_METRIC,
    LOGIT_DIFF_PERCENT_METRIC,
    LOGPROB_DIFF_PERCENT_METRIC,
    PERCENT_METRICS,
    PROB_DIFF_PERCENT_METRIC,
    with_mean_of_ratios,
)
from auto_circuit.metrics.prune_metrics.answer_value import (
    ANSWER_LOGIT_METRIC,
    ANSWER_LOGPROB_METRIC,
    ANSWER_PROB_METRIC,
    WRONG_ANSWER_LOGIT_METRIC,
)
from auto_circuit.metrics.prune_metrics.correct_answer_percent import (
    CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
    CORRECT_ANSWER_PERCENT_METRIC,
)
from auto_circuit.metrics.prune_metrics.kl_div import (
    CLEAN_KL_DIV_METRIC,
    CORRUPT_KL_DIV_METRIC,
)
from auto_circuit.metrics.prune_metrics.mean_squared_error import (
    CLEAN_MSE_METRIC,
)
from auto_circuit.metrics.prune_metrics.prune_metric import (
    MetricFunc,
    PruneMetric,
)
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import PruneMetricKey

__all__ = [
    "ANSWER_LOGIT_METRIC",
    "ANSWER_LOGPROB_METRIC",
    "ANSWER_PROB_METRIC",
    "CLEAN_KL_DIV_METRIC",
    "CLEAN_MSE_METRIC",
    "CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC",
    "CORRECT_ANSWER_PERCENT_METRIC",
    "CORRUPT_KL_DIV_METRIC",
    "LOBPROB_DIFF_PERCENT_METRIC",
    "LOGIT_DIFF_METRIC",
    "LOGIT_DIFF_PERCENT_METRIC",
    "LOGPROB_DIFF_METRIC",
    "LOGPROB_DIFF_PERCENT_METRIC",
    "MetricFunc",
    "PERCENT_METRICS",
    "PROB_DIFF_METRIC",
    "PROB_DIFF_PERCENT_METRIC",
    "PRUNE_METRICS",
    "PRUNE_METRIC_DICT",
    "PruneMetric",
    "WRONG_ANSWER_LOGIT_METRIC",
    "find_metric",
    "with_mean_of_ratios",
]

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


@checked
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
