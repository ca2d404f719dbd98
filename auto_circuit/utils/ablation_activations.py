"""The activations that are patched in: those of other prompts, means, or zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, get_args

import torch as t
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import Module

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch, Side
from auto_circuit.engine.edge_matrices import PatchPlan, SrcPort
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.memory import Guard, Limit, MemoryLimit, Sizes, Taken, fitting_sizes
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, BatchKey
from auto_circuit.utils.limited_memory import (
    largest_batch,
    limit_of,
    measured,
    part_of,
    parts_of,
)
from auto_circuit.utils.patchable_model import (
    LAST_POSITION,
    PatchableModel,
    last_position_only,
    unpatched,
)
from auto_circuit.utils.torch_state import own_computation, own_defaults

SrcOuts = Float[Tensor, "src batch seq d_model"]

PER_BATCH_ABLATIONS = (
    AblationType.RESAMPLE,
    AblationType.BATCH_TOKENWISE_MEAN,
    AblationType.BATCH_ALL_TOK_MEAN,
)
"""The ablations whose activations come from one side of each batch."""

BATCH_MEANS = {
    AblationType.BATCH_TOKENWISE_MEAN: (1,),
    AblationType.BATCH_ALL_TOK_MEAN: (1, 2),
}
"""Those that are means over a batch -> the dimensions of [src batch seq d_model] of the mean."""

PatchedIn = tuple[AblationType, Side | None]
"""What is patched in, and the prompts that it comes from (None if the type says it)."""


@checked
def ablation_side(ablation_type: AblationType, clean_corrupt: Side | None) -> Side | None:
    """The prompts that what is patched in comes from; None if the type says it itself."""
    return clean_corrupt if ablation_type in PER_BATCH_ABLATIONS else None


@checked
def check_loader(model: PatchableModel, dataloader: PromptDataLoader) -> None:
    """Raise DataError unless the loader has prompts, and their prefix is the model's."""
    dataloader.check_complete()
    if dataloader.n_prompts == 0:
        raise DataError(
            "The dataloader has no prompts. Load it with a `train_test_size` above 0."
        )
    _check_padding_is_not_read(model, dataloader)
    prefix = dataloader.kv_cache
    if prefix is None:
        if model.kv_caches is not None:
            raise DataError(
                "The model puts a prefix before every input (`kv_caches`), but these "
                "prompts were not cut: they were loaded without `tail_divergence`."
            )
    elif model.kv_caches is None or not t.equal(model.kv_caches.tokens, prefix.tokens):
        raise DataError(
            f"The first {prefix.seq_len} tokens of these prompts were cut off into a "
            "prefix cache (`tail_divergence=True`), which the model does not have. Make "
            "the model with `patchable_model(..., kv_caches=(train_loader.kv_cache, "
            "test_loader.kv_cache))`."
        )


def _check_padding_is_not_read(
    model: PatchableModel, dataloader: PromptDataLoader
) -> None:
    masks = getattr(dataloader.dataset, "clean_attention_masks", None)
    if (
        masks is None
        or model.out_slice == LAST_POSITION
        or bool(t.as_tensor(masks).all())
    ):
        return
    raise DataError(
        "The prompts are padded, and the output at every position counts: padding would "
        "count too. Make the model with `slice_output='last_seq'`, or give prompts of one "
        "length (`pad=False`)."
    )


