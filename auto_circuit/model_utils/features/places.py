"""Where an autoencoder, a transcoder or neurons belong in a TransformerLens model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Identity, Module
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    GatedMLPBridge,
    NormalizationBridge,
)

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, ModelError, near_matches
from auto_circuit.model_utils.block_facts import (
    PLAIN_MLPS,
    by_position,
    check_is_decoder,
    class_of,
    has_residual_scale,
    in_out,
    inner_linear,
    mlp_shares_norm,
    norm_before_heads,
    residual_scale,
)
from auto_circuit.model_utils.features.autoencoder import Autoencoder
from auto_circuit.model_utils.features.splices import (
    BareNorm,
    Decoded,
    Latents,
    NeuronLatents,
    NeuronRows,
    PostNorm,
    RowLatents,
    Shown,
    Splice,
    SpliceSite,
    WholeLatents,
)
from auto_circuit.model_utils.model_adapter import Norm
from auto_circuit.model_utils.transformer_lens_sites import (
    closed_form,
    has_mlps,
    heads_add_up,
    norm_facts,
)

ALIASES = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.o.hook_in": "attn.hook_z",
    "attn.o.hook_out": "attn.hook_out",
    "mlp.out.hook_in": "mlp.hook_post",
    "ln1_post.hook_out": "hook_attn_out",
    "ln2_post.hook_out": "hook_mlp_out",
}
"""TransformerLens 4's own names of hook points -> the ones that we use."""
NAMES = {
    "hook_resid_pre": ("Resid Pre", "residual"),
    "hook_resid_mid": ("Resid Mid", "residual"),
    "hook_resid_post": ("Resid Post", "residual"),
    "hook_attn_out": ("A", "attention"),
    "attn.hook_out": ("A", "attention"),
    "attn.hook_z": ("A", "attention"),
    "hook_mlp_out": ("MLP", "mlp"),
    "mlp.hook_out": ("MLP", "mlp"),
    "mlp.hook_post": ("MLP", "mlp"),
}
"""Hook points that an autoencoder may encode -> the nodes' name, and what it replaces."""
HUGGING_FACE_NAMES = {
    r"(\w+\.)*(layers|h|blocks)\.(\d{1,4})": "hook_resid_post",
    r"(\w+\.)*(layers|h|blocks)\.(\d{1,4})\.mlp": "mlp.hook_out",
    r"(\w+\.)*(layers|h|blocks)\.(\d{1,4})\.(attn|self_attn|attention|self_attention)": (
        "attn.hook_out"
    ),
}
"""What Hugging Face calls modules -> the hook point that shows what such a module gives."""
TRANSCODER_READS = (
    *("mlp.hook_in", "ln2.hook_out", "ln2.hook_normalized"),
    *("hook_mlp_in", "ln2.hook_in", "hook_resid_mid"),
)
OUT_HOOKS = {
    "attention": ("hook_attn_out", "attn.hook_out"),
    "mlp": ("hook_mlp_out", "mlp.hook_out"),
}
"""Of a component, what it adds to the residual stream; and what it gives."""
POST_NORMS = {"attention": "ln1_post", "mlp": "ln2_post"}
"""Of a component, the norm between the two, where there is one."""
HOOKS_BELOW = ("hook_in", "hook_out", "attn.o.hook_in", "mlp.out.hook_in")
"""Hook points that there are by TransformerLens 4's name in every model."""
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
    check_is_decoder(model)
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
    hook = "hook_resid_mid" if hook == "ln2.hook_in" else hook
    if hook not in NAMES:
        raise ConfigError(
            f"An autoencoder of {item.hook_name!r} cannot be put into the graph. Expected one "
            f"of {list(NAMES)}, or, of a transcoder, {list(TRANSCODER_READS)} with "
            f"`hook_name_out` {TRANSCODER_WRITES[0]!r}."
        )
    latents, idxs = _latents(model, item, _width(model, block, hook), kept)
    return Splice(_site(model, block, hook), latents, idxs)


def _site(model: TransformerBridge, block: int, hook: str) -> SpliceSite:
    """Where an autoencoder belongs that encodes what it decodes to."""
    name, component = NAMES[hook]
    if component == "residual":
        return _cut_site(model, block, hook)
    site = _written_site(model, block, component, hook)
    return replace(
        site,
        name=f"A{block}" if component == "attention" else f"{name} {block}",
        key=_module_name(block, hook) if hook == OUT_HOOKS[component][1] else site.key,
        reads=_shown(model, block, hook),
        linear=_linear(model, block, hook),
    )


