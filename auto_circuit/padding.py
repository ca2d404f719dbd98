"""Which tokens are padding, and which positions count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int, Shaped
from torch import Tensor

from auto_circuit.errors import DataError, GraphError

KNOWN_MASK = "_auto_circuit_attention_mask"
"""The attribute by which the tokens of a batch know their attention mask."""

PASS_THE_MASK = (
    "Pass the mask: `tokens, kwargs = batch.model_input('clean'); model(tokens, "
    "**kwargs)`, or `model(tokens, attention_mask=...)`."
)


def remember_mask(
    tokens: Shaped[Tensor, "*batch_seq"], mask: Shaped[Tensor, "*batch_seq"] | None
) -> None:
    """Let `model(tokens)` find the attention mask of these very tokens."""
    if mask is not None:
        setattr(tokens, KNOWN_MASK, mask)


def known_mask(
    tokens: Shaped[Tensor, "*batch_seq"],
) -> Shaped[Tensor, "*batch_seq"] | None:
    """The attention mask that was remembered for these very tokens.

    Tokens that are made of them (a copy, some of the rows) have none.
    """
    mask = getattr(tokens, KNOWN_MASK, None)
    return mask if mask is not None and mask.shape == tokens.shape else None


def padding_mask(
    tokens: Int[Tensor, "batch seq"], tokenizer: Any
) -> Int[Tensor, "batch seq"] | None:
    """A mask, 0 at padding at the start and at the end of rows; None if nothing is padded.

    Raises GraphError where padding cannot be told from text: tokenizers that pad with BOS
    or EOS.
    """
    pad_id = getattr(tokenizer, "pad_token_id", None)
    if pad_id is None:
        return None
    is_pad = tokens == pad_id
    if not is_pad[:, [0, -1]].any():
        return None
    leading = is_pad.cumprod(1)
    trailing = is_pad.flip(1).cumprod(1).flip(1)
    for marker, side, run in (("BOS", "starts", leading), ("EOS", "ends", trailing)):
        own_id = getattr(tokenizer, f"{marker.lower()}_token_id", None)
        if pad_id == own_id:
            lengths = run.sum(1)
            if lengths.max() > 1 or lengths.min() != lengths.max():
                raise GraphError(
                    f"The input {side} with several {marker} tokens, or only some of its "
                    f"rows do with one. This tokenizer also pads with {marker}, so padding "
                    f"cannot be told from text. {PASS_THE_MASK}"
                )
            run.zero_()
    mask = 1 - (leading | trailing)
    return None if mask.all() else mask


def check_attention_mask(
    mask: Shaped[Tensor, "*batch_seq"], shape: Sequence[int], n_cached: int
) -> None:
    """Raise DataError for a mask that is not one of tokens [batch seq].

    n_cached: so many positions before the tokens it may cover as well.
    """
    batch, seq = shape
    if tuple(mask.shape) not in ((batch, seq), (batch, n_cached + seq)):
        raise DataError(
            f"The attention mask has shape {tuple(mask.shape)}; the tokens need "
            f"[batch, positions] = {(batch, seq)}, 1 at text and 0 at padding."
        )


def check_last_is_text(mask: Shaped[Tensor, "batch seq"]) -> None:
    """Raise DataError if a row ends with padding."""
    n_padded = int((mask[:, -1] == 0).sum())
    if n_padded:
        raise DataError(
            f"{n_padded} of {len(mask)} prompts end with padding, but the output at the "
            "last position counts (`slice_output='last_seq'`). Pad on the left: "
            "`model.to_tokens(texts, padding_side='left')`, or `load_datasets_from_json`, "
            "which does."
        )
