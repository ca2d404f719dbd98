"""What all algorithms that train masks share: the prompts, the steps, the record.

A training step costs one forward and one backward pass. Before the first step, each batch
costs two forward passes: one for what is patched in, one for the full model's outputs.

Signs. Logits of configs, warm starts, penalties and scores speak of the circuit: the higher,
the surer is the edge in it. Masks speak of patching, as those of all wrappers: 1 is patched.
Which logits a training's masks have depends on what its patched edges are (`PatchedEdges`), and
`swapped_logits` is the one place that goes from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from auto_circuit.checks import check_count, check_number, check_seed, checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.errors import MemoryLimitError, TrainingError
from auto_circuit.prompt_encoding import OTHER_SIDE
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.ranking import desc_prune_scores
from auto_circuit.types import AblationType, PruneScores
from auto_circuit.utils.ablation_activations import (
    PER_BATCH_ABLATIONS,
    PatchedIn,
    Side,
    SrcOuts,
    ablated_parts,
    ablation_side,
    iter_src_ablations,
    loaded_batches,
    recorded_bytes,
)
from auto_circuit.utils.graph_utils import patch_mode, set_all_masks, train_mask_mode
from auto_circuit.utils.limited_memory import largest_batch, measured
from auto_circuit.utils.patchable_model import PatchableModel, unpatched

PatchedEdges = Literal["circuit", "others"]
"""What patched edges are: the circuit (corrupt prompts, its edges patched with clean
activations), or all others (clean prompts, the circuit's edges left alone)."""


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch, what is patched into it, and the full model's outputs on its clean side."""

    batch: PromptPairBatch
    inputs: Tensor
    kwargs: dict[str, Any]
    patch_src_outs: SrcOuts
    clean_outputs: Float[Tensor, "batch *pos vocab"]


@dataclass(frozen=True)
class TrainingStep:
    """One step of a training: its losses, and the expected size of its circuit.

    loss = faithfulness + penalty. validation: the faithfulness loss on other prompts, at
    the steps at which it was measured.
    """

    step: int
    loss: float
    faithfulness: float
    penalty: float
    n_edges: int | float
    validation: float | None = None


@dataclass(frozen=True, eq=False)
class MaskTraining:
    """What a training found: scores, and the record of its steps."""

    prune_scores: PruneScores
    steps: tuple[TrainingStep, ...]


@checked
def training_batches(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    ablation_type: AblationType,
    input_side: Side,
    max_batches: int | None = None,
) -> list[TrainingBatch]:
    """A loader's (first) batches, ready to be trained on; they are held in memory.

    The input is one side of the prompts; what is patched in comes from the other side, or
    from where the ablation type says.
    """
    patch_side = ablation_side(ablation_type, OTHER_SIDE[input_side])
    _check_fits(model, dataloader, (ablation_type, patch_side), max_batches)
    ready = []
    all_outs = iter_src_ablations(model, dataloader, ablation_type, patch_side)
    for batch, outs in islice(all_outs, max_batches):
        clean, clean_kwargs = batch.model_input("clean")
        with unpatched(model, grad=False):
            clean_outputs = model.sliced(clean, **clean_kwargs).clone()
        inputs, kwargs = batch.model_input(input_side)
        # The activations share memory from batch to batch; a mean is the same for all.
        own = outs.clone() if ablation_type in PER_BATCH_ABLATIONS else outs
        ready.append(TrainingBatch(batch, inputs, kwargs, own, clean_outputs))
    return ready


def _check_fits(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    patched_in: PatchedIn,
    max_batches: int | None,
) -> None:
    """Raise MemoryLimitError unless all batches and a step fit in the model's limit.

    A step is not cut into pieces: gates are drawn for a whole batch.
    """
    limit = model.memory_limit
    if limit is None or model.written is None:
        return
    batches = list(islice(loaded_batches(dataloader), max_batches))
    held = recorded_bytes(model, batches, patched_in)
    n_bytes = limit.n_bytes(model.written.device)

    def step(batch: PromptPairBatch, outs: SrcOuts) -> None:
        with train_mask_mode(model, notes=False), patch_mode(model, outs):
            set_all_masks(model, 0.5)
            tokens, kwargs = batch.model_input("clean")
            model.sliced(tokens, **kwargs).sum().backward()

    def run() -> None:
        for batch, outs in ablated_parts(model, lambda: [largest], patched_in):
            step(batch, outs)

    largest = largest_batch(batches)
    least = held if held > n_bytes else held + measured(model, run)
    if least > n_bytes:
        raise MemoryLimitError(
            f"`memory_limit` is {n_bytes:,} bytes, but a training holds the activations of "
            f"all its {len(batches)} batches, and does a step of one: {least:,} bytes. Give at "
            "least that much, or fewer or smaller batches."
        )


@contextmanager
def training_steps(
    model: PatchableModel,
    batches: Sequence[TrainingBatch],
    n_steps: int,
    after_epoch: Callable[[int], None] | None = None,
) -> Iterator[Iterator[tuple[int, TrainingBatch]]]:
    """(step, batch) for as many steps, batch after batch, each in its `patch_mode`.

    after_epoch: called with the number of steps done, outside of `patch_mode`.
    """
    steps = _training_steps(model, batches, n_steps, after_epoch)
    # Closed, so that a `break` leaves `patch_mode` at once.
    with closing(steps):
        yield steps


def _training_steps(
    model: PatchableModel,
    batches: Sequence[TrainingBatch],
    n_steps: int,
    after_epoch: Callable[[int], None] | None,
) -> Generator[tuple[int, TrainingBatch]]:
    with ExitStack() as stack:
        open_batch = None
        for step in range(n_steps):
            batch = batches[step % len(batches)]
            if batch is not open_batch:
                stack.close()
                stack.enter_context(patch_mode(model, batch.patch_src_outs))
                open_batch = batch
            yield step, batch
            if after_epoch is not None and (step + 1) % len(batches) == 0:
                stack.close()
                open_batch = None
                after_epoch(step + 1)


@checked
def swapped_logits(
    logits: Float[Tensor, "*seq_head src"], patched: PatchedEdges
) -> Float[Tensor, "*seq_head src"]:
    """Logits of being in the circuit, from a mask's; or a mask's, from those."""
    return logits * (1 if patched == "circuit" else -1)


@checked
def set_circuit_logits(
    masks: Mapping[str, Parameter], first: PruneScores, patched: PatchedEdges
) -> None:
    """Let a training begin with these logits of being in the circuit."""
    for name, logits in first.items():
        masks[name].data.copy_(swapped_logits(logits, patched))


@checked
def circuit_logits(
    masks: Mapping[str, Parameter], patched: PatchedEdges
) -> dict[str, Float[Tensor, "*_seq_head _src"]]:
    """The logits of being in the circuit."""
    return {name: swapped_logits(mask, patched) for name, mask in masks.items()}


def first_logits(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    warm_start: PruneAlgo | PruneScores | None,
    first: float,
    highest: float,
) -> PruneScores:
    """What a training's gates begin with: one logit for all, or a warm start's for each."""
    if warm_start is None:
        return model.new_prune_scores(first)
    return warm_start_logits(model, dataloader, warm_start, highest)


@checked
def warm_start_logits(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    warm_start: PruneAlgo | PruneScores,
    highest: float,
) -> dict[str, Float[Tensor, "*_seq_head _src"]]:
    """Gate logits that begin where another algorithm ended, from its ranking alone.

    They fall with the logarithm of the rank, from `highest` for the edge with the largest
    |score| to minus that for the last one. Edges with the same |score| have the same logit.

    warm_start: scores, or the algorithm that finds them, on the same prompts. Raises
        GraphError for scores of another graph.

    Source: Edge Pruning that EAP-IG warm-starts, arXiv 2510.06811. Differs from it: the
    ranks of the scores count, not their sizes.
    """
    if isinstance(warm_start, PruneAlgo):
        warm_start = warm_start.func(model, dataloader, None)
    warm_start = model.check_scores(warm_start)
    ascending = desc_prune_scores(warm_start).flip(0)
    n_edges = len(ascending)
    logits = {}
    for name, scores in warm_start.items():
        n_not_better = t.searchsorted(ascending, scores.abs().contiguous(), right=True)
        # The rank is 1 for the best edge.
        log_rank = t.log(1.0 + n_edges - n_not_better) / math.log(max(n_edges, 2))
        logits[name] = (highest * (1 - 2 * log_rank)).to(scores)
    return logits


def mask_optimizer(masks: Mapping[str, Parameter], learning_rate: float) -> t.optim.Adam:
    """Adam with a short memory.

    A gate's gradients are large while it is undecided and tiny once it is nearly shut:
    with the usual memory of 1000 steps the large ones would hold it back for good.
    """
    return t.optim.Adam(masks.values(), lr=learning_rate, betas=(0.9, 0.95))


def rate_decay(
    optimizer: t.optim.Optimizer, last_share: float, n_steps: int
) -> t.optim.lr_scheduler.LinearLR:
    """A learning rate that falls linearly to a share of itself in the last step."""
    return t.optim.lr_scheduler.LinearLR(optimizer, 1.0, last_share, n_steps)


def circuit_outputs(
    model: PatchableModel, batch: TrainingBatch
) -> Float[Tensor, "batch *pos vocab"]:
    """The outputs that count, with the masks as they are."""
    return model.sliced(batch.inputs, **batch.kwargs)


@dataclass(frozen=True, eq=False)
class Losses:
    """What a step lowers (the sum of the first two), and the expected size of its circuit."""

    faithfulness: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    n_edges: Float[Tensor, ""]


def take_step(
    step: int,
    losses: Losses,
    learning_rate: int | float,
    optimizers: Sequence[t.optim.Optimizer],
) -> TrainingStep:
    """One step down the gradient of all optimizers, and its record.

    Raises TrainingError if the loss is not a finite number.
    """
    loss = losses.faithfulness + losses.penalty
    check_finite(loss, step, learning_rate)
    parts = (loss, losses.faithfulness, losses.penalty, losses.n_edges)
    # Before the backward pass, which a GPU may still be at when the next step begins.
    record = TrainingStep(step, *(float(value.detach()) for value in parts))
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return record


def check_training(n_steps: int, learning_rate: int | float, seed: int) -> None:
    """Raise ConfigError for a training of no steps, or of steps that lead nowhere."""
    check_count("n_steps", n_steps)
    check_number("learning_rate", learning_rate, above=0)
    check_seed(seed)


def check_finite(loss: Float[Tensor, ""], step: int, learning_rate: int | float) -> None:
    """Raise TrainingError if the loss is not a finite number."""
    if math.isfinite(loss.item()):
        return
    if step == 0:
        raise TrainingError(
            f"The loss is {loss.item()} at step 0, before anything was trained. Look at "
            "the weight of the penalty, at the faithfulness target, and at the model's own "
            "outputs on these prompts: one of them is not a finite number."
        )
    raise TrainingError(
        f"The loss is {loss.item()} at step {step}: the training diverged. Lower the "
        f"learning rate (it is {learning_rate})."
    )


@checked
def scores_from_masks(
    masks: Mapping[str, Parameter], patched: PatchedEdges, learning_rate: int | float
) -> PruneScores:
    """What `scores_from_logits` makes of the masks of a training that is over."""
    return scores_from_logits(circuit_logits(masks, patched), learning_rate)


def scores_from_logits(
    logits: Mapping[str, Float[Tensor, "*_seq_head _src"]], learning_rate: float
) -> PruneScores:
    """Mask logits, shifted so that the lowest is 0: the higher, the surer an edge is in.

    Raises TrainingError if the last step has led to logits that are not finite.
    """
    if not all(bool(values.isfinite().all()) for values in logits.values()):
        raise TrainingError(
            "After the last step some gates are not finite numbers: the training "
            f"diverged. Lower the learning rate (it is {learning_rate})."
        )
    lowest = min(float(values.detach().min()) for values in logits.values())
    return {name: values.detach() - lowest for name, values in logits.items()}
