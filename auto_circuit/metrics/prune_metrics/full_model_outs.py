"""The full model's outputs, which most metrics compare a circuit's outputs with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptPairBatch, Side
from auto_circuit.errors import DataError
from auto_circuit.metrics.protocols import SlicedModel
from auto_circuit.precision import at_least_float32
from auto_circuit.types import BatchKey
from auto_circuit.utils.patchable_model import PatchableModel, unpatched
from auto_circuit.utils.tensor_ops import (
    answer_diff_rounding_errors,
    batch_answer_diffs,
    nan_where_zero,
)
from auto_circuit.utils.torch_state import own_computation, own_state

ProbFunc = Literal["logits", "softmax", "log_softmax"]


@checked
def apply_prob_func(
    logits: Float[Tensor, "*lead vocab"], prob_func: ProbFunc
) -> Float[Tensor, "*lead vocab"]:
    """The logits themselves, probabilities, or log-probabilities (nats).

    Raises ConfigError for another `prob_func`.
    """
    if prob_func == "logits":
        return logits
    if prob_func == "softmax":
        return at_least_float32(logits).softmax(-1)
    return at_least_float32(logits).log_softmax(-1)


class FullModelOuts:
    """A model's unpatched outputs on a loader's batches, computed when first asked.

    Give one object to several metrics and the model runs once per prompt, however many
    metrics and circuits there are. It belongs to one (model, loader) pair and one state
    of the model: make a new one when the model changes.
    """

    def __init__(self, model: SlicedModel, dataloader: Iterable[PromptPairBatch]) -> None:
        self.model = model
        self.dataloader = dataloader
        self._vals: dict[tuple[BatchKey, Side, ProbFunc], Tensor] = {}
        self._mean_answer_diffs: dict[ProbFunc, float] = {}

    @checked
    def vals(
        self, batch: PromptPairBatch, side: Side, prob_func: ProbFunc = "logits"
    ) -> Float[Tensor, "batch *pos vocab"]:
        """`model(batch.clean or batch.corrupt)[model.out_slice]`, after `prob_func`."""
        key = (batch.key, side, prob_func)
        if key not in self._vals:
            with own_computation(grad=False):
                if prob_func == "logits":
                    self._vals[key] = self._run(batch, side)
                else:
                    logits = self.vals(batch, side)
                    self._vals[key] = apply_prob_func(logits, prob_func)
        return self._vals[key]

    @checked
    def mean_answer_diff(self, prob_func: ProbFunc = "logits") -> float:
        """The mean difference between correct and wrong answers on the clean prompts.

        NaN, with an UndefinedPercentWarning, if it is 0 within rounding.
        """
        if prob_func not in self._mean_answer_diffs:
            diffs, errors = [], []
            for batch in self.dataloader:
                vals = self.vals(batch, "clean", prob_func)
                diffs.append(batch_answer_diffs(vals, batch).double())
                errors.append(answer_diff_rounding_errors(vals, batch).double())
            if not diffs:
                raise DataError("The loader has no batches, so there is nothing to mean.")
            mean = nan_where_zero(t.cat(diffs).mean(), t.cat(errors).mean())
            self._mean_answer_diffs[prob_func] = float(mean)
        return self._mean_answer_diffs[prob_func]

    def _run(self, batch: PromptPairBatch, side: Side) -> Tensor:
        tokens, kwargs = batch.model_input(side)
        model = self.model
        is_ours = isinstance(model, PatchableModel)
        with unpatched(model) if is_ours else own_state(model):
            return model(tokens, **kwargs)[model.out_slice]
