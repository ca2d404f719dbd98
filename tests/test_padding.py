"""Positions are read by the attention mask: the same numbers on whichever side one pads."""

from __future__ import annotations

from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import DataError, GraphError
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import sae_model
from auto_circuit.padding import check_attention_mask, padding_mask
from auto_circuit.prune import run_circuits
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.texts import bpe_tokenizer, text_model, word_tokenizer

EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
SHORT, LONG = [1, 4, 9], [1, 5, 9, 6, 12, 7]
PAD = 0


def padded(side: str, rows: tuple[list[int], ...] = (SHORT, LONG)) -> Tensor:
    width = max(map(len, rows))
    fills = [[PAD] * (width - len(row)) for row in rows]
    pairs = zip(rows, fills, strict=True)
    return t.tensor([fill + row if side == "left" else row + fill for row, fill in pairs])


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return patchable_model(text_model(word_tokenizer()), True, "last_seq", None, True)


def last_logits(model: PatchableModel) -> Tensor:
    """Each prompt on its own, by the bare model."""
    return t.cat([model.wrapped_model(t.tensor([row]))[:, -1] for row in (SHORT, LONG)])


def test_left_padding_gives_the_numbers_of_single_prompts(model: PatchableModel) -> None:
    tokens = padded("left")
    t.testing.assert_close(model(tokens)[model.out_slice], last_logits(model), **EXACT)
    t.testing.assert_close(model.sliced(tokens), last_logits(model), **EXACT)
    mask = (tokens != PAD).long()
    given = model.sliced(tokens, attention_mask=mask.bool())
    t.testing.assert_close(given, last_logits(model), **EXACT)


def test_right_padding_is_refused_where_the_last_position_counts(
    model: PatchableModel,
) -> None:
    tokens = padded("right")
    for kwargs in ({}, {"attention_mask": (tokens != PAD).long()}):
        for call in (model, model.sliced, model.run_with_cache):
            with pytest.raises(DataError, match="1 of 2 prompts end with padding"):
                call(tokens, **kwargs)
    with pytest.raises(DataError, match="end with padding"):
        src_ablations(model, tokens)


def test_right_padding_where_all_positions_count() -> None:
    whole = patchable_model(text_model(word_tokenizer()), True, None, None, True)
    outputs = whole(padded("right"))
    expected = whole.wrapped_model(t.tensor([SHORT]))[0]
    t.testing.assert_close(outputs[0, : len(SHORT)], expected, **EXACT)
    left = whole(padded("left"))[0, -len(SHORT) :]
    t.testing.assert_close(left, expected, **EXACT)
    for ablation in (AblationType.BATCH_ALL_TOK_MEAN,):
        means = [
            src_ablations(whole, padded(side), ablation) for side in ("left", "right")
        ]
        t.testing.assert_close(means[0], means[1], **EXACT)


def test_texts_of_several_lengths(model: PatchableModel) -> None:
    tokenizer: Any = model.wrapped_model.tokenizer
    texts = [tokenizer.decode(row) for row in (SHORT, LONG)]
    outs = model(texts)[model.out_slice]
    t.testing.assert_close(outs, last_logits(model), **EXACT)
    with pytest.raises(DataError, match="`padding_side` is 'right'"):
        model(texts, padding_side="right")


def test_masks_with_holes(model: PatchableModel) -> None:
    """A hole is as if its token were not there."""
    holey = t.tensor([[1, 4, PAD, 9]])
    mask = t.tensor([[1, 1, 0, 1]])
    outs = model.sliced(holey, attention_mask=mask)
    t.testing.assert_close(outs, last_logits(model)[:1], **EXACT)
    means = src_ablations(model, holey, AblationType.BATCH_ALL_TOK_MEAN, mask)
    alone = src_ablations(model, t.tensor([SHORT]), AblationType.BATCH_ALL_TOK_MEAN)
    t.testing.assert_close(means[:, :, :1], alone[:, :, :1], **EXACT)
    with pytest.raises(DataError, match=r"mask has shape \(1, 3\).*\(1, 4\)"):
        model(holey, attention_mask=mask[:, :3])


