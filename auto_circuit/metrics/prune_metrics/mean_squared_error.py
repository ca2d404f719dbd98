"""How far a circuit's outputs are from the full model's, for outputs that are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptPairBatch
from auto_circuit.metrics.protocols import SlicedModel
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_means
from auto_circuit.metrics.prune_metrics.prune_metric import PruneMetric
from auto_circuit.precision import at_least_float32
from auto_circuit.types import CircuitOutputs, Measurements
from auto_circuit.utils.tensor_ops import check_same_shape


@checked
def measure_mean_squared_error(
    model: SlicedModel,
    dataloader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    *,
    full_model_outs: FullModelOuts | None = None,
) -> Measurements:
    """The mean squared difference between the circuit's outputs and the clean model's.

    In squared units of the output, mean over prompts (of their positions and output
    entries); 0 (the same outputs) or more. The metric for models whose output is a number
    and no word, such as the compiled model "xproportion".

    circuit_outs: `run_circuits` on the same loader. full_model_outs: to be shared.
    Raises DataError for outputs of another loader.
    """
    return prompt_means(
        model, dataloader, circuit_outs, prompt_squared_errors, full_model_outs
    )


@checked
def prompt_squared_errors(
    out: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch, full: FullModelOuts
) -> Float[Tensor, "batch"]:
    """The mean squared difference of each prompt's outputs."""
    clean_out = full.vals(batch, "clean")
    check_same_shape(out, clean_out)
    differences = at_least_float32(out) - at_least_float32(clean_out)
    return differences.square().flatten(1).mean(1)


CLEAN_MSE_METRIC = PruneMetric(
    key="Clean MSE",
    question="How far are the circuit's outputs from the model's, if these are numbers?",
    name="Squared Difference to Clean",
    log_x=True,
    log_y=True,
    lower_better=True,
    y_min=1e-6,
    prompt_func=prompt_squared_errors,
    bounds=(0.0, math.inf),
    of_numbers=True,
)
"""For models whose output is a number."""
