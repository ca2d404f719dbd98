"""A model's work in pieces: prompts of a batch, and sources, that are worked on together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, zeros, zeros_like
from torch.utils._pytree import tree_leaves

from auto_circuit.checks import checked
from auto_circuit.data import Answers, PromptPairBatch
from auto_circuit.engine.kept_sources import KeptSources
from auto_circuit.errors import ConfigError
from auto_circuit.memory import (
    Guard,
    Limit,
    MemoryLimit,
    OverLimit,
    PeakMemory,
    Taken,
    as_limit,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import own_computation


@checked
def limit_of(model: PatchableModel, memory_limit: Limit) -> MemoryLimit | None:
    """The limit that was given, or else the one that the model has (`memory_limited`)."""
    return as_limit(memory_limit) or model.memory_limit


@checked
@contextmanager
def memory_limited(model: PatchableModel, memory_limit: Limit) -> Iterator[None]:
    """Inside, all that records activations of the model keeps to a limit.

    Unless it is given one of its own. See `MemoryLimit`; None leaves things as they are.
    """
    before = model.memory_limit
    model.memory_limit = as_limit(memory_limit) or before
    try:
        yield
    finally:
        model.memory_limit = before


@contextmanager
def keeping(
    model: PatchableModel, kept: KeptSources | None, recomputes: bool
) -> Iterator[None]:
    """Inside, passes record these sources only, and keep blocks' inputs only.

    What is patched in has what `kept` says, slot by slot.
    """
    before = model.plan
    if recomputes and not before.blocks:
        raise ConfigError(
            f"`checkpoint=True` runs blocks again, and the adapter {model.adapter.name!r} "
            "names none. Leave it out, or give the adapter `blocks`."
        )
    if recomputes and before.crossings:
        raise ConfigError(
            "`checkpoint=True` does not go with crossing edges, whose keys and values of "
            "other tokens would be made again. Leave it out; `memory_limit` alone does."
        )
    model.plan = replace(before, kept=kept, recomputes=recomputes)
    try:
        yield
    finally:
        model.plan = before


def largest_batch(batches: Iterable[PromptPairBatch]) -> PromptPairBatch:
    """The batch with the longest prompts, and of these the one with most of them."""
    return max(batches, key=lambda batch: (batch.clean.shape[1], len(batch.clean)))


def part_of(batch: PromptPairBatch, first: int, stop: int) -> PromptPairBatch:
    """Some of a batch's prompts; its key is the batch's."""

    def picked(answers: Answers) -> Answers:
        return answers[first:stop]

    masks = (batch.clean_attention_mask, batch.corrupt_attention_mask)
    clean_mask, corrupt_mask = (m if m is None else m[first:stop] for m in masks)
    return replace(
        batch,
        clean=batch.clean[first:stop],
        corrupt=batch.corrupt[first:stop],
        answers=picked(batch.answers),
        wrong_answers=picked(batch.wrong_answers),
        clean_attention_mask=clean_mask,
        corrupt_attention_mask=corrupt_mask,
    )


def parts_of(batch: PromptPairBatch, n_at_once: int | None) -> Iterator[PromptPairBatch]:
    """The batch, so many prompts at a time; as it is if None."""
    n_prompts = len(batch.clean)
    if n_at_once is None or n_at_once >= n_prompts:
        yield batch
        return
    for first in range(0, n_prompts, n_at_once):
        yield part_of(batch, first, first + n_at_once)


def let_go(model: PatchableModel) -> None:
    """Free what earlier passes left in the model."""
    model.free_buffers()
    for module in model.wrapped_model.modules():
        # The attention pattern of the last pass, and with it the graph of that.
        if vars(module).get("_pattern") is not None:
            setattr(module, "_pattern", None)  # noqa: B010


def measured(
    model: PatchableModel, run: Callable[[], object], guard: Guard | None = None
) -> Taken | None:
    """What a piece of work takes, beside what was there; None if the guard stops it.

    No gradient stays.
    """
    let_go(model)
    peak, older, is_stopped = PeakMemory(guard), _some_graph(), False
    try:
        with peak:
            for mask in model.patch_masks.values():
                if mask.requires_grad:
                    mask.grad = zeros_like(mask)  # as it will be after the first piece
            run()
    except OverLimit:
        is_stopped = True
    finally:
        for mask in model.patch_masks.values():
            mask.grad = None
        let_go(model)
    if not is_stopped:
        return peak.taken
    _let_go_of_graphs(model, older)
    return None


def _some_graph() -> Float[Tensor, ""]:
    with own_computation(grad=True):
        return zeros((), requires_grad=True) * 1


def _let_go_of_graphs(model: PatchableModel, older: Float[Tensor, ""]) -> None:
    """Free what a pass that was not finished has saved for its backward pass.

    older: the end of a graph that was made before.
    """
    let_go(model)
    # What a backward pass had still to do when it was stopped lies in torch's queue, the
    # newest first: another one throws it out on the way to what is older.
    older.backward()
    gc.collect()


def held_bytes(model: PatchableModel, batch: PromptPairBatch) -> int:
    """What is there besides such work: prompts, the masks as they were, the scores so far."""
    masks = sum(mask.nbytes for mask in model.patch_masks.values())
    # The last batch is there until the next one is.
    prompts = [leaf for leaf in tree_leaves(vars(batch)) if isinstance(leaf, Tensor)]
    return 2 * masks + 2 * sum(tensor.nbytes for tensor in prompts)


@contextmanager
def drawn_together(model: PatchableModel, n_prompts: int, rows: slice) -> Iterator[None]:
    """Inside, a pass has some of so many prompts, whose gates are drawn together."""
    wrappers = list(model.dest_wrappers)
    try:
        for wrapper in wrappers:
            wrapper.drawn = n_prompts, rows
        yield
    finally:
        for wrapper in wrappers:
            wrapper.drawn = None


def chunks_of(units: list[range], n_srcs: int) -> list[range]:
    """Sources that are taken together: as many whole units as fit in `n_srcs`, at least one."""
    # Units 0..1, 1..5, 5..6 (a module's heads), at most 5 sources: 0..5 and 5..6.
    chunks: list[range] = []
    for unit in units:
        if chunks and unit.stop - chunks[-1].start <= n_srcs:
            chunks[-1] = range(chunks[-1].start, unit.stop)
        else:
            chunks.append(unit)
    return chunks