def test_means_do_not_count_padding_that_only_the_tokenizer_knows(
    model: PatchableModel,
) -> None:
    tokens = padded("left")
    mask = (tokens != PAD).long()
    for ablation in (AblationType.BATCH_TOKENWISE_MEAN, AblationType.BATCH_ALL_TOK_MEAN):
        given = src_ablations(model, tokens, ablation, mask)
        t.testing.assert_close(src_ablations(model, tokens, ablation), given, **EXACT)


def test_padding_that_cannot_be_told_from_text() -> None:
    tokenizer = bpe_tokenizer()
    end = tokenizer.pad_token_id
    rows = {
        "several at the start": [[end, end, 5], [end, 4, 5]],
        "one at some starts": [[end, 5], [4, 5]],
        "several at the end": [[5, end, end]],
        "one at some ends": [[4, 5, end], [4, 5, 6]],
    }
    for wrong in rows.values():
        with pytest.raises(GraphError, match="padding cannot be told from text"):
            padding_mask(t.tensor(wrong), tokenizer)
    for right in ([[end, 4, 5], [end, 6, 5]], [[4, 5, end]], [[4, end, 5]]):
        assert padding_mask(t.tensor(right), tokenizer) is None


def test_only_what_is_at_the_ends_is_padding() -> None:
    tokenizer = word_tokenizer()
    rows = {
        (PAD, 4, PAD, 5): (0, 1, 1, 1),
        (4, PAD, 5, PAD): (1, 1, 1, 0),
        (PAD, PAD, 4, PAD): (0, 0, 1, 0),
    }
    for row, expected in rows.items():
        mask = padding_mask(t.tensor([row]), tokenizer)
        assert mask is not None and mask.tolist() == [list(expected)]
    assert padding_mask(t.tensor([[4, PAD, 5]]), tokenizer) is None


def test_a_mask_may_cover_what_is_cached() -> None:
    for width in (3, 5):
        check_attention_mask(t.ones(2, width), (2, 3), n_cached=2)
    for shape in ((2, 4), (1, 3), (3,), (2, 3, 1)):
        with pytest.raises(DataError, match=r"positions\] = \(2, 3\)"):
            check_attention_mask(t.ones(shape), (2, 3), n_cached=2)


@pytest.mark.parametrize("has_masks", [True, False])
def test_latents_are_ranked_by_text_alone(has_masks: bool) -> None:
    bridge = text_model(word_tokenizer())
    saes = sae_model(bridge, "resid_delta_mlp", load_pretrained=False, n_latents=12)
    one = [t.tensor([1])] * 2

    def kept(rows: Any, masks: Tensor | None, batch_size: int) -> list[Any]:
        dataset = PromptDataset(rows, rows, one, one, masks, masks)
        loader = PromptDataLoader(dataset, None, 0, batch_size=batch_size)
        pruned = saes.pruned(loader, max_latents=4)
        return [sae.latent_idxs for sae in pruned.saes.values()]

    alone = kept([t.tensor(SHORT), t.tensor(LONG)], None, 1)
    for side in ("left", "right"):
        tokens = padded(side)
        masks = (tokens != PAD).long() if has_masks else None
        assert kept(tokens, masks, 2) == alone


def test_padding_where_all_outputs_count(model: PatchableModel) -> None:
    tokens, one = padded("left"), [t.tensor([1])] * 2
    mask = (tokens != PAD).long()
    loader = PromptDataLoader(
        PromptDataset(tokens, tokens.flip(0), one, one, mask, mask.flip(0)), None, 0
    )
    whole = patchable_model(model.wrapped_model, True, None, None, True)
    with pytest.raises(DataError, match="padding would count too"):
        run_circuits(whole, loader, [0], whole.new_prune_scores(1.0))
