"""Where the nodes of TransformerLens models can be seen and patched.

Most nodes are at hook points. What single heads read and write, TransformerLens computes
only on demand (`set_use_split_qkv_input`, `set_use_attn_result`), and then for all heads,
at 40 % of the cost of a forward pass of GPT-2. It follows from the weights: where queries,
keys and values are plain linear maps of one normed input, and the output one of all heads'
values, the engine computes it itself, for the heads that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    LinearBridge,
    NormalizationBridge,
    PositionEmbeddingsAttentionBridge,
)

from auto_circuit import devices
from auto_circuit.errors import ModelError
from auto_circuit.model_utils.block_facts import (
    by_position,
    class_of,
    has_residual_scale,
    in_out,
    inner_linear,
    mlp_linears,
    mlp_shares_norm,
    norm_after_heads,
    norm_before_heads,
    projects_heads,
    residual_scale,
    whole_mlp,
)
from auto_circuit.model_utils.model_adapter import HeadInputs, Norm, Port, SrcSite
from auto_circuit.model_utils.ungrouped_heads import (
    UngroupedLinear,
    keeps_heads_apart,
    norm_weight,
    ungrouped_attention,
)
from auto_circuit.modules import replaced_attribute, replaced_forward
from auto_circuit.types import HeadInput
from auto_circuit.utils.user_hooks import Bypassed
from auto_circuit.weights import has_packed_weights

KNOWN_NORMS = ("RMSNorm", "CohereLayerNorm")
"""Ends of names of Hugging Face classes that compute what `Norm` says."""

NORM_HOOKS = ("hook_scale", "hook_normalized", "hook_out")
HEAD_INPUTS = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in")

# Exactly these classes compute attention in TransformerLens's own code.
PLAIN_ATTENTIONS = (
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)


def n_kv_heads(model: TransformerBridge) -> int:
    """The number of key-value heads: that of heads, or fewer (grouped-query)."""
    return getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads


def has_mlps(model: TransformerBridge) -> bool:
    """Do the blocks have MLPs? (Attention-only models do not.)"""
    return "mlp" in model.blocks[0].submodules


def has_post_norm(model: TransformerBridge) -> bool:
    """Is attention's output normalised before it is added, as in Gemma 2?"""
    return "ln1_post" in model.blocks[0].submodules


def heads_add_up(model: TransformerBridge) -> bool:
    """Can what attention adds to the residual stream be told apart by heads?

    Where it is normalised before, only if that norm is known: a head then writes its share
    of the sum that the norm divides (see `_normed_heads`). Else the source is the layer.
    """
    if not has_post_norm(model):
        return True
    norms = [norm_after_heads(block) for block in model.blocks]
    are_known = all(norm is not None and _is_known_norm(norm) for norm in norms)
    return are_known and heads_by_weights(model)


def hook_point(model: TransformerBridge, name: str) -> Module:
    """A hook point. Raises ModelError if the model has none of that name."""
    found = _registered_hook_point(model, name)
    if found is not None:
        return found
    try:
        return model.hook_dict[name]
    except KeyError:
        raise ModelError(
            f"This {model.cfg.architecture} model has no hook point {name!r}, "
            "which its computation graph needs. Its architecture is not supported as it is: "
            "it needs a ModelAdapter of its own."
        ) from None


def _registered_hook_point(model: Any, name: str) -> Module | None:
    """`model.hook_dict[name]`, without the whole dictionary, which takes milliseconds."""
    try:
        aliases = {**model.hook_aliases, **model._collect_hook_aliases_from_registry()}
        target = aliases.get(name, name)
        target = target[0] if isinstance(target, list) else target
        return model._hook_registry.get(target)
    except AttributeError:  # another version of TransformerLens
        return None


# ------------------------------------------------------------------- heads by weights


def heads_by_weights(model: TransformerBridge) -> bool:
    """Are the model's heads told apart by weights? One answer for all of its blocks.

    The switches, the other way, are the whole model's.
    """
    return all(projects_heads(block.attn) for block in model.blocks)


def has_norm_over_heads(attention: Any, head_input: HeadInput | None) -> bool:
    """Does a norm run over this input's queries or keys of all heads together?

    Then one head's input changes what all heads write. (A norm that has weights for each
    head, in two dimensions, runs over each alone.) None: over any of a head's inputs.
    """
    norms = {
        "query": ["q_norm"],
        "key": ["k_norm"],
        "value": [],
        None: ["q_norm", "k_norm"],
    }
    weights = [norm_weight(attention, name) for name in norms[head_input]]
    d_head = attention.config.d_head
    is_over_inputs = any(
        w is not None and w.ndim == 1 and len(w) > d_head for w in weights
    )
    return is_over_inputs or _has_norm_before_output(attention)


