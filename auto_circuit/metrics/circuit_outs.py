"""Run circuits that are given edge by edge, where `run_circuits` takes ranked scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.circuits import Circuit, CircuitMasks, as_circuit
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import batch_vals
from auto_circuit.metrics.prune_metrics.prune_metric import PruneMetric
from auto_circuit.prune import set_masks
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import (
    SrcOuts,
    ablated_parts,
    ablation_side,
    iter_src_ablations,
    loaded_batches,
)
from auto_circuit.utils.graph_utils import patch_mode, preserved_masks
from auto_circuit.utils.limited_passes import prompts_at_once
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state, own_state

CHUNK = 16
"""How many circuits' outputs of one batch are held in memory at a time."""


@checked
def iter_circuit_outs(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuits: Sequence[CircuitMasks],
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> Iterator[tuple[PromptPairBatch, int, Float[Tensor, "batch *pos vocab"]]]:
    """(batch, index of the circuit, its output) for every batch and circuit.

    The input is clean; along all edges that are not in the circuit, the ablation is
    patched in: with RESAMPLE, the corrupt prompts' activations. The model may be used
    between two items. Cost: a forward pass per batch and circuit, and one per batch.
    """
    checked_circuits = [as_circuit(model, circuit) for circuit in circuits]
    side = ablation_side(ablation_type, "corrupt")

    def try_out(batch: PromptPairBatch, patch_src_outs: SrcOuts) -> None:
        for circuit in checked_circuits:
            _outs(model, batch, patch_src_outs, [circuit])

    n_at_once = prompts_at_once(model, dataloader, (ablation_type, side), try_out)
    if n_at_once is not None:
        parts = ablated_parts(
            model, lambda: loaded_batches(dataloader), (ablation_type, side), n_at_once
        )
        yield from _outs_of_parts(model, dataloader, parts, checked_circuits)
        return
    for batch, patch_src_outs in iter_src_ablations(
        model, dataloader, ablation_type, side
    ):
        for start in range(0, len(circuits), CHUNK):
            chunk = checked_circuits[start : start + CHUNK]
            outs = _outs(model, batch, patch_src_outs, chunk)
            for idx, out in enumerate(outs, start=start):
                yield batch, idx, out


def _outs_of_parts(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    parts: Iterator[tuple[PromptPairBatch, SrcOuts]],
    circuits: Sequence[Circuit],
) -> Iterator[tuple[PromptPairBatch, int, Float[Tensor, "batch *pos vocab"]]]:
    """The same from parts of batches, which come in order."""
    for batch in loaded_batches(dataloader):
        of_parts: list[list[Tensor]] = []
        n_missing = len(batch.clean)
        while n_missing > 0:
            part, patch_src_outs = next(parts)
            of_parts.append(_outs(model, part, patch_src_outs, circuits))
            n_missing -= len(part.clean)
        for idx, outs in enumerate(zip(*of_parts, strict=True)):
            yield batch, idx, t.cat(outs)


def _outs(
    model: PatchableModel,
    batch: PromptPairBatch,
    patch_src_outs: Tensor,
    circuits: Sequence[Circuit],
) -> list[Tensor]:
    tokens, kwargs = batch.model_input("clean")
    outs = []
    with (
        own_state(model, grad=False),
        preserved_masks(model),
        patch_mode(model, patch_src_outs),
    ):
        for circuit in circuits:
            set_masks(model, circuit.complement())
            outs.append(model.sliced(tokens, **kwargs).clone())
    return outs


@checked
@in_own_state(grad=False)
def circuit_prompt_vals(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuits: Sequence[CircuitMasks],
    metric: PruneMetric,
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> Float[Tensor, "circuit prompt"]:
    """A metric's value for every circuit and prompt, as float64 on the CPU.

    Raises ConfigError for a metric without `prompt_func`, GraphError for a circuit of
    another graph.
    """
    if metric.prompt_func is None:
        raise ConfigError(
            f"The metric {metric.key!r} has no value for single prompts. Give one with "
            "a `prompt_func`, such as LOGIT_DIFF_METRIC."
        )
    metric.check_prompts(dataloader)
    full = FullModelOuts(model, dataloader)
    vals: list[list[Tensor]] = [[] for _ in circuits]
    for batch, idx, out in iter_circuit_outs(model, dataloader, circuits, ablation_type):
        of_prompts = batch_vals(metric.prompt_func, out, batch, full)
        vals[idx].append(of_prompts.to("cpu", t.float64))
    return t.stack([t.cat(of_circuit) for of_circuit in vals])