def _cut_site(model: TransformerBridge, block: int, hook: str) -> SpliceSite:
    """Where the residual stream is cut."""
    name = f"{NAMES[hook][0]} {block}"
    key, owner = _module_name(block, hook), model.blocks[block]
    shown = Shown(key)
    if hook != "hook_resid_mid":
        return SpliceSite(name, key, block, "residual", shown, shown, shows=key)
    if hook not in owner.hook_aliases or mlp_shares_norm(owner) or is_parallel(model):
        raise ModelError(
            f"In this {model.cfg.architecture} model attention and MLP read the same "
            "residual stream: there is none between them (`hook_resid_mid`). Use "
            "autoencoders of `hook_resid_pre` or `hook_resid_post`."
        )
    if not heads_add_up(model):
        raise ModelError(
            f"The heads of this {model.cfg.architecture} model cannot be told apart, and "
            "what all of them add is seen where the stream would be cut. Use autoencoders "
            "of `hook_resid_pre` or `hook_resid_post`."
        )
    by_position = _by_position(owner)
    return SpliceSite(
        name,
        key,
        block,
        "residual",
        reads=Shown(key, by_position=by_position),
        writes=_shown(model, block, "hook_attn_out"),
        shows=key,
        before=f"blocks.{block}.hook_in",
    )


def is_parallel(model: TransformerBridge) -> bool:
    """Do attention and MLP of a block read the same residual stream?"""
    return bool(model.cfg.parallel_attn_mlp)


def _shown(model: TransformerBridge, block: int, hook: str) -> Shown:
    """Where the model shows what a hook point is called for."""
    owner: Any = model.blocks[block]
    scale, by_position = residual_scale(owner), _by_position(owner)
    if hook.startswith("attn.") or hook == "hook_attn_out":
        by_position = None
    if has_residual_scale(owner) and hook in ("hook_attn_out", "hook_mlp_out"):
        # The block's own hook point fires only for TransformerLens's hooks.
        part = "attn" if hook == "hook_attn_out" else "mlp"
        return Shown(f"blocks.{block}.{part}.hook_out", scale, by_position)
    return Shown(_module_name(block, hook), by_position=by_position)


def _by_position(block: Any) -> Callable[[Tensor], Tensor] | None:
    return partial(by_position, block) if class_of(block).mlp_by_token else None


def parse_hook(model: TransformerBridge, name: str) -> tuple[int, str]:
    """(block, hook point in it). Raises ConfigError if the model has none such."""
    found = re.fullmatch(r"blocks\.(\d{1,4})\.([a-z_0-9.]+)", name)
    if found is not None and int(found[1]) < model.cfg.n_layers:
        block, hook = int(found[1]), ALIASES.get(found[2], found[2])
        if mlp_shares_norm(model.blocks[block]):
            hook = re.sub(r"^ln1\.", "ln2.", hook)
        known = [*NAMES, *TRANSCODER_READS]
        if hook in known:
            return block, hook
        raise ConfigError(
            f"Autoencoders of {name!r:.80} are not known.{near_matches(hook, known)} "
            f"Expected one of {known}."
        )
    for pattern, hook in HUGGING_FACE_NAMES.items():
        of_module = re.fullmatch(pattern, name)
        if of_module is not None and int(of_module[3]) < model.cfg.n_layers:
            return int(of_module[3]), hook
    raise ConfigError(
        f"The model has no hook point {name!r:.80}: expected `blocks.<n>.<hook>` with n "
        f"from 0 to {model.cfg.n_layers - 1}."
    )


def _module_name(block: int, hook: str) -> str:
    names = {ours: theirs for theirs, ours in ALIASES.items() if theirs in HOOKS_BELOW}
    return f"blocks.{block}.{names.get(hook, hook)}"


def _written_site(
    model: TransformerBridge, block: int, component: str, hook: str
) -> SpliceSite:
    """Where what a component writes is split, if `hook` shows what is decoded to."""
    added, part = OUT_HOOKS[component]
    owner: Any = model.blocks[block]
    shown, scale = _shown(model, block, added), residual_scale(owner)
    key = f"blocks.{block}.{added}"
    site = SpliceSite(key, key, block, component, reads=shown, writes=shown)
    if hook == added:
        return site
    to_sum = _to_sum(model, block, hook)
    norm = _post_norm(model, block, component)
    if norm is not None:
        sums = Shown(f"blocks.{block}.{POST_NORMS[component]}.hook_in")
        return replace(site, post_norm=PostNorm(sums, norm, to_sum))
    is_added = has_residual_scale(owner) or owner.hook_aliases.get(added) == hook
    if hook == part and not is_added:
        raise ModelError(
            f"In this {model.cfg.architecture} model `blocks.{block}.{hook}` is not what "
            f"is added to the residual stream. Use autoencoders of `{added}`."
        )
    if scale != 1.0:
        return replace(site, to_written=partial(_scaled, scale, to_sum))
    return replace(site, to_written=to_sum)


