"""Where the nodes of TransformerLens models can be seen and patched.

Most nodes are at hook points. What single heads read and write, TransformerLens computes
only on demand (`set_use_split_qkv_input`, `set_use_attn_result`), and then for all heads,
at 40 % of the cost of a forward pass of GPT-2. It follows from the weights: where queries,
keys and values are plain linear maps of one normed input, and the output one of all heads'
values, the engine computes it itself, for the heads that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch as t
from torch import Tensor
from torch.nn import Identity, LayerNorm, Linear, Module
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    GatedMLPBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformers.pytorch_utils import Conv1D

from auto_circuit.errors import ModelError
from auto_circuit.model_utils.model_adapter import HeadInputs, Norm, Port, SrcSite
from auto_circuit.model_utils.ungrouped_heads import (
    UngroupedLinear,
    keeps_heads_apart,
    norm_weight,
    ungrouped_attention,
)
from auto_circuit.modules import replaced_forward
from auto_circuit.types import HeadInput
from auto_circuit.utils.user_hooks import Bypassed

NORM_HOOKS = ("hook_scale", "hook_normalized", "hook_out")
HEAD_INPUTS = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in")

# Exactly these classes compute attention in TransformerLens's own code.
PLAIN_ATTENTIONS = (
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)


PLAIN_MLPS = (MLPBridge, GatedMLPBridge)


def n_kv_heads(model: TransformerBridge) -> int:
    """The number of key-value heads: that of heads, or fewer (grouped-query)."""
    return getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads


def has_mlps(model: TransformerBridge) -> bool:
    """Do the blocks have MLPs? (Attention-only models do not.)"""
    return "mlp" in model.blocks[0].submodules


def has_post_norm(model: TransformerBridge) -> bool:
    """Is attention's output normalised before it is added, as in Gemma 2?

    Then a single head's contribution is not defined, and the source is the layer.
    """
    return "ln1_post" in model.blocks[0].submodules


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
            "which its computation graph needs. Its architecture is not supported."
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


def projects_heads(attention: Any) -> bool:
    """Does what single heads read and write follow from the weights?"""
    if type(attention) not in PLAIN_ATTENTIONS:
        return False
    if getattr(attention, "_result_contribution_scale", 1.0) != 1.0:
        return False
    config = attention.config
    n_kv = getattr(config, "n_key_value_heads", None) or config.n_heads
    widths = {"q": config.n_heads, "k": n_kv, "v": n_kv}
    output = _inner_linear(attention, "o")
    return (
        all(_has_width(attention, name, n) for name, n in widths.items())
        and type(output) in (Linear, Conv1D)
        and _in_out(output).shape[0] == config.n_heads * config.d_head
    )


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
    return any(w is not None and w.ndim == 1 and len(w) > d_head for w in weights)


def _has_width(attention: Any, name: str, n_heads: int) -> bool:
    linear = _inner_linear(attention, name)
    return type(linear) is Linear and (
        linear.out_features == n_heads * attention.config.d_head
    )


def _inner_linear(attention: Any, name: str) -> Any:
    bridge = getattr(attention, name, None)
    return bridge.original_component if type(bridge) is LinearBridge else None


def _in_out(linear: Any) -> Tensor:
    """The weights as [input output]: GPT-2's Conv1D has them so, a Linear turned."""
    return linear.weight if isinstance(linear, Conv1D) else linear.weight.T


def norm_facts(bridge: NormalizationBridge) -> Norm:
    """A TransformerLens norm in closed form."""
    gain, bias = partial(_norm_gain, bridge), partial(_norm_bias, bridge)
    return Norm(not bridge.uses_rms_norm, _epsilon(bridge), gain, bias)


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
    return kind is LayerNorm or kind.__name__.endswith("RMSNorm")


def _epsilon(norm: NormalizationBridge) -> float:
    for name in ("eps", "variance_epsilon"):
        epsilon = getattr(norm.original_component, name, None)
        if epsilon is not None:
            return float(epsilon)
    return float(getattr(norm.config, "eps", 1e-5))


def _norm_before_heads(block: Any) -> NormalizationBridge | None:
    norm = block.submodules.get("ln1")
    is_one = isinstance(norm, NormalizationBridge)
    return norm if is_one and not isinstance(norm.original_component, Identity) else None


# ----------------------------------------------------------------------- sources, ports


def src_site(model: Module, module_name: str) -> SrcSite:
    """Where the sources of a module are seen."""
    assert isinstance(model, TransformerBridge)
    if not module_name.endswith(".attn.hook_result"):
        return SrcSite(hook_point(model, module_name))
    if not heads_by_weights(model):
        return SrcSite(hook_point(model, module_name))
    attention: Any = model.get_submodule(module_name.rpartition(".")[0])
    output = attention.o.original_component
    return SrcSite(
        attention.o.hook_in, lambda n_heads: _in_out(output).unflatten(0, (n_heads, -1))
    )


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
    for (block, reads_heads), group in groupby(module_names, key=_kind):
        names = tuple(group)
        if not reads_heads:
            found += [_port(model, name) for name in names]
        elif by_weights:
            found.append(_weights_port(model, block, names, ungroup))
        else:
            found += [port for name in names for port in _split_ports(model, name)]
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


