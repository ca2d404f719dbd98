"""Where an autoencoder, a transcoder or neurons belong in a TransformerLens model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    GatedMLPBridge,
    MLPBridge,
    NormalizationBridge,
)

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, ModelError, near_matches
from auto_circuit.model_utils.features.autoencoder import Autoencoder
from auto_circuit.model_utils.features.splices import (
    BareNorm,
    Latents,
    NeuronLatents,
    NeuronRows,
    RowLatents,
    Splice,
    SpliceSite,
    WholeLatents,
)
from auto_circuit.model_utils.transformer_lens_sites import (
    closed_form,
    has_mlps,
    has_post_norm,
    norm_facts,
)

ALIASES = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.out.hook_in": "mlp.hook_post",
}
"""TransformerLens 4's own names of hook points -> the ones that we use."""
NAMES = {
    "hook_resid_pre": ("Resid Pre", "residual"),
    "hook_resid_post": ("Resid Post", "residual"),
    "hook_attn_out": ("A", "attention"),
    "attn.hook_out": ("A", "attention"),
    "attn.hook_z": ("A", "attention"),
    "hook_mlp_out": ("MLP", "mlp"),
    "mlp.hook_out": ("MLP", "mlp"),
    "mlp.hook_post": ("MLP", "mlp"),
}
"""Hook points that an autoencoder may encode -> the nodes' name, and what it replaces."""
TRANSCODER_READS = (
    *("mlp.hook_in", "ln2.hook_out", "ln2.hook_normalized"),
    *("hook_mlp_in", "ln2.hook_in", "hook_resid_mid"),
)
TRANSCODER_WRITES = ("hook_mlp_out", "mlp.hook_out")
Check = Callable[[], None]


@checked
@dataclass(frozen=True, eq=False)
class Placed:
    """Anything with `encode` and a linear `decode`, and where it belongs.

    hook_name: the hook point whose output it encodes. hook_name_out: if it is a transcoder,
        the one that it stands for. An `Autoencoder` knows both itself.
    """

    autoencoder: Any
    hook_name: str
    hook_name_out: str | None = None