def _has_norm_before_output(attention: Any) -> bool:
    """Does attention norm what its heads read, before its output (BitNet)?"""
    of_inputs = {"q_norm", "k_norm"} & {*attention.submodules}
    known = {attention.submodules[name].original_component for name in of_inputs}
    inside = {module for norm in known for module in norm.modules()}
    return any(
        "Norm" in type(module).__name__
        and not isinstance(module, NormalizationBridge)
        and module not in inside
        for module in attention.original_component.modules()
    )


def norm_facts(bridge: NormalizationBridge) -> Norm:
    """A TransformerLens norm in closed form."""
    gain, bias = partial(_norm_gain, bridge), partial(_norm_bias, bridge)
    return Norm(not bridge.uses_rms_norm, _epsilon(bridge), gain, bias)


CONSTANT_SCALE = "_auto_circuit_constant_scale"


@contextmanager
def constant_scale(bridge: NormalizationBridge) -> Iterator[None]:
    """Inside, no gradient flows through a norm's scale into what heads write.

    For backward modifiers, which do the same to the norm itself.
    """
    with replaced_attribute(bridge, CONSTANT_SCALE, True):
        yield


def _norm_gain(bridge: NormalizationBridge) -> Tensor | float:
    weight: Any = getattr(bridge.original_component, "weight", None)
    if weight is None:
        return 1.0
    weight = 1.0 + weight if bridge.uses_weight_offset else weight
    return 1.0 if _is_everywhere(1, weight) else weight


def _norm_bias(bridge: NormalizationBridge) -> Tensor | None:
    weight: Any = getattr(bridge.original_component, "bias", None)
    return None if weight is None or _is_everywhere(0, weight) else weight


def _is_everywhere(value: int, weight: Tensor) -> bool:
    """As if folded into the next weights. (To look would make a GPU wait.)"""
    return weight.device.type == "cpu" and bool((weight == value).all())


def closed_form(bridge: NormalizationBridge) -> Norm | None:
    """The facts about a norm, if it is one whose form is known."""
    return norm_facts(bridge) if _is_known_norm(bridge) else None


def _is_known_norm(bridge: NormalizationBridge) -> bool:
    kind = type(bridge.original_component)
    return kind is LayerNorm or kind.__name__.endswith(KNOWN_NORMS)


def _epsilon(norm: NormalizationBridge) -> float:
    for name in ("eps", "variance_epsilon"):
        epsilon = getattr(norm.original_component, name, None)
        if epsilon is not None:
            return float(epsilon)
    return float(getattr(norm.config, "eps", 1e-5))


# ----------------------------------------------------------------------- sources, ports


def src_site(model: Module, module_name: str) -> SrcSite:
    """Where the sources of a module are seen."""
    assert isinstance(model, TransformerBridge)
    *_, hook = module_name.rpartition(".")
    block: Any = model.get_submodule(".".join(module_name.split(".")[:2]))
    if hook == "hook_result" and heads_by_weights(model):
        return _heads_site(block)
    if has_residual_scale(block) and hook in ("hook_attn_out", "hook_mlp_out"):
        # The block's own hook point fires only for TransformerLens's hooks.
        part = block.attn if hook == "hook_attn_out" else block.mlp
        scale = residual_scale(block)
        return SrcSite(
            part.hook_out, transform=None if scale == 1.0 else lambda out: scale * out
        )
    if class_of(block).mlp_by_token and hook == "hook_mlp_out":
        shown = hook_point(model, module_name)
        return SrcSite(shown, transform=partial(by_position, block))
    return SrcSite(hook_point(model, module_name))


def _heads_site(block: Any) -> SrcSite:
    """What the heads of a block write, by the weights of attention's output."""
    attention, norm, scale = block.attn, norm_after_heads(block), residual_scale(block)
    output = inner_linear(attention, "o")
    if norm is not None:
        n_heads = attention.config.n_heads
        transform = partial(_normed_heads, norm, output, n_heads)
        return SrcSite(attention.o.hook_in, transform=transform)

    def projection(n_heads: int) -> Float[Tensor, "{n_heads} d_head d_model"]:
        weights = in_out(output).unflatten(0, (n_heads, -1))
        return weights if scale == 1.0 else scale * weights

    return SrcSite(attention.o.hook_in, projection)


