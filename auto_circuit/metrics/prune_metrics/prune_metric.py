"""What a faithfulness metric is: one number for each circuit, and how to draw it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from auto_circuit.checks import checked, shown
from auto_circuit.data import PromptPairBatch, check_wrong_answers
from auto_circuit.errors import ConfigError
from auto_circuit.fingerprints import FOR_READERS
from auto_circuit.metrics.protocols import SlicedModel
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import PromptFunc, prompt_means
from auto_circuit.prompt_files import Prompt
from auto_circuit.types import CircuitOutputs, Measurements, PruneMetricKey

MetricFunc = Callable[[Any, Iterable[PromptPairBatch], CircuitOutputs], Measurements]
"""(model, dataloader, circuit outputs) -> [(number of edges, value)]"""


@dataclass(frozen=True)
class MeanOverPrompts:
    """The `metric_func` that follows from a `prompt_func`: the mean over prompts."""

    prompt_func: PromptFunc | None = None

    def __call__(
        self,
        model: SlicedModel,
        dataloader: Iterable[PromptPairBatch],
        circuit_outs: CircuitOutputs,
        *,
        full_model_outs: FullModelOuts | None = None,
    ) -> Measurements:
        """[(number of edges, mean over prompts)]; raises DataError as `prompt_means` does."""
        assert self.prompt_func is not None
        return prompt_means(
            model, dataloader, circuit_outs, self.prompt_func, full_model_outs
        )


@checked
@dataclass(frozen=True)
class PruneMetric:
    """One number for each circuit size, and how to draw it.

    key: the name under which results are filed. name: the label of figures' y axes.
    prompt_func: (circuit's output, batch, full model's outputs) -> the value of each
        prompt: what the metric is. With it, measurements have standard deviations, and
        metrics share the full model's outputs.
    metric_func: (model, dataloader, circuit outputs) -> [(number of edges, value)]. It
        follows from `prompt_func`; give it for a metric that is no mean over prompts.
    log_x, log_y: are the figures' axes logarithmic? A logarithmic y axis needs `y_min`.
    lower_better: is a lower value closer to the full model?
    y_axes_match: do a figure's tasks share one y axis?
    y_min: the lowest value that is drawn, and that enters an area, if log_y.
    bounds: the lowest and the highest value that the metric can have.
    of_numbers: does it also measure models whose output is a number, and no word?
    needs_wrong_answers: does it compare answers with wrong ones?
    question: the one that it answers, for those who choose; the members of `PRUNE_METRICS`
        have it. It changes no number.

    Raises ConfigError for a metric without a function, and for a logarithmic y axis without
    a positive `y_min`.
    """

    key: PruneMetricKey
    name: str
    metric_func: MetricFunc = MeanOverPrompts()
    log_x: bool = False
    log_y: bool = False
    lower_better: bool = False
    y_axes_match: bool = False
    y_min: int | float | None = None
    prompt_func: PromptFunc | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    of_numbers: bool = False
    needs_wrong_answers: bool = False
    question: str = field(default="", kw_only=True, metadata=FOR_READERS)

    def __post_init__(self) -> None:
        # Made anew for `replace(metric, prompt_func=...)`, where it would be the old one's.
        if isinstance(self.metric_func, MeanOverPrompts):
            object.__setattr__(self, "metric_func", MeanOverPrompts(self.prompt_func))
            if self.prompt_func is None:
                raise ConfigError(
                    f"The metric {self.key!r} has no function. Give a `prompt_func` (the "
                    "value of each prompt), or a `metric_func` if it is no mean over "
                    "prompts."
                )
        if self.log_y and (self.y_min is None or self.y_min <= 0):
            raise ConfigError(
                f"The metric {self.key!r} has `log_y` and y_min={self.y_min}; a "
                "logarithmic axis needs a `y_min` above 0."
            )

    def measure(
        self,
        model: SlicedModel,
        dataloader: Iterable[PromptPairBatch],
        circuit_outs: CircuitOutputs,
    ) -> Measurements:
        """[(number of edges, value)], one for each circuit.

        Raises ConfigError if `metric_func` gives anything else.
        """
        points = self.metric_func(model, dataloader, circuit_outs)
        try:
            sizes = [int(n_edges) for n_edges, _ in points]
            found: Measurements = [(int(n), float(value)) for n, value in points]
        except (TypeError, ValueError, OverflowError):
            sizes, found = [], []
        if sorted(sizes) != sorted(circuit_outs):
            raise ConfigError(
                f"The metric {self.key!r} gave {shown(points)}; expected a list of (number "
                f"of edges, value), one for each of the circuits {sorted(circuit_outs)}."
            )
        return found

    def check_prompts(
        self, dataloader: Iterable[PromptPairBatch] | Sequence[Prompt]
    ) -> None:
        """Raise DataError if it compares with wrong answers that some prompt has not."""
        if self.needs_wrong_answers:
            check_wrong_answers(dataloader, f"the metric {self.key!r}")

    def __str__(self) -> str:
        return self.key