@checked
@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of a block's MLP, each its activation times its output row.

    as_destinations: is each a destination too, by its own input row(s)?
    """

    block: int
    as_destinations: bool = False


def placed(item: Any) -> Placed | Neurons:
    """An autoencoder, and its place. Raises ConfigError if it has none."""
    if isinstance(item, Placed | Neurons):
        return item
    config = getattr(item, "cfg", None)
    for owner in (item, getattr(config, "metadata", None), config):
        hook = getattr(owner, "hook_name", None)
        if isinstance(hook, str):
            return Placed(item, hook, getattr(owner, "hook_name_out", None) or None)
    raise ConfigError(
        f"A {type(item).__name__} does not say which hook point it encodes (`hook_name`). "
        'Give `Placed(autoencoder, "blocks.2.hook_resid_pre")`, or `Neurons(block)`.'
    )


def make_splice(
    model: TransformerBridge, item: Placed | Neurons, kept: Sequence[int] | None
) -> Splice:
    """What takes the place of a component. kept: the latents that are nodes (None: all).

    Raises ConfigError or ModelError for an autoencoder of another model, of another place, or
    for latents that it has not.
    """
    if isinstance(item, Neurons):
        return _neurons(model, item, kept)
    for name in ("encode", "decode"):
        if not callable(getattr(item.autoencoder, name, None)):
            raise ConfigError(
                f"A {type(item.autoencoder).__name__} has no `{name}`: it is no autoencoder."
            )
    block, hook = parse_hook(model, item.hook_name)
    if item.hook_name_out not in (None, item.hook_name):
        return _transcoder(model, item, block, hook, kept)
    if hook not in NAMES:
        raise ConfigError(
            f"An autoencoder of {item.hook_name!r} cannot be put into the graph. Expected one "
            f"of {list(NAMES)}, or, of a transcoder, {list(TRANSCODER_READS)} with "
            f"`hook_name_out` {TRANSCODER_WRITES[0]!r}."
        )
    _check_not_normed(model, item.hook_name, hook)
    name, component = NAMES[hook]
    writes, to_written = _written(model, block, hook)
    latents, idxs = _latents(model, item, _width(model, block, hook), kept)
    is_cut = component == "residual"
    site = SpliceSite(
        f"A{block}" if component == "attention" else f"{name} {block}",
        block,
        component,
        reads=_module_name(block, hook),
        writes=writes,
        linear=None if to_written is None else (_module_name(block, hook), to_written),
        to_written=to_written,
        shows=writes if is_cut else None,
    )
    return Splice(site, latents, idxs)


def parse_hook(model: TransformerBridge, name: str) -> tuple[int, str]:
    """(block, hook point in it). Raises ConfigError if the model has none such."""
    found = re.fullmatch(r"blocks\.(\d{1,4})\.([a-z_0-9.]+)", name)
    if found is None or int(found[1]) >= model.cfg.n_layers:
        raise ConfigError(
            f"The model has no hook point {name!r:.80}: expected `blocks.<n>.<hook>` with n "
            f"from 0 to {model.cfg.n_layers - 1}."
        )
    hook = ALIASES.get(found[2], found[2])
    known = [*NAMES, *TRANSCODER_READS]
    if hook not in known:
        raise ConfigError(
            f"Autoencoders of {name!r:.80} are not known.{near_matches(hook, known)} "
            f"Expected one of {known}."
        )
    return int(found[1]), hook


def _module_name(block: int, hook: str) -> str:
    names = {ours: theirs for theirs, ours in ALIASES.items()}
    return f"blocks.{block}.{names.get(hook, hook)}"


def _written(
    model: TransformerBridge, block: int, hook: str
) -> tuple[str, Callable[[], Float[Tensor, "d_in d_model"]] | None]:
    """(the hook point that the parts add up to, the matrix to there)"""
    if hook == "attn.hook_z":
        return f"blocks.{block}.hook_attn_out", partial(_attention_weight, model, block)
    if hook == "mlp.hook_post":
        return f"blocks.{block}.hook_mlp_out", partial(_output_weight, model, block)
    return _module_name(block, hook), None


def _attention_weight(
    model: TransformerBridge, block: int
) -> Float[Tensor, "value d_model"]:
    """From all heads' values."""
    attention: Any = model.blocks[block].attn
    return attention.W_O.flatten(0, -2)


def _output_weight(
    model: TransformerBridge, block: int
) -> Float[Tensor, "neuron d_model"]:
    return model.blocks[block].mlp.W_out


def _width(model: TransformerBridge, block: int, hook: str) -> int:
    if hook == "attn.hook_z":
        return int(_attention_weight(model, block).shape[0])
    if hook == "mlp.hook_post":
        _check_mlp(model, block)
        return int(_output_weight(model, block).shape[0])
    return int(model.cfg.d_model)


def _check_mlp(model: TransformerBridge, block: int) -> Any:
    """The MLP. Raises ModelError if there is none whose neurons can be seen."""
    mlp: Any = model.blocks[block].mlp if has_mlps(model) else None
    if type(mlp) not in (MLPBridge, GatedMLPBridge):
        raise ModelError(
            f"Block {block} of this {model.cfg.architecture} model has no MLP whose neurons "
            "can be seen one by one."
        )
    return mlp


def _check_not_normed(model: TransformerBridge, name: str, hook: str) -> None:
    """Raise ModelError where the model changes what is written before it is added."""
    is_inside = hook in ("attn.hook_z", "attn.hook_out", "mlp.hook_post", "mlp.hook_out")
    if is_inside and has_post_norm(model):
        raise ModelError(
            f"The model normalises what it writes after {name!r}, so latents there write no "
            "parts of it. Use autoencoders of `hook_attn_out` or `hook_mlp_out`."
        )