def _kind(module_name: str) -> tuple[str, bool]:
    """(block, are its heads' inputs meant?)"""
    block, _, hook = module_name.rpartition(".")
    return block, hook in HEAD_INPUTS


def _port(model: TransformerBridge, name: str) -> Port:
    block, _, hook = name.rpartition(".")
    if hook == "hook_resid_mid":
        # `hook_resid_mid` sees only what the MLP's norm reads. What changes the residual
        # stream itself is what attention adds to it.
        attention_out = hook_point(model, f"{block}.hook_attn_out")
        return Port((name,), attention_out, additive=True)
    component = None
    if hook == "hook_mlp_in":
        mlp: Any = model.get_submodule(f"{block}.mlp")
        component = mlp.original_component if type(mlp) in PLAIN_MLPS else None
    return Port((name,), hook_point(model, name), component=component)


def _weights_port(
    model: TransformerBridge, name: str, dests: tuple[str, ...], ungroup: bool
) -> Port:
    """All heads of a block, by the weights of their queries, keys and values."""
    block: Any = model.get_submodule(name)
    is_shared = dests == (f"{name}.hook_attn_in",)
    n_kv, n_heads = n_kv_heads(model), model.cfg.n_heads
    called = tuple(_inner_linear(block.attn, part) for part in "qkv")
    n_queries = n_kv if is_shared else n_heads
    linears: tuple[tuple[Module, int], ...] = tuple(
        zip(called, (n_queries, n_kv, n_kv), strict=True)
    )
    norm = _norm_before_heads(block)
    heads = HeadInputs(
        norm=None if norm is None else norm.original_component,
        closed_form=None if norm is None else closed_form(norm),
        linears=linears,
        share_rows=is_shared,
    )
    if ungroup:
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
    bypassed = _between(name, block)
    if not has_post_norm(model):
        output = _inner_linear(block.attn, "o")
        bypassed += (Bypassed(f"{name}.attn.o", output, gives=False),)
    return Port(dests, residual, heads=heads, bypassed=bypassed)


def _between(name: str, block: Any) -> tuple[Bypassed, ...]:
    """The modules between the residual stream and the linear maps of heads."""
    norm, attention, places = _norm_before_heads(block), block.attn, []
    if norm is not None:
        modules = [norm, norm.original_component]
        places += [Bypassed(f"{name}.ln1", module) for module in modules]
        places += [
            Bypassed(f"{name}.ln1.{hook}", getattr(norm, hook)) for hook in NORM_HOOKS
        ]
        places.append(Bypassed(f"{name}.attn.hook_in", attention.hook_in))
    places.append(Bypassed(f"{name}.attn", attention, gives=False))
    for part in "qkv":
        bridge, where = getattr(attention, part, None), f"{name}.attn.{part}"
        if isinstance(bridge, LinearBridge):
            modules = [bridge, bridge.original_component]
            places += [Bypassed(where, module, gives=False) for module in modules]
            places.append(Bypassed(f"{where}.hook_in", bridge.hook_in))
    return tuple(places)


def check_can_ungroup(model: TransformerBridge) -> None:
    """Raise ModelError unless query heads can have keys and values of their own."""
    problem = None
    if not heads_by_weights(model):
        problem = "its heads cannot be told apart by their weights"
    elif not all(keeps_heads_apart(block.attn) for block in model.blocks):
        problem = "a norm over keys has weights for each key-value head, or mixes them"
    if problem:
        raise ModelError(
            f"The key-value heads of this {model.cfg.architecture} model cannot be "
            f"ungrouped (`ungroup=True`): {problem}. Use `ungroup=False`."
        )


def _split_ports(model: TransformerBridge, name: str) -> list[Port]:
    """Heads whose inputs TransformerLens keeps apart (see `open_sites`)."""
    block, _, hook = name.rpartition(".")
    owner: Any = model.get_submodule(block)
    bypassed, norm = _between(block, owner), _norm_before_heads(owner)
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
    for switch in HEAD_SWITCHES:
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
    with _without_zero_bias(model.unembed), _plain_norms(model):
        try:
            try:
                _set_switches(model, switches)
            except NotImplementedError as error:
                raise ModelError(
                    f"The attention of this {model.cfg.architecture} model does not "
                    f"expose its heads ({error}). For TransformerLens's own models use "
                    "`auto_circuit.model_utils.transformer_lens_utils.native_bridge`."
                ) from error
            yield
        finally:
            _set_switches(model, before)


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
def _without_zero_bias(unembed: Any) -> Iterator[None]:
    """TransformerLens gives every unembedding a bias, mostly of zeros.

    To add it takes as long as half of the unembedding itself (at 50,000 words).
    """
    linear: Any = unembed.original_component
    bias = linear._buffers.get("bias")
    if bias is None or bias.is_meta or bias.any():
        yield
        return
    with replaced_forward(linear, lambda x: t.nn.functional.linear(x, linear.weight)):
        yield
