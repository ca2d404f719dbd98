"""In which precision numbers are added up, kept and compared."""

from __future__ import annotations

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked

ROUNDING = 64 * t.finfo(t.float32).eps
"""Numbers that differ by less, relatively, are equal but for rounding."""


def mask_dtype(model_dtype: t.dtype) -> t.dtype:
    """The dtype of masks and scores: the model's, but float32 for half precision.

    Their gradients are added up over tokens, prompts and steps.
    """
    return t.promote_types(model_dtype, t.float32)


@checked
def at_least_float32(vals: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The values, half precision turned into float32."""
    is_half = vals.dtype in (t.float16, t.bfloat16)
    return vals.float() if is_half else vals
