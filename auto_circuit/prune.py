"""Run the circuits that a prune algorithm's scores make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch as t
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.circuits import Circuit, circuit_of_scores
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.memory import Limit
from auto_circuit.prompt_encoding import OTHER_SIDE, Side
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.ranking import desc_prune_scores
from auto_circuit.types import (
    AblationType,
    CircuitOutputs,
    PatchType,
    PerEdge,
    PruneScores,
)
from auto_circuit.utils.ablation_activations import (
    SrcOuts,
    ablation_side,
)
from auto_circuit.utils.custom_tqdm import tqdm
from auto_circuit.utils.graph_utils import patch_mode, preserved_masks
from auto_circuit.utils.limited_passes import Passes, each_batch
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@in_own_state(grad=False)
def run_circuits(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    test_edge_counts: Sequence[int],
    prune_scores: PruneScores,
    patch_type: PatchType = PatchType.EDGE_PATCH,
    ablation_type: AblationType = AblationType.RESAMPLE,
    reverse_clean_corrupt: bool = False,
    render_graph: bool = False,
    render_score_threshold: bool | int | float = 0.0,
    render_file_path: Path | str | None = None,
    memory_limit: Limit = None,
) -> CircuitOutputs:
    """The model's output with only a circuit's edges intact, for several circuit sizes.

    The circuit of size k has the k edges with the largest |score|, and all that tie with
    the last of them. Returns {edges really in the circuit: {batch key: output}}; the
    output is `model(input)[model.out_slice]`.

    | patch_type | reverse | input   | patched in | along            |
    |------------|---------|---------|------------|------------------|
    | TREE_PATCH | False   | clean   | corrupt    | all other edges  |
    | EDGE_PATCH | False   | corrupt | clean      | circuit edges    |
    | EDGE_PATCH | True    | clean   | corrupt    | circuit edges    |
    | TREE_PATCH | True    | corrupt | clean      | all other edges  |

    "Patched in" holds for RESAMPLE and BATCH_*; ZERO and TOKENWISE_MEAN_* name what is
    patched in themselves. Raises GraphError for a size that the graph does not have and
    for scores that do not fit it, before the model runs.

    render_graph: show the edges that are patched for the last of the sizes
        (`draw_seq_graph`, in a notebook or the browser). render_score_threshold,
        render_file_path: its `score_threshold` (the scores are 1) and `file_path`.

    memory_limit: the most that the passes may take beside the model, without the outputs:
        bytes, or a share of what is free (see `MemoryLimit`).

    No edge is in a circuit of size 0, also if scores are infinite.
    """
    prune_scores = model.check_scores(prune_scores)
    patched = _patched_edges(model, prune_scores, test_edge_counts, patch_type)
    clean_input = (patch_type == PatchType.TREE_PATCH) != reverse_clean_corrupt
    input_side: Side = "clean" if clean_input else "corrupt"
    patch_side = ablation_side(ablation_type, OTHER_SIDE[input_side])
    outputs: CircuitOutputs = {n_edges: {} for n_edges in patched}

    def run(
        batch: PromptPairBatch, patch_src_outs: SrcOuts
    ) -> Iterator[tuple[int, Tensor]]:
        tokens, kwargs = batch.model_input(input_side)
        with patch_mode(model, patch_src_outs):
            for n_edges, edges in patched.items():
                set_masks(model, edges)
                yield n_edges, model.sliced(tokens, **kwargs).clone()

    def keep_outputs(batch: PromptPairBatch, patch_src_outs: SrcOuts) -> None:
        for n_edges, out in run(batch, patch_src_outs):
            # Under a limit a batch may come in parts.
            before = outputs[n_edges].get(batch.key)
            outputs[n_edges][batch.key] = out if before is None else t.cat([before, out])
        progress.update()

    def try_out(batch: PromptPairBatch, patch_src_outs: SrcOuts) -> None:
        for _ in run(batch, patch_src_outs):
            pass

    with preserved_masks(model), tqdm(total=len(dataloader), leave=False) as progress:
        passes = Passes(keep_outputs, try_out)
        each_batch(model, dataloader, (ablation_type, patch_side), passes, memory_limit)
    if render_graph and len(test_edge_counts):
        # Imported when asked for: a driver of figures in a lower layer.
        from auto_circuit.visualize import draw_seq_graph

        last = _patched_edges(model, prune_scores, test_edge_counts[-1:], patch_type)
        (edges,) = last.values()
        draw_seq_graph(
            model,
            edges.scores,
            float(render_score_threshold),
            seq_labels=model.position_labels(dataloader.seq_labels),
            display_ipython=True,
            file_path=render_file_path,
        )
    return outputs


@checked
def set_masks(model: PatchableModel, values: Mapping[str, PerEdge]) -> None:
    """Set every mask to the values (or booleans) of a dictionary like `patch_masks`."""
    for module_name, mask in model.patch_masks.items():
        mask.data.copy_(values[module_name])


def _patched_edges(
    model: PatchableModel,
    prune_scores: PruneScores,
    test_edge_counts: Sequence[int],
    patch_type: PatchType,
) -> dict[int, Circuit]:
    """{edges really in the circuit: the edges that are patched to test it}"""
    desc_scores = desc_prune_scores(prune_scores)
    circuits = [
        circuit_of_scores(model, prune_scores, size, desc_scores)
        for size in sorted(set(test_edge_counts))
    ]
    if patch_type == PatchType.EDGE_PATCH:
        return {circuit.n_edges: circuit for circuit in circuits}
    return {circuit.n_edges: circuit.complement() for circuit in circuits}
