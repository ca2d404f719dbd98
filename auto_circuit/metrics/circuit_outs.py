"""Run circuits that are given edge by edge, where `run_circuits` takes ranked scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.errors import ConfigError, GraphError, near_matches
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prune_metrics import PruneMetric
from auto_circuit.prune import Circuit, set_masks
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import (
    PER_BATCH_ABLATIONS,
    iter_src_ablations,
)
from auto_circuit.utils.graph_utils import patch_mode, preserved_masks
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state, own_state

CHUNK = 16
"""How many circuits' outputs of one batch are held in memory at a time."""


@checked
def check_circuit(model: PatchableModel, circuit: Mapping[str, Tensor]) -> None:
    """Raise GraphError unless the circuit is a boolean tensor for every mask."""
    expected = {name: tuple(mask.shape) for name, mask in model.patch_masks.items()}
    for name in (*circuit, *expected):
        if name not in expected:
            raise GraphError(
                f"The circuit names {name!r}, which is no destination of this graph."
                + near_matches(name, expected)
            )
        if name not in circuit:
            raise GraphError(
                f"The circuit lacks the destination {name!r}. Start from "
                "`model.circuit_prune_scores(edges, bool=True)`."
            )
        edges = circuit[name]
        if edges.dtype != t.bool or tuple(edges.shape) != expected[name]:
            raise GraphError(
                f"The circuit at {name!r} is {edges.dtype} of shape "
                f"{tuple(edges.shape)}; expected torch.bool of shape {expected[name]}. "
                "`circuit_mask(prune_scores, edge_count)` makes circuits of scores."
            )


@checked
def n_circuit_edges(circuit: Mapping[str, Tensor]) -> int:
    """The number of edges in a circuit."""
    return sum(int(edges.sum()) for edges in circuit.values())


@checked
def complement(circuit: Mapping[str, Tensor]) -> Circuit:
    """All the edges that are not in a circuit."""
    return {name: ~edges for name, edges in circuit.items()}


@checked
def without(circuit: Mapping[str, Tensor], removed: Mapping[str, Tensor]) -> Circuit:
    """The edges of a circuit that are not among the removed ones."""
    return {name: edges & ~removed[name] for name, edges in circuit.items()}


@checked
def iter_circuit_outs(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuits: Sequence[Mapping[str, Tensor]],
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> Iterator[tuple[PromptPairBatch, int, Tensor]]:
    """(batch, index of the circuit, its output) for every batch and circuit.

    The input is clean; along all edges that are not in the circuit, the ablation is
    patched in: with RESAMPLE, the corrupt prompts' activations. The model may be used
    between two items. Cost: a forward pass per batch and circuit, and one per batch.
    """
    for circuit in circuits:
        check_circuit(model, circuit)
    side = "corrupt" if ablation_type in PER_BATCH_ABLATIONS else None
    for batch, patch_src_outs in iter_src_ablations(
        model, dataloader, ablation_type, side
    ):
        for start in range(0, len(circuits), CHUNK):
            chunk = circuits[start : start + CHUNK]
            outs = _outs(model, batch, patch_src_outs, chunk)
            for idx, out in enumerate(outs, start=start):
                yield batch, idx, out


def _outs(
    model: PatchableModel,
    batch: PromptPairBatch,
    patch_src_outs: Tensor,
    circuits: Sequence[Mapping[str, Tensor]],
) -> list[Tensor]:
    tokens, kwargs = batch.model_input("clean")
    outs = []
    with (
        own_state(model, grad=False),
        preserved_masks(model),
        patch_mode(model, patch_src_outs),
    ):
        for circuit in circuits:
            set_masks(model, complement(circuit))
            outs.append(model.sliced(tokens, **kwargs).clone())
    return outs


@checked
@in_own_state(grad=False)
def circuit_prompt_vals(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuits: Sequence[Mapping[str, Tensor]],
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
        prompt_vals = metric.prompt_func(out, batch, full)
        vals[idx].append(prompt_vals.to("cpu", t.float64))
    return t.stack([t.cat(of_circuit) for of_circuit in vals])
