"""Hard concrete gates: random masks in [0, 1] with exact 0s and 1s, from logits."""

from __future__ import annotations

import math

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.errors import GraphError
from auto_circuit.precision import at_least_float32

HARD_CONCRETE_LEFT = -0.1
HARD_CONCRETE_RIGHT = 1.1
HARD_CONCRETE_TEMP = 2 / 3
_MIN_NOISE = 1e-4


@checked
def sample_hard_concrete(
    mask: Float[Tensor, "*mask"],
    batch_size: int,
    mask_expanded: bool = False,
    generator: t.Generator | None = None,
    rows: slice | None = None,
) -> Float[Tensor, "row *edges"]:
    """Random masks in [0, 1] from mask logits, an independent one per batch element.

    The hard concrete distribution: a binary concrete (temperature 2/3) stretched to
    [-0.1, 1.1] and clamped, so that exact 0s and 1s have positive probability. 0: the
    edge is as it is, 1: it is patched.

    mask_expanded: does `mask` have the leading batch dimension already? Then the result
        has its shape, else `[batch_size, *mask.shape]`.
    generator: where the randomness comes from; the global generator if None.
    rows: the batch elements that are wanted; the randomness is that of the whole batch.

    Raises GraphError if an expanded mask has another batch size.
    """
    if mask_expanded and (mask.ndim == 0 or mask.shape[0] != batch_size):
        raise GraphError(
            f"A mask of shape {tuple(mask.shape)} was called expanded, but the batch "
            f"size is {batch_size}. Its first dimension must be the batch's."
        )
    shape = mask.shape if mask_expanded else (batch_size, *mask.shape)
    logits = at_least_float32(mask)
    noise = t.rand(shape, generator=generator, device=mask.device, dtype=logits.dtype)
    if rows is not None:
        noise = noise[rows]
        logits = logits[rows] if mask_expanded else logits
    noise = noise.clamp(_MIN_NOISE, 1 - _MIN_NOISE)
    concrete = t.sigmoid((t.logit(noise) + logits) / HARD_CONCRETE_TEMP)
    return _stretch(concrete).to(mask.dtype)


@checked
def hard_concrete_value(mask: Float[Tensor, "*mask"]) -> Float[Tensor, "*mask"]:
    """The mask without randomness, in [0, 1]: the stretched sigmoid of the logits."""
    return _stretch(t.sigmoid(mask))


@checked
def hard_concrete_expected_l0(mask: Float[Tensor, "*mask"]) -> Float[Tensor, "*mask"]:
    """The probability that a sample is not 0, for every entry.

    Its sum is the expected number of edges that are patched at all. It has no noise,
    unlike the sum of a sample, which auto-circuit penalised.
    """
    ratio = -HARD_CONCRETE_LEFT / HARD_CONCRETE_RIGHT
    return t.sigmoid(mask - HARD_CONCRETE_TEMP * math.log(ratio))


def _stretch(concrete: Tensor) -> Tensor:
    width = HARD_CONCRETE_RIGHT - HARD_CONCRETE_LEFT
    return (concrete * width + HARD_CONCRETE_LEFT).clamp(0.0, 1.0)
