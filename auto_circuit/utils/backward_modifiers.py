"""Other backward passes: gradients that explain better than the true ones.

A gradient says what an infinitely small change does; attribution asks about a change to
another prompt's activations. Where a model saturates (a sharp attention pattern, a
normalisation that cancels what it is given, a flat activation function) the two differ,
and rules for the backward pass close part of the gap. The context managers here change
how gradients flow and nothing else: forward values are what they were. Put one around
any gradient-based algorithm:

    with gim_backward(model):
        scores = edge_attribution_patching_prune_scores(model, loader, None)

They work on TransformerLens models, by hooks on the norms, the attention patterns and the
MLPs. Each hook returns its input's value with the gradient of another function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Identity, Module
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
)

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.model_utils.features.spliced import SplicedTransformer
from auto_circuit.model_utils.transformer_lens_sites import (
    PLAIN_ATTENTIONS,
    constant_scale,
    norm_facts,
)
from auto_circuit.utils.patchable_model import PatchableModel

Hook = Callable[[Tensor], Tensor | None]
ROUNDING = 1e3
"""How many units in the last place of the largest number two ways of computing differ."""


@checked
@contextmanager
def gim_backward(
    model: PatchableModel, softmax_temperature: float = 2.0
) -> Iterator[None]:
    """Inside, gradients flow by the rules of gradient interaction modifications (GIM).

    - The softmax of attention has the gradient that it would have at
      `softmax_temperature`, without the factor 1/temperature: where one key gets all the
      attention, the others still count.
    - The scale of layer norm and RMS norm is a constant.
    - A product's gradient is shared between its factors: 1/2 each for the attention
      pattern and the values, and for the gate of a gated MLP and what it gates; another
      1/2 for queries and keys (so 1/4 in all).

    Forward values do not change. On exit everything is as it was. Raises ModelError for
    models with parts whose inside hooks cannot reach (mixtures of experts, attention sinks,
    attention in Hugging Face's own code, as GPT-J's), and ConfigError for models that are
    not TransformerLens models, and for a temperature that is not above 0.

    Source: arXiv 2505.17630.
    """
    if softmax_temperature <= 0:
        raise ConfigError(
            f"`softmax_temperature` is {softmax_temperature}; expected a number above 0 "
            "(the paper's is 2)."
        )
    parts = _parts(model, "gim_backward", changes_attention=True)
    with ExitStack() as stack:
        for norm in parts.norms:
            _freeze_norm_scale(stack, norm)
        for attention in parts.attentions:
            _soften_softmax(stack, attention, softmax_temperature)
            _hook(stack, attention.o.hook_in, partial(_scale_gradient, factor=0.5))
        for mlp in parts.mlps:
            if _is_gated(mlp):
                _hook(stack, mlp.out.hook_in, partial(_scale_gradient, factor=0.5))
        yield


@checked
@contextmanager
def relp_backward(
    model: PatchableModel, freeze_attention_patterns: bool = False
) -> Iterator[None]:
    """Inside, gradients are the coefficients of layer-wise relevance propagation (RelP).

    - The scale of layer norm and RMS norm is a constant.
    - An activation function is multiplication with the constant f(x) / x.
    - The product of a gated MLP sends half of its gradient to either factor.

    freeze_attention_patterns: also take attention patterns as constants. Then no edge
        into a query or a key has a score. The paper's code leaves this off unless asked.

    Forward values do not change. On exit everything is as it was. Raises ModelError for
    models with parts whose inside hooks cannot reach (mixtures of experts; with
    `freeze_attention_patterns` also attention in Hugging Face's own code, as GPT-J's), and
    ConfigError for models that are not TransformerLens models.

    Source: arXiv 2508.21258.
    """
    parts = _parts(model, "relp_backward", freeze_attention_patterns)
    with ExitStack() as stack:
        for norm in parts.norms:
            _freeze_norm_scale(stack, norm)
        for mlp in parts.mlps:
            _linearize_activation(stack, mlp)
        if freeze_attention_patterns:
            for attention in parts.attentions:
                _hook(stack, attention.hook_pattern, Tensor.detach)
        yield


# --------------------------------------------------------------------- a model's parts


@dataclass(frozen=True)
class _Parts:
    norms: list[NormalizationBridge]
    attentions: list[Any]
    mlps: list[Any]


def _parts(model: PatchableModel, modifier: str, changes_attention: bool) -> _Parts:
    """What the hooks stand at. Raises ModelError if there are others."""
    bridge = model.wrapped_model
    if isinstance(bridge, SplicedTransformer):
        raise ConfigError(
            f"`{modifier}` has no rule for latents or neurons as nodes, which this spliced "
            "model has. Run the algorithm without it, or on the model without autoencoders."
        )
    if not isinstance(bridge, TransformerBridge):
        raise ConfigError(
            f"`{modifier}` changes how gradients pass attention, norms and MLPs of "
            f"TransformerLens models; this is a {type(bridge).__name__}. Run the "
            "algorithm without it, or on a model from `load_tl_model`."
        )
    norms = [
        module
        for module in bridge.modules()
        if isinstance(module, NormalizationBridge)
        and not isinstance(module.original_component, Identity)
    ]
    with_mlp = [block for block in bridge.blocks if "mlp" in block.submodules]
    parts = _Parts(
        norms=norms,
        attentions=[block.attn for block in bridge.blocks],
        mlps=[block.mlp for block in with_mlp],
    )
    unreached = _unreached(bridge, parts, changes_attention)
    if unreached:
        raise ModelError(
            f"`{modifier}` cannot reach inside of {', '.join(unreached)}, which this "
            f"{bridge.cfg.architecture} model has. It knows softmax attention without sinks "
            "that TransformerLens computes, MLPs with or without a gate, layer norm and "
            "RMS norm. Run the algorithm without it."
        )
    return parts


def _unreached(
    bridge: TransformerBridge, parts: _Parts, changes_attention: bool
) -> list[str]:
    """What hooks cannot reach inside of: the class names of modules."""
    hooked = {norm.original_component for norm in parts.norms}
    # Not all of the original's modules are the bridge's (the end of an OPT with projections).
    everywhere = {**dict.fromkeys(bridge.modules()), **dict.fromkeys(_original(bridge))}
    modules = [
        module
        for module in everywhere
        if "Norm" in type(module).__name__
        and not isinstance(module, NormalizationBridge)
        and module not in hooked
    ]
    found = [type(module).__name__ for module in modules]
    found += [type(mlp).__name__ for mlp in parts.mlps if not _has_projections(mlp)]
    if changes_attention:
        found += [problem for part in parts.attentions if (problem := _hidden(part))]
    return sorted(set(found))


def _original(bridge: TransformerBridge) -> Iterator[Module]:
    """The modules of the Hugging Face model that it was made of."""
    original = getattr(bridge, "original_model", None)
    return iter(()) if original is None else original.modules()


def _hidden(attention: Any) -> str | None:
    """What of this attention's softmax hooks do not show; None if they show all."""
    if getattr(attention.original_component, "sinks", None) is not None:
        return "attention with sinks"
    if not isinstance(attention, PLAIN_ATTENTIONS):
        return f"{type(attention).__name__} (attention in Hugging Face's own code)"
    return None