# ------------------------------------------------------------------------------- latents


def _latents(
    model: TransformerBridge, item: Placed, width: int, kept: Sequence[int] | None
) -> tuple[Latents, Sequence[int]]:
    """The latents that are nodes, and which of all they are."""
    like = next(model.parameters()).new_zeros(width)
    autoencoder = item.autoencoder
    if not isinstance(autoencoder, Autoencoder):
        n_latents = _n_latents(item, like)
        idxs = checked_latents(n_latents, kept)
        return WholeLatents(autoencoder, idxs, like), idxs
    if autoencoder.d_in != width:
        raise ConfigError(
            f"The autoencoder of {item.hook_name!r} encodes {autoencoder.d_in} numbers, of "
            f"which this model has {width} there: it is another model's."
        )
    d_out = width if item.hook_name_out is None else model.cfg.d_model
    if autoencoder.d_out != d_out:
        raise ConfigError(
            f"The autoencoder of {item.hook_name!r} decodes to {autoencoder.d_out} numbers, "
            f"of which this model has {d_out} there: it is another model's."
        )
    idxs = checked_latents(autoencoder.n_latents, kept)
    autoencoder = autoencoder.to(like.device, like.dtype)
    if autoencoder.is_separable:
        return RowLatents(autoencoder.rows(idxs)), idxs
    return WholeLatents(autoencoder, idxs, like), idxs


def _n_latents(item: Placed, like: Float[Tensor, "d_in"]) -> int:
    """The number of latents that anything encodes to, which it is asked for."""
    try:
        with t.no_grad():
            return int(item.autoencoder.encode(like.unsqueeze(0)).shape[-1])
    except Exception as error:  # somebody else's code
        raise ConfigError(
            f"The {type(item.autoencoder).__name__} of {item.hook_name!r} cannot encode an "
            f"activation of this model, [1, {len(like)}]: {error!s:.200}"
        ) from error


def checked_latents(n_latents: int, kept: Sequence[int] | None) -> list[int]:
    """Which latents are nodes, in order. Raises ConfigError for those that are not there."""
    if kept is None:
        return list(range(n_latents))
    unknown = sorted(idx for idx in set(kept) if idx not in range(n_latents))
    if unknown or not kept:
        problem = f"has no latents {unknown[:5]}" if unknown else "would have none"
        raise ConfigError(
            f"The autoencoder {problem}; it has {n_latents}, from 0 on. Leave an autoencoder "
            "out if none of its latents is to be a node."
        )
    return sorted(set(kept))


# -------------------------------------------------------------- transcoders and neurons


def _transcoder(
    model: TransformerBridge,
    item: Placed,
    block: int,
    hook: str,
    kept: Sequence[int] | None,
) -> Splice:
    out_block, out = parse_hook(model, str(item.hook_name_out))
    if hook not in TRANSCODER_READS or out not in TRANSCODER_WRITES or out_block != block:
        raise ConfigError(
            f"A transcoder from {item.hook_name!r} to {item.hook_name_out!r} cannot be put "
            f"into the graph: expected one from {list(TRANSCODER_READS)} to "
            f"{TRANSCODER_WRITES[0]!r} of the same block."
        )
    _check_not_normed(model, str(item.hook_name_out), out)
    latents, idxs = _latents(model, item, model.cfg.d_model, kept)
    return _reading_mlp_input(model, block, hook, latents, idxs)


