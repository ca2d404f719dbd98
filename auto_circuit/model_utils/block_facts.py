"""What must be known of TransformerLens's blocks, as data with defaults.

Most follows from the parts that a block has, and is checked by numbers when a graph is made
(`graph_utils`). A class of blocks that does something in another way is a row of
`BLOCK_CLASSES`; that is all that a new architecture of the usual kind may need.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import Identity, Linear
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
)
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_circuit.errors import ModelError
from auto_circuit.weights import dense_weight, is_linear

PLAIN_MLPS = (MLPBridge, GatedMLPBridge)


@dataclass(frozen=True)
class BlockClass:
    """A class of blocks, where it differs from most.

    name: the class's in TransformerLens.
    mlp_input: the part of a block that shows the residual stream that its MLP reads.
    mlp_by_token: does its MLP see each token alone, [token d_model]?
    """

    name: str
    mlp_input: str = "hook_mlp_in"
    mlp_by_token: bool = False


BLOCK_CLASSES = (
    BlockClass("BloomBlockBridge", mlp_input="ln2.hook_in"),
    BlockClass("_OptBlockBridge", mlp_by_token=True),
)
USUAL = BlockClass("BlockBridge")


def class_of(block: Any) -> BlockClass:
    """What is known of a block's class."""
    found = [known for known in BLOCK_CLASSES if known.name == type(block).__name__]
    return found[0] if found else USUAL


STATE_SPACE = (
    r"\w*(Mamba|Mixer|Rwkv|RWKV|ShortConv|DeltaNet|RecurrentBlock|Hyena)"
    r"\w*(?<!LM)(?<!Model)"
)
"""What classes of modules are called that carry a state from token to token."""
NORM_AFTER_SUM = ("bert", "roberta", "xlm-roberta", "openai-gpt")
"""`model_type` of models that norm the sums of what is added, whose configuration is silent."""


def check_has_residual_stream(original: PreTrainedModel) -> None:
    """Raise ModelError for a Hugging Face model of which no graph can be made.

    Before TransformerLens sees it, which says of some what is only a consequence.
    """
    config: Any = original.config
    names = {type(module).__name__ for module in original.modules()}
    carriers = sorted(name for name in names if re.fullmatch(STATE_SPACE, name))
    kind, missing = type(original).__name__, None
    if getattr(config, "is_encoder_decoder", False):
        missing = "one residual stream (it has an encoder and a decoder)"
    elif carriers:
        missing = (
            "attention alone to carry what tokens say to others (it has state space, "
            f"recurrent or convolution parts: {', '.join(carriers[:2])})"
        )
    elif getattr(config, "model_type", None) in NORM_AFTER_SUM:
        missing = NO_STREAM
    if missing:
        raise _no_graph(kind, missing)


NO_STREAM = "a residual stream that is a sum (it norms the sums, and hands those on)"


def _no_graph(kind: str, missing: str) -> ModelError:
    return ModelError(
        f"This {kind} model does not have {missing}, which its computation graph needs, so "
        "it is not supported. Use a decoder-only transformer with attention and MLPs (GPT, "
        "Llama, Gemma, ...), or give `patchable_model(..., adapter=ModelAdapter(...))` a "
        "graph of your own."
    )


def check_is_decoder(model: TransformerBridge) -> None:
    """Raise ModelError unless the model is one stack of blocks with attention."""
    kind, missing = model.cfg.architecture, None
    original = getattr(model, "original_model", None)
    if isinstance(original, PreTrainedModel):
        check_has_residual_stream(original)
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        missing = "one stack of blocks (it may have an encoder and a decoder)"
    elif not all("attn" in block.submodules for block in blocks):
        missing = "attention in every block (some may be state space models)"
    elif has_norm_after_sum(model):
        missing = NO_STREAM
    elif others := {name for block in model.blocks for name in other_readers(block.attn)}:
        missing = (
            "attention that reads by its queries, keys and values alone (there is "
            f"`{'`, `'.join(sorted(others))}` too)"
        )
    if missing:
        raise _no_graph(str(kind), missing)


def by_position(
    block: Any, out: Float[Tensor, "token d_model"]
) -> Float[Tensor, "batch seq d_model"]:
    """What an MLP that sees each token alone writes at each position."""
    shape = block.hook_mlp_in.hook_conversion.batch_seq
    # In a backward pass, the last forward pass may be another one's. Only the order of
    # the tokens matters then.
    return out.unflatten(0, shape) if math.prod(shape) == len(out) else out.unsqueeze(0)


# ------------------------------------------------------------------------------- norms