def _has_projections(mlp: Any) -> bool:
    names = ["in", "out", *(["gate"] if _is_gated(mlp) else [])]
    projections = [getattr(mlp, name, None) for name in names]
    # A symbolic one stands for linear maps that are the block's own (OPT).
    is_known = isinstance(mlp, MLPBridge) or getattr(mlp, "is_symbolic", False)
    return is_known and all(isinstance(part, LinearBridge) for part in projections)


def _is_gated(mlp: Any) -> bool:
    return "gate" in mlp.submodules


def _check_computes(what: str, shown: Tensor, ours: Tensor) -> None:
    """Raise ModelError if a part of the model is not what its rule is for."""
    # Models in float64 compute norms and softmax in float32.
    eps = max(t.finfo(dtype).eps for dtype in (shown.dtype, t.float32))
    limit = ROUNDING * eps * float(shown.detach().abs().max())
    is_same = shown.shape == ours.shape and bool(
        ((shown - ours).detach().abs() <= limit).all()
    )
    if not is_same:
        raise ModelError(
            f"{what} of this model computes something else than the backward modifier has "
            "a rule for. Run the algorithm without it."
        )


# ------------------------------------------------------------------------------- hooks


def _hook(stack: ExitStack, module: Module, hook: Hook) -> None:
    """Put the module's output through a function while gradients are recorded."""

    def forward_hook(module: Module, args: Any, out: Tensor) -> Tensor | None:
        return hook(out) if t.is_grad_enabled() else None

    stack.callback(module.register_forward_hook(forward_hook).remove)


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """The value, exactly, with the gradient of another tensor of its shape."""
    return value.detach() + (other - other.detach()).to(value.dtype)