@checked
def src_ablations(
    model: PatchableModel,
    sample: Shaped[Tensor, "batch *seq"] | PromptDataLoader,
    ablation_type: AblationType = AblationType.RESAMPLE,
    attention_mask: Shaped[Tensor, "batch *_"] | None = None,
    memory_limit: Limit = None,
) -> SrcOuts:
    """What every source writes, under an ablation: [src batch seq d_model].

    sample: the prompts. For the means over a data set a PromptDataLoader; else the
        tokens of one batch (with their `attention_mask`, if padded).
    RESAMPLE gives the activations on the batch; ZERO zeros; BATCH_* the mean over the
    batch (and over positions), repeated; TOKENWISE_MEAN_* the mean over the data set's
    prompts, repeated to the loader's batch size (a view: nothing is copied), in `patch_mode`
    to the size of each batch. Padding
    does not count in means. Position embeddings are ablated with the first source, unless
    the model was made with `keep_positions=True`. Raises ConfigError if `sample` does not
    fit the type.

    memory_limit: the most that this may take, the activations themselves included: bytes,
        or a share of what is free (see `MemoryLimit`). Prompts are recorded a few at a time;
        raises MemoryLimitError if the activations and a pass over one prompt take more.
    """
    limit = limit_of(model, memory_limit)
    if ablation_type.mean_over_dataset:
        if not isinstance(sample, PromptDataLoader):
            raise ConfigError(
                f"The ablation {ablation_type} is a mean over a data set: `sample` must "
                f"be a PromptDataLoader, not a {type(sample).__name__}."
            )
        _check_mean(model, sample)
        n_at_once = _recorded_at_once(model, sample, (ablation_type, None), limit)
        mean = _dataset_mean(model, loaded_batches(sample), ablation_type, n_at_once)
        return mean.expand(-1, sample.batch_size or 1, -1, -1)
    if not isinstance(sample, Tensor):
        raise ConfigError(
            f"The ablation {ablation_type} is computed for one batch: `sample` must be a "
            f"Tensor of tokens, not a {type(sample).__name__}. For a whole loader use "
            "`batch_src_ablations`."
        )
    if attention_mask is None:
        attention_mask = model.attention_mask(sample)
    if limit is not None:
        batch = _batch_of(sample, attention_mask)
        n_at_once = _recorded_at_once(model, [batch], (ablation_type, "clean"), limit)
        return _whole_batch(model, batch, (ablation_type, "clean"), n_at_once)
    kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
    outs = record_src_outs(model, sample, kwargs)
    return _ablate_batch(model, sample, outs, ablation_type, attention_mask)


@checked
def batch_src_ablations(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    ablation_type: AblationType = AblationType.RESAMPLE,
    clean_corrupt: Side | None = None,
    memory_limit: Limit = None,
) -> dict[BatchKey, SrcOuts]:
    """The activations to patch in for every batch of a loader: {batch key: tensor}.

    clean_corrupt: which prompts they come from. For RESAMPLE and BATCH_* it must be
    given; the other types say it themselves (or need none), and it must be None.
    Raises ConfigError otherwise. Means over the data set are computed once.

    All batches are held in memory: for large loaders use `iter_src_ablations`.

    memory_limit: see `src_ablations`.
    """
    limit = limit_of(model, memory_limit)
    with own_computation():
        return {
            batch.key: outs.clone() if ablation_type in PER_BATCH_ABLATIONS else outs
            for batch, outs in _iter_src_ablations(
                model, dataloader, (ablation_type, clean_corrupt), limit, holds_all=True
            )
        }


@checked
def iter_src_ablations(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    ablation_type: AblationType,
    clean_corrupt: Side | None,
    memory_limit: Limit = None,
) -> Iterator[tuple[PromptPairBatch, SrcOuts]]:
    """Each batch with the activations to patch in, one at a time, for masks of all prompts.

    The activations share memory: they are good until the next batch is asked for. Raises
    ConfigError inside of `set_mask_batch_size`.

    memory_limit: see `src_ablations`. What you do with a batch is not in it; algorithms and
        `run_circuits`, which have a limit for all that they do, split the batches themselves.
    """
    limit = limit_of(model, memory_limit)
    check_masks_are_shared(model)
    patched_in = (ablation_type, clean_corrupt)
    yield from _iter_src_ablations(model, dataloader, patched_in, limit)


def check_masks_are_shared(model: PatchableModel) -> None:
    """Raise ConfigError if each example has masks of its own."""
    n_examples = next(iter(model.dest_wrappers)).mask_batch_size
    if n_examples is not None:
        raise ConfigError(
            f"Each of {n_examples} examples has masks of its own, but this goes through all "
            "batches of a dataloader with one mask per edge. Leave `set_mask_batch_size` "
            "first; for scores of every prompt there is `mask_gradient_prompt_scores`."
        )


