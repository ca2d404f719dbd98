"""The keys and values of a prefix that all prompts of a data set share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch as t
from jaxtyping import Bool, Float, Int
from torch import Tensor

from auto_circuit.checks import shown
from auto_circuit.errors import ConfigError
from auto_circuit.padding import known_mask
from auto_circuit.utils.module_use import being_read
from auto_circuit.utils.torch_state import in_own_state
from auto_circuit.utils.user_hooks import UserHooks
from auto_circuit.weights import WeightFingerprint

ROUNDING = 64
"""How many units in the last place of the largest logit two ways of computing differ."""


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """The keys and values of a prefix that all prompts of a data set share.

    tokens: [prefix]. keys, values: per layer [1 kv_head prefix d_head].
    weights: those that they were computed with; None if nobody knows.
    """

    tokens: Int[Tensor, "prefix"]
    keys: tuple[Float[Tensor, "1 kv_head prefix d_head"], ...]
    values: tuple[Float[Tensor, "1 kv_head prefix d_head"], ...]
    weights: WeightFingerprint | None = None

    @property
    def seq_len(self) -> int:
        """The number of tokens in the prefix."""
        return len(self.tokens)

    def __deepcopy__(self, memo: dict[int, object]) -> PrefixCache:
        """Itself: it never changes, and `weights` must stay those of the model itself."""
        return self

    def past_key_values(self, batch_size: int) -> Any:
        """A new Hugging Face cache that holds the prefix for a batch of any size.

        The model extends the cache that it is given, so each call needs a new one.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            shape = (batch_size, -1, -1, -1)
            cache.update(key.expand(shape), value.expand(shape), layer)
        return cache


GONE_KEYWORDS = {
    "shortformer_pos_embed": "TransformerLens 4 has no such positions",
    "tokens": "the loss of a pass from the middle is not computed: ask for logits",
}
"""Keywords of TransformerLens 2's `forward` that nothing stands for -> why."""


def current_keywords(model: Any, given: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """TransformerLens 2's keywords of a call, as TransformerLens 4 reads them.

    given: the input of the call. `past_kv_cache`, a loader's `kv_cache` or a Hugging Face
    cache, becomes `past_key_values`. Raises ConfigError for keywords and caches that
    TransformerLens 4 would swallow without a word.
    """
    kwargs = dict(kwargs)
    for name, reason in GONE_KEYWORDS.items():
        if kwargs.pop(name, None) is not None:
            raise ConfigError(f"`{name}` is not supported: {reason}. Leave it out.")
    cache = kwargs.pop("past_kv_cache", None)
    if cache is None:
        return kwargs
    if kwargs.get("past_key_values") is not None:
        raise ConfigError("Give `past_kv_cache` or `past_key_values`, not both.")
    if isinstance(cache, PrefixCache):
        return _continuing(_made_by(model, cache), given, kwargs)
    if not hasattr(cache, "get_seq_length"):
        raise ConfigError(
            f"`past_kv_cache` is {shown(cache)}; expected the `kv_cache` of a dataloader, "
            "or a Hugging Face cache (TransformerLens 4 calls it `past_key_values`). "
            "TransformerLens's own caches are not read."
        )
    return {**kwargs, "past_key_values": cache}


def _made_by(model: Any, prefix: PrefixCache) -> PrefixCache:
    is_current = prefix.weights is not None and prefix.weights.is_of(model)
    return prefix if is_current else make_prefix_cache(model, prefix.tokens)


def _continuing(
    prefix: PrefixCache, given: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    n_prompts = 1
    if isinstance(given, list) or (isinstance(given, Tensor) and given.ndim > 1):
        n_prompts = len(given)
    kwargs["past_key_values"] = prefix.past_key_values(n_prompts)
    mask = kwargs.get("attention_mask")
    if not isinstance(given, Tensor):
        return kwargs
    mask = known_mask(given) if mask is None else mask
    if mask is not None and mask.shape[-1] == given.shape[-1]:
        ones = mask.new_ones(n_prompts, prefix.seq_len)
        kwargs["attention_mask"] = t.cat([ones, mask.view(n_prompts, -1)], dim=1)
    return kwargs


def begin_with(
    tokens: Int[Tensor, "batch seq"],
    prefix: Int[Tensor, "prefix"],
    starts: Int[Tensor, "batch"] | None = None,
) -> Bool[Tensor, "batch"]:
    """Which rows begin with a prefix? starts: where they begin, if not at 0."""
    batch, seq = tokens.shape
    if seq < len(prefix):
        return t.zeros(batch, dtype=t.bool, device=tokens.device)
    if starts is None:
        return (tokens[:, : len(prefix)] == prefix).all(1)
    places = starts[:, None] + t.arange(len(prefix), device=tokens.device)
    found = tokens.gather(1, places.clamp(max=seq - 1))
    return (found == prefix).all(1) & (places[:, -1] < seq)


@in_own_state(grad=False)
def make_prefix_cache(model: Any, tokens: Int[Tensor, "prefix"]) -> PrefixCache:
    """A model's keys and values for a prefix.

    Raises ConfigError if it gives none, and if hooks are on the model, which would become a
    part of them for as long as they are remembered.
    """
    from transformers import DynamicCache

    if UserHooks(model).ids():
        raise ConfigError(
            "There are hooks on the model, and the keys and values of the prefix "
            f"({len(tokens)} tokens) would be those of the model with them. Remove them "
            "(`reset_hooks`) until the prefix is computed, or set `tail_divergence=False`: "
            "whole prompts then pass the hooks."
        )

    # A plain cache keeps everything: the cache that a model with sliding windows makes for
    # itself drops what is outside of the window, and with it the count of positions.
    cache = DynamicCache()
    try:
        with being_read(model, model):
            model(tokens[None], past_key_values=cache, use_cache=True)
        layers = [_keys_and_values(layer) for layer in cache.layers]
        lengths = {part.shape[2] for pair in layers for part in pair}
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise _no_cache(model, str(error)) from error
    if lengths != {len(tokens)}:
        raise _no_cache(model, f"it holds {sorted(lengths)} of {len(tokens)} positions")
    return PrefixCache(
        tokens,
        tuple(keys.detach().clone() for keys, _ in layers),
        tuple(values.detach().clone() for _, values in layers),
        WeightFingerprint(model),
    )


def _keys_and_values(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _no_cache(model: Any, why: str) -> ConfigError:
    return ConfigError(f"This {type(model).__name__} gives no KV cache ({why}).")


@in_own_state(grad=False)
def is_exact(model: Any, prefix: PrefixCache, rest: Int[Tensor, "seq"]) -> bool:
    """Does the model say the same of a prompt with the cache as without it?"""
    with being_read(model, model):
        whole = model(t.cat([prefix.tokens, rest])[None])[0, -1]
        cached = model(rest[None], past_key_values=prefix.past_key_values(1))[0, -1]
    rounding = ROUNDING * t.finfo(whole.dtype).eps * (1 + whole.abs().max())
    return bool((whole - cached).abs().max() <= rounding)