def _scale_gradient(value: Tensor, factor: float) -> Tensor:
    return _with_gradient_of(value, factor * value)


def _freeze_norm_scale(stack: ExitStack, norm: NormalizationBridge) -> None:
    # TransformerLens runs a norm in its own code, by its Hugging Face module, or, for
    # the inputs of single heads, by that module alone. Twice does no harm.
    inner, hook = norm.original_component, _FrozenScale(norm)
    for module in (norm, inner) if inner is not None else (norm,):
        stack.callback(module.register_forward_hook(hook).remove)
    last = norm.hook_in.register_forward_hook(hook.see)
    stack.callback(last.remove)

    def put_last(module: Module, args: Any) -> None:
        norm.hook_in._forward_hooks.move_to_end(last.id)  # type: ignore[attr-defined]

    stack.callback(norm.register_forward_pre_hook(put_last).remove)
    stack.enter_context(constant_scale(norm))


class _FrozenScale:
    """A norm's hook: gradients flow as if its scale were a constant."""

    def __init__(self, norm: NormalizationBridge) -> None:
        self.norm, self.is_checked = norm, False
        self.inputs: list[Tensor] = []

    def see(self, module: Module, args: Any, out: Tensor) -> None:
        """What the norm reads after all other hooks: patches may enter there (BLOOM)."""
        self.inputs[:] = [out]

    def __call__(self, module: Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
        is_whole = module is self.norm and bool(self.inputs)
        read = self.inputs.pop() if is_whole else args[0]
        if not t.is_grad_enabled():
            return None
        x = read.to(t.promote_types(read.dtype, t.float32))
        facts = norm_facts(self.norm)
        centred = facts.centre(x)
        normed = centred / facts.scale(centred).detach() * facts.gain()
        if not self.is_checked:
            bias = facts.bias()
            whole = normed if bias is None else normed + bias
            _check_computes(type(self.norm.original_component).__name__, out, whole)
            self.is_checked = True
        return _with_gradient_of(out, normed)


def _soften_softmax(stack: ExitStack, attention: Any, temperature: float) -> None:
    """The gradient of the softmax at a temperature; halved, for queries and keys."""
    scores: list[Tensor] = []
    checked_patterns: list[bool] = []

    def soften(pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        logits = scores.pop().to(t.promote_types(pattern.dtype, t.float32))
        # -inf in a whole row (padding) has no softmax.
        logits = logits.clamp(min=t.finfo(logits.dtype).min)
        if not checked_patterns:
            _check_is_softmax(type(attention).__name__, pattern, logits)
            checked_patterns.append(True)
        soft = t.softmax(logits / temperature, dim=-1)
        return _with_gradient_of(pattern, 0.5 * temperature * soft)

    _hook(stack, attention.hook_attn_scores, scores.append)
    _hook(stack, attention.hook_pattern, soften)


def _check_is_softmax(name: str, pattern: Tensor, logits: Tensor) -> None:
    is_row = pattern.detach().sum(-1, keepdim=True) > 0  # not one of padding
    _check_computes(name, pattern * is_row, logits.softmax(-1) * is_row)


def _linearize_activation(stack: ExitStack, mlp: Any) -> None:
    """f(x) becomes x times the constant f(x) / x; a gate's product is shared in halves."""
    is_gated = _is_gated(mlp)
    before = mlp.gate if is_gated else getattr(mlp, "in")
    inputs: list[Tensor] = []

    def cut(x: Tensor) -> Tensor:
        inputs.append(x)
        return x.detach()

    def join(product: Tensor) -> Tensor:
        # The gradient of `product` itself passes only what is gated: x was cut off.
        x = inputs.pop()
        ratio = t.where(x == 0, 0.0, product / x).detach()
        linear = x * ratio
        return _with_gradient_of(
            product, 0.5 * (linear + product) if is_gated else linear
        )

    _hook(stack, before.hook_out, cut)
    _hook(stack, mlp.out.hook_in, join)