def _iter_src_ablations(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    patched_in: PatchedIn,
    limit: MemoryLimit | None,
    holds_all: bool = False,
) -> Iterator[tuple[PromptPairBatch, SrcOuts]]:
    """Whole batches. holds_all: are the activations of all of them kept?"""
    check_patched_in(model, dataloader, patched_in)
    if limit is None:
        yield from ablated_parts(model, lambda: loaded_batches(dataloader), patched_in)
        return
    n_at_once = _recorded_at_once(model, dataloader, patched_in, limit, holds_all)
    mean = None
    if patched_in[0].mean_over_dataset:
        mean = _dataset_mean(model, loaded_batches(dataloader), patched_in[0], n_at_once)
    for batch in loaded_batches(dataloader):
        if mean is not None:
            yield batch, _repeated(mean, *batch.clean.shape[:2])
        else:
            yield batch, _whole_batch(model, batch, patched_in, n_at_once)


@checked
def check_patched_in(
    model: PatchableModel, dataloader: PromptDataLoader, patched_in: PatchedIn
) -> None:
    """Raise unless these prompts can be ablated so."""
    ablation_type, clean_corrupt = patched_in
    _check_side(ablation_type, clean_corrupt)
    check_loader(model, dataloader)
    if ablation_type.mean_over_dataset:
        _check_kept_positions(model, dataloader)


@checked
def ablated_parts(
    model: PatchableModel,
    batches: Callable[[], Iterable[PromptPairBatch]],
    patched_in: PatchedIn,
    n_at_once: int | None = None,
    mean: Float[Tensor, "src 1 _ d_model"] | None = None,
) -> Iterator[tuple[PromptPairBatch, SrcOuts]]:
    """Each batch, so many prompts at a time, with what is patched into them.

    batches: gives all batches, whenever it is called. mean: that of a data set, if it is
    known. The activations share memory.
    """
    ablation_type, side = patched_in
    outs = None
    if ablation_type.mean_over_dataset and mean is None:
        mean = _dataset_mean(model, batches(), ablation_type, n_at_once)
    for batch in batches():
        if ablation_type in BATCH_MEANS and n_at_once is not None:
            mean = _batch_mean(model, batch, patched_in, n_at_once)
        for part in parts_of(batch, n_at_once):
            tokens, kwargs = part.model_input(side or "clean")
            has_positions = ablation_type in BATCH_MEANS and model.keep_positions
            if mean is not None and not has_positions:
                yield part, _repeated(mean, *tokens.shape[:2])
                continue
            if outs is not None and outs.shape[1:3] != tokens.shape[:2]:
                outs = None  # gone before there is another one
            # ZERO needs an input only for its shape.
            outs = record_src_outs(model, tokens, kwargs, reuse=outs)
            mask = kwargs.get("attention_mask")
            yield part, _ablate_batch(model, tokens, outs, ablation_type, mask, mean)


@checked
def to_try(
    batch: PromptPairBatch, patched_in: PatchedIn, n_at_once: int
) -> list[PromptPairBatch]:
    """Prompts that show what so many at a time take: two parts where a mean is added up."""
    if patched_in[0].mean_over_dataset:
        return [part_of(batch, 0, n_at_once)] * 2
    n_prompts = 2 * n_at_once if patched_in[0] in BATCH_MEANS else n_at_once
    return [part_of(batch, 0, n_prompts)]


def _repeated(
    mean: Float[Tensor, "src 1 _ d_model"], n_prompts: int, seq: int
) -> SrcOuts:
    """A mean for each prompt; one of all positions, for each of them too."""
    if mean.shape[2] == 1:
        mean = mean.expand(-1, -1, seq, -1)
    # The engine overwrites what lies in memory as its buffer does, as the mean for a
    # single prompt may; no repeated one does.
    return mean.clone() if n_prompts == 1 else mean.expand(-1, n_prompts, -1, -1)


def _batch_of(tokens: Tensor, attention_mask: Tensor | None) -> PromptPairBatch:
    """Prompts without answers."""
    answers = t.zeros((len(tokens), 1), dtype=t.long, device=tokens.device)
    return PromptPairBatch(
        key=0,
        batch_diverge_idx=0,
        clean=tokens,
        corrupt=tokens,
        answers=answers,
        wrong_answers=answers,
        clean_attention_mask=attention_mask,
    )