def _normed_heads(
    bridge: NormalizationBridge,
    output: Any,
    n_heads: int,
    values: Float[Tensor, "batch seq _"],
) -> Float[Tensor, "batch seq {n_heads} d_model"]:
    """What each head adds, where the sum of all is normed: its share of that.

    `gain * centre(values_h @ weights_h + bias / H) / scale`, with the scale of the sum of
    all heads in the same run, and an equal share of the norm's bias. So the shares add up
    to what the layer adds, in any run.
    """
    norm, weights = norm_facts(bridge), in_out(output).unflatten(0, (n_heads, -1))
    heads = t.einsum("bshe,hed->bshd", values.unflatten(-1, (n_heads, -1)), weights)
    if output.bias is not None:
        heads = heads + output.bias / n_heads
    heads = norm.centre(heads)
    scale = norm.scale(heads.sum(2, keepdim=True))
    if vars(bridge).get(CONSTANT_SCALE, False):
        scale = scale.detach()
    shares = (heads / scale).to(values.dtype) * norm.gain()
    bias = norm.bias()
    return shares if bias is None else shares + bias / n_heads


def ports(
    model: Module,
    module_names: Sequence[str],
    separate_qkv: bool | None,
    ungroup: bool = False,
) -> tuple[Port, ...]:
    """Where the patches of all destinations enter.

    ungroup: with a key and a value for every query head; see `check_can_ungroup`.
    """
    assert isinstance(model, TransformerBridge)
    _wire_capture_hooks_again(model)
    by_weights = heads_by_weights(model)
    found: list[Port] = []
    for (block, is_one_port), group in groupby(module_names, key=partial(_kind, model)):
        names = tuple(group)
        if is_one_port and by_weights:
            found.append(_weights_port(model, block, names, ungroup))
            continue
        for name in names:
            reads_heads = name.endswith(HEAD_INPUTS)
            found += _split_ports(model, name) if reads_heads else [_port(model, name)]
    return tuple(replace(port, block=_block_idx(port)) for port in found)


def _wire_capture_hooks_again(model: TransformerBridge) -> None:
    """The next pass wires them to this model's own hook points.

    In a `copy.deepcopy` of a bridge they still lead to those of the original.
    """
    for block in model.blocks:
        tear_down = getattr(block, "_teardown_capture_hooks", None)
        if tear_down is not None:
            tear_down()


def _block_idx(port: Port) -> int:
    return int(port.dest_modules[0].split(".")[1])


def _kind(model: TransformerBridge, module_name: str) -> tuple[str, bool]:
    """(block, is this an input of its heads, or of an MLP with the same norm?)"""
    name, _, hook = module_name.rpartition(".")
    if hook == "hook_mlp_in":
        return name, mlp_shares_norm(model.get_submodule(name))
    return name, hook in HEAD_INPUTS


def _port(model: TransformerBridge, name: str) -> Port:
    block, _, hook = name.rpartition(".")
    if hook == "hook_resid_mid":
        # `hook_resid_mid` sees only what the MLP's norm reads. What changes the residual
        # stream itself is what attention adds to it.
        attention_out = hook_point(model, f"{block}.hook_attn_out")
        return Port((name,), attention_out, additive=True)
    if hook != "hook_mlp_in":
        return Port((name,), hook_point(model, name))
    owner: Any = model.get_submodule(block)
    facts = class_of(owner)
    shown = owner.get_submodule(facts.mlp_input)
    by_token = facts.mlp_by_token
    return Port((name,), shown, component=whole_mlp(owner), by_token=by_token)


