"""Where heads of TransformerLens models read keys and values of other positions.

The attention that TransformerLens computes itself has three places for that. Keys and values
are handed to the KV cache when all has been done to them (norms, rotary positions); scores
are handed to the causal mask; and the pattern is shown at a hook point before the values are
read. Further keys and values go through the model's own products, so that its scale, its soft
cap and its grouping of heads are theirs too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch as t
from torch import Tensor
from torch.nn import Module

from auto_circuit.model_utils.model_adapter import (
    AttentionReader,
    HeadVectors,
    Scores,
)
from auto_circuit.modules import replaced_attribute


@contextmanager
def read_attention(attention: Module, reader: AttentionReader) -> Iterator[None]:
    """Inside, `reader` looks into every pass of the attention, and changes what is read."""
    inner: Any = attention
    update, mask = inner._update_kv_cache, inner._apply_reconstruct_attention_mask
    n_further = 0

    def update_kv_cache(keys: HeadVectors, values: HeadVectors, **kwargs: Any) -> Any:
        nonlocal n_further
        # After users' hooks, which are to see the pattern as it is.
        inner.hook_pattern._forward_hooks.move_to_end(handle.id)
        further_keys = reader.further_keys(keys)
        further_values = reader.further_values(values)
        n_further = 0 if further_keys is None else further_keys.shape[2]
        keys, values = update(keys, values, **kwargs)
        return _with(keys, further_keys, 2), _with(values, further_values, 2)

    def apply_mask(attn_scores: Scores, seq_len: int, **kwargs: Any) -> Scores:
        if n_further:
            seq_len -= n_further
            further = attn_scores[..., seq_len:]
            attn_scores = reader.scores(attn_scores[..., :seq_len], further)
        return mask(attn_scores=attn_scores, seq_len=seq_len, **kwargs)

    def pattern(module: Module, args: Any, out: Scores) -> Scores | None:
        further = reader.further_pattern(out)
        return None if further is None else _with(out, further, -1)

    with ExitStack() as stack:
        for name, function in (
            ("_update_kv_cache", update_kv_cache),
            ("_apply_reconstruct_attention_mask", apply_mask),
        ):
            stack.enter_context(replaced_attribute(attention, name, function))
        handle = inner.hook_pattern.register_forward_hook(pattern)
        stack.callback(handle.remove)
        yield


def _with(own: Tensor, further: Tensor | None, dim: int) -> Tensor:
    return own if further is None else t.cat([own, further.to(own.dtype)], dim)
