"""The keys and values of a prefix that all prompts of a data set share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch as t
from jaxtyping import Bool, Float, Int
from torch import Tensor

from auto_circuit.errors import ConfigError
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
