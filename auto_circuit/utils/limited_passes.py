"""To go through a loader's prompts, with all that is done with them inside a memory limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.engine.kept_sources import KeptSources, kept_alone, kept_with_sums
from auto_circuit.memory import Guard, Limit, MemoryLimit, Sizes, Taken, fitting_sizes
from auto_circuit.utils.ablation_activations import (
    PatchedIn,
    SrcOuts,
    ablated_parts,
    check_masks_are_shared,
    check_patched_in,
    iter_src_ablations,
    loaded_batches,
    to_try,
)
from auto_circuit.utils.limited_memory import (
    chunks_of,
    held_bytes,
    keeping,
    largest_batch,
    let_go,
    limit_of,
    measured,
)
from auto_circuit.utils.patchable_model import PatchableModel

Work = Callable[[PromptPairBatch, SrcOuts], object]
"""What is done with prompts, and what is patched into them."""


@dataclass(frozen=True, eq=False)
class Passes:
    """What is done with every batch; a sum over prompts, so that batches can be split.

    work: does it. Under a limit it gets some of a batch's prompts.
    try_out: takes as much memory and leaves nothing behind (masks' gradients aside); may take
        less time.
    kept: sources whose masks' gradients are taken -> the sources that such passes must keep;
        None if work needs all sources at once. Work is then done once for each chunk of
        sources, with `model.plan.kept` saying which.
    units: the sources that cannot be parted; each for itself if None.
    """

    work: Work
    try_out: Work
    kept: Callable[[range], KeptSources] | None = None
    units: Sequence[range] | None = None


@checked
def each_batch(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    patched_in: PatchedIn,
    passes: Passes,
    memory_limit: Limit = None,
) -> None:
    """Go through all prompts. Without a limit: batch by batch, with all sources.

    Raises MemoryLimitError, before anything else is done, if the smallest pieces do not fit.
    """
    limit = limit_of(model, memory_limit)
    if limit is None:
        for batch, outs in iter_src_ablations(model, dataloader, *patched_in):
            passes.work(batch, outs)
        return
    check_masks_are_shared(model)
    check_patched_in(model, dataloader, patched_in)
    if model.plan.crossings:
        # Keys and values of other tokens are made from all sources.
        passes = replace(passes, kept=None)
    sizes = _sizes(model, dataloader, patched_in, passes, limit)
    units = _units(model, passes)
    for own in chunks_of(units, sizes.n_srcs):
        # With all sources there is nothing that had to be kept apart.
        is_whole = len(own) == model.plan.n_srcs or passes.kept is None
        kept = None if is_whole or passes.kept is None else passes.kept(own)
        with keeping(model, kept, limit.checkpoint):
            _go_through(model, dataloader, patched_in, passes.work, sizes.n_prompts)


@checked
def prompts_at_once(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    patched_in: PatchedIn,
    try_out: Work,
) -> int | None:
    """How many prompts can be worked on together in the model's limit; None: it has none."""
    limit = limit_of(model, None)
    if limit is None:
        return None
    passes = Passes(try_out, try_out)
    return _sizes(model, dataloader, patched_in, passes, limit).n_prompts


def _go_through(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    patched_in: PatchedIn,
    work: Work,
    n_prompts: int,
) -> None:
    parts = ablated_parts(
        model, lambda: loaded_batches(dataloader), patched_in, n_prompts
    )
    for part, outs in parts:
        work(part, outs)
        del outs  # the next ones may be of another size
        # What would lie idle while the next part is recorded, and was not there for the first.
        let_go(model)


def _units(model: PatchableModel, passes: Passes) -> list[range]:
    n_srcs = model.plan.n_srcs
    if passes.kept is None:
        return [range(n_srcs)]
    return list(passes.units or (range(src, src + 1) for src in range(n_srcs)))


def _sizes(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    patched_in: PatchedIn,
    passes: Passes,
    limit: MemoryLimit,
) -> Sizes:
    """The largest pieces that fit, as the first prompts of the largest batch show."""
    assert model.written is not None
    batch, n_srcs = largest_batch(loaded_batches(dataloader)), model.plan.n_srcs
    fewest = max(len(unit) for unit in _units(model, passes))

    def peak(sizes: Sizes, guard: Guard | None) -> Taken | None:
        tried, kept = to_try(batch, patched_in, sizes.n_prompts), None
        if passes.kept is not None and sizes.n_srcs < n_srcs:
            chunks = chunks_of(_units(model, passes), sizes.n_srcs)
            # The first of the largest: the more destinations are after it, the more work.
            kept = max(map(passes.kept, chunks), key=lambda kept: len(kept.slots))

        def run() -> None:
            parts = ablated_parts(model, lambda: tried, patched_in, sizes.n_prompts)
            for prompts, outs in parts:
                passes.try_out(prompts, outs)
                del outs

        with keeping(model, kept, limit.checkpoint):
            return measured(model, run, guard)

    n_bytes = limit.n_bytes(model.written.device)
    most = Sizes(len(batch.clean), n_srcs)
    held = held_bytes(model, batch)
    return fitting_sizes(peak, n_bytes, Sizes(1, fewest), most, held)


def kept_at(
    model: PatchableModel, mask_values: Sequence[float]
) -> Callable[[range], KeptSources] | None:
    """What passes must keep in which all masks have one of these values.

    None if masks are not used as they are: they are read through a random function.
    """
    modules = [port.srcs for port in model.plan.src_ports]
    if any(w.mask_fn == "hard_concrete" or w.dropout_p for w in model.dest_wrappers):
        return None
    are_read_as_they_are = all(w.mask_fn is None for w in model.dest_wrappers)
    if are_read_as_they_are and not any(mask_values):
        return kept_alone
    return lambda own: kept_with_sums(own, modules)
