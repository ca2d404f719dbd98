"""TransformerLens models that take what code for TransformerLens 2 gives them.

TransformerLens 4 hands keywords that it does not know to the Hugging Face model, which
swallows them: `past_kv_cache`, say, without which every position is another one. And it
computes what single heads read in one of two ways, where TransformerLens 2 allowed both.
"""

from __future__ import annotations

from functools import wraps
from typing import Any
from warnings import warn

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.padding import known_mask
from auto_circuit.prefix_cache import current_keywords


class LoadedBridge(TransformerBridge):
    """A TransformerBridge that reads TransformerLens 2's keywords, or refuses them.

    The batches of a PromptDataLoader bring their attention masks along.
    """

    @wraps(TransformerBridge.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As TransformerLens does. Raises ConfigError for what it does not know any more."""
        given = args[0] if args else kwargs.get("input")
        kwargs = current_keywords(self, given, kwargs)
        is_open = len(args) == 1 and not {"attention_mask", "past_key_values"} & {*kwargs}
        if is_open and isinstance(given, Tensor):
            mask = known_mask(given)
            kwargs |= {} if mask is None else {"attention_mask": mask}
        return super().forward(*args, **kwargs)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """As TransformerLens does; but not beside the split inputs of heads, which stay."""
        if use_attn_in and getattr(self.cfg, "use_split_qkv_input", False):
            warn(
                "TransformerLens 4 has `use_attn_in` or `use_split_qkv_input`, not both; "
                "the latter is on, so `hook_attn_in` stays off. `patchable_model` needs "
                "none of these switches: the line can go. For `hook_attn_in` itself, call "
                "`set_use_split_qkv_input(False)` first.",
                stacklevel=3,
            )
            return
        super().set_use_attn_in(use_attn_in)


def as_loaded(bridge: TransformerBridge) -> LoadedBridge:
    """The same object, now of that class."""
    bridge.__class__ = LoadedBridge
    assert isinstance(bridge, LoadedBridge)
    return bridge
