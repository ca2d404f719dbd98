"""Keys and values for every query head, where the model has them for groups of heads.

With grouped-query attention the query heads of a group read the same keys and values. To
give head `h` keys and values of its own, which are those of its group while nothing is
patched, the linear maps that make them serve every query head (`UngroupedLinear`), and
attention takes what they give as it is (`ungrouped_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from auto_circuit.modules import replaced_attribute
from auto_circuit.weights import dense_weight

Heads = Float[Tensor, "batch _ _ d_head"]
"""Keys or values, [batch head seq d_head], of some heads at some positions."""


class UngroupedLinear(Module):
    """A linear map for key-value heads, as one for the query heads that share them.

    linear: torch's Linear, whose output is one part for each of `n_kv` heads; here each
    part is there `group` times.
    """

    def __init__(self, linear: Any, n_kv: int, group: int) -> None:
        super().__init__()
        self.linear = linear
        self.n_kv = n_kv
        self.group = group
        self.out_features = linear.out_features * group

    @property
    def weight(self) -> Float[Tensor, "width d_model"]:
        """The weights, [query head * d_head, d_model]."""
        return self._for_each(dense_weight(self.linear), 0)

    @property
    def bias(self) -> Float[Tensor, "width"] | None:
        """The bias, [query head * d_head]."""
        bias = self.linear.bias
        return None if bias is None else self._for_each(bias, 0)

    def forward(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token width"]:
        """The linear map's output, each part `group` times."""
        # Not by calling it: what stands in for its `forward` calls this.
        return self._for_each(type(self.linear).forward(self.linear, x), -1)

    def _for_each(self, parts: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
        dim = dim % parts.ndim
        by_head = parts.unflatten(dim, (self.n_kv, -1))
        return by_head.repeat_interleave(self.group, dim).flatten(dim, dim + 1)


def keeps_heads_apart(attention: Any) -> bool:
    """Is all that happens to a key between its linear map and its use the same for heads?

    Not where a norm has weights for each key-value head, or runs over all of them. (Over the
    keys of one head alone it may run by chance: it is that of the queries which says so.)
    """
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    inner = [norm.original_component for norm in norms if norm is not None]
    weights = [weight for norm in inner for weight in norm.parameters()]
    has_one_for_each = any(list(norm.children()) for norm in inner)
    return not has_one_for_each and all(
        weight.numel() in (1, attention.config.d_head) for weight in weights
    )


def norm_weight(attention: Any, name: str) -> Float[Tensor, "*head d_head"] | None:
    """The weight of attention's norm over queries or keys, if there is one."""
    norm = getattr(attention, name, None)
    return getattr(getattr(norm, "original_component", None), "weight", None)


@contextmanager
def ungrouped_attention(attention: Any, group: int) -> Iterator[None]:
    """Inside, attention takes keys and values of all query heads, and repeats none.

    A prefix in the KV cache still has those of key-value heads.
    """
    config = copy(attention.config)
    config.n_key_value_heads = config.n_heads
    inner = attention.original_component
    update = attention._update_kv_cache

    def update_kv_cache(keys: Heads, values: Heads, **kwargs: Any) -> Any:
        one_of_each = (keys[:, ::group], values[:, ::group])
        with_prefix = update(*one_of_each, **kwargs)
        return [
            _after(prefix, own, group)
            for prefix, own in zip(with_prefix, (keys, values), strict=True)
        ]

    attributes: list[tuple[Any, str, Any]] = [
        (attention, "config", config),
        (attention, "_update_kv_cache", update_kv_cache),
        (inner, "num_key_value_groups", 1),
    ]
    # Hooks at `hook_k` and `hook_v` see a dimension of heads.
    conversions = [part.hook_out.hook_conversion for part in (attention.k, attention.v)]
    attributes += [(c, "n_heads", config.n_heads) for c in conversions if c is not None]
    with ExitStack() as stack:
        for owner, name, value in attributes:
            stack.enter_context(replaced_attribute(owner, name, value))
        yield


def _after(with_prefix: Heads, own: Heads, group: int) -> Heads:
    """[batch head seq d_head]: the cached positions, repeated, and then those of heads."""
    n_cached = with_prefix.shape[2] - own.shape[2]
    if n_cached == 0:
        return own
    cached = with_prefix[:, :, :n_cached].repeat_interleave(group, 1)
    return t.cat([cached, own], 2)
