"""What a faithfulness metric is: one number for each circuit, and how to draw it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from auto_circuit.checks import checked
from auto_circuit.data import PromptPairBatch, check_wrong_answers
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.prune_metrics.prompt_stats import PromptFunc
from auto_circuit.prompt_files import Prompt
from auto_circuit.types import CircuitOutputs, Measurements, PruneMetricKey

MetricFunc = Callable[[Any, Iterable[PromptPairBatch], CircuitOutputs], Measurements]
"""(model, dataloader, circuit outputs) -> [(number of edges, value)]"""


@checked
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
    bounds: the lowest and the highest value that the metric can have.
    of_numbers: does it also measure models whose output is a number, and no word?
    needs_wrong_answers: does it compare answers with wrong ones?

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
    bounds: tuple[float, float] = (-math.inf, math.inf)
    of_numbers: bool = False
    needs_wrong_answers: bool = False

    def __post_init__(self) -> None:
        if self.log_y and (self.y_min is None or self.y_min <= 0):
            raise ConfigError(
                f"The metric {self.key!r} has `log_y` and y_min={self.y_min}; a "
                "logarithmic axis needs a `y_min` above 0."
            )

    def check_prompts(
        self, dataloader: Iterable[PromptPairBatch] | Sequence[Prompt]
    ) -> None:
        """Raise DataError if it compares with wrong answers that some prompt has not."""
        if self.needs_wrong_answers:
            check_wrong_answers(dataloader, f"the metric {self.key!r}")

    def __str__(self) -> str:
        return self.key
