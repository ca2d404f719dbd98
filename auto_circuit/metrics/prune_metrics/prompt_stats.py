"""Means over prompts: what every metric has in common.

A metric is a function that gives each prompt of a batch a number. Its measurement is
the mean over all prompts of the loader, so it does not depend on how they are batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from warnings import warn

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked, shown
from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.metrics.protocols import SlicedModel
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.types import CircuitOutputs, Measurements
from auto_circuit.utils.torch_state import in_own_state

PromptFunc = Callable[
    [Float[Tensor, "batch *pos vocab"], PromptPairBatch, FullModelOuts],
    Float[Tensor, "batch"],
]
"""(circuit's output, batch, full model's outputs) -> the value of each prompt"""

OTHER_LOADER = (
    "they were computed on another loader. Give the loader that `run_circuits` was given."
)


class NotANumberWarning(UserWarning):
    """A number that was measured is NaN because a model's outputs are."""


class PromptVals(NamedTuple):
    """A metric's value for every prompt of a loader, for one circuit."""

    n_edges: int
    vals: list[float]

    @property
    def mean(self) -> float:
        """The mean over prompts; NaN if a value is."""
        if all(map(math.isfinite, self.vals)):
            return math.fsum(self.vals) / len(self.vals)
        return float(t.tensor(self.vals, dtype=t.float64).mean())

    @property
    def std(self) -> float:
        """The unbiased standard deviation over prompts; NaN for a single prompt."""
        if len(self.vals) < 2:
            return math.nan
        return float(t.tensor(self.vals, dtype=t.float64).std())


@checked
@in_own_state(grad=False)
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

    Raises DataError for a loader without batches, without circuits, and for outputs of
    another loader. Where an output is NaN, so is the value, with a NotANumberWarning.
    """
    if not circuit_outs:
        raise DataError("There are no circuits' outputs, so there is nothing to measure.")
    full = full_model_outs or FullModelOuts(model, dataloader)
    batches = list(dataloader)
    if not batches:
        raise DataError("The loader has no batches, so there is nothing to measure.")
    for n_edges, outs in circuit_outs.items():
        _check_outputs(outs, batches, n_edges)
    found = [
        PromptVals(
            n_edges,
            [
                val
                for batch in batches
                for val in batch_vals(prompt_func, outs[batch.key], batch, full).tolist()
            ],
        )
        for n_edges, outs in circuit_outs.items()
    ]
    suspects = [vals.n_edges for vals in found if any(map(math.isnan, vals.vals))]
    warn_of_nan(
        [
            n_edges
            for n_edges in suspects
            if any(bool(out.isnan().any()) for out in circuit_outs[n_edges].values())
        ],
        len(found),
    )
    return found


def batch_vals(
    prompt_func: PromptFunc,
    out: Float[Tensor, "batch *pos vocab"],
    batch: PromptPairBatch,
    full: FullModelOuts,
) -> Float[Tensor, "batch"]:
    """A metric's value for each prompt of a batch.

    Raises ConfigError if the metric's function gives anything but a number for each.
    """
    vals = prompt_func(out, batch, full)
    n_prompts = len(batch.clean)
    if not isinstance(vals, Tensor) or vals.shape != (n_prompts,):
        function = prompt_func.func if isinstance(prompt_func, partial) else prompt_func
        raise ConfigError(
            f"The metric's function `{getattr(function, '__name__', function)}` gave "
            f"{shown(vals)} for a batch of {n_prompts} prompts; expected a Tensor "
            f"[{n_prompts}]: a number for each prompt."
        )
    return vals if vals.is_floating_point() else vals.double()


def warn_of_nan(bad: Sequence[int], n_circuits: int) -> None:
    """One warning if values are NaN because outputs are, and not because of a metric.

    bad: the sizes of those circuits. n_circuits: of how many.
    """
    if bad:
        warn(
            f"The outputs of {len(bad)} of {n_circuits} circuits hold NaN (not a number), "
            f"so their values are NaN; the first has {bad[0]} edges. Does the model itself "
            "give NaN on these prompts, or does it overflow in half precision?",
            NotANumberWarning,
            stacklevel=4,
        )


@checked
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


def _check_outputs(outs: Any, batches: Sequence[PromptPairBatch], n_edges: int) -> None:
    """Raise DataError unless there is an output of the right length for every batch."""
    if not isinstance(outs, Mapping):
        raise DataError(
            f"The outputs of the circuit with {n_edges} edges are {shown(outs)}; expected "
            "{batch key: Tensor}, as `run_circuits` gives them."
        )
    for batch in batches:
        out, n_prompts = outs.get(batch.key), len(batch.clean)
        found = None
        if out is None:
            found = "no such batch"
        elif not isinstance(out, Tensor) or not out.is_floating_point():
            raise DataError(
                f"The output of batch {batch.key} for the circuit with {n_edges} edges is "
                f"{_kind(out)}; expected a Tensor of floating point numbers."
            )
        elif out.ndim < 2:
            found = f"the shape {tuple(out.shape)} for it"
        elif len(out) != n_prompts:
            found = f"{len(out)} prompts for it"
        if found:
            raise DataError(
                f"The loader's batch {batch.key} has {n_prompts} prompts, but the outputs "
                f"of the circuit with {n_edges} edges have {found}: {OTHER_LOADER}"
            )
    n_unknown = len(set(outs) - {batch.key for batch in batches})
    if n_unknown:
        raise DataError(
            f"The outputs of the circuit with {n_edges} edges have {n_unknown} batches "
            f"that the loader does not have: {OTHER_LOADER}"
        )


def _kind(value: Any) -> str:
    return f"of {value.dtype}" if isinstance(value, Tensor) else shown(value)