def _scaled(
    scale: float, to_sum: Callable[[Decoded], Decoded] | None, decoded: Decoded
) -> Decoded:
    return scale * (decoded if to_sum is None else to_sum(decoded))


def _to_sum(
    model: TransformerBridge, block: int, hook: str
) -> Callable[[Decoded], Decoded] | None:
    """From what a hook point shows to what the component gives, if it is a matrix."""
    linear = _linear(model, block, hook)
    return None if linear is None else lambda decoded: decoded @ linear[1]()


def _linear(
    model: TransformerBridge, block: int, hook: str
) -> tuple[str, Callable[[], Float[Tensor, "d_in d_model"]]] | None:
    """(where what is multiplied is seen, the matrix)"""
    weights = {"attn.hook_z": _attention_weight, "mlp.hook_post": _output_weight}
    if hook not in weights:
        return None
    return _module_name(block, hook), partial(weights[hook], model, block)


def _post_norm(model: TransformerBridge, block: int, component: str) -> Norm | None:
    """The norm of what a component writes, if any. Raises ModelError if it is not known."""
    norm = model.blocks[block].submodules.get(POST_NORMS[component])
    if not isinstance(norm, NormalizationBridge):
        return None
    form = closed_form(norm)
    if form is None:
        added, part = OUT_HOOKS[component]
        raise ModelError(
            f"The model normalises what `blocks.{block}.{part}` gives in a way that is not "
            f"known, so latents there write no parts of it. Use autoencoders of `{added}`."
        )
    return form


def _attention_weight(
    model: TransformerBridge, block: int
) -> Float[Tensor, "value d_model"]:
    """From all heads' values."""
    attention: Any = model.blocks[block].attn
    return attention.W_O.flatten(0, -2)


def _output_weight(
    model: TransformerBridge, block: int
) -> Float[Tensor, "neuron d_model"]:
    return in_out(inner_linear(_mlp(model, block), "out"))


def _width(model: TransformerBridge, block: int, hook: str) -> int:
    if hook == "attn.hook_z":
        return int(_attention_weight(model, block).shape[0])
    if hook == "mlp.hook_post":
        return int(_output_weight(model, block).shape[0])
    return int(model.cfg.d_model)


def _mlp(model: TransformerBridge, block: int) -> Any:
    """The MLP. Raises ModelError if there is none whose neurons can be seen."""
    mlp: Any = model.blocks[block].mlp if has_mlps(model) else None
    if type(mlp) not in PLAIN_MLPS or not hasattr(inner_linear(mlp, "out"), "weight"):
        raise ModelError(
            f"Block {block} of this {model.cfg.architecture} model has no MLP whose neurons "
            "can be seen one by one."
        )
    return mlp


# ------------------------------------------------------------------------------- latents


def _latents(
    model: TransformerBridge, item: Placed, width: int, kept: Sequence[int] | None
) -> tuple[Latents, Sequence[int]]:
    """The latents that are nodes, and which of all they are."""
    like = next(model.parameters()).new_zeros(width)
    autoencoder = item.autoencoder
    d_out = width if item.hook_name_out is None else model.cfg.d_model
    if not isinstance(autoencoder, Autoencoder):
        n_latents = _n_latents(item, like)
        idxs = checked_latents(n_latents, kept)
        return WholeLatents(autoencoder, idxs, like, d_out), idxs
    if autoencoder.d_in != width:
        raise ConfigError(
            f"The autoencoder of {item.hook_name!r} encodes {autoencoder.d_in} numbers, of "
            f"which this model has {width} there: it is another model's."
        )
    if autoencoder.d_out != d_out:
        raise ConfigError(
            f"The autoencoder of {item.hook_name!r} decodes to {autoencoder.d_out} numbers, "
            f"of which this model has {d_out} there: it is another model's."
        )
    _check_finite(item)
    idxs = checked_latents(autoencoder.n_latents, kept)
    autoencoder = autoencoder.to(like.device, like.dtype)
    if autoencoder.is_separable:
        return RowLatents(autoencoder.rows(idxs)), idxs
    return WholeLatents(autoencoder, idxs, like, d_out), idxs


