"""What a model does on one prompt: where its heads attend, which words its nodes write for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as t
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import Identity, Linear, Module

from auto_circuit.checks import checked
from auto_circuit.explorer.data import EffectsView, SideEffects, small_indices
from auto_circuit.model_utils.model_adapter import Norm
from auto_circuit.utils.ablation_activations import record_src_outs
from auto_circuit.utils.patchable_model import PatchableModel, unpatched

Pass = tuple[Shaped[Tensor, "1 seq"], dict[str, Any]]
"""One prompt's tokens, and what else the model is called with."""

N_RAISED, N_LOWERED = 6, 4
"""How many words are kept that a source raises, and that it lowers."""


# ---------------------------------------------------------------------------- attention


@checked
def attention_patterns(
    model: PatchableModel, tokens: Shaped[Tensor, "1 seq"]
) -> dict[int, Float[Tensor, "head query key"]]:
    """Block -> where its heads attend on a whole prompt; {} if the model does not show it.

    tokens: also those that other prompts begin with, and without padding.
    """
    names = {
        name: int(name.split(".")[1])
        for name in getattr(model.wrapped_model, "hook_dict", {})
        if name.startswith("blocks.") and name.endswith(".attn.hook_pattern")
    }
    if not names:
        return {}
    with unpatched(model, grad=False):
        _, cache = model.run_with_cache(tokens, names_filter=list(names))
    return {names[name]: cache[name][0].float() for name in names if name in cache}


def as_bytes(patterns: Float[Tensor, "head query key"]) -> np.ndarray:
    """Shares from 0 to 1 as whole numbers from 0 to 255."""
    return (patterns * 255).round().clamp(0, 255).to(t.uint8).cpu().numpy()


# ---------------------------------------------------------------- direct effects on logits


@dataclass(frozen=True, eq=False)
class _Readout:
    """What turns the final residual stream into logits. norm: None if there is none."""

    stream: Module
    norm: Norm | None
    weight: Float[Tensor, "vocab d_model"]


def _readout(model: PatchableModel) -> _Readout | None:
    """None if it is not a norm of known form and a linear map."""
    # It imports TransformerLens, which takes seconds, and with a model it is there already.
    from transformer_lens.model_bridge.generalized_components import NormalizationBridge

    from auto_circuit.model_utils.transformer_lens_sites import closed_form

    unembed: Any = model.adapter.find_unembed(model.wrapped_model)
    linear = getattr(unembed, "original_component", unembed)
    norm: Any = getattr(model.wrapped_model, "ln_final", None)
    if type(linear) is not Linear or norm is None:
        return None
    if isinstance(getattr(norm, "original_component", None), Identity):
        return _Readout(norm, None, linear.weight)
    known = closed_form(norm) if isinstance(norm, NormalizationBridge) else None
    return None if known is None else _Readout(norm, known, linear.weight)


@checked
def direct_logit_effects(
    model: PatchableModel,
    tokens: Shaped[Tensor, "1 seq"],
    kwargs: dict[str, Shaped[Tensor, "..."]],
) -> Float[Tensor, "src vocab"] | None:
    """What each source adds to the logits at a prompt's last position, and by itself alone.

    Its output goes through the final norm, which divides by the scale that it has on the
    whole residual stream, and through the unembedding. The logits are the sum over all
    sources, and what biases add. None for a model whose output is no such thing.
    """
    readout = _readout(model)
    if readout is None:
        return None
    streams: list[Tensor] = []

    def keep(module: Module, args: tuple[Any, ...]) -> None:
        streams.append(args[0][0, -1])

    handle = readout.stream.register_forward_pre_hook(keep)
    try:
        written = record_src_outs(model, tokens, kwargs)[:, 0, -1]
    finally:
        handle.remove()
    with unpatched(model, grad=False):
        weight = readout.weight
        if readout.norm is not None:
            norm = readout.norm
            scale = norm.scale(norm.centre(streams[-1]))
            written = norm.centre(written) / scale * norm.gain()
        return written.to(weight.dtype) @ weight.T


@checked
def effects_view(
    effects: dict[str, Float[Tensor, "src vocab"]],
    answers: tuple[int | None, int | None],
    word: Callable[[int], str],
) -> EffectsView:
    """The words that each source writes for on both sides of a prompt.

    answers: the ids of an answer and of a wrong one, if there are such.
    """
    tops = {side: _tops(of_side) for side, of_side in effects.items()}
    ids = np.unique(np.concatenate([top.ravel() for top in tops.values()]))

    def side_effects(side: str) -> SideEffects:
        of_side, top = effects[side].float().cpu(), tops[side]
        answer, wrong = (
            None if idx is None else of_side[:, idx].numpy() for idx in answers
        )
        return SideEffects(
            answer=answer,
            wrong_answer=wrong,
            words=small_indices(np.searchsorted(ids, top), len(ids)),
            values=of_side.gather(1, t.from_numpy(top)).numpy(),
        )

    n_raised = min(N_RAISED, effects["clean"].shape[1])
    return EffectsView(
        words=tuple(word(int(idx)) for idx in ids),
        n_raised=n_raised,
        clean=side_effects("clean"),
        corrupt=side_effects("corrupt"),
    )


def _tops(effects: Float[Tensor, "src vocab"]) -> np.ndarray:
    """The words that are raised most, then those that are lowered most, most first."""
    n_words = effects.shape[1]
    n_raised = min(N_RAISED, n_words)
    n_lowered = min(N_LOWERED, n_words - n_raised)
    raised = effects.topk(n_raised).indices
    lowered = effects.topk(n_lowered, largest=False).indices
    return t.cat([raised, lowered], dim=1).cpu().numpy()