def _reading_mlp_input(
    model: TransformerBridge, block: int, hook: str, latents: Latents, idxs: Sequence[int]
) -> Splice:
    """Latents, or neurons, that read the residual stream where the MLP does."""
    norm = _norm_before_mlp(model, block)
    is_before = hook in ("hook_mlp_in", "ln2.hook_in", "hook_resid_mid")
    is_neurons = isinstance(latents, NeuronLatents)
    inner: Module | None = norm.original_component
    form = closed_form(norm)
    if is_before:
        inner = form = None
    elif hook == "ln2.hook_normalized":
        facts = norm_facts(norm)
        form = type(facts)(facts.centred, facts.epsilon, lambda: 1.0, lambda: None)
        inner = BareNorm(form)
    site = SpliceSite(
        f"MLP {block}",
        block,
        "mlp",
        # What the MLP really reads, also where the error's input is patched.
        reads=f"blocks.{block}.ln2.hook_in" if is_before else f"blocks.{block}.{hook}",
        writes=f"blocks.{block}.hook_mlp_out",
        linear=_linear_in_neurons(model, block) if is_neurons else None,
        shows=f"blocks.{block}.hook_mlp_in",
        norm=inner,
        closed_form=form,
    )
    return Splice(site, latents, idxs, "Neuron" if is_neurons else "Latent")


def _linear_in_neurons(
    model: TransformerBridge, block: int
) -> tuple[str, Callable[[], Float[Tensor, "neuron d_model"]]]:
    return f"blocks.{block}.mlp.out.hook_in", partial(_output_weight, model, block)


def _norm_before_mlp(model: TransformerBridge, block: int) -> NormalizationBridge:
    norm = model.blocks[block].submodules.get("ln2") if has_mlps(model) else None
    if not isinstance(norm, NormalizationBridge):
        raise ModelError(
            f"The MLP of block {block} has no norm of its own (`ln2`), so that transcoders, "
            "and neurons as destinations, are not supported for this "
            f"{model.cfg.architecture} model."
        )
    return norm


def _neurons(
    model: TransformerBridge, item: Neurons, kept: Sequence[int] | None
) -> Splice:
    if item.block not in range(model.cfg.n_layers):
        raise ConfigError(
            f"There are no neurons of block {item.block}; the model has "
            f"{model.cfg.n_layers} blocks, from 0 on."
        )
    block = item.block
    mlp = _check_mlp(model, block)
    _check_not_normed(model, f"blocks.{block}.mlp.hook_post", "mlp.hook_post")
    idxs = checked_latents(_output_weight(model, block).shape[0], kept)
    output_weight = partial(_output_weight, model, block)
    if item.as_destinations:
        into, combine = _into_neurons(model, mlp, idxs)
        latents = NeuronLatents(idxs, output_weight, into, combine)
        return _reading_mlp_input(model, block, "mlp.hook_in", latents, idxs)
    site = SpliceSite(
        f"MLP {block}",
        block,
        "mlp",
        reads=f"blocks.{block}.mlp.out.hook_in",
        writes=f"blocks.{block}.hook_mlp_out",
        linear=_linear_in_neurons(model, block),
    )
    return Splice(site, NeuronLatents(idxs, output_weight), idxs, "Neuron")


def _into_neurons(
    model: TransformerBridge, mlp: Any, idxs: Sequence[int]
) -> tuple[list[Module], Callable[[Sequence[Tensor]], Tensor]]:
    """The linear maps into neurons, and their activations from what these give."""
    inner = mlp.original_component
    names = ("act", "act_fn", "activation_fn", "activation")
    functions = [getattr(inner, n) for n in names if callable(getattr(inner, n, None))]
    if not functions:
        raise ModelError(
            f"The activation function of this {model.cfg.architecture} model's MLPs was not "
            f"found (as {names}): its neurons cannot be destinations."
        )
    act = functions[0]
    into: list[Module] = [
        NeuronRows(idxs, partial(getattr, mlp, "W_in"), partial(_bias, mlp, "in"))
    ]
    if type(mlp) is not GatedMLPBridge:
        return into, lambda outs: act(outs[0])
    gate = partial(getattr, mlp, "W_gate"), partial(_bias, mlp, "gate")
    into.append(NeuronRows(idxs, *gate))
    return into, lambda outs: act(outs[1]) * outs[0]


def _bias(mlp: Any, name: str) -> Float[Tensor, "neuron"] | None:
    bridge: Any = getattr(mlp, name)
    return getattr(bridge.original_component, "bias", None)