def _check_finite(item: Placed) -> None:
    """Raise ModelError if an autoencoder of ours has weights that are no numbers."""
    weights = {name: w for name, w in vars(item.autoencoder).items() if t.is_tensor(w)}
    damaged = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if damaged:
        raise ModelError(
            f"The autoencoder of {item.hook_name!r} is damaged: its {' and '.join(damaged)} "
            "hold NaN or infinity."
        )


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
    latents, idxs = _latents(model, item, model.cfg.d_model, kept)
    site = _mlp_input_site(model, block, hook, _written_site(model, block, "mlp", out))
    skip = getattr(item.autoencoder, "skip_weight", None)
    if skip is not None:
        skip = skip.detach().to(next(model.parameters()))
    return Splice(site, latents, idxs, skip=skip)


def _mlp_input_site(
    model: TransformerBridge, block: int, hook: str, site: SpliceSite
) -> SpliceSite:
    """The same, of latents (or neurons) that read the residual stream where the MLP does."""
    owner: Any = model.blocks[block]
    is_shared = mlp_shares_norm(owner)
    norm = norm_before_heads(owner) if is_shared else _norm_before_mlp(owner)
    is_before = hook in ("hook_mlp_in", "ln2.hook_in", "hook_resid_mid") or norm is None
    normalized: str | None = None
    inner: Module | None = None
    form: Norm | None = None
    if norm is not None and not is_before:
        inner, form = norm.original_component, closed_form(norm)
    if norm is not None and hook == "ln2.hook_normalized":
        facts = norm_facts(norm)
        form = type(facts)(facts.centred, facts.epsilon, lambda: 1.0, lambda: None)
        inner = BareNorm(form)
        normalized = hook
    of_norm = "ln1" if is_shared else "ln2"
    reads = hook.replace("ln2", of_norm)
    if is_before or normalized is not None:
        reads = "mlp.hook_in" if norm is None else f"{of_norm}.hook_in"
    # The residual stream, where patches of the MLP's own input do not show.
    shows = class_of(owner).mlp_input
    if is_shared:
        shows = "attn.hook_in" if norm is None else "ln1.hook_in"
    site = replace(
        site,
        name=f"MLP {block}",
        # What the MLP really reads, also where the error's input is patched.
        reads=Shown(f"blocks.{block}.{reads}", by_position=_by_position(owner)),
        shows=f"blocks.{block}.{shows}",
        norm=inner,
        closed_form=form,
        normalized=(
            None if normalized is None else f"blocks.{block}.{of_norm}.hook_normalized"
        ),
    )
    if not is_shared:
        return site
    read_by_mlp = Identity() if norm is None else norm.original_component
    return replace(site, enters=(f"blocks.{block}.mlp.hook_in", read_by_mlp))


def _norm_before_mlp(block: Any) -> NormalizationBridge | None:
    """The norm through which a block's MLP alone reads the residual stream, if any."""
    norm = block.submodules.get("ln2")
    is_one = isinstance(norm, NormalizationBridge)
    return norm if is_one and not isinstance(norm.original_component, Identity) else None


def _neurons(
    model: TransformerBridge, item: Neurons, kept: Sequence[int] | None
) -> Splice:
    if item.block not in range(model.cfg.n_layers):
        raise ConfigError(
            f"There are no neurons of block {item.block}; the model has "
            f"{model.cfg.n_layers} blocks, from 0 on."
        )
    block, hook = item.block, "mlp.hook_post"
    mlp = _mlp(model, block)
    output_weight = partial(_output_weight, model, block)
    idxs = checked_latents(output_weight().shape[0], kept)
    site = _written_site(model, block, "mlp", hook)
    # Their directions are rows of that matrix already.
    post_norm = site.post_norm
    scale = residual_scale(model.blocks[block])
    site = replace(
        site,
        name=f"MLP {block}",
        reads=_shown(model, block, hook),
        linear=_linear(model, block, hook),
        to_written=None if scale == 1.0 else partial(_scaled, scale, None),
        post_norm=None if post_norm is None else replace(post_norm, to_sum=None),
    )
    if not item.as_destinations:
        return Splice(site, NeuronLatents(idxs, output_weight), idxs, "Neuron")
    into, combine = _into_neurons(model, mlp, idxs)
    latents = NeuronLatents(idxs, output_weight, into, combine)
    site = _mlp_input_site(model, block, "mlp.hook_in", site)
    return Splice(site, latents, idxs, "Neuron")


def _into_neurons(
    model: TransformerBridge, mlp: Any, idxs: Sequence[int]
) -> tuple[list[Module], Callable[[Sequence[Tensor]], Tensor]]:
    """The linear maps into neurons, and their activations from what these give."""
    inner = mlp.original_component
    names = ("act", "act_fn", "activation_fn", "activation", "gelu_impl")
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
