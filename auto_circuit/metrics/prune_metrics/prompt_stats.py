"""Means over prompts: what every metric has in common.

A metric is a function that gives each prompt of a batch a number. Its measurement is
the mean over all prompts of the loader, so it does not depend on how they are batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch as t
from torch import Tensor

from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import DataError
from auto_circuit.metrics.protocols import SlicedModel
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.types import CircuitOutputs, Measurements

PromptFunc = Callable[[Tensor, PromptPairBatch, FullModelOuts], Tensor]
"""(circuit's output [batch *pos vocab], batch, full model's outputs) -> [batch]"""


class PromptVals(NamedTuple):
    """A metric's value for every prompt of a loader, for one circuit."""

    n_edges: int
    vals: list[float]

    @property
    def mean(self) -> float:
        """The mean over prompts."""
        return math.fsum(self.vals) / len(self.vals)

    @property
    def std(self) -> float:
        """The unbiased standard deviation over prompts; NaN for a single prompt."""
        if len(self.vals) < 2:
            return math.nan
        return float(t.tensor(self.vals, dtype=t.float64).std())


def prompt_vals(
    model: SlicedModel,
    dataloader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    prompt_func: PromptFunc,
    full_model_outs: FullModelOuts | None = None,
) -> list[PromptVals]:
    """A metric's value for every prompt and circuit.

    dataloader: the loader (any repeatable collection of batches) that `circuit_outs`
        were computed on.
    full_model_outs: outputs of the full model to share between metrics.

    Raises DataError for a loader without batches and for outputs of another loader.
    """
    full = full_model_outs or FullModelOuts(model, dataloader)
    batches = list(dataloader)
    if not batches:
        raise DataError("The loader has no batches, so there is nothing to measure.")
    with t.no_grad():
        return [
            PromptVals(
                n_edges,
                [
                    val
                    for batch in batches
                    for val in prompt_func(
                        _batch_output(outs, batch, n_edges), batch, full
                    ).tolist()
                ],
            )
            for n_edges, outs in circuit_outs.items()
        ]


def prompt_means(
    model: SlicedModel,
    dataloader: Iterable[PromptPairBatch],
    circuit_outs: CircuitOutputs,
    prompt_func: PromptFunc,
    full_model_outs: FullModelOuts | None = None,
) -> Measurements:
    """[(number of edges, mean over prompts)]; see `prompt_vals`."""
    per_circuit = prompt_vals(
        model, dataloader, circuit_outs, prompt_func, full_model_outs
    )
    return [(circuit.n_edges, circuit.mean) for circuit in per_circuit]


def _batch_output(
    outs: dict[int, Tensor], batch: PromptPairBatch, n_edges: int
) -> Tensor:
    out, n_prompts = outs.get(batch.key), len(batch.clean)
    if out is None or len(out) != n_prompts:
        found = "no such batch" if out is None else f"{len(out)} prompts for it"
        raise DataError(
            f"The loader's batch {batch.key} has {n_prompts} prompts, but the outputs "
            f"of the circuit with {n_edges} edges have {found}: they were computed on "
            "another loader. Give the loader that `run_circuits` was given."
        )
    return out
