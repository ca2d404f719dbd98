"""The activations that are patched in: those of other prompts, means, or zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, get_args

import torch as t
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import Module

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch, Side
from auto_circuit.engine.edge_matrices import PatchPlan, SrcPort
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, BatchKey
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
    """
    if ablation_type.mean_over_dataset:
        if not isinstance(sample, PromptDataLoader):
            raise ConfigError(
                f"The ablation {ablation_type} is a mean over a data set: `sample` must "
                f"be a PromptDataLoader, not a {type(sample).__name__}."
            )
        mean = _dataset_mean(model, sample, ablation_type)
        return mean.expand(-1, sample.batch_size or 1, -1, -1)
    if not isinstance(sample, Tensor):
        raise ConfigError(
            f"The ablation {ablation_type} is computed for one batch: `sample` must be a "
            f"Tensor of tokens, not a {type(sample).__name__}. For a whole loader use "
            "`batch_src_ablations`."
        )
    if attention_mask is None:
        attention_mask = model.attention_mask(sample)
    kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
    outs = record_src_outs(model, sample, kwargs)
    return _ablate_batch(model, sample, outs, ablation_type, attention_mask)


@checked
def batch_src_ablations(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    ablation_type: AblationType = AblationType.RESAMPLE,
    clean_corrupt: Side | None = None,
) -> dict[BatchKey, SrcOuts]:
    """The activations to patch in for every batch of a loader: {batch key: tensor}.

    clean_corrupt: which prompts they come from. For RESAMPLE and BATCH_* it must be
    given; the other types say it themselves (or need none), and it must be None.
    Raises ConfigError otherwise. Means over the data set are computed once.

    All batches are held in memory: for large loaders use `iter_src_ablations`.
    """
    with own_computation():
        return {
            batch.key: outs.clone() if ablation_type in PER_BATCH_ABLATIONS else outs
            for batch, outs in _iter_src_ablations(
                model, dataloader, ablation_type, clean_corrupt
            )
        }


@checked
def iter_src_ablations(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    ablation_type: AblationType,
    clean_corrupt: Side | None,
) -> Iterator[tuple[PromptPairBatch, SrcOuts]]:
    """Each batch with the activations to patch in, one at a time, for masks of all prompts.

    The activations share memory: they are good until the next batch is asked for. Raises
    ConfigError inside of `set_mask_batch_size`.
    """
    _check_masks_are_shared(model)
    yield from _iter_src_ablations(model, dataloader, ablation_type, clean_corrupt)


def _check_masks_are_shared(model: PatchableModel) -> None:
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
    ablation_type: AblationType,
    clean_corrupt: Side | None,
) -> Iterator[tuple[PromptPairBatch, SrcOuts]]:
    _check_side(ablation_type, clean_corrupt)
    check_loader(model, dataloader)
    mean = outs = None
    if ablation_type.mean_over_dataset:
        mean = _dataset_mean(model, dataloader, ablation_type)
    for batch in _batches(dataloader):
        if mean is not None:
            n_prompts = batch.clean.shape[0]
            # The engine overwrites what lies in memory as its buffer does, as the mean
            # for a single prompt may; no repeated one does.
            yield batch, (
                mean.clone() if n_prompts == 1 else mean.expand(-1, n_prompts, -1, -1)
            )
        else:
            # ZERO needs an input only for its shape.
            tokens, kwargs = batch.model_input(clean_corrupt or "clean")
            outs = record_src_outs(model, tokens, kwargs, reuse=outs)
            mask = kwargs.get("attention_mask")
            yield batch, _ablate_batch(model, tokens, outs, ablation_type, mask)


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


def _batches(dataloader: PromptDataLoader) -> Iterator[PromptPairBatch]:
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
) -> SrcOuts:
    """Ablate what the sources write on one batch; overwrites it, if positions are kept."""
    if not model.keep_positions or ablation_type == AblationType.RESAMPLE:
        return _ablate(outs, ablation_type, attention_mask)
    with own_computation(grad=False), own_defaults():
        token_embeddings = model.adapter.embed_tokens(model.wrapped_model, tokens)
        if token_embeddings is None:
            return _ablate(outs, ablation_type, attention_mask)
        # The first source is the sum of the embeddings of tokens and positions.
        positions = outs[0] - token_embeddings
        outs[0] = token_embeddings
        ablated = _ablate(outs, ablation_type, attention_mask).clone()
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
    tokens, _ = next(iter(_batches(dataloader))).model_input("clean")
    with own_computation(grad=False), own_defaults():
        return model.adapter.embed_tokens(model.wrapped_model, tokens) is not None


def _ablate(
    outs: SrcOuts, ablation_type: AblationType, attention_mask: Tensor | None
) -> SrcOuts:
    if ablation_type == AblationType.RESAMPLE:
        return outs
    with own_computation(grad=False), own_defaults():
        return _ablated(outs, ablation_type, attention_mask)


def _ablated(
    outs: SrcOuts, ablation_type: AblationType, attention_mask: Tensor | None
) -> SrcOuts:
    if ablation_type == AblationType.ZERO:
        return t.zeros_like(outs)
    dims = (1,) if ablation_type == AblationType.BATCH_TOKENWISE_MEAN else (1, 2)
    is_text = _is_text(outs, attention_mask)
    # Half precision loses too much in a sum, or overflows.
    wide = t.promote_types(outs.dtype, t.float32)
    total = (outs * is_text).sum(dims, keepdim=True, dtype=wide)
    mean = total / is_text.sum(dims, keepdim=True).clamp(min=1)
    return mean.to(outs.dtype).expand_as(outs)


def _is_text(
    outs: SrcOuts, attention_mask: Tensor | None
) -> Bool[Tensor, "1 batch seq 1"]:
    if attention_mask is None:
        return outs.new_ones((1, *outs.shape[1:3], 1), dtype=t.bool)
    return attention_mask[None, :, -outs.shape[2] :, None].bool()


def _dataset_mean(
    model: PatchableModel, dataloader: PromptDataLoader, ablation_type: AblationType
) -> Float[Tensor, "src 1 seq d_model"]:
    """The mean over a data set's prompts, at each position; padding does not count."""
    check_loader(model, dataloader)
    _check_kept_positions(model, dataloader)
    used = {
        "clean": ablation_type.clean_dataset,
        "corrupt": ablation_type.corrupt_dataset,
    }
    sides = [side for side in get_args(Side) if used[side]]
    total = count = outs = None
    with own_computation(grad=False), own_defaults():
        for batch in dataloader:
            for side in sides:
                tokens, kwargs = batch.model_input(side)
                outs = record_src_outs(model, tokens, kwargs, reuse=outs)
                is_text = _is_text(outs, kwargs.get("attention_mask"))
                # Half precision loses too much in a sum, or overflows.
                wide = t.promote_types(outs.dtype, t.float32)
                of_batch = (outs * is_text).sum(1, keepdim=True, dtype=wide)
                n_text = is_text.sum(1, keepdim=True)
                total = of_batch if total is None else total + of_batch
                count = n_text if count is None else count + n_text
        assert total is not None and count is not None and outs is not None
        return (total / count.clamp(min=1)).to(outs.dtype)