def _weights_port(
    model: TransformerBridge, name: str, dests: tuple[str, ...], ungroup: bool
) -> Port:
    """All heads of a block, by the weights of their queries, keys and values.

    And its MLP, if that reads what the same norm gives.
    """
    block: Any = model.get_submodule(name)
    is_shared = f"{name}.hook_attn_in" in dests
    n_kv, n_heads = n_kv_heads(model), model.cfg.n_heads
    called = tuple(inner_linear(block.attn, part) for part in "qkv")
    n_queries = n_kv if is_shared else n_heads
    linears: tuple[tuple[Module, int], ...] = tuple(
        zip(called, (n_queries, n_kv, n_kv), strict=True)
    )
    norm = norm_before_heads(block)
    heads = HeadInputs(
        norm=None if norm is None else norm.original_component,
        closed_form=None if norm is None else closed_form(norm),
        linears=linears,
        share_rows=is_shared,
    )
    if ungroup and n_heads != n_kv:
        group = n_heads // n_kv
        query, *keys_values = called
        ungrouped = [UngroupedLinear(linear, n_kv, group) for linear in keys_values]
        heads = replace(
            heads,
            linears=tuple((linear, n_heads) for linear in (query, *ungrouped)),
            called=called,
            opened=partial(ungrouped_attention, block.attn, group),
        )
    residual = block.attn.hook_in if norm is None else norm.hook_in
    bypassed = _between(name, block) + _after_heads(name, block)
    if f"{name}.hook_mlp_in" in dests:
        heads = _with_mlp(heads, mlp_linears(block.mlp))
        bypassed += _before_mlp(name, block.mlp)
    return Port(dests, residual, heads=heads, bypassed=bypassed)


def _with_mlp(heads: HeadInputs, linears: tuple[Linear, ...]) -> HeadInputs:
    """The same, and an MLP that reads what the heads' norm gives."""
    return replace(
        heads,
        linears=(*heads.linears, *((linear, 1) for linear in linears)),
        n_mlp_linears=len(linears),
        called=None if heads.called is None else (*heads.called, *linears),
    )


def _before_mlp(name: str, mlp: Any) -> tuple[Bypassed, ...]:
    """The modules between a norm and the linear maps of an MLP that shares it."""
    places = [Bypassed(f"{name}.mlp", mlp, gives=False)]
    places.append(Bypassed(f"{name}.mlp.hook_in", mlp.hook_in))
    return (*places, *_around_linears(f"{name}.mlp", mlp, ("gate", "in")))


def _after_heads(name: str, block: Any) -> tuple[Bypassed, ...]:
    """The modules between the heads' values and what a norm makes of their sum."""
    attention, norm = block.attn, cast(Any, norm_after_heads(block))
    output = inner_linear(attention, "o")
    places = [Bypassed(f"{name}.attn.o", output, gives=norm is not None)]
    if norm is not None:
        places += [
            Bypassed(f"{name}.attn.o.hook_out", attention.o.hook_out),
            Bypassed(f"{name}.attn.hook_out", attention.hook_out),
            Bypassed(f"{name}.ln1_post", norm, gives=False),
            Bypassed(f"{name}.ln1_post", norm.original_component),
        ]
        hooks = ("hook_in", "hook_scale", "hook_normalized")
        places += [Bypassed(f"{name}.ln1_post.{h}", getattr(norm, h)) for h in hooks]
    return tuple(places)


def _between(name: str, block: Any) -> tuple[Bypassed, ...]:
    """The modules between the residual stream and the linear maps of heads."""
    norm, attention, places = norm_before_heads(block), block.attn, []
    if norm is not None:
        modules = [norm, norm.original_component]
        places += [Bypassed(f"{name}.ln1", module) for module in modules]
        places += [
            Bypassed(f"{name}.ln1.{hook}", getattr(norm, hook)) for hook in NORM_HOOKS
        ]
        places.append(Bypassed(f"{name}.attn.hook_in", attention.hook_in))
    places.append(Bypassed(f"{name}.attn", attention, gives=False))
    return (*places, *_around_linears(f"{name}.attn", attention, "qkv"))


def _around_linears(name: str, part: Any, linears: Iterable[str]) -> Iterator[Bypassed]:
    """What linear maps of a part of a block are given."""
    for linear in linears:
        bridge, where = getattr(part, linear, None), f"{name}.{linear}"
        if isinstance(bridge, LinearBridge):
            modules = [bridge, bridge.original_component]
            yield from (Bypassed(where, module, gives=False) for module in modules)
            yield Bypassed(f"{where}.hook_in", bridge.hook_in)


def check_can_ungroup(model: TransformerBridge) -> None:
    """Raise ModelError unless query heads can have keys and values of their own."""
    problem = None
    if not heads_by_weights(model):
        problem = "its heads cannot be told apart by their weights"
    elif any(type(block.attn) is AttentionBridge for block in model.blocks):
        problem = "Hugging Face's own code tells which heads share a key"
    elif not all(keeps_heads_apart(block.attn) for block in model.blocks):
        problem = "a norm over keys has weights for each key-value head, or mixes them"
    if problem:
        raise ModelError(
            f"The key-value heads of this {model.cfg.architecture} model cannot be "
            f"ungrouped (`ungroup=True`): {problem}. Use `ungroup=False`."
        )


