"""How deep a behaviour's circuit is: what paths through few heads and MLPs do on their own.

A path goes from the embedding through nodes (heads, MLPs), each of which reads the last one,
to the output. Let every path through at most n nodes carry the clean prompt, and every longer
one the corrupt prompt:

    w(0) = what the nodes write on the corrupt prompts
    w(n) = what they write if they read the clean embedding, and w(n - 1) of other nodes

The output that reads the clean embedding and w(n) has the paths through at most n nodes. That
is exact, whatever algorithm would find the circuit; and once n is the longest path of the
graph, w(n) is the clean run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import check_number, checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.faithfulness import faithfulness
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import batch_vals
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_METRIC,
    PruneMetric,
)
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import iter_src_ablations
from auto_circuit.utils.graph_utils import patch_mode, preserved_masks
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@in_own_state(grad=False)
def faithfulness_of_short_paths(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    metric: PruneMetric = LOGIT_DIFF_METRIC,
) -> list[float]:
    """The faithfulness of all paths through at most 0, 1, 2, ... nodes.

    0: the metric is what it is on the corrupt prompts; 1: what it is on the clean ones. The
    last is that of the longest path in the graph, 1 within rounding. In between it may go
    beyond both. A position counts as one step, as positions within a node do.

    Cost: a forward pass for each length and batch. Raises ConfigError for a metric without
    `prompt_func`, DataError if the metric is the same on clean and corrupt prompts.
    """
    if metric.prompt_func is None:
        raise ConfigError(
            f"The metric {metric.key!r} has no value for single prompts. Give one with "
            "a `prompt_func`, such as LOGIT_DIFF_METRIC."
        )
    metric.check_prompts(dataloader)
    full = FullModelOuts(model, dataloader)
    # Of each prompt: on the corrupt one, with paths of each length, on the clean one.
    rows: list[Float[Tensor, "length prompt"]] = []
    for batch, corrupt in iter_src_ablations(
        model, dataloader, AblationType.RESAMPLE, "corrupt"
    ):
        outs = [
            full.vals(batch, "corrupt"),
            *_outs_of_short_paths(model, batch, corrupt),
            full.vals(batch, "clean"),
        ]
        vals = [batch_vals(metric.prompt_func, out, batch, full) for out in outs]
        rows.append(t.stack(vals).to("cpu", t.float64))
    nothing, *of_lengths, whole = t.cat(rows, dim=1).mean(1).tolist()
    return [faithfulness(value, nothing, whole) for value in of_lengths]


def _outs_of_short_paths(
    model: PatchableModel,
    batch: PromptPairBatch,
    corrupt: Float[Tensor, "src batch seq d_model"],
) -> Iterator[Float[Tensor, "batch *pos vocab"]]:
    tokens, kwargs = batch.model_input("clean")
    written = corrupt.clone()
    with preserved_masks(model):
        _patch_all_but_the_start(model)
        for _ in range(_longest_path(model) + 1):
            read, written = written, t.empty_like(written)
            with patch_mode(model, read, curr_src_outs=written):
                yield model.sliced(tokens, **kwargs).clone()


def _first_layer_that_reads(model: PatchableModel) -> int:
    return min(dest.layer for dest in model.dests)


def _patch_all_but_the_start(model: PatchableModel) -> None:
    """Set the masks of all edges that come from a node: from what reads something."""
    first = _first_layer_that_reads(model)
    nodes = t.tensor([float(src.layer >= first) for src in model.srcs])
    for wrapper in model.dest_wrappers:
        wrapper.mask.data.copy_(nodes[wrapper.in_srcs].expand_as(wrapper.mask))


def _longest_path(model: PatchableModel) -> int:
    """The most nodes that a path can go through: as many as write in different layers."""
    first = _first_layer_that_reads(model)
    return len({src.layer for src in model.srcs if src.layer >= first})


@checked
def path_depth(faithfulness_by_length: Sequence[float], share: int | float = 0.8) -> int:
    """The nodes in a row that a behaviour needs: from so many on, faithfulness >= `share`.

    faithfulness_by_length: of `faithfulness_of_short_paths`. 0: the embedding's way to the
    output does it; 1: single heads and MLPs; 2: such as read what another one wrote.
    Raises ConfigError for a share outside of [0, 1], or one that even the longest paths
    do not reach.
    """
    check_number("share", share, 0, 1)
    lengths = list(enumerate(faithfulness_by_length))
    below = [n for n, value in lengths if not value >= share]
    depth = below[-1] + 1 if below else 0
    if depth == len(lengths):
        raise ConfigError(
            f"`faithfulness_by_length` ends below the share {share}, so that no length of "
            "paths is enough. Give what `faithfulness_of_short_paths` returns, and a share "
            "below 1."
        )
    return depth