def _whole_batch(
    model: PatchableModel,
    batch: PromptPairBatch,
    patched_in: PatchedIn,
    n_at_once: int | None,
) -> SrcOuts:
    """What is patched into a batch, recorded a few prompts at a time."""
    if patched_in[0] in BATCH_MEANS and not model.keep_positions:
        mean = _batch_mean(model, batch, patched_in, n_at_once)
        return mean.expand(-1, len(batch.clean), *batch.clean.shape[1:2], -1)
    whole, first = None, 0
    for part, outs in ablated_parts(model, lambda: [batch], patched_in, n_at_once):
        by_token = outs.movedim(0, 2)
        if whole is None:
            shape = (len(batch.clean), *by_token.shape[1:])
            whole = model.pass_buffers.new(by_token, shape)
        whole[first : first + len(part.clean)] = by_token
        first += len(part.clean)
    assert whole is not None
    return whole.movedim(2, 0)


@checked
def recorded_bytes(
    model: PatchableModel, batches: Iterable[PromptPairBatch], patched_in: PatchedIn
) -> int:
    """What the activations take that are patched into these batches; a mean takes nothing."""
    ablation_type = patched_in[0]
    has_positions = ablation_type in BATCH_MEANS and model.keep_positions
    is_mean = ablation_type.mean_over_dataset or ablation_type in BATCH_MEANS
    if (is_mean and not has_positions) or model.written is None:
        return 0
    n_tokens = sum(math.prod(batch.clean.shape[:2]) for batch in batches)
    written = model.written
    return n_tokens * model.plan.n_slots * len(written) * written.element_size()


def _recorded_at_once(
    model: PatchableModel,
    batches: Collection[PromptPairBatch] | PromptDataLoader,
    patched_in: PatchedIn,
    limit: MemoryLimit | None,
    holds_all: bool = False,
) -> int | None:
    """How many prompts are recorded at a time, so that all that is held fits in a limit."""
    if limit is None:
        return None
    written = model.written
    assert written is not None
    batch = largest_batch(batches)
    held = recorded_bytes(model, batches if holds_all else [batch], patched_in)

    def peak(sizes: Sizes, guard: Guard | None) -> Taken | None:
        tried = to_try(batch, patched_in, sizes.n_prompts)
        parts = ablated_parts(model, lambda: tried, patched_in, sizes.n_prompts)
        return measured(model, lambda: [None for _ in parts], guard)

    n_srcs, n_prompts = model.plan.n_srcs, len(batch.clean)
    n_bytes = limit.n_bytes(written.device)
    least, most = Sizes(1, n_srcs), Sizes(n_prompts, n_srcs)
    return fitting_sizes(peak, n_bytes, least, most, held).n_prompts


def _check_side(ablation_type: AblationType, clean_corrupt: Side | None) -> None:
    needs_side = ablation_type in PER_BATCH_ABLATIONS
    if needs_side and clean_corrupt not in ("clean", "corrupt"):
        raise ConfigError(
            f"The ablation {ablation_type} needs `clean_corrupt`: 'clean' or 'corrupt', "
            f"the prompts that the activations come from; got {clean_corrupt!r}."
        )
    if not needs_side and clean_corrupt is not None:
        raise ConfigError(
            f"The ablation {ablation_type} does not depend on `clean_corrupt`; leave it "
            f"None (got {clean_corrupt!r})."
        )


@contextmanager
def _recorded(
    model: PatchableModel, record: Callable[[slice, Tensor], None]
) -> Iterator[None]:
    """Inside, `record` sees the outputs of sources that are seen together."""
    with ExitStack() as stack:
        stack.enter_context(
            model.adapter.open_sites(model.wrapped_model, model.separate_qkv)
        )
        for port in model.plan.src_ports:
            handle = port.site.module.register_forward_hook(
                partial(_record_port, record, model.plan, port)
            )
            stack.callback(handle.remove)
        yield


def _record_port(
    record: Callable[[slice, Tensor], None],
    plan: PatchPlan,
    port: SrcPort,
    module: Module,
    args: Any,
    out: Tensor,
) -> None:
    slots = plan.slots_of(port.srcs)
    if slots.start < slots.stop:
        record(slots, plan.written(port, out))


