"""How much a circuit's predictions differ from the full model's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptPairBatch
from auto_circuit.metrics.protocols import SlicedModel
from auto_circuit.metrics.prune_metrics.full_model_outs import (
    FullModelOuts,
    Side,
    apply_prob_func,
)
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_means
from auto_circuit.metrics.prune_metrics.prune_metric import PruneMetric
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import CircuitOutputs, Measurements
from auto_circuit.utils.tensor_ops import kl_divs


@checked
def measure_kl_div(
    model: SlicedModel,
    dataloader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    compare_to_clean: bool = True,
    *,
    full_model_outs: FullModelOuts | None = None,
) -> Measurements:
    """KL(full model || circuit): how much the circuit's predictions differ.

    In nats, mean over prompts; 0 (the same predictions) or more.

    compare_to_clean: the full model on the clean prompts, else on the corrupt ones.
    circuit_outs: `run_circuits` on the same loader. full_model_outs: to be shared.

    With several positions in the output, a prompt's value is the mean over its
    positions; padding does not count. Raises DataError for outputs of another loader.
    """
    prompt_func = partial(prompt_kl_divs, compare_to_clean=compare_to_clean)
    return prompt_means(model, dataloader, circuit_outs, prompt_func, full_model_outs)


@checked
def prompt_kl_divs(
    out: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    full: FullModelOuts,
    compare_to_clean: bool = True,
) -> Float[Tensor, "batch"]:
    """KL(full model || circuit) of each prompt, in nats."""
    side: Side = "clean" if compare_to_clean else "corrupt"
    target_logprobs = full.vals(batch, side, "log_softmax")
    divs = kl_divs(apply_prob_func(out, "log_softmax"), target_logprobs)
    # Rounding can make a divergence of 0 negative.
    divs = divs.clamp(min=0.0)
    if divs.ndim == 1:
        return divs
    weights = _position_weights(batch, side, full).to(divs)
    return (divs * weights).flatten(1).sum(1) / weights.expand_as(divs).flatten(1).sum(1)


def _position_weights(batch: PromptPairBatch, side: Side, full: FullModelOuts) -> Tensor:
    """1 at the output's positions that are text, 0 at padding."""
    is_clean = side == "clean"
    mask = batch.clean_attention_mask if is_clean else batch.corrupt_attention_mask
    if mask is None:
        return t.ones(())
    return mask[full.model.out_slice]


CLEAN_KL_DIV_METRIC = PruneMetric(
    key="Clean KL Div",
    question="How far are the circuit's predictions from the model's, of all words?",
    name="KL(Clean || Circuit)",
    log_x=True,
    log_y=True,
    lower_better=True,
    y_min=1e-2,
    prompt_func=partial(prompt_kl_divs, compare_to_clean=True),
    bounds=(0.0, math.inf),
)

CORRUPT_KL_DIV_METRIC = PruneMetric(
    key="Corrupt KL Div",
    question="How far are they from what the model says on the corrupt prompts?",
    name="KL(Corrupt || Circuit)",
    log_x=True,
    log_y=True,
    y_min=1e-6,
    prompt_func=partial(prompt_kl_divs, compare_to_clean=False),
    bounds=(0.0, math.inf),
)