def check_shows_attention(model: TransformerBridge) -> None:
    """Raise ModelError unless keys and values can be seen where heads read them."""
    attentions = [(i, block.attn) for i, block in enumerate(model.blocks)]
    kinds = [(i, type(attn)) for i, attn in attentions if not _shows_attention(attn)]
    if kinds or not heads_by_weights(model):
        problem = "its heads cannot be told apart by their weights"
        if kinds:
            problem = (
                f"`blocks.{kinds[0][0]}.attn` is a {kinds[0][1].__name__}, which keeps its "
                "scores to itself"
            )
        raise ModelError(
            f"This {model.cfg.architecture} model does not show what its heads read across "
            f"positions (`crossing=True`): {problem}. Use `crossing=False`."
        )


def _shows_attention(attention: Any) -> bool:
    """Does it compute attention in TransformerLens's own code, as `read_attention` knows it?

    Subclasses whose `rope_optional` is set leave out rotary positions in some blocks, and
    change nothing else (Cohere 2, EXAONE 4, SmolLM 3).
    """
    return type(attention) in PLAIN_ATTENTIONS or (
        isinstance(attention, PositionEmbeddingsAttentionBridge)
        and bool(getattr(attention, "rope_optional", False))
    )


def _split_ports(model: TransformerBridge, name: str) -> list[Port]:
    """Heads whose inputs TransformerLens keeps apart (see `open_sites`)."""
    block, _, hook = name.rpartition(".")
    owner: Any = model.get_submodule(block)
    bypassed, norm = _between(block, owner), norm_before_heads(owner)
    if norm is not None:
        # TransformerLens forks what is given to the norm.
        bypassed += (Bypassed(f"{block}.ln1.hook_in", norm.hook_in),)
    n_kv = n_kv_heads(model)
    if hook != "hook_attn_in" or n_kv == model.cfg.n_heads:
        return [Port((name,), hook_point(model, name), bypassed=bypassed)]
    group = model.cfg.n_heads // n_kv
    query_rows = tuple(head // group for head in range(model.cfg.n_heads))
    return [
        Port(
            (name,),
            hook_point(model, f"{block}.hook_{part}_input"),
            rows,
            bypassed=bypassed,
        )
        for part, rows in (("q", query_rows), ("k", None), ("v", None))
    ]


# --------------------------------------------------------------------------- switches


def _switches(
    model: TransformerBridge, separate_qkv: bool | None, by_weights: bool
) -> dict[str, bool]:
    """TransformerLens computes per-head results and inputs only when asked to."""
    split = bool(separate_qkv) or n_kv_heads(model) != model.cfg.n_heads
    return {
        "use_attn_result": not by_weights and not has_post_norm(model),
        "use_split_qkv_input": not by_weights and split,
        "use_attn_in": not by_weights and not split,
        "use_hook_mlp_in": has_mlps(model),
    }


def _check_no_hooks_of_heads(model: TransformerBridge) -> None:
    """Raise ModelError for hooks that would never be called, without a word."""
    for idx, block in enumerate(model.blocks):
        for name in (*HEAD_INPUTS, "hook_result"):
            if getattr(block.attn, name)._forward_hooks:
                raise ModelError(
                    f"There is a hook at `blocks.{idx}.attn.{name}`, which this model does "
                    "not pass while edges are patched or activations recorded: inputs and "
                    "outputs of single heads are computed from the weights. Remove it "
                    "(`reset_hooks`), or hook `hook_q`, `hook_k`, `hook_v` or `hook_z`."
                )


def _set_switches(model: TransformerBridge, switches: dict[str, bool]) -> None:
    # Off before on: TransformerLens refuses two ways of splitting at the same time.
    for switch, is_on in sorted(switches.items(), key=lambda item: item[1]):
        if bool(getattr(model.cfg, switch, False)) != is_on:
            getattr(model, f"set_{switch}")(is_on)


HEAD_SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
"""What makes TransformerLens's hook points of single heads, and of MLPs' inputs, fire."""


def switch_on_heads(model: TransformerBridge) -> None:
    """Let all hook points of single heads and of MLPs' inputs fire, where there are any."""
    are_packed = has_packed_weights(model)
    for switch in HEAD_SWITCHES:
        if are_packed and switch != "use_hook_mlp_in":
            continue  # TransformerLens reads no packed weights
        if switch == "use_split_qkv_input" and getattr(model.cfg, "use_attn_in", False):
            continue  # the other way, which somebody has chosen
        with suppress(NotImplementedError):
            _set_switches(model, {switch: True})


@contextmanager
def heads_switched_on(model: Module) -> Iterator[None]:
    """Inside, the hook points of single heads fire. Restores the model's switches."""
    if not isinstance(model, TransformerBridge):
        yield
        return
    before = {name: bool(getattr(model.cfg, name, False)) for name in HEAD_SWITCHES}
    try:
        switch_on_heads(model)
        yield
    finally:
        _set_switches(model, before)


@contextmanager
def open_sites(model: Module, separate_qkv: bool | None) -> Iterator[None]:
    """Inside, every site is passed by a forward pass. Restores the model's switches."""
    assert isinstance(model, TransformerBridge)
    by_weights = heads_by_weights(model)
    if by_weights:
        _check_no_hooks_of_heads(model)
    switches = _switches(model, separate_qkv, by_weights)
    before = {switch: bool(getattr(model.cfg, switch, False)) for switch in switches}
    inside = (_without_zero_bias, _plain_norms, _mlps_by_linears)
    with ExitStack() as stack:
        for context in inside:
            stack.enter_context(context(model))
        try:
            try:
                _set_switches(model, switches)
            except NotImplementedError as error:
                raise _hidden_heads(model, error) from error
            yield
        finally:
            _set_switches(model, before)


def _hidden_heads(model: TransformerBridge, error: Exception) -> ModelError:
    architecture = model.cfg.architecture
    what_to_do = (
        "Make it by `auto_circuit.model_utils.transformer_lens_utils.native_bridge`."
        if architecture == "TransformerLensNative"
        else "So it is not supported as it is: it needs a ModelAdapter of its own."
    )
    return ModelError(
        f"The attention of this {architecture} model does not expose its heads "
        f"({str(error).rstrip('.')}). {what_to_do}"
    )


@contextmanager
def _mlps_by_linears(model: TransformerBridge) -> Iterator[None]:
    """Inside, MLPs that share a norm with heads call their linear maps as modules.

    Where weights were processed, TransformerLens reads these maps' weights instead.
    """
    with ExitStack() as stack:
        for block in model.blocks:
            if mlp_shares_norm(block):
                mlp: Any = block.mlp
                stack.enter_context(
                    replaced_attribute(mlp, "_use_processed_weights", False)
                )
        yield


@contextmanager
def _plain_norms(model: TransformerBridge) -> Iterator[None]:
    """Inside, norms are computed by their Hugging Face modules alone.

    TransformerLens computes them a second time, step by step, for hooks on their scale.
    Where nobody has hooks there, that only costs time.
    """
    inside = [norm for block in model.blocks for norm in block.submodules.values()]
    with ExitStack() as stack:
        for norm in (*inside, getattr(model, "ln_final", None)):
            if isinstance(norm, NormalizationBridge) and _can_be_plain(norm):
                stack.enter_context(replaced_forward(norm, partial(_plain_norm, norm)))
        yield


def _can_be_plain(norm: NormalizationBridge) -> bool:
    weight = getattr(norm.original_component, "weight", None)
    # In half precision the two ways round differently.
    return _is_known_norm(norm) and (
        weight is None or weight.dtype in (t.float32, t.float64)
    )


def _plain_norm(norm: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    hooks = (norm.hook_scale, norm.hook_normalized)
    if any(hook._forward_hooks or hook._backward_hooks for hook in hooks):
        return type(norm).forward(norm, hidden_states, **kwargs)  # type: ignore[no-any-return]
    return norm.hook_out(norm.original_component(norm.hook_in(hidden_states)))


@contextmanager
def _without_zero_bias(model: TransformerBridge) -> Iterator[None]:
    """TransformerLens gives every unembedding a bias, mostly of zeros.

    To add it takes as long as half of the unembedding itself (at 50,000 words).
    """
    unembed: Any = model.unembed
    linear: Any = unembed.original_component
    bias = linear._buffers.get("bias")
    if bias is None or bias.is_meta or bias.any():
        yield
        return
    with replaced_forward(linear, partial(_without_bias, linear)):
        yield


def _without_bias(
    linear: Any, x: Float[Tensor, "... d_model"]
) -> Float[Tensor, "... vocab"]:
    # What accelerate does to bring inputs to a module's device, it does in its forward.
    here = devices.moved(x, devices.device_of(linear.weight))
    return t.nn.functional.linear(here, linear.weight)