@checked
def record_src_outs(
    model: PatchableModel,
    inputs: Shaped[Tensor, "batch *seq"],
    kwargs: dict[str, Shaped[Tensor, "..."]],
    reuse: Float[Tensor, "src _ _ d_model"] | None = None,
) -> SrcOuts:
    """Run the model and keep what every source writes.

    reuse: activations of an earlier call, whose memory may be taken if it fits.
    """
    recorder = _Recorder(model, reuse)
    with (
        unpatched(model, grad=False),
        _recorded(model, recorder.record),
        last_position_only(model),
    ):
        model(inputs, **kwargs)
    assert recorder.buffer is not None
    return recorder.buffer.movedim(2, 0)


class _Recorder:
    """One tensor for what all sources write, made for the first one that does."""

    def __init__(
        self, model: PatchableModel, reuse: Float[Tensor, "src _ _ d_model"] | None
    ) -> None:
        self.model = model
        # Tokens outermost in memory: the layout in which the engine reads it fastest.
        self.buffer = None if reuse is None else reuse.movedim(0, 2)

    def record(self, srcs: slice, heads: Float[Tensor, "batch seq src d_model"]) -> None:
        batch, seq, _, d_model = heads.shape
        shape = (batch, seq, self.model.plan.n_slots, d_model)
        if self.buffer is None or self.buffer.shape != shape:
            self.buffer = self.model.pass_buffers.new(heads, shape)
        self.buffer[:, :, srcs] = heads


def loaded_batches(dataloader: PromptDataLoader) -> Iterator[PromptPairBatch]:
    """The loader's batches, in tensors of the kind that our passes make."""
    with own_computation(), own_defaults():
        batches = iter(dataloader)
    while True:
        with own_computation(), own_defaults():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _ablate_batch(
    model: PatchableModel,
    tokens: Tensor,
    outs: SrcOuts,
    ablation_type: AblationType,
    attention_mask: Tensor | None,
    mean: Float[Tensor, "src 1 _ d_model"] | None = None,
) -> SrcOuts:
    """Ablate what the sources write on one batch; overwrites it, if positions are kept.

    mean: the batch's, if these are some of its prompts.
    """
    kept = model.plan.kept
    has_start = kept is None or kept.slots[0].start == 0
    is_kept = model.keep_positions and ablation_type != AblationType.RESAMPLE
    if not is_kept or not has_start:
        return _ablate(outs, ablation_type, attention_mask, mean)
    with own_computation(grad=False), own_defaults():
        token_embeddings = model.adapter.embed_tokens(model.wrapped_model, tokens)
        if token_embeddings is None:
            return _ablate(outs, ablation_type, attention_mask, mean)
        # The first source is the sum of the embeddings of tokens and positions.
        positions = outs[0] - token_embeddings
        outs[0] = token_embeddings
        ablated = _ablate(outs, ablation_type, attention_mask, mean).clone()
        ablated[0] += positions
    return ablated


def _check_kept_positions(model: PatchableModel, dataloader: PromptDataLoader) -> None:
    """Means at each position keep position embeddings, unless padding shifts these."""
    is_padded = getattr(dataloader.dataset, "clean_attention_masks", None) is not None
    if model.keep_positions and is_padded and _has_positions(model, dataloader):
        raise ConfigError(
            "The mean over a data set of padded prompts mixes the embeddings of different "
            "positions, and the model was made with `keep_positions=True`. Use prompts of "
            "one length, AblationType.ZERO or a mean over the batch, or "
            "`keep_positions=False`."
        )


def _has_positions(model: PatchableModel, dataloader: PromptDataLoader) -> bool:
    tokens, _ = next(iter(loaded_batches(dataloader))).model_input("clean")
    with own_computation(grad=False), own_defaults():
        return model.adapter.embed_tokens(model.wrapped_model, tokens) is not None


