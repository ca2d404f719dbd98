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
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from auto_circuit.checks import check_count, check_number, check_seed, checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.errors import TrainingError
from auto_circuit.memory import Guard, Sizes, Taken, fitting_sizes
from auto_circuit.prompt_encoding import OTHER_SIDE
from auto_circuit.prune_algos.objectives import FaithfulnessTarget, faithfulness_loss
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
    check_patched_in,
    iter_src_ablations,
    loaded_batches,
    recorded_bytes,
    src_ablations,
    to_try,
)
from auto_circuit.utils.graph_utils import patch_mode
from auto_circuit.utils.limited_memory import (
    drawn_together,
    held_bytes,
    largest_batch,
    let_go,
    measured,
    part_of,
    parts_of,
)
from auto_circuit.utils.patchable_model import PatchableModel, unpatched

PatchedEdges = Literal["circuit", "others"]
"""What patched edges are: the circuit (corrupt prompts, its edges patched with clean
activations), or all others (clean prompts, the circuit's edges left alone)."""


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch, what is patched into it, and the full model's outputs on its clean side.

    parts: gives some of its prompts at a time, with what is patched into them, which then
        does not stay in memory (`patch_src_outs` is None).
    """

    batch: PromptPairBatch
    inputs: Tensor
    kwargs: dict[str, Any]
    patch_src_outs: SrcOuts | None
    clean_outputs: Float[Tensor, "batch *pos vocab"]
    parts: Callable[[], Iterator[TrainingBatch]] | None = None

    def patches(self, model: PatchableModel) -> AbstractContextManager[None]:
        """Inside, passes are patched; those of parts, in contexts of their own."""
        if self.patch_src_outs is None:
            return nullcontext()
        return patch_mode(model, self.patch_src_outs)


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
    n_at_once: int | None = None,
) -> list[TrainingBatch]:
    """A loader's (first) batches, ready to be trained on; they are held in memory.

    The input is one side of the prompts; what is patched in comes from the other side, or
    from where the ablation type says. n_at_once: it is made anew for so many prompts at a
    time, whenever they are run (`prompts_at_once`); only the outputs are held.
    """
    patched_in = _patched_in(ablation_type, input_side)
    if n_at_once is not None:
        check_patched_in(model, dataloader, patched_in)
        mean = None
        if ablation_type.mean_over_dataset:
            mean = src_ablations(model, dataloader, ablation_type)[:, :1]
        return [
            _in_parts(model, batch, patched_in, input_side, n_at_once, mean)
            for batch in islice(loaded_batches(dataloader), max_batches)
        ]
    ready = []
    all_outs = iter_src_ablations(model, dataloader, *patched_in)
    for batch, outs in islice(all_outs, max_batches):
        # The activations share memory from batch to batch; a mean is the same for all.
        own = outs.clone() if ablation_type in PER_BATCH_ABLATIONS else outs
        clean_outputs = _clean_outputs(model, batch)
        inputs, kwargs = batch.model_input(input_side)
        ready.append(TrainingBatch(batch, inputs, kwargs, own, clean_outputs))
    return ready


def _patched_in(ablation_type: AblationType, input_side: Side) -> PatchedIn:
    return ablation_type, ablation_side(ablation_type, OTHER_SIDE[input_side])


def _clean_outputs(
    model: PatchableModel, batch: PromptPairBatch
) -> Float[Tensor, "batch *pos vocab"]:
    clean, kwargs = batch.model_input("clean")
    with unpatched(model, grad=False):
        return model.sliced(clean, **kwargs).clone()


def _in_parts(
    model: PatchableModel,
    batch: PromptPairBatch,
    patched_in: PatchedIn,
    input_side: Side,
    n_at_once: int,
    mean: Float[Tensor, "src 1 _ d_model"] | None,
) -> TrainingBatch:
    outputs = [_clean_outputs(model, part) for part in parts_of(batch, n_at_once)]
    clean_outputs = t.cat(outputs)

    def parts() -> Iterator[TrainingBatch]:
        first = 0
        for part, outs in ablated_parts(
            model, lambda: [batch], patched_in, n_at_once, mean
        ):
            inputs, kwargs = part.model_input(input_side)
            of_part = clean_outputs[first : first + len(inputs)]
            yield TrainingBatch(part, inputs, kwargs, outs, of_part)
            first += len(part.clean)
            del outs
            let_go(model)

    inputs, kwargs = batch.model_input(input_side)
    return TrainingBatch(batch, inputs, kwargs, None, clean_outputs, parts)


@checked
def prompts_at_once(
    model: PatchableModel,
    loaders: Sequence[PromptDataLoader],
    ablation_type: AblationType,
    input_side: Side,
    try_out: Callable[[TrainingBatch], object],
    max_batches: int | None = None,
) -> int | None:
    """How many prompts of a batch may be run at a time in the model's limit.

    None: whole batches, with all that is patched into them held in memory. try_out: runs a
    batch once, and leaves nothing behind. Raises MemoryLimitError if not even one prompt fits.
    """
    limit, written = model.memory_limit, model.written
    if limit is None or written is None:
        return None
    patched_in = _patched_in(ablation_type, input_side)
    loaded = (islice(loaded_batches(loader), max_batches) for loader in loaders)
    batches = [batch for of_loader in loaded for batch in of_loader]
    largest = largest_batch(batches)
    outputs = _clean_outputs(model, part_of(largest, 0, 1)).nbytes
    # Masks' gradients, what an optimizer remembers of them, and what a step makes of them.
    masks = 8 * sum(mask.nbytes for mask in model.patch_masks.values())
    held = held_bytes(model, largest) + masks
    held += outputs * sum(len(batch.clean) for batch in batches)
    n_bytes, n_srcs = limit.n_bytes(written.device), model.plan.n_srcs
    found: dict[int, Taken] = {}

    def peak(sizes: Sizes, guard: Guard | None) -> Taken | None:
        n = sizes.n_prompts
        part = to_try(largest, patched_in, n)[0]

        def run() -> None:
            try_out(_in_parts(model, part, patched_in, input_side, n, None))

        taken = measured(model, run, guard)
        if taken is not None:
            found[n] = taken
        return taken

    most = Sizes(len(largest.clean), n_srcs)
    n = fitting_sizes(peak, n_bytes, Sizes(1, n_srcs), most, held).n_prompts
    if n < most.n_prompts:
        return n
    left = n_bytes - held - recorded_bytes(model, batches, patched_in)

    def run_whole() -> None:
        for batch, outs in ablated_parts(model, lambda: [largest], patched_in):
            outputs = _clean_outputs(model, batch)
            inputs, kwargs = batch.model_input(input_side)
            try_out(TrainingBatch(batch, inputs, kwargs, outs, outputs))

    whole = measured(model, run_whole, Guard(left, found[n], 1.0))
    return n if whole is None or whole.n_bytes > left else None


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
                stack.enter_context(batch.patches(model))
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


@checked
def batch_faithfulness(
    model: PatchableModel, batch: TrainingBatch, target: FaithfulnessTarget
) -> Float[Tensor, ""]:
    """How unlike the full model the circuit is on a batch; see `faithfulness_loss`.

    Of a batch in parts the gradient is in the masks already: it is that of each part, added up.
    """
    if batch.parts is None:
        outputs = circuit_outputs(model, batch)
        return faithfulness_loss(target, outputs, batch.batch, batch.clean_outputs)
    n_prompts, first, losses = len(batch.inputs), 0, []
    generator = next(iter(model.dest_wrappers)).generator
    state = None if generator is None else generator.get_state()
    for part in batch.parts():
        rows = slice(first, first + len(part.inputs))
        if generator is not None and state is not None:
            generator.set_state(state)
        with drawn_together(model, n_prompts, rows), part.patches(model):
            # A mean over the batch's prompts is that of its parts, by their sizes.
            share = len(part.inputs) / n_prompts
            loss = batch_faithfulness(model, part, target) * share
            if loss.requires_grad:
                loss.backward()
        losses.append(loss.detach())
        first = rows.stop
    return t.stack(losses).sum()


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
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        # At the end: the gradients of the next batch may come part by part, before its step.
        optimizer.zero_grad()
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