def has_norm_after_sum(model: TransformerBridge) -> bool:
    """Does what reaches the next block pass a norm (OPT-350m)? As the configuration says."""
    # TransformerLens's own configuration has not all of Hugging Face's.
    original = getattr(model, "original_model", None)
    configs = (model.cfg, getattr(original, "config", None))
    return any(
        not getattr(config, "do_layer_norm_before", True)
        or getattr(config, "apply_residual_connection_post_layernorm", False)
        for config in configs
    )


def norm_before_heads(block: Any) -> NormalizationBridge | None:
    """The norm through which a block's heads read the residual stream, if any."""
    norm = block.submodules.get("ln1")
    is_one = isinstance(norm, NormalizationBridge)
    return norm if is_one and not isinstance(norm.original_component, Identity) else None


def norm_after_heads(block: Any) -> NormalizationBridge | None:
    """The norm of attention's output before it is added, if any (Gemma 2)."""
    norm = block.submodules.get("ln1_post")
    return norm if isinstance(norm, NormalizationBridge) else None


def mlp_shares_norm(block: Any) -> bool:
    """Does the MLP read what the norm before the heads gives (GPT-J)?"""
    norms = {"ln2", "ln2_post"} & {*block.submodules}
    return "mlp" in block.submodules and not norms


def has_residual_scale(block: Any) -> bool:
    """Are a block's parts multiplied by a number, if only by 1, before they are added?"""
    return hasattr(block, "residual_contribution_scale")


def residual_scale(block: Any) -> float:
    """What a block's parts are multiplied by before they are added (Granite)."""
    return float(getattr(block, "residual_contribution_scale", 1.0))


# --------------------------------------------------------------------------- linear maps


def inner_linear(part: Any, name: str) -> Any:
    """The module that computes a linear map of attention, or of an MLP; None if unknown."""
    bridge = getattr(part, name, None)
    return bridge.original_component if type(bridge) is LinearBridge else None


def in_out(linear: Any) -> Float[Tensor, "d_in d_out"]:
    """The weights as [input output]: GPT-2's Conv1D has them so, a Linear turned."""
    return linear.weight if isinstance(linear, Conv1D) else dense_weight(linear).T


def projects_heads(attention: Any) -> bool:
    """Does what single heads read and write follow from the weights?

    Where queries, keys, values and the output are linear maps of the usual widths. That the
    model calls them so, and adds what they say, is checked by numbers.
    """
    if not isinstance(attention, AttentionBridge):
        return False
    config: Any = attention.config
    n_kv = getattr(config, "n_key_value_heads", None) or config.n_heads
    widths = {"q": config.n_heads, "k": n_kv, "v": n_kv}
    output = inner_linear(attention, "o")
    return (
        all(_has_width(attention, name, n) for name, n in widths.items())
        and isinstance(output, (Linear, Conv1D))
        and _width_in(output) == config.n_heads * config.d_head
    )


def _width_in(linear: Any) -> int:
    is_turned = isinstance(linear, Conv1D)
    return int(linear.weight.shape[0] if is_turned else linear.in_features)


def _has_width(attention: Any, name: str, n_heads: int) -> bool:
    linear = inner_linear(attention, name)
    return is_linear(linear) and (
        linear.out_features == n_heads * attention.config.d_head
    )


def other_readers(attention: Any) -> list[str]:
    """The linear maps of attention besides those of queries, keys, values and the output.

    Such as that of a gate: nothing could be patched into what it reads.
    """
    parts = attention.submodules
    own = [parts[name].original_component for name in (*"qkvo", "qkv") if name in parts]
    inside = {module for linear in own for module in linear.modules()}
    return [
        name.removesuffix("._original_component")
        for name, module in attention.original_component.named_modules()
        if isinstance(module, (Linear, Conv1D)) and module not in inside
    ]


def mlp_linears(mlp: Any) -> tuple[Linear, ...]:
    """The linear maps that read an MLP's input, in the order in which they are called."""
    found = [inner_linear(mlp, name) for name in ("gate", "in")]
    return tuple(linear for linear in found if isinstance(linear, Linear))


def whole_mlp(block: Any) -> Any:
    """The module that computes all that the MLP adds from all that it reads, if any.

    Not where that module adds the residual stream too (MPT), or is the block (OPT).
    """
    mlp: Any = block.mlp
    written = block.hook_aliases.get("hook_mlp_out")
    all_of_it = ("mlp.hook_out", "ln2_post.hook_out")
    is_whole = type(mlp) in PLAIN_MLPS and written in all_of_it
    return mlp.original_component if is_whole else None