def _ablate(
    outs: SrcOuts,
    ablation_type: AblationType,
    attention_mask: Tensor | None,
    mean: Float[Tensor, "src 1 _ d_model"] | None = None,
) -> SrcOuts:
    if ablation_type == AblationType.RESAMPLE:
        return outs
    if mean is not None:
        return mean.expand_as(outs)
    with own_computation(grad=False), own_defaults():
        return _ablated(outs, ablation_type, attention_mask)


def _ablated(
    outs: SrcOuts, ablation_type: AblationType, attention_mask: Tensor | None
) -> SrcOuts:
    if ablation_type == AblationType.ZERO:
        return t.zeros_like(outs)
    total, count = _sum_of_text(outs, attention_mask, BATCH_MEANS[ablation_type])
    return (total / count.clamp(min=1)).to(outs.dtype).expand_as(outs)


def _sum_of_text(
    outs: SrcOuts, attention_mask: Tensor | None, dims: tuple[int, ...]
) -> tuple[Float[Tensor, "src _ _ d_model"], Int[Tensor, "1 _ _ 1"]]:
    """(The sum over prompts and maybe positions, of how many) Padding does not count."""
    is_text = _is_text(outs, attention_mask)
    # Half precision loses too much in a sum, or overflows.
    wide = t.promote_types(outs.dtype, t.float32)
    text = outs if attention_mask is None else outs * is_text
    total = text.sum(dims, keepdim=True, dtype=wide)
    return total, is_text.sum(dims, keepdim=True)


def _is_text(
    outs: SrcOuts, attention_mask: Tensor | None
) -> Bool[Tensor, "1 batch seq 1"]:
    if attention_mask is None:
        return outs.new_ones((1, *outs.shape[1:3], 1), dtype=t.bool)
    return attention_mask[None, :, -outs.shape[2] :, None].bool()


def _check_mean(model: PatchableModel, dataloader: PromptDataLoader) -> None:
    check_loader(model, dataloader)
    _check_kept_positions(model, dataloader)


def _dataset_mean(
    model: PatchableModel,
    batches: Iterable[PromptPairBatch],
    ablation_type: AblationType,
    n_at_once: int | None = None,
) -> Float[Tensor, "src 1 seq d_model"]:
    """The mean over a data set's prompts, at each position; padding does not count."""
    used = {
        "clean": ablation_type.clean_dataset,
        "corrupt": ablation_type.corrupt_dataset,
    }
    sides = [side for side in get_args(Side) if used[side]]
    inputs = (
        part.model_input(side)
        for batch in batches
        for part in parts_of(batch, n_at_once)
        for side in sides
    )
    return _mean_written(model, inputs, (1,))


def _batch_mean(
    model: PatchableModel,
    batch: PromptPairBatch,
    patched_in: PatchedIn,
    n_at_once: int | None,
) -> Float[Tensor, "src 1 _ d_model"]:
    """The mean over a batch; if positions are kept, of the first source's token embeddings."""
    ablation_type, side = patched_in
    assert side is not None
    inputs = (part.model_input(side) for part in parts_of(batch, n_at_once))
    return _mean_written(model, inputs, BATCH_MEANS[ablation_type], model.keep_positions)


def _mean_written(
    model: PatchableModel,
    inputs: Iterable[tuple[Tensor, dict[str, Tensor]]],
    dims: tuple[int, ...],
    of_tokens: bool = False,
) -> Float[Tensor, "src 1 _ d_model"]:
    """The mean of what sources write; of_tokens: of the first one, without positions."""
    total = count = outs = None
    with own_computation(grad=False), own_defaults():
        for tokens, kwargs in inputs:
            if outs is not None and outs.shape[1:3] != tokens.shape[:2]:
                outs = None  # gone before there is another one
            outs = record_src_outs(model, tokens, kwargs, reuse=outs)
            if of_tokens:
                embedded = model.adapter.embed_tokens(model.wrapped_model, tokens)
                if embedded is not None:
                    outs[0] = embedded
            mask = kwargs.get("attention_mask")
            of_part, n_text = _sum_of_text(outs, mask, dims)
            total = of_part if total is None else total + of_part
            count = n_text if count is None else count + n_text
        assert total is not None and count is not None and outs is not None
        return (total / count.clamp(min=1)).to(outs.dtype)
